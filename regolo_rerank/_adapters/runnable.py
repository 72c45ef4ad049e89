"""The runnable form of LangChain's reranker."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from langchain_core.documents import Document
from langchain_core.runnables import Runnable, RunnableConfig, ensure_config
from pydantic import BaseModel, create_model

from regolo_rerank.errors import InvalidInputError

__all__ = ["Step"]


class Step(Runnable[Any, list[Document]]):
    """A reranker as a step of an LCEL chain."""

    def __init__(
        self,
        name: str,
        rerank: Callable[..., list[Document]],
        arerank: Callable[..., Awaitable[list[Document]]],
    ) -> None:
        self.name = name
        self._rerank = rerank
        self._arerank = arerank

    def __repr__(self) -> str:
        return f"{self.name}().as_runnable()"

    def get_input_schema(self, config: RunnableConfig | None = None) -> type[BaseModel]:
        """Return a model of `{"query": ..., "documents": ...}`."""
        del config
        return create_model(self.get_name("Input"), query=(str, ...), documents=(list[Document], ...))

    def invoke(
        self,
        input: Any,  # noqa: A002 - the name that LangChain gives it
        config: RunnableConfig | None = None,
        **kwargs: Any,
    ) -> list[Document]:
        """Rerank `{"query": ..., "documents": ...}` in a run of its own; `instruction` is the call's task."""
        return self._rerank(*_read(input, kwargs), ensure_config(config), **kwargs)

    async def ainvoke(
        self,
        input: Any,  # noqa: A002 - the name that LangChain gives it
        config: RunnableConfig | None = None,
        **kwargs: Any,
    ) -> list[Document]:
        """Do the same without blocking the event loop."""
        return await self._arerank(*_read(input, kwargs), ensure_config(config), **kwargs)


def _read(candidates: Any, arguments: dict[str, Any]) -> tuple[Sequence[Document], str]:
    if others := arguments.keys() - {"instruction"}:
        raise InvalidInputError(
            f"{', '.join(sorted(others))}: the runnable takes no argument but instruction; set options on the reranker"
        )
    if not isinstance(candidates, dict) or not candidates.keys() >= {"query", "documents"}:
        raise InvalidInputError(
            f"the runnable takes {{'query': ..., 'documents': ...}}, got {type(candidates).__name__}"
        )
    return candidates["documents"], candidates["query"]
