"""LangChain: a document compressor that reranks, a retriever around it, and a step for LCEL chains."""

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypedDict, Unpack

from regolo_rerank._version import install_hint

try:
    from langchain_core import __version__ as langchain_version
    from langchain_core.callbacks import AsyncCallbackManagerForChainRun, CallbackManagerForChainRun, Callbacks
    from langchain_core.documents import BaseDocumentCompressor, Document
    from langchain_core.runnables.config import (
        RunnableConfig,
        ensure_config,
        get_async_callback_manager_for_config,
        get_callback_manager_for_config,
    )
except ImportError as error:
    raise ImportError(f"regolo_rerank.langchain needs LangChain: {install_hint('langchain')}") from error

from pydantic import SecretStr, model_validator
from pydantic_core import PydanticSerializationError

from regolo_rerank import _openinference
from regolo_rerank._adapters import AdapterOptions, Outcome
from regolo_rerank._inputs import check_documents
from regolo_rerank.client import RankOptions
from regolo_rerank.errors import InvalidInputError
from regolo_rerank.results import RerankResponse

if TYPE_CHECKING:
    from regolo_rerank._langchain_runnables import RerankRetriever, RerankStep

__all__ = ["RegoloRerank", "RerankRetriever"]


def __getattr__(name: str) -> Any:
    if name != "RerankRetriever":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from regolo_rerank._langchain_runnables import RerankRetriever

    return RerankRetriever


class RankedIndex(TypedDict):
    """One document of a ranking, as LangChain's other rerankers return it.

    Attributes:
        index: The document's position in the caller's list, from 0.
        relevance_score: Relevance to the query, higher is better.
    """

    index: int
    relevance_score: float


class RegoloRerank(AdapterOptions, BaseDocumentCompressor):
    """Document compressor that reranks documents with Regolo.ai's Rerank API.

    It returns copies of the best documents with id, metadata and a `relevance_score` in the metadata. The caller's
    documents are never modified.

    Args:
        api_key: API key, also accepted as `regolo_api_key`. None reads the environment variable `REGOLO_API_KEY`.
        **options: `metadata_fields`, `on_error` and `score_metadata_key`, and the options of `RegoloClient`. The
            default of `top_n` is 5.

    Raises:
        InvalidInputError: An option is unknown or has a wrong value.

    Examples:
        >>> reranker = RegoloRerank(base_url="local://", top_n=1)
        >>> documents = [Document("Rome is in Italy."), Document("Beijing is the capital of China.")]
        >>> best = reranker.compress_documents(documents, "capital of China")[0]
        >>> best.page_content, list(best.metadata)
        ('Beijing is the capital of China.', ['relevance_score'])
    """

    metadata_fields: tuple[str, ...] = ()
    """Metadata keys to score with the text, as `key: value` lines in front of it. Missing and empty values are left
    out."""

    user_agent: ClassVar[str] = f"{AdapterOptions.user_agent} langchain-core/{langchain_version}"

    if TYPE_CHECKING:  # an argument only, which becomes api_key
        regolo_api_key: SecretStr | str | None = None

    @model_validator(mode="before")
    @classmethod
    def _accept_regolo_api_key(cls, options: Any) -> Any:
        if isinstance(options, dict) and "regolo_api_key" in options:
            options = dict(options)
            key = options.pop("regolo_api_key")
            if options.get("api_key") is not None:
                raise ValueError("api_key and regolo_api_key are the same option. Pass one of them")
            options["api_key"] = key
        return options

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """Return the `top_n` documents that are most relevant to a query, best first.

        The call is a separate run in a trace, with scores, usage and request ids.

        Args:
            documents: N documents.
            query: The query, not blank.
            callbacks: Handlers, or the manager of a parent run. None uses those of the surrounding chain.

        Returns:
            At most min(N, top_n) copies.

        Raises:
            RegoloError: As in `RegoloClient.rerank`, unless `on_error` covers the error.
        """
        documents, config = _require_documents(documents), _find_config(callbacks)
        manager = get_callback_manager_for_config(config)
        if not manager.handlers:
            return self._attach_scores(documents, self._rerank(query, documents, self._text_of))
        inputs = self._trace_inputs(documents, query)
        manager.add_metadata({"ls_provider": "regolo", "ls_model_name": self.model}, inherit=False)
        run = manager.on_chain_start(None, inputs, name=self._run_name(config), run_id=config.get("run_id"))
        _openinference.show_inputs(run, **inputs)
        try:
            outcome = self._rerank(query, documents, self._text_of)
            kept = self._attach_scores(documents, outcome)
        except BaseException as error:
            run.on_chain_error(error)
            raise
        run.on_chain_end(_trace_outputs(run, kept, outcome))
        return kept

    async def acompress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """Return the documents as `compress_documents` does, without blocking the event loop."""
        documents, config = _require_documents(documents), _find_config(callbacks)
        manager = get_async_callback_manager_for_config(config)
        if not manager.handlers:
            return self._attach_scores(documents, await self._arerank(query, documents, self._text_of))
        inputs = self._trace_inputs(documents, query)
        manager.add_metadata({"ls_provider": "regolo", "ls_model_name": self.model}, inherit=False)
        run = await manager.on_chain_start(None, inputs, name=self._run_name(config), run_id=config.get("run_id"))
        _openinference.show_inputs(run, **inputs)
        try:
            outcome = await self._arerank(query, documents, self._text_of)
            kept = self._attach_scores(documents, outcome)
        except BaseException as error:
            await run.on_chain_error(error)
            raise
        await run.on_chain_end(_trace_outputs(run, kept, outcome))
        return kept

    def rerank(
        self,
        documents: Iterable[str | Document | dict[str, Any]],
        query: str,
        **options: Unpack[RankOptions],
    ) -> list[RankedIndex]:
        """Rank strings, documents or dicts, as LangChain's other rerankers do.

        `on_error` does not apply. An argument of None uses the option.

        Args:
            documents: N strings, documents, or dicts with a `text`.
            query: The query, not blank.
            **options: `top_n`, `model`, `instruction`, `score_threshold`, `total_timeout` and `extra_body`, as in
                `RegoloClient.rerank`.

        Returns:
            At most min(N, top_n) dicts with `index` and `relevance_score`, best first.

        Raises:
            RegoloError: As in `RegoloClient.rerank`.
        """
        response = self._client_for_call().rerank(query, documents, text=self._text_of_any, **options)
        return _indices_of(response)

    async def arerank(
        self,
        documents: Iterable[str | Document | dict[str, Any]],
        query: str,
        **options: Unpack[RankOptions],
    ) -> list[RankedIndex]:
        """Rank as `rerank` does, without blocking the event loop."""
        response = await self._client_for_call().arerank(query, documents, text=self._text_of_any, **options)
        return _indices_of(response)

    def as_runnable(self, *, query_key: str = "query", documents_key: str = "documents") -> "RerankStep":
        """Return this reranker as a step of an LCEL chain: `{"query": ..., "documents": ...}` to documents.

        At `invoke`, by `bind` and as configurable fields it accepts the options of one call: `top_n`, `model`,
        `instruction`, `score_threshold`, `total_timeout`, `extra_body` and `api_key`.

        Pass a key as a `SecretStr`. LangChain shows bound strings in a repr, and LangSmith receives configurable
        strings as metadata, unless the field's id is `api_key`.

        Args:
            query_key: The key of the query in the input.
            documents_key: The key of the documents in the input.

        Examples:
            >>> step = RegoloRerank(base_url="local://").as_runnable()
            >>> documents = [Document("Rome is in Italy."), Document("Beijing is the capital of China.")]
            >>> step.invoke({"query": "capital of China", "documents": documents}, top_n=1)[0].page_content
            'Beijing is the capital of China.'
        """
        from regolo_rerank._langchain_runnables import RerankStep

        return RerankStep(reranker=self, query_key=query_key, documents_key=documents_key)

    def _attach_scores(self, documents: list[Document], outcome: Outcome) -> list[Document]:
        """Return copies of the ranked documents with their scores, or after a fallback the first ones without."""
        if outcome.response is None:
            return [_copy(document, self._metadata(document.metadata, None)) for document in documents[: self.top_n]]
        results = outcome.response.results
        return [_copy(result.document, self._metadata(result.document.metadata, result)) for result in results]

    def _text_of(self, document: Document) -> str:
        if not self.metadata_fields:
            return document.page_content
        values = ((key, _write_value(document.metadata.get(key))) for key in self.metadata_fields)
        return "\n".join([*(f"{key}: {value}" for key, value in values if value), document.page_content])

    def _text_of_any(self, document: str | Document | dict[str, Any]) -> Any:
        if isinstance(document, Document):
            return self._text_of(document)
        return document.get("text") if isinstance(document, dict) else document

    def _run_name(self, config: RunnableConfig) -> str:
        return config.get("run_name") or type(self).__name__

    def _trace_inputs(self, documents: list[Document], query: str) -> dict[str, Any]:
        # A handler may modify its list during the call.
        return {"query": query, "documents": list(documents), "model": self.model, "top_n": self.top_n}


def _indices_of(response: RerankResponse[Any]) -> list[RankedIndex]:
    return [RankedIndex(index=result.index, relevance_score=result.relevance_score) for result in response]


def _require_documents(documents: Sequence[Document]) -> list[Document]:
    if isinstance(documents, Document):
        raise InvalidInputError("documents: must be a list, got Document. Pass [document]")
    listed = check_documents(documents)
    for index, document in enumerate(listed):
        if not isinstance(document, Document):
            raise InvalidInputError(
                f"documents[{index}]: must be a Document, got {type(document).__name__}. Pass "
                f"Document(page_content=...), or call rerank(documents, query), which accepts strings"
            )
    return listed


def _find_config(callbacks: Callbacks | None) -> RunnableConfig:
    """Return the config with the given callbacks, or that of the surrounding chain."""
    return ensure_config() if callbacks is None else {"callbacks": callbacks}


def _copy(document: Document, metadata: dict[str, Any]) -> Document:
    """Return a copy with other metadata, as a plain `Document` if the caller's class cannot be written as JSON.

    LangChain's transformers return such classes, with arrays as fields, and a trace or a cache could not store them.
    """
    copy = document.model_copy(update={"metadata": metadata})
    if type(document) is not Document:
        try:
            copy.model_dump_json()
        except (PydanticSerializationError, TypeError, ValueError):
            return Document(page_content=document.page_content, id=document.id, metadata=metadata)
    return copy


def _write_value(value: Any) -> str:
    """Return a metadata value as a person would write it, or "" for a missing or empty one."""
    if isinstance(value, list | tuple | set | frozenset):
        return ", ".join(filter(None, map(_write_value, value)))
    if isinstance(value, float):
        return "" if math.isnan(value) else str(int(value)) if value.is_integer() else str(value)
    return "" if value is None else str(value).strip()


def _trace_outputs(
    run: CallbackManagerForChainRun | AsyncCallbackManagerForChainRun, kept: list[Document], outcome: Outcome
) -> dict[str, Any]:
    """Return the outputs of a run for its trace."""
    scores = None if outcome.response is None else [result.relevance_score for result in outcome.response.results]
    outputs = {"documents": list(kept), "scores": scores, **outcome.report}
    _openinference.show_outputs(run, **outputs)
    return outputs
