"""LlamaIndex: a node postprocessor that reranks, for query engines and chat engines."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from regolo_rerank._version import install_hint

try:
    from llama_index.core import __version__ as llama_index_version
    from llama_index.core.callbacks import CBEventType, EventPayload
    from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
    from llama_index.core.postprocessor.types import BaseNodePostprocessor
    from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle
    from llama_index_instrumentation import get_dispatcher
except ImportError as error:
    raise ImportError(f"regolo_rerank.llama_index needs LlamaIndex: {install_hint('llama-index')}") from error

from pydantic import model_validator

from regolo_rerank import _openinference
from regolo_rerank._adapters import AdapterOptions, Outcome, report_failure
from regolo_rerank._inputs import check_documents
from regolo_rerank.errors import InvalidInputError
from regolo_rerank.results import Usage

__all__ = ["RegoloReRankEndEvent", "RegoloRerank"]

_dispatcher = get_dispatcher(__name__)


class RegoloReRankEndEvent(ReRankEndEvent):
    """LlamaIndex's `ReRankEndEvent` with usage and outcome added.

    Attributes:
        response_id: The server's id of the first reply, or None without a reply.
        request_ids: The gateway's id of each request that has one, for support.
        usage: Tokens, requests and cost of all requests of the call, or None if it failed.
        fallback: Whether `on_error="return_input"` has returned the input.
        error: The error of a call that failed or fell back, or None.

    Raises:
        pydantic.ValidationError: A field is missing or has a wrong type.
    """

    response_id: str | None
    request_ids: list[str]
    usage: Usage | None
    fallback: bool
    error: str | None


class RegoloRerank(AdapterOptions, BaseNodePostprocessor):
    """Node postprocessor that reranks nodes with Regolo.ai's Rerank API.

    `postprocess_nodes(nodes, query_bundle=None, query_str=None)` returns copies of the best nodes. Their `score` is the
    relevance score, and so is `relevance_score` in their metadata, which is excluded from the LLM and embedding text.
    The caller's nodes are never modified. `apostprocess_nodes` is the async variant.

    Args:
        api_key: API key. None reads the environment variable `REGOLO_API_KEY`.
        callback_manager: LlamaIndex's manager, for handlers of its older kind.
        **options: `metadata_mode`, `keep_retrieval_score`, `on_error` and `score_metadata_key`, and the options of
            `RegoloClient`. The default of `top_n` is 5.

    Raises:
        InvalidInputError: An option is unknown or has a wrong value.
        RegoloError: By a call, as in `RegoloClient.rerank`, unless `on_error` covers the error.

    Examples:
        >>> from llama_index.core.schema import TextNode
        >>> texts = ["Rome is in Italy.", "Beijing is the capital of China."]
        >>> nodes = [NodeWithScore(node=TextNode(text=text)) for text in texts]
        >>> reranker = RegoloRerank(base_url="local://", top_n=1)
        >>> reranker.postprocess_nodes(nodes, query_str="capital of China")[0].text
        'Beijing is the capital of China.'
    """

    metadata_mode: MetadataMode = MetadataMode.EMBED
    """Which metadata of a node is scored with its text."""

    keep_retrieval_score: bool = False
    """Keep the retriever's score in the metadata as `retrieval_score`."""

    user_agent: ClassVar[str] = f"{AdapterOptions.user_agent} llama-index-core/{llama_index_version}"

    @classmethod
    def class_name(cls) -> str:
        """Return the name under which LlamaIndex serialises this class."""
        return "RegoloRerank"

    @model_validator(mode="before")
    @classmethod
    def _drop_class_name(cls, options: Any) -> Any:
        """Accept the `class_name` that LlamaIndex adds to a serialised object."""
        if isinstance(options, dict):
            return {name: value for name, value in options.items() if name != "class_name"}
        return options

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        with self._reported(nodes, query_bundle) as run:
            run.outcome = self._rerank(run.query, run.nodes, self._text_of)
            run.kept = self._attach_scores(run.nodes, run.outcome)
        return run.kept

    @_dispatcher.span
    async def _apostprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        with self._reported(nodes, query_bundle) as run:
            run.outcome = await self._arerank(run.query, run.nodes, self._text_of)
            run.kept = self._attach_scores(run.nodes, run.outcome)
        return run.kept

    @contextmanager
    def _reported(self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None) -> Iterator["_Rerank"]:
        """Report a rerank to LlamaIndex's events and callbacks, with an end for each start."""
        run = _Rerank(nodes, query_bundle)
        top_n = len(run.nodes) if self.top_n is None else self.top_n
        _dispatcher.event(ReRankStartEvent(query=run.query_bundle, nodes=run.nodes, top_n=top_n, model_name=self.model))
        payload: dict[str, Any] = {
            EventPayload.NODES: list(run.nodes),  # a handler may modify its list during the call
            EventPayload.MODEL_NAME: self.model,
            EventPayload.QUERY_STR: run.query,
            EventPayload.TOP_K: top_n,
        }
        try:
            with self.callback_manager.event(CBEventType.RERANKING, payload=payload) as event:
                yield run
                event.on_end(
                    payload={EventPayload.NODES: list(run.kept), EventPayload.ADDITIONAL_KWARGS: run.outcome.report}
                )
        except BaseException as error:
            run.outcome = Outcome(None, report_failure(error, fallback=False))
            raise
        finally:
            _openinference.show_report(run.outcome.report)
            _dispatcher.event(RegoloReRankEndEvent(nodes=run.kept, **run.outcome.report))

    def _text_of(self, candidate: NodeWithScore) -> str:
        return candidate.node.get_content(metadata_mode=self.metadata_mode)

    def _attach_scores(self, nodes: list[NodeWithScore], outcome: Outcome) -> list[NodeWithScore]:
        """Return copies of the ranked nodes with their scores, or after a fallback the first ones without."""
        if outcome.response is None:
            return [
                _copy(candidate, self._metadata(candidate.node.metadata, None)) for candidate in nodes[: self.top_n]
            ]
        kept = []
        for result in outcome.response:
            metadata = self._metadata(result.document.node.metadata, result)
            if self.keep_retrieval_score:
                metadata["retrieval_score"] = result.document.score
            kept.append(_copy(result.document, metadata, result.relevance_score))
        return kept


class _Rerank:
    """One rerank, as it is reported to LlamaIndex."""

    def __init__(self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None) -> None:
        if query_bundle is None:
            raise InvalidInputError("query: missing. Pass query_str=..., or query_bundle=QueryBundle(...)")
        if not isinstance(query_bundle, QueryBundle):
            kind = type(query_bundle).__name__
            raise InvalidInputError(f"query_bundle: must be a QueryBundle, got {kind}. Pass a text as query_str")
        self.query_bundle = query_bundle
        self.query = query_bundle.query_str
        if isinstance(nodes, NodeWithScore):
            raise InvalidInputError("nodes: must be a list, got NodeWithScore. Pass [node]")
        self.nodes = check_documents(nodes, "nodes")
        for index, candidate in enumerate(self.nodes):
            if not isinstance(candidate, NodeWithScore):
                raise InvalidInputError(
                    f"nodes[{index}]: must be a NodeWithScore, got {type(candidate).__name__}. Pass "
                    f"NodeWithScore(node=TextNode(text=...)), or call RegoloClient.rerank with strings"
                )
        self.kept: list[NodeWithScore] = []
        self.outcome: Outcome


def _copy(candidate: NodeWithScore, metadata: dict[str, Any], score: float | None = None) -> NodeWithScore:
    """Return a copy with other metadata, and with a score if there is one.

    Keys that are new in the metadata are excluded from the LLM and embedding text.
    """
    node = candidate.node
    added = [key for key in metadata if key not in node.metadata]
    copied = node.model_copy(
        update={
            "metadata": metadata,
            "excluded_embed_metadata_keys": _add_keys(node.excluded_embed_metadata_keys, added),
            "excluded_llm_metadata_keys": _add_keys(node.excluded_llm_metadata_keys, added),
        }
    )
    return candidate.model_copy(update={"node": copied, "score": candidate.score if score is None else score})


def _add_keys(keys: list[str], further: list[str]) -> list[str]:
    return list(dict.fromkeys([*keys, *further]))
