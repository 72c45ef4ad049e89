"""LangChain: a retriever that reranks, and a step for LCEL chains.

They are in a module apart from the adapter, because LangChain's runnables take twice as long to load as all the rest.
"""

import asyncio
from collections.abc import Mapping
from contextlib import AbstractContextManager
from contextvars import Context
from typing import TYPE_CHECKING, Annotated, Any, Final

from langchain_core.callbacks import AsyncCallbackManagerForRetrieverRun, CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import Runnable, RunnableConfig, RunnableSerializable, ensure_config
from langchain_core.runnables.config import set_config_context
from pydantic import BaseModel, ConfigDict, SecretStr, SkipValidation, create_model

from regolo_rerank.errors import InvalidInputError
from regolo_rerank.langchain import RegoloRerank
from regolo_rerank.options import explained

__all__ = ["RerankRetriever", "RerankStep"]

_CALL_OPTIONS: Final = ("top_n", "model", "instruction", "score_threshold", "total_timeout", "extra_body", "api_key")


class _CallOptions(BaseModel):
    """Options of one call, as fields that `configurable_fields` can name. None uses the reranker's option."""

    top_n: Annotated[int | None, SkipValidation] = None
    model: Annotated[str | None, SkipValidation] = None
    instruction: Annotated[str | None, SkipValidation] = None
    score_threshold: Annotated[float | None, SkipValidation] = None
    total_timeout: Annotated[float | None, SkipValidation] = None
    extra_body: Annotated[dict[str, Any] | None, SkipValidation] = None
    api_key: SecretStr | None = None

    def __getstate__(self) -> dict[Any, Any]:
        """Pickle everything but the key."""
        state = super().__getstate__()
        return {**state, "__dict__": {**state["__dict__"], "api_key": None}}

    def _with_call_options(self, reranker: RegoloRerank, arguments: Mapping[str, Any]) -> RegoloRerank:
        """Return the reranker with the options of one call."""
        if unknown := arguments.keys() - set(_CALL_OPTIONS):
            raise InvalidInputError(
                f"{', '.join(sorted(unknown))}: not an option of one call. Those are {', '.join(_CALL_OPTIONS)}. Set "
                f"others with with_options()"
            )
        configured = {name: getattr(self, name) for name in _CALL_OPTIONS}
        changes = {name: value for name, value in [*configured.items(), *arguments.items()] if value is not None}
        return reranker.with_options(**changes) if changes else reranker


class RerankStep(_CallOptions, RunnableSerializable[Any, list[Document]]):
    """A reranker as a step of an LCEL chain. See `RegoloRerank.as_runnable`."""

    reranker: RegoloRerank
    query_key: str
    documents_key: str

    def __repr__(self) -> str:
        return f"{type(self.reranker).__name__}().as_runnable()"

    def get_name(self, suffix: str | None = None, *, name: str | None = None) -> str:
        """Return the name of the reranker's class."""
        return super().get_name(suffix, name=name or self.name or type(self.reranker).__name__)

    def get_input_schema(self, config: RunnableConfig | None = None) -> type[BaseModel]:
        """Return a model of `{"query": ..., "documents": ...}`."""
        del config
        fields: dict[str, Any] = {self.query_key: (str, ...), self.documents_key: (list[Document], ...)}
        return create_model(self.get_name("Input"), **fields)

    def invoke(
        self,
        input: Any,  # noqa: A002 - LangChain's name
        config: RunnableConfig | None = None,
        **kwargs: Any,
    ) -> list[Document]:
        """Rerank `{"query": ..., "documents": ...}`, with options of one call."""
        documents, query = self._read(input)
        reranker = self._with_call_options(self.reranker, kwargs)
        with set_config_context(ensure_config(config)) as context:
            return context.run(reranker.compress_documents, documents, query)

    async def ainvoke(
        self,
        input: Any,  # noqa: A002 - LangChain's name
        config: RunnableConfig | None = None,
        **kwargs: Any,
    ) -> list[Document]:
        """Rerank as `invoke` does, without blocking the event loop."""
        documents, query = self._read(input)
        reranker = self._with_call_options(self.reranker, kwargs)
        with set_config_context(ensure_config(config)) as context:
            return await asyncio.create_task(reranker.acompress_documents(documents, query), context=context)

    def _read(self, candidates: Any) -> tuple[Any, Any]:
        if isinstance(candidates, dict) and candidates.keys() >= {self.query_key, self.documents_key}:
            return candidates[self.documents_key], candidates[self.query_key]
        found = (
            f"the keys {', '.join(map(repr, candidates))}"
            if isinstance(candidates, dict)
            else type(candidates).__name__
        )
        raise InvalidInputError(
            f"input: must be {{{self.query_key!r}: ..., {self.documents_key!r}: ...}}, got {found}. For other keys use "
            f"as_runnable(query_key=..., documents_key=...)"
        )


class RerankRetriever(_CallOptions, BaseRetriever):
    """Retriever that reranks the documents of another one.

    Retrieval and reranking are child runs in a trace. `invoke` and `ainvoke` accept `k` and the options of one call:
    `top_n`, `model`, `instruction`, `score_threshold`, `total_timeout`, `extra_body` and `api_key`. So do `bind` and
    `configurable_fields`. Pass a key as a `SecretStr`, for the reasons given at `RegoloRerank.as_runnable`.

    Args:
        base_retriever: A retriever, or any runnable from a query to documents. It should return more documents than
            `top_n`, for example 50.
        reranker: The reranker.
        k: Number of documents to keep, the same as `top_n`. None uses the reranker's `top_n`.

    Raises:
        InvalidInputError: An argument is unknown or has a wrong type.

    Examples:
        >>> from langchain_core.runnables import RunnableLambda
        >>> found = [Document("Rome is in Italy."), Document("Beijing is the capital of China.")]
        >>> reranker = RegoloRerank(base_url="local://", top_n=5)
        >>> retriever = RerankRetriever(base_retriever=RunnableLambda(lambda query: found), reranker=reranker)
        >>> retriever.invoke("capital of China", k=1)[0].page_content
        'Beijing is the capital of China.'
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid", hide_input_in_errors=True)

    base_retriever: Runnable[str, Any]
    reranker: RegoloRerank
    k: Annotated[int | None, SkipValidation] = None

    if not TYPE_CHECKING:  # type checkers read the parameters from the fields

        def __init__(self, **fields: Any) -> None:
            explained(type(self), super().__init__, **fields)

    def invoke(
        self,
        input: str,  # noqa: A002 - LangChain's name
        config: RunnableConfig | None = None,
        **kwargs: Any,
    ) -> list[Document]:
        """Return the best documents for a query, with options of one call."""
        config = ensure_config(config)
        with _configurable(config) as context:
            return context.run(super().invoke, input, config, **kwargs)

    async def ainvoke(
        self,
        input: str,  # noqa: A002 - LangChain's name
        config: RunnableConfig | None = None,
        **kwargs: Any,
    ) -> list[Document]:
        """Return the documents as `invoke` does, without blocking the event loop."""
        config = ensure_config(config)
        with _configurable(config) as context:
            return await asyncio.create_task(super().ainvoke(input, config, **kwargs), context=context)

    def _get_relevant_documents(
        self, query: str, *, run_manager: CallbackManagerForRetrieverRun, **kwargs: Any
    ) -> list[Document]:
        reranker = self._reranker_for(kwargs)
        documents = self.base_retriever.invoke(query, {"callbacks": run_manager.get_child()})
        return reranker.compress_documents(documents, query, callbacks=run_manager.get_child())

    async def _aget_relevant_documents(
        self, query: str, *, run_manager: AsyncCallbackManagerForRetrieverRun, **kwargs: Any
    ) -> list[Document]:
        reranker = self._reranker_for(kwargs)
        documents = await self.base_retriever.ainvoke(query, {"callbacks": run_manager.get_child()})
        return await reranker.acompress_documents(documents, query, callbacks=run_manager.get_child())

    def _reranker_for(self, arguments: dict[str, Any]) -> RegoloRerank:
        own = _replace_k({"k": self.k, "top_n": self.top_n})
        return self._with_call_options(self.reranker, own | _replace_k(arguments))


def _configurable(config: RunnableConfig) -> AbstractContextManager[Context]:
    """Return a context in which the base retriever finds the configurable fields of a call."""
    return set_config_context({"configurable": config.get("configurable", {})})


def _replace_k(arguments: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of one level, with `top_n` in place of `k`."""
    given = {name: value for name, value in arguments.items() if value is not None}
    if "k" in given:
        if "top_n" in given:
            raise InvalidInputError("k: the same as top_n. Pass one of them")
        given["top_n"] = given.pop("k")
    return given
