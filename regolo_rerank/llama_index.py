"""LlamaIndex: a node postprocessor that reranks, for query engines and chat engines."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

try:
    from llama_index.core import __version__ as llama_index_version
    from llama_index.core.callbacks import CBEventType, EventPayload
    from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
    from llama_index.core.postprocessor.types import BaseNodePostprocessor
    from llama_index.core.schema import BaseNode, MetadataMode, NodeWithScore, QueryBundle
    from llama_index_instrumentation import get_dispatcher
except ImportError as error:
    raise ImportError('regolo_rerank.llama_index needs LlamaIndex: pip install "regolo_rerank[llama-index]"') from error

from pydantic import model_validator

from regolo_rerank._adapters.base import AdapterOptions, Outcome, report_failure
from regolo_rerank._adapters.spans import show_report
from regolo_rerank._wire.inputs import check_documents
from regolo_rerank.errors import InvalidInputError, ends_here
from regolo_rerank.results import RerankResponse, Usage

__all__ = ["RegoloReRankEndEvent", "RegoloRerank"]

_dispatcher = get_dispatcher(__name__)


class RegoloReRankEndEvent(ReRankEndEvent):
    """The end of a rerank: LlamaIndex's own event, which has `nodes`, with what the call took and came to.

    Attributes:
        response_id: The service's name for the first reply; None where there is none.
        request_ids: The gateway's name for each request that has one, for support.
        usage: Tokens, requests and cost, added up over all requests of the call; None where the call failed.
        fallback: Whether `on_error="return_input"` has given the input back, unranked.
        error: What went wrong with a call that failed or fell back; None where it has ranked.

    Raises:
        pydantic.ValidationError: A field is missing or has a wrong type.
    """

    response_id: str | None
    request_ids: list[str]
    usage: Usage | None
    fallback: bool
    error: str | None


class RegoloRerank(AdapterOptions, BaseNodePostprocessor):
    """Reranks nodes with Regolo.ai's Rerank API.

    `postprocess_nodes(nodes, query_bundle=None, query_str=None)` takes N nodes (`NodeWithScore`) and a query in one of
    its two forms, and returns min(N, top_n) copies at most, the best first. Their `score` is the relevance score, and
    so is `relevance_score` in their metadata, which the next postprocessor leaves alone, and which neither the LLM nor
    an embedding model sees. The caller's own are never changed. `apostprocess_nodes` is the same, natively async.
    `callback_manager`, for handlers of LlamaIndex's older kind, is an option too.

    Args:
        api_key: The key; without it, the environment's `REGOLO_API_KEY` is used.
        callback_manager: LlamaIndex's own, for handlers of its older kind; may be assigned later.
        **options: Any option, by name: those below, and those of `Options`.

    Raises:
        pydantic.ValidationError: An option is unknown or has a wrong value; the message names it.
        RegoloError: By a call, see `RegoloClient.rerank`; with `on_error="return_input"` a failure of the service is a
            `RerankFallbackWarning` instead.

    Examples:
        >>> from llama_index.core.schema import TextNode
        >>> texts = ["Rome", "Beijing, capital of China"]
        >>> nodes = [NodeWithScore(node=TextNode(text=text)) for text in texts]
        >>> reranker = RegoloRerank(base_url="local://", top_n=1)
        >>> reranker.postprocess_nodes(nodes, query_str="capital of China")[0].text
        'Beijing, capital of China'
    """

    metadata_mode: MetadataMode = MetadataMode.EMBED
    """Which of a node's metadata is put in front of its text for scoring."""

    keep_retrieval_score: bool = False
    """Whether the retriever's score is kept in the metadata as `retrieval_score`, hidden from the LLM and from
    embeddings."""

    user_agent: ClassVar[str] = f"{AdapterOptions.user_agent} llama-index-core/{llama_index_version}"

    @classmethod
    def class_name(cls) -> str:
        """Return the name that LlamaIndex serialises this class under."""
        return "RegoloRerank"

    @model_validator(mode="before")
    @classmethod
    def _drop_class_name(cls, options: Any) -> Any:
        if isinstance(options, dict):
            return {name: value for name, value in options.items() if name != "class_name"}
        return options

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        with ends_here, self._report(nodes, query_bundle) as run:
            run.outcome = self._rerank(run.query, run.nodes, self._get_texts, self._attach_scores)
        return run.outcome.kept

    @_dispatcher.span
    async def _apostprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        with ends_here, self._report(nodes, query_bundle) as run:
            run.outcome = await self._arerank(run.query, run.nodes, self._get_texts, self._attach_scores)
        return run.outcome.kept

    @contextmanager
    def _report(self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None) -> Iterator["_Run"]:
        """Report a run to LlamaIndex's events and callbacks, with an end for each start on every path."""
        if query_bundle is None:
            raise InvalidInputError(
                "Missing query bundle in extra info. Pass query_str, or query_bundle=QueryBundle(...)."
            )
        if not isinstance(query_bundle, QueryBundle):
            kind = type(query_bundle).__name__
            raise InvalidInputError(f"query_bundle: must be a QueryBundle, got {kind}; pass a text as query_str")
        run = _Run(query_bundle.query_str, check_documents(nodes, NodeWithScore, name="nodes"))
        top_n = len(run.nodes) if self.top_n is None else self.top_n
        _dispatcher.event(
            ReRankStartEvent(query=query_bundle, nodes=run.nodes, top_n=top_n, model_name=self.model),
        )
        payload: dict[str, Any] = {
            EventPayload.NODES: list(run.nodes),  # a handler may change what it is shown, while the call goes on
            EventPayload.MODEL_NAME: self.model,
            EventPayload.QUERY_STR: run.query,
            EventPayload.TOP_K: top_n,
        }
        try:
            with self.callback_manager.event(CBEventType.RERANKING, payload=payload) as event:
                yield run
                kept, report = run.outcome.kept, run.outcome.report
                event.on_end(payload={EventPayload.NODES: list(kept), EventPayload.ADDITIONAL_KWARGS: report})
        except BaseException as error:
            run.outcome = Outcome([], report_failure(error, fallback=False))
            raise
        finally:
            show_report(run.outcome.report)
            _dispatcher.event(RegoloReRankEndEvent(nodes=run.outcome.kept, **run.outcome.report))

    def _get_texts(self, nodes: list[NodeWithScore]) -> list[str]:
        return [candidate.node.get_content(metadata_mode=self.metadata_mode) for candidate in nodes]

    def _attach_scores(self, nodes: list[NodeWithScore], response: RerankResponse) -> list[NodeWithScore]:
        kept = []
        for result in response.results:
            candidate, scores = nodes[result.index], {"relevance_score": result.relevance_score}
            further = {"retrieval_score": candidate.score, **scores} if self.keep_retrieval_score else scores
            fields: dict[str, Any] = {"node": _add_metadata(candidate.node, further), "score": result.relevance_score}
            # To make one anew takes half of what a copy takes; but one of a class of the caller's may hold more.
            anew = type(candidate) is NodeWithScore
            kept.append(NodeWithScore(**fields) if anew else candidate.model_copy(update=fields))
        return kept


def _add_metadata(node: BaseNode, further: dict[str, Any]) -> BaseNode:
    """Return a copy of a node with further metadata, which no text shows."""
    return node.model_copy(
        update={
            "metadata": {**node.metadata, **further},
            "excluded_embed_metadata_keys": _add_keys(node.excluded_embed_metadata_keys, further),
            "excluded_llm_metadata_keys": _add_keys(node.excluded_llm_metadata_keys, further),
        }
    )


def _add_keys(keys: list[str], further: Iterable[str]) -> list[str]:
    return list(dict.fromkeys([*keys, *further]))


@dataclass(slots=True)
class _Run:
    """One reranking, as LlamaIndex is told of it."""

    query: str
    nodes: list[NodeWithScore]
    outcome: Outcome[NodeWithScore] = field(init=False)
