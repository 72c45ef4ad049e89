import pytest
from llama_index.core.callbacks import CallbackManager, CBEventType, EventPayload, LlamaDebugHandler
from llama_index.core.instrumentation.events import BaseEvent
from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
from llama_index.core.instrumentation.span_handlers import SimpleSpanHandler
from llama_index.core.schema import NodeWithScore

from regolo_rerank import AuthenticationError, InvalidInputError, RegoloError, RerankFallbackWarning, Usage
from regolo_rerank.llama_index import RegoloRerank as LlamaIndexRerank
from regolo_rerank.llama_index import RegoloReRankEndEvent
from tests.support.stub import Reply, Stub, error
from tests.support.traces import DOWN, FALLEN_BACK, QUERY, TOLD, Rerank, nodes, telling


def test_the_end_event_tells_what_a_call_took(
    rerank: Rerank, llama_index: LlamaIndexRerank, stub: Stub, events: list[BaseEvent]
) -> None:
    """It is core's own event for a handler written for that, and has ids and usage of all requests besides."""
    llama_index.batch_size, stub.reply = 2, telling
    debug = LlamaDebugHandler(print_trace_on_end=False)
    llama_index.callback_manager = CallbackManager([debug])
    kept = rerank(llama_index)
    _, end = events
    assert isinstance(end, ReRankEndEvent)
    assert end.class_name() == ReRankEndEvent.class_name()
    assert end.nodes == kept
    assert isinstance(end, RegoloReRankEndEvent)
    assert (end.response_id, end.request_ids, end.usage) == ("r-1", ["call-1", "call-1"], Usage(14, 2, 0.5))
    assert (end.fallback, end.error) == (False, None)
    assert {name: end.model_dump()[name] for name in TOLD} == TOLD
    ((_, ended),) = debug.get_event_pairs(CBEventType.RERANKING)
    assert ended.payload == {EventPayload.NODES: kept, EventPayload.ADDITIONAL_KWARGS: TOLD}


def test_a_fallback_shows_in_the_event(
    rerank: Rerank, llama_index: LlamaIndexRerank, stub: Stub, events: list[BaseEvent]
) -> None:
    """The end of a call that has fallen back says so and why, with the retriever's scores and no others."""
    llama_index.on_error = "return_input"
    stub.always(DOWN)
    debug = LlamaDebugHandler(print_trace_on_end=False)
    llama_index.callback_manager = CallbackManager([debug])
    with pytest.warns(RerankFallbackWarning, match="down"):
        kept = rerank(llama_index)
    assert kept == nodes()[:2]
    assert isinstance(events[1], RegoloReRankEndEvent)
    assert events[1].nodes == kept
    assert {name: events[1].model_dump()[name] for name in TOLD} == FALLEN_BACK
    ((_, ended),) = debug.get_event_pairs(CBEventType.RERANKING)
    assert ended.payload == {EventPayload.NODES: kept, EventPayload.ADDITIONAL_KWARGS: FALLEN_BACK}


@pytest.mark.parametrize(
    ("given", "top_n", "query", "reply", "problem", "usage"),
    [
        (nodes(), 2, QUERY, None, None, Usage(None, 1)),
        (nodes(), None, QUERY, None, None, Usage(None, 1)),
        ([], None, QUERY, None, None, Usage(None, 0)),
        (nodes(), 2, " ", None, InvalidInputError, None),
        (nodes(), 2, QUERY, error("no such key", 401), AuthenticationError, None),
        (nodes(), 2, QUERY, DOWN, None, None),
    ],
    ids=["ranked", "all ranked", "empty", "refused", "failed", "fallen back"],
)
@pytest.mark.filterwarnings("ignore::regolo_rerank.errors.RerankFallbackWarning")  # seen in the test above
def test_a_call_is_one_span_with_two_events(
    mode: str,
    rerank: Rerank,
    llama_index: LlamaIndexRerank,
    stub: Stub,
    events: list[BaseEvent],
    spans: SimpleSpanHandler,
    given: list[NodeWithScore],
    top_n: int | None,
    query: str,
    reply: Reply | None,
    problem: type[RegoloError] | None,
    usage: Usage | None,
) -> None:
    """Each call, also an empty or failing one, is a span with a start, which has what was asked, and an end."""
    llama_index.on_error, llama_index.top_n = "return_input", top_n
    kept: list[NodeWithScore] = []
    if reply is not None:
        stub.always(reply)
    if problem is None:
        kept = rerank(llama_index, given, query=query)
    else:
        with pytest.raises(problem):
            rerank(llama_index, given, query=query)
    assert not spans.open_spans
    (span,) = [*spans.completed_spans, *spans.dropped_spans]
    assert span.id_.partition("-")[0] == f"RegoloRerank._{'a' * (mode == 'async')}postprocess_nodes"
    assert bool(spans.dropped_spans) == (problem is not None)
    start, end = events
    assert isinstance(start, ReRankStartEvent)
    assert isinstance(end, RegoloReRankEndEvent)
    assert (start.span_id, end.span_id) == (span.id_, span.id_)
    assert getattr(start.query, "query_str", None) == query
    assert (start.nodes, start.model_name) == (given, "Qwen3-Reranker-4B")
    assert start.top_n == (len(given) if top_n is None else top_n)
    assert end.nodes == kept
    assert end.usage == usage
    assert (end.error is None) == (usage is not None)
    assert end.fallback == (usage is None and problem is None)
