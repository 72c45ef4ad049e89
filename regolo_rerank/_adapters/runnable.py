"""The runnable form of LangChain's reranker."""

from collections.abc import Awaitable, Callable
from typing import Annotated, Any, Final

from langchain_core.documents import Document
from langchain_core.runnables import RunnableConfig, RunnableSerializable, ensure_config
from pydantic import BaseModel, SkipValidation, create_model

from regolo_rerank.errors import InvalidInputError, ends_here

__all__ = ["Step"]

_ARGUMENTS: Final = ("top_n", "model", "instruction", "score_threshold", "extra_body")
"""What a call takes besides query and documents."""


class Step(RunnableSerializable[Any, list[Document]]):
    """A reranker as a step of an LCEL chain.

    The fields that are arguments of a call, None for the reranker's own option, are what `configurable_fields` can
    name; a call checks them.
    """

    rerank: Callable[..., list[Document]]
    arerank: Callable[..., Awaitable[list[Document]]]
    query_key: str
    documents_key: str
    top_n: Annotated[int | None, SkipValidation] = None
    model: Annotated[str | None, SkipValidation] = None
    instruction: Annotated[str | None, SkipValidation] = None
    score_threshold: Annotated[float | None, SkipValidation] = None
    extra_body: Annotated[dict[str, Any] | None, SkipValidation] = None

    def __repr__(self) -> str:
        return f"{self.name}().as_runnable()"

    def get_input_schema(self, config: RunnableConfig | None = None) -> type[BaseModel]:
        """Return a model of `{"query": ..., "documents": ...}`."""
        del config
        fields: dict[str, Any] = {self.query_key: (str, ...), self.documents_key: (list[Document], ...)}
        return create_model(self.get_name("Input"), **fields)

    def invoke(
        self,
        input: Any,  # noqa: A002 - the name that LangChain gives it
        config: RunnableConfig | None = None,
        **kwargs: Any,
    ) -> list[Document]:
        """Rerank `{"query": ..., "documents": ...}` in a run of its own, with the arguments of one call."""
        with ends_here:
            return self.rerank(*self._read(input), ensure_config(config), **self._arguments(kwargs))

    async def ainvoke(
        self,
        input: Any,  # noqa: A002 - the name that LangChain gives it
        config: RunnableConfig | None = None,
        **kwargs: Any,
    ) -> list[Document]:
        """Do the same without blocking the event loop."""
        with ends_here:
            return await self.arerank(*self._read(input), ensure_config(config), **self._arguments(kwargs))

    def _read(self, candidates: Any) -> tuple[Any, Any]:
        if isinstance(candidates, dict) and candidates.keys() >= {self.query_key, self.documents_key}:
            return candidates[self.documents_key], candidates[self.query_key]
        keys = ", ".join(map(repr, candidates)) if isinstance(candidates, dict) else ""
        got = f"the keys {keys}" if keys else type(candidates).__name__
        raise InvalidInputError(
            f"the runnable takes {{{self.query_key!r}: ..., {self.documents_key!r}: ...}}, got {got}; "
            f"as_runnable(query_key=..., documents_key=...) takes others"
        )

    def _arguments(self, given: dict[str, Any]) -> dict[str, Any]:
        if unknown := given.keys() - set(_ARGUMENTS):
            raise InvalidInputError(
                f"{', '.join(sorted(unknown))}: no argument of a call, which are {', '.join(_ARGUMENTS)}; "
                f"set other options on the reranker"
            )
        return {name: getattr(self, name) for name in _ARGUMENTS} | {
            name: value for name, value in given.items() if value is not None
        }
