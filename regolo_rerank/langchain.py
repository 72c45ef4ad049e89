"""LangChain: a document compressor that reranks, for `ContextualCompressionRetriever` and for LCEL chains."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypedDict

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
    raise ImportError('regolo_rerank.langchain needs LangChain: pip install "regolo_rerank[langchain]"') from error

from pydantic import SecretStr, model_validator

from regolo_rerank._adapters.base import AdapterOptions, Outcome
from regolo_rerank._adapters.spans import show_inputs, show_outputs
from regolo_rerank._wire.inputs import check_documents
from regolo_rerank.errors import InvalidInputError, ends_here
from regolo_rerank.results import RerankResponse

if TYPE_CHECKING:
    from langchain_core.runnables import RunnableSerializable

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
        **options: Any option, by name: those below, and those of `Options`.

    Raises:
        pydantic.ValidationError: An option is unknown or has a wrong value; the message names it.

    Examples:
        >>> reranker = RegoloRerank(base_url="local://", top_n=1)
        >>> documents = [Document("Rome"), Document("Beijing, capital of China")]
        >>> best = reranker.compress_documents(documents, "capital of China")[0]
        >>> best.page_content, list(best.metadata)
        ('Beijing, capital of China', ['relevance_score'])
    """

    metadata_fields: tuple[str, ...] = ()
    """Metadata keys that are put in front of the text as `key: value` lines for scoring, where a document has them."""

    if TYPE_CHECKING:  # an argument only, which becomes api_key
        regolo_api_key: SecretStr | str | None = None

    user_agent: ClassVar[str] = f"{AdapterOptions.user_agent} langchain-core/{langchain_version}"

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
            min(N, top_n) copies at most, with `relevance_score` in their metadata. Handlers are told of a run of the
            class's name, with query, documents, model and top_n in, and documents, scores and usage out.

        Raises:
            RegoloError: See `RegoloClient.rerank`; with `on_error="return_input"` a failure of the service is a
                `RerankFallbackWarning` instead.
        """
        with ends_here:
            return self._trace(documents, query, _config(callbacks))

    async def acompress_documents(
        self,
        documents: Sequence[Document],
        query: str,
        callbacks: Callbacks | None = None,
    ) -> list[Document]:
        """Return what `compress_documents` does, without blocking the event loop."""
        with ends_here:
            return await self._atrace(documents, query, _config(callbacks))

    def rerank(
        self,
        documents: Iterable[str | Document | dict[str, Any]],
        query: str,
        *,
        model: str | None = None,
        top_n: int | None = None,
        instruction: str | None = None,
    ) -> list[RankedIndex]:
        """Rank documents of any kind, as LangChain's other rerankers do.

        Args:
            documents: N strings, documents, or dicts with their text in `text`.
            query: What was searched; not blank.
            model: Name of the reranking model; None takes the option.
            top_n: Results kept; None takes the option.
            instruction: The task in a sentence; None takes the option.

        Returns:
            min(N, top_n) dicts at most, the best first, with `index` into `documents` and `relevance_score`.

        Raises:
            RegoloError: See `RegoloClient.rerank`; `on_error` does not apply, since indices need scores.
        """
        with ends_here:
            ranking = self._rank(query, self._read_texts(documents), model=model, top_n=top_n, instruction=instruction)
            return _as_dicts(ranking)

    async def arerank(
        self,
        documents: Iterable[str | Document | dict[str, Any]],
        query: str,
        *,
        model: str | None = None,
        top_n: int | None = None,
        instruction: str | None = None,
    ) -> list[RankedIndex]:
        """Rank as `rerank` does, without blocking the event loop."""
        with ends_here:
            ranking = await self._arank(
                query, self._read_texts(documents), model=model, top_n=top_n, instruction=instruction
            )
            return _as_dicts(ranking)

    def as_runnable(
        self, *, query_key: str = "query", documents_key: str = "documents"
    ) -> "RunnableSerializable[Candidates | dict[str, Any], list[Document]]":
        """Return this reranker as a step of an LCEL chain.

        It takes `{"query": ..., "documents": ...}` and gives the documents that are kept; options that are assigned
        later count for it too. It traces as a direct call does and raises the same errors, and `InvalidInputError` for
        other inputs. By `invoke`, `bind` or `configurable_fields` it takes what `RegoloClient.rerank` takes for one
        call: top_n, model, instruction, score_threshold and extra_body.

        Args:
            query_key: Where its input has the query.
            documents_key: Where its input has the documents.

        Examples:
            >>> step = RegoloRerank(base_url="local://").as_runnable()
            >>> documents = [Document("Rome"), Document("Beijing, capital of China")]
            >>> candidates = {"query": "capital of China", "documents": documents}
            >>> step.invoke(candidates, top_n=1)[0].page_content
            'Beijing, capital of China'
        """
        # LangChain's runnables take longer to load than all else together.
        from regolo_rerank._adapters.runnable import Step

        return Step(
            name=type(self).__name__,
            rerank=self._trace,
            arerank=self._atrace,
            query_key=query_key,
            documents_key=documents_key,
        )

    def _trace(
        self, documents: Sequence[Document], query: str, config: RunnableConfig, **arguments: Any
    ) -> list[Document]:
        """Rerank in a run of its own, where somebody listens."""
        documents = check_documents(documents, Document)
        manager = get_callback_manager_for_config(config)
        if not manager.handlers:
            return self._rerank(query, documents, self._get_texts, _attach_scores, **arguments).kept
        inputs = self._tell_inputs(documents, query, arguments)
        manager.add_metadata({"ls_provider": "regolo", "ls_model_name": inputs["model"]}, inherit=False)
        run = manager.on_chain_start(None, inputs, **self._identify(config))
        show_inputs(run, **inputs)
        try:
            outcome = self._rerank(query, documents, self._get_texts, _attach_scores, **arguments)
        except BaseException as error:
            run.on_chain_error(error)
            raise
        run.on_chain_end(_tell_outputs(run, outcome))
        return outcome.kept

    async def _atrace(
        self, documents: Sequence[Document], query: str, config: RunnableConfig, **arguments: Any
    ) -> list[Document]:
        documents = check_documents(documents, Document)
        manager = get_async_callback_manager_for_config(config)
        if not manager.handlers:
            return (await self._arerank(query, documents, self._get_texts, _attach_scores, **arguments)).kept
        inputs = self._tell_inputs(documents, query, arguments)
        manager.add_metadata({"ls_provider": "regolo", "ls_model_name": inputs["model"]}, inherit=False)
        run = await manager.on_chain_start(None, inputs, **self._identify(config))
        show_inputs(run, **inputs)
        try:
            outcome = await self._arerank(query, documents, self._get_texts, _attach_scores, **arguments)
        except BaseException as error:
            await run.on_chain_error(error)
            raise
        await run.on_chain_end(_tell_outputs(run, outcome))
        return outcome.kept

    def _identify(self, config: RunnableConfig) -> dict[str, Any]:
        return {"name": config.get("run_name") or type(self).__name__, "run_id": config.get("run_id")}

    def _tell_inputs(self, documents: list[Document], query: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "query": query,
            "documents": list(documents),  # a handler may change what it is shown, while the call goes on
            "model": self._argument("model", arguments),
            "top_n": self._argument("top_n", arguments),
        }

    def _get_texts(self, documents: list[Document]) -> list[str]:
        if not self.metadata_fields:
            return [document.page_content for document in documents]
        return [self._get_text(document) for document in documents]

    def _read_texts(self, documents: Iterable[str | Document | dict[str, Any]]) -> list[str]:
        return [
            self._read_text(index, document)
            for index, document in enumerate(check_documents(documents, str, Document, dict))
        ]

    def _read_text(self, index: int, document: str | Document | dict[str, Any]) -> str:
        if isinstance(document, str):
            return document
        if isinstance(document, dict):
            text = document.get("text")
            if not isinstance(text, str):
                raise InvalidInputError(
                    f"documents[{index}]: a dict's text is a string in 'text', got {type(text).__name__}"
                )
            return text
        return self._get_text(document)

    def _get_text(self, document: Document) -> str:
        lines = [f"{key}: {document.metadata[key]}" for key in self.metadata_fields if key in document.metadata]
        return "\n".join([*lines, document.page_content]) if lines else document.page_content


def _config(callbacks: Callbacks | None) -> RunnableConfig:
    """Return the configuration of a call that is given callbacks, or takes those of the chain around it."""
    return ensure_config() if callbacks is None else {"callbacks": callbacks}


def _attach_scores(documents: list[Document], response: RerankResponse) -> list[Document]:
    return [
        (document := documents[result.index]).model_copy(
            update={"metadata": {**document.metadata, "relevance_score": result.relevance_score}}
        )
        for result in response.results
    ]


def _tell_outputs(
    run: CallbackManagerForChainRun | AsyncCallbackManagerForChainRun, outcome: Outcome[Document]
) -> dict[str, Any]:
    """Tell tracers what they do not take from a run's outputs, and return those."""
    scores = None if outcome.report["fallback"] else [document.metadata["relevance_score"] for document in outcome.kept]
    outputs = {"documents": list(outcome.kept), "scores": scores, **outcome.report}
    show_outputs(run, **outputs)
    _count_tokens(run, outcome)
    return outputs


def _count_tokens(
    run: CallbackManagerForChainRun | AsyncCallbackManagerForChainRun, outcome: Outcome[Document]
) -> None:
    """Tell tracers of the tokens where LangChain's own models do, so that LangSmith counts them."""
    tokens = (outcome.report["usage"] or {}).get("total_tokens")
    if tokens is None:
        return
    for handler in run.handlers:
        traced = getattr(handler, "run_map", {}).get(str(run.run_id))
        if traced is not None:
            usage = {"input_tokens": tokens, "output_tokens": 0, "total_tokens": tokens}
            traced.extra.setdefault("metadata", {})["usage_metadata"] = usage


def _as_dicts(response: RerankResponse) -> list[RankedIndex]:
    return [{"index": result.index, "relevance_score": result.relevance_score} for result in response.results]
