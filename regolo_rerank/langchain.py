"""LangChain: a document compressor that reranks, for `ContextualCompressionRetriever` and for LCEL chains."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypedDict

try:
    from langchain_core import __version__ as langchain_version
    from langchain_core.callbacks import AsyncCallbackManager, CallbackManager, Callbacks
    from langchain_core.documents import BaseDocumentCompressor, Document
    from langchain_core.runnables import Runnable, RunnableLambda
    from langchain_core.runnables.config import ensure_config
except ImportError as error:
    raise ImportError('regolo_rerank.langchain needs LangChain: pip install "regolo_rerank[langchain]"') from error

from pydantic import SecretStr, model_validator

from regolo_rerank.adapter import AdapterOptions
from regolo_rerank.errors import InvalidInputError, RegoloError
from regolo_rerank.ranking import RerankResponse, checked_documents

__all__ = ["RegoloRerank"]


class RankedIndex(TypedDict):
    """One document of a ranking, in the convention of LangChain's rerankers.

    Attributes:
        index: The document's place in the caller's list, from 0.
        relevance_score: How relevant it is; higher is better.
    """

    index: int
    relevance_score: float


class Candidates(TypedDict):
    """What the runnable form takes.

    Attributes:
        query: What was searched; not blank.
        documents: N documents.
    """

    query: str
    documents: Sequence[Document]


class RegoloRerank(AdapterOptions, BaseDocumentCompressor):
    """Reranks documents with Regolo.ai's Rerank API.

    The documents that are kept come back as copies, with their id and metadata, and with `relevance_score` added to
    the metadata; the caller's own are never changed.

    Args:
        api_key: The key, also as `regolo_api_key`; without it, the environment's `REGOLO_API_KEY` is used.
        **options: Any option, by name: those below, of `AdapterOptions` and of `Options`.

    Raises:
        pydantic.ValidationError: An option is unknown or has a wrong value; the message names it.

    Example:
        >>> reranker = RegoloRerank(base_url="local://", top_n=1)
        >>> documents = [Document("Rome is in Italy."), Document("Beijing is the capital of China.")]
        >>> reranker.compress_documents(documents, "capital of China")
        [Document(metadata={'relevance_score': 1.0}, page_content='Beijing is the capital of China.')]
    """

    metadata_fields: tuple[str, ...] = ()
    """Metadata keys that are put in front of the text as `key: value` lines for scoring, where a document has them."""

    if TYPE_CHECKING:  # an argument only, which becomes api_key
        regolo_api_key: SecretStr | str | None = None

    framework: ClassVar[str] = f"langchain-core/{langchain_version}"

    @model_validator(mode="before")
    @classmethod
    def _accept_regolo_api_key(cls, options: Any) -> Any:
        if isinstance(options, dict) and "regolo_api_key" in options:
            options = dict(options)
            key = options.pop("regolo_api_key")
            if options.get("api_key") is not None:
                raise ValueError("api_key and regolo_api_key are the same option; pass one of them")
            options["api_key"] = key
        return options

    def compress_documents(
        self,
        documents: Sequence[Document],
        query: str,
        callbacks: Callbacks | None = None,
    ) -> list[Document]:
        """Return the `top_n` documents that are most relevant to a query, the best first.

        Args:
            documents: N documents.
            query: What was searched; not blank.
            callbacks: Handlers, or a parent run's manager; without them the surrounding chain's are used.

        Returns:
            min(N, top_n) copies at most, with `relevance_score` in their metadata.

        Raises:
            RegoloError: See `RegoloClient.rerank`; with `on_error="return_input"` a failure of the service is a
                `RerankFallbackWarning` instead.
        """
        documents = checked_documents(documents, Document)
        manager = CallbackManager.configure(_inherited(callbacks))
        run = manager.on_chain_start(None, self._inputs(documents, query), name=type(self).__name__)
        try:
            ranked = self._compress(documents, query)
        except BaseException as error:
            run.on_chain_error(error)
            raise
        run.on_chain_end({"documents": ranked})
        return ranked

    async def acompress_documents(
        self,
        documents: Sequence[Document],
        query: str,
        callbacks: Callbacks | None = None,
    ) -> list[Document]:
        """Return what `compress_documents` does, without blocking the event loop."""
        documents = checked_documents(documents, Document)
        manager = AsyncCallbackManager.configure(_inherited(callbacks))
        run = await manager.on_chain_start(None, self._inputs(documents, query), name=type(self).__name__)
        try:
            ranked = await self._acompress(documents, query)
        except BaseException as error:
            await run.on_chain_error(error)
            raise
        await run.on_chain_end({"documents": ranked})
        return ranked

    def rerank(
        self,
        documents: Iterable[str | Document | dict[str, Any]],
        query: str,
        *,
        model: str | None = None,
        top_n: int | None = None,
    ) -> list[RankedIndex]:
        """Rank documents of any kind, as LangChain's other rerankers do.

        Args:
            documents: N strings, documents, or dicts with their text in `text`.
            query: What was searched; not blank.
            model: Name of the reranking model; None takes the option.
            top_n: Results kept; None takes the option.

        Returns:
            min(N, top_n) dicts at most, the best first, with `index` into `documents` and `relevance_score`.

        Raises:
            RegoloError: See `RegoloClient.rerank`; `on_error` does not apply, since indices need scores.
        """
        return _as_dicts(self._rank(query, self._texts(documents), model=model, top_n=top_n))

    async def arerank(
        self,
        documents: Iterable[str | Document | dict[str, Any]],
        query: str,
        *,
        model: str | None = None,
        top_n: int | None = None,
    ) -> list[RankedIndex]:
        """Rank as `rerank` does, without blocking the event loop."""
        return _as_dicts(await self._arank(query, self._texts(documents), model=model, top_n=top_n))

    def as_runnable(self) -> Runnable[Candidates, list[Document]]:
        """Return this reranker as a step of an LCEL chain.

        It takes `{"query": ..., "documents": ...}` and gives the documents that are kept; options that are assigned
        later count for it too. It raises what `compress_documents` raises, and `InvalidInputError` for other inputs.

        Example:
            >>> step = RegoloRerank(base_url="local://").as_runnable()
            >>> step.invoke({"query": "pasta", "documents": [Document("Pasta al pesto")]})[0].page_content
            'Pasta al pesto'
        """

        def compress(candidates: Candidates) -> list[Document]:
            return self._compress(*_read(candidates))

        async def acompress(candidates: Candidates) -> list[Document]:
            return await self._acompress(*_read(candidates))

        return RunnableLambda(compress, acompress, name=type(self).__name__)

    def _compress(self, documents: list[Document], query: str) -> list[Document]:
        try:
            response = self._rank(query, self._contents(documents))
        except RegoloError as error:
            return self._fall_back(error, documents)
        return _scored(documents, response)

    async def _acompress(self, documents: list[Document], query: str) -> list[Document]:
        try:
            response = await self._arank(query, self._contents(documents))
        except RegoloError as error:
            return self._fall_back(error, documents)
        return _scored(documents, response)

    def _inputs(self, documents: list[Document], query: str) -> dict[str, Any]:
        return {"query": query, "documents": documents, "model": self.model, "top_n": self.top_n}

    def _contents(self, documents: list[Document]) -> list[str]:
        if not self.metadata_fields:
            return [document.page_content for document in documents]
        return [self._content(document) for document in documents]

    def _texts(self, documents: Iterable[str | Document | dict[str, Any]]) -> list[str]:
        return [
            self._text(index, document)
            for index, document in enumerate(checked_documents(documents, str, Document, dict))
        ]

    def _text(self, index: int, document: str | Document | dict[str, Any]) -> str:
        if isinstance(document, str):
            return document
        if isinstance(document, dict):
            text = document.get("text")
            if not isinstance(text, str):
                raise InvalidInputError(
                    f"documents[{index}]: a dict's text is a string in 'text', got {type(text).__name__}"
                )
            return text
        return self._content(document)

    def _content(self, document: Document) -> str:
        lines = [f"{key}: {document.metadata[key]}" for key in self.metadata_fields if key in document.metadata]
        return "\n".join([*lines, document.page_content]) if lines else document.page_content


def _inherited(callbacks: Callbacks | None) -> Callbacks:
    return ensure_config().get("callbacks") if callbacks is None else callbacks


def _read(candidates: Any) -> tuple[list[Document], str]:
    if not isinstance(candidates, dict) or not candidates.keys() >= {"query", "documents"}:
        raise InvalidInputError(
            f"the runnable takes {{'query': ..., 'documents': ...}}, got {type(candidates).__name__}"
        )
    return checked_documents(candidates["documents"], Document), candidates["query"]


def _scored(documents: list[Document], response: RerankResponse) -> list[Document]:
    return [
        (document := documents[result.index]).model_copy(
            update={"metadata": {**document.metadata, "relevance_score": result.relevance_score}}
        )
        for result in response.results
    ]


def _as_dicts(response: RerankResponse) -> list[RankedIndex]:
    return [{"index": result.index, "relevance_score": result.relevance_score} for result in response.results]
