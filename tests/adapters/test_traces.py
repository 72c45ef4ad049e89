"""What traces, callbacks, events and spans of both frameworks show of a rerank, and that they never show the key."""

import asyncio
import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any
from unittest.mock import MagicMock

import pytest
import requests
from langchain_core.documents import Document
from langchain_core.runnables import ConfigurableField
from langchain_core.tracers import LangChainTracer
from langchain_core.tracers.run_collector import RunCollectorCallbackHandler
from langsmith import Client
from llama_index.core import MockEmbedding, VectorStoreIndex
from llama_index.core.callbacks import CallbackManager, CBEventType, EventPayload, LlamaDebugHandler
from llama_index.core.instrumentation.events import BaseEvent
from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
from llama_index.core.instrumentation.span_handlers import SimpleSpanHandler
from llama_index.core.llms import MockLLM
from llama_index.core.schema import NodeWithScore
from openinference.instrumentation.langchain import LangChainInstrumentor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from pydantic import SecretStr

from regolo_rerank import AuthenticationError, InvalidInputError, RegoloError, RerankFallbackWarning, Usage
from regolo_rerank.langchain import RegoloRerank as LangChainRerank
from regolo_rerank.langchain import RerankRetriever
from regolo_rerank.llama_index import RegoloRerank as LlamaIndexRerank
from regolo_rerank.llama_index import RegoloReRankEndEvent
from tests.adapters.helpers import (
    DOWN,
    FALLBACK_REPORT,
    QUERY,
    REPORT,
    TEXTS,
    Adapter,
    Everything,
    Handler,
    Rerank,
    Way,
    documents,
    documents_in,
    nodes,
    reranker_spans,
    runs_in,
    texts_of,
    with_usage,
)
from tests.conftest import KEY
from tests.support.modes import Call
from tests.support.stub import Received, Reply, Stub, error, scored

# --- LangChain's runs -------------------------------------------------------------------------------------------------


def test_a_run_has_input_result_and_usage(way: Way, langchain: LangChainRerank, stub: Stub) -> None:
    """It has query, documents, model and top_n as input, and documents, scores, ids and usage as output."""
    langchain.batch_size, stub.reply = 2, with_usage
    trace = RunCollectorCallbackHandler()
    kept = way(langchain, trace)
    (run,) = runs_in(trace.traced_runs)
    assert (run.run_type, run.error) == ("chain", None)
    assert run.inputs == {"query": QUERY, "documents": documents(), "model": "Qwen3-Reranker-4B", "top_n": 2}
    assert run.outputs == {"documents": kept, "scores": [0.9, 0.5], **REPORT}
    json.dumps([run.outputs[name] for name in ("scores", *REPORT)])


@pytest.mark.parametrize("on_error", ["raise", "return_input"])
def test_an_error_ends_the_run(way: Way, langchain: LangChainRerank, stub: Stub, on_error: Any) -> None:
    """The run has the caller's error, and no output."""
    langchain.on_error = on_error
    stub.always(error("no such key", 401))
    handler, trace = Handler(), RunCollectorCallbackHandler()
    for listener in (handler, trace):
        with pytest.raises(AuthenticationError, match="no such key"):
            way(langchain, listener)
    assert {type(reported) for what, _, reported in handler.seen if what == "error"} <= {AuthenticationError}
    (run,) = runs_in(trace.traced_runs)
    assert "AuthenticationError" in str(run.error)
    assert not run.outputs


def test_a_fallback_shows_in_the_run(way: Way, langchain: LangChainRerank, stub: Stub) -> None:
    """The run ends well, with the reason and without scores."""
    langchain.on_error = "return_input"
    stub.always(DOWN)
    trace = RunCollectorCallbackHandler()
    with pytest.warns(RerankFallbackWarning, match="down"):
        kept = way(langchain, trace)
    (run,) = runs_in(trace.traced_runs)
    assert (kept, run.error) == (documents()[:2], None)
    assert run.outputs == {"documents": kept, "scores": None, **FALLBACK_REPORT}


def test_an_interrupted_call_ends_its_run(rerank: Rerank, langchain: LangChainRerank) -> None:
    """Ctrl-C leaves no run open: its error is the interruption."""

    def interrupted(query: str, texts: list[str]) -> list[float]:
        raise KeyboardInterrupt(query, texts)

    handler = Handler()
    reranker = langchain.with_options(base_url="local://", scorer=interrupted)
    with pytest.raises(KeyboardInterrupt):
        rerank(reranker, handler=handler)
    assert [(what, type(reported)) for what, _, reported in handler.seen] == [
        ("start", dict),
        ("error", KeyboardInterrupt),
    ]


@pytest.mark.anyio
async def test_a_cancelled_call_ends_its_run(langchain: LangChainRerank, stub: Stub) -> None:
    """A handler sees the end of a call that is cancelled while its request is in flight."""
    sent, handler, loop = asyncio.Event(), Handler(), asyncio.get_running_loop()

    def reply(_: Received) -> Reply:
        loop.call_soon_threadsafe(sent.set)
        return Reply(delay=0.5)

    stub.reply = reply
    step = langchain.as_runnable()
    given = {"query": QUERY, "documents": documents()}
    call = asyncio.create_task(step.ainvoke(given, {"callbacks": [handler]}))
    await sent.wait()
    call.cancel()
    await asyncio.wait([call])
    assert call.cancelled()
    assert [(what, type(reported)) for what, _, reported in handler.seen] == [
        ("start", dict),
        ("error", asyncio.CancelledError),
    ]


def test_a_handler_may_change_its_lists(rerank: Rerank, adapter: Adapter, stub: Stub) -> None:
    """A handler that modifies what it is shown, during the call or after it, does not change the result."""
    adapter.on_error = "return_input"
    handler, debug = Handler(), LlamaDebugHandler(print_trace_on_end=False)
    if isinstance(adapter, LlamaIndexRerank):
        adapter.callback_manager = CallbackManager([debug])

    def shown() -> list[list[Any]]:
        payloads = [event.payload or {} for event in debug.get_events()]
        runs = [reported["documents"] for _, _, reported in handler.seen]
        return [*runs, *(payload[EventPayload.NODES] for payload in payloads)]

    def reply(_: Received) -> Reply:
        (given,) = shown()
        given.reverse()
        return DOWN

    stub.reply = reply
    with pytest.warns(RerankFallbackWarning):
        kept = rerank(adapter, handler=handler)
    shown()[1].clear()
    assert texts_of(kept) == TEXTS[:2]


# --- LlamaIndex's events and spans ------------------------------------------------------------------------------------


def test_the_end_event_has_usage(
    rerank: Rerank, llama_index: LlamaIndexRerank, stub: Stub, events: list[BaseEvent]
) -> None:
    """It is LlamaIndex's own event for handlers of that, with ids and usage of all requests."""
    llama_index.batch_size, stub.reply = 2, with_usage
    debug = LlamaDebugHandler(print_trace_on_end=False)
    llama_index.callback_manager = CallbackManager([debug])
    kept = rerank(llama_index)
    _, end = events
    assert isinstance(end, RegoloReRankEndEvent)
    assert (end.class_name(), end.nodes) == (ReRankEndEvent.class_name(), kept)
    assert end.usage == Usage(14, 2, 0.5)
    assert {name: end.model_dump()[name] for name in REPORT} == REPORT
    ((_, ended),) = debug.get_event_pairs(CBEventType.RERANKING)
    assert ended.payload == {EventPayload.NODES: kept, EventPayload.ADDITIONAL_KWARGS: REPORT}


CASES: dict[str, tuple[list[NodeWithScore], str, Reply | None, type[RegoloError] | None]] = {
    "ranked": (nodes(), QUERY, None, None),
    "empty": ([], QUERY, None, None),
    "fallback": (nodes(), QUERY, DOWN, None),
    "blank query": (nodes(), " ", None, None),
    "failed": (nodes(), QUERY, error("no such key", 401), AuthenticationError),
    "wrong node": ([nodes()[0].node], QUERY, None, InvalidInputError),  # type: ignore[list-item]
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore::regolo_rerank.RerankFallbackWarning")
def test_every_start_has_an_end(
    rerank: Rerank,
    llama_index: LlamaIndexRerank,
    stub: Stub,
    events: list[BaseEvent],
    spans: SimpleSpanHandler,
    case: str,
) -> None:
    """A call is one span with a start and an end event, also if it fails. Wrong input starts no event."""
    llama_index.on_error, llama_index.top_n = "return_input", None
    given, query, reply, problem = CASES[case]
    kept: list[NodeWithScore] = []
    if reply is not None:
        stub.always(reply)
    if problem is None:
        kept = rerank(llama_index, given, query)
    else:
        with pytest.raises(problem):
            rerank(llama_index, given, query)
    assert not spans.open_spans
    (span,) = [*spans.completed_spans, *spans.dropped_spans]
    assert bool(spans.dropped_spans) == (problem is not None)
    if case == "wrong node":
        assert events == []
        return
    start, end = events
    assert isinstance(start, ReRankStartEvent)
    assert isinstance(end, RegoloReRankEndEvent)
    assert (start.span_id, end.span_id) == (span.id_, span.id_)
    assert getattr(start.query, "query_str", None) == query
    assert (start.nodes, start.model_name, start.top_n) == (given, "Qwen3-Reranker-4B", len(given))
    assert end.nodes == kept
    assert end.fallback == (case in {"fallback", "blank query"})
    assert (end.error is None) == (case in {"ranked", "empty"})
    if case == "fallback":
        assert {name: end.model_dump()[name] for name in FALLBACK_REPORT} == FALLBACK_REPORT
        assert kept == given


# --- OpenInference ----------------------------------------------------------------------------------------------------


def test_openinference_shows_one_reranker_in_langchain(
    way: Way, langchain: LangChainRerank, stub: Stub, exporter: InMemorySpanExporter
) -> None:
    """A call is one RERANKER span with all attributes. For other handlers it stays a chain."""
    langchain.batch_size, stub.reply = 2, with_usage
    trace = RunCollectorCallbackHandler()
    way(langchain, trace)
    (span,) = reranker_spans(exporter)
    attributes = dict(span.attributes or {})
    assert (span.name, span.status.status_code) == ("RegoloRerank", StatusCode.OK)
    assert documents_in(span, "input") == [(text, None) for text in TEXTS]
    assert documents_in(span, "output") == [("b score=0.9", 0.9), ("c score=0.5", 0.5)]
    expected = {
        "reranker.query": QUERY,
        "reranker.model_name": "Qwen3-Reranker-4B",
        "reranker.top_k": 2,
        "reranker.input_documents.0.document.id": "id-0",
        "reranker.input_documents.0.document.metadata": '{"source": "x"}',
        "regolo_rerank.response_id": "r-1",
        "regolo_rerank.request_ids": ("call-1", "call-1"),
        "regolo_rerank.total_tokens": 14,
        "regolo_rerank.requests": 2,
        "regolo_rerank.cost": 0.5,
        "regolo_rerank.fallback": False,
    }
    assert attributes | expected == attributes
    (run,) = runs_in(trace.traced_runs)
    assert run.run_type == "chain"
    assert (span.parent is None) == (run.parent_run_id is None)


def test_openinference_shows_one_reranker_in_an_engine(
    call: Call, llama_index: LlamaIndexRerank, stub: Stub, exporter: InMemorySpanExporter
) -> None:
    """A rerank is a span below the engine's, with documents, scores and usage."""
    llama_index.batch_size, stub.reply = 2, with_usage
    index = VectorStoreIndex([candidate.node for candidate in nodes()], embed_model=MockEmbedding(embed_dim=2))
    engine: Any = index.as_query_engine(llm=MockLLM(), node_postprocessors=[llama_index], similarity_top_k=3)
    call(engine.query, QUERY)
    (span,) = reranker_spans(exporter)
    attributes = dict(span.attributes or {})
    assert span.parent is not None
    assert sorted(content for content, _ in documents_in(span, "input")) == TEXTS
    assert documents_in(span, "output") == [("b score=0.9", 0.9), ("c score=0.5", 0.5)]
    expected = {
        "reranker.query": QUERY,
        "reranker.top_k": 2,
        "regolo_rerank.request_ids": ("call-1", "call-1"),
        "regolo_rerank.total_tokens": 14,
        "regolo_rerank.cost": 0.5,
        "regolo_rerank.fallback": False,
    }
    assert attributes | expected == attributes


def test_openinference_shows_failures_and_fallbacks(
    rerank: Rerank, adapter: Adapter, stub: Stub, exporter: InMemorySpanExporter
) -> None:
    """The span of an error has its message and no output. That of a fallback has output without relevance scores."""
    adapter.top_n, adapter.on_error = None, "return_input"
    stub.script(error("no such key", 401))
    stub.always(DOWN)
    with pytest.raises(AuthenticationError):
        rerank(adapter)
    with pytest.warns(RerankFallbackWarning):
        rerank(adapter)
    failed, fallen_back = reranker_spans(exporter)
    assert failed.status.status_code is StatusCode.ERROR
    assert "no such key" in str(failed.status.description)
    assert [content for content, _ in documents_in(failed, "input")] == TEXTS
    assert documents_in(failed, "output") == []
    attributes = fallen_back.attributes or {}
    assert fallen_back.status.status_code is StatusCode.OK
    assert attributes["reranker.top_k"] == 3
    assert attributes["regolo_rerank.fallback"] is True
    assert attributes["regolo_rerank.request_ids"] == ("call-9",)
    score = None if isinstance(adapter, LangChainRerank) else 0.25
    assert documents_in(fallen_back, "output") == [(text, score) for text in TEXTS]


def test_a_span_of_many_documents_keeps_the_important_attributes(
    rerank: Rerank, langchain: LangChainRerank, exporter: InMemorySpanExporter
) -> None:
    """OpenTelemetry keeps 128 attributes. Those that it drops are of the last input documents."""
    rerank(langchain, [Document(f"{number} score=0.{number:03}") for number in range(200)])
    (span,) = reranker_spans(exporter)
    attributes = span.attributes or {}
    assert span.dropped_attributes > 0
    assert (attributes["reranker.query"], attributes["regolo_rerank.requests"]) == (QUERY, 2)
    assert documents_in(span, "output") == [("199 score=0.199", 0.199), ("198 score=0.198", 0.198)]
    assert documents_in(span, "input")[0] == ("0 score=0.000", None)


@pytest.mark.usefixtures("exporter")
def test_an_error_in_a_tracer_is_harmless(
    rerank: Rerank, adapter: Adapter, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A call ranks even if OpenInference fails. The log has the reason."""

    def fail(*_: Any) -> None:
        raise LookupError("no such span")

    monkeypatch.setattr(LangChainInstrumentor, "get_span", fail)
    monkeypatch.setattr("openinference.instrumentation.llama_index.get_current_span", fail)
    assert len(rerank(adapter)) == 2
    assert "A trace is incomplete: LookupError: no such span" in caplog.text


def test_tracers_and_langchain_classic_are_not_imported() -> None:
    """Calls with handlers work without OpenInference and langchain-classic, even if they are installed."""
    program = """
import sys
from langchain_core.documents import Document
from langchain_core.tracers.run_collector import RunCollectorCallbackHandler
from llama_index.core.schema import NodeWithScore, TextNode
from regolo_rerank import langchain, llama_index

trace = RunCollectorCallbackHandler()
langchain.RegoloRerank(base_url="local://").compress_documents([Document("a")], "a", callbacks=[trace])
llama_index.RegoloRerank(base_url="local://").postprocess_nodes([NodeWithScore(node=TextNode(text="a"))], query_str="a")
print(trace.traced_runs[0].name, {name.split(".")[0] for name in sys.modules} & {"openinference", "langchain_classic"})
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)  # noqa: S603 - our own
    assert done.stdout == "RegoloRerank set()\n", done.stderr


# --- LangSmith --------------------------------------------------------------------------------------------------------


@pytest.fixture
def langsmith() -> Iterator[tuple[LangChainTracer, Callable[[], list[dict[str, Any]]]]]:
    """LangSmith's tracer, and the runs that its client has sent by a session that only records."""
    session = MagicMock(spec=requests.Session)
    client = Client(api_url="http://127.0.0.1:9", api_key="made-up", session=session, auto_batch_tracing=False)

    def received() -> list[dict[str, Any]]:
        runs: dict[str, dict[str, Any]] = {}
        for sent in session.request.call_args_list:
            if body := sent.kwargs.get("data"):
                part = json.loads(body)
                runs.setdefault(part.get("id") or sent.args[1].rpartition("/")[2], {}).update(
                    {name: value for name, value in part.items() if value}
                )
        return list(runs.values())

    yield LangChainTracer(client=client), received
    client.cleanup()


@pytest.mark.parametrize(
    "answer", [with_usage, scored, lambda _: error("no such key", 401)], ids=["counted", "unknown", "failed"]
)
def test_langsmith_shows_model_and_tokens(
    way: Way, langchain: LangChainRerank, stub: Stub, langsmith: Any, answer: Callable[[Received], Reply]
) -> None:
    """The rerank has the names by which LangSmith knows models, and its tokens. No other run has them."""
    tracer, received = langsmith
    langchain.batch_size, stub.reply = 2, answer
    with suppress(AuthenticationError):
        way(langchain, tracer)
    runs = received()
    (metadata,) = [run["extra"]["metadata"] for run in runs if "ls_model_name" in run["extra"]["metadata"]]
    assert (metadata["ls_provider"], metadata["ls_model_name"]) == ("regolo", "Qwen3-Reranker-4B")
    tokens = {"input_tokens": 14, "output_tokens": 0, "total_tokens": 14}
    assert metadata.get("usage_metadata") == (tokens if answer is with_usage else None)
    assert KEY not in json.dumps(runs)


# --- the key ----------------------------------------------------------------------------------------------------------

QUOTING = Reply(
    {"error": {"message": f"key {KEY} has a problem", "code": KEY, "type": KEY}}, 500, {"x-litellm-call-id": KEY}
)
"""An error that quotes the key in every field."""


@pytest.mark.parametrize("outcome", ["ranked", "fallback", "error"])
def test_no_trace_shows_the_key(
    rerank: Rerank,
    adapter: Adapter,
    stub: Stub,
    exporter: InMemorySpanExporter,
    events: list[BaseEvent],
    spans: SimpleSpanHandler,
    caplog: pytest.LogCaptureFixture,
    outcome: str,
) -> None:
    """Runs, events, callbacks, spans, warnings, logs and errors never have it, not even if the server quotes it."""
    handler, trace, debug = Handler(), RunCollectorCallbackHandler(), LlamaDebugHandler(print_trace_on_end=False)
    adapter.on_error, adapter.max_retries = "return_input" if outcome == "fallback" else "raise", 1
    if isinstance(adapter, LlamaIndexRerank):
        adapter.callback_manager = CallbackManager([debug])
    if outcome != "ranked":
        stub.always(QUOTING)
    said: list[str] = []
    with caplog.at_level(logging.DEBUG):
        for listener in (handler, trace):
            if outcome == "error":
                with pytest.raises(RegoloError) as raised:
                    rerank(adapter, handler=listener)
                said.append(f"{raised.value!r} {vars(raised.value)}")
            elif outcome == "fallback":
                with pytest.warns(RerankFallbackWarning) as caught:
                    rerank(adapter, handler=listener)
                said.append(str(caught[0].message))
            else:
                rerank(adapter, handler=listener)
    assert stub.received[0].headers["authorization"] == f"Bearer {KEY}"
    exported = "".join(span.to_json() for span in exporter.get_finished_spans())
    assert QUERY in exported
    assert ("***" in exported) == (outcome != "ranked")
    said += [
        exported,
        *map(repr, [adapter, handler.seen, events, spans.completed_spans, spans.dropped_spans]),
        *(run.model_dump_json() for run in trace.traced_runs),
        *(event.model_dump_json() for event in events),
        *(repr(event.payload) for event in debug.get_events()),
        *(repr(vars(record)) for record in caplog.records if record.name == "regolo_rerank"),
        repr(adapter.model_dump()),
        adapter.model_dump_json(),
        repr(adapter.to_json()) if isinstance(adapter, LlamaIndexRerank) else "",
    ]
    assert KEY not in "".join(said)


def _invoke(chain: Any, call: Call, given: Any, handler: Any, key: Any) -> None:
    call(chain.invoke, given, {"callbacks": [handler]}, api_key=key)


def _bind(chain: Any, call: Call, given: Any, handler: Any, key: Any) -> None:
    call(chain.bind(api_key=key).invoke, given, {"callbacks": [handler]})


def _configure(chain: Any, call: Call, given: Any, handler: Any, key: Any) -> None:
    # LangChain leaves a field with this id out of a trace's metadata. With another id, only a SecretStr is left out.
    name = "api_key" if isinstance(key, str) else "tenant_key"
    configured = chain.configurable_fields(api_key=ConfigurableField(id=name))
    call(configured.invoke, given, {"callbacks": [handler], "configurable": {name: key}})


@pytest.mark.parametrize("kind", [str, SecretStr])
@pytest.mark.parametrize("way_of_key", [_invoke, _bind, _configure])
@pytest.mark.parametrize("form", ["step", "retriever"])
def test_the_key_of_one_call_is_in_no_trace(
    call: Call,
    langchain: LangChainRerank,
    stub: Stub,
    exporter: InMemorySpanExporter,
    langsmith: Any,
    form: str,
    way_of_key: Callable[..., None],
    kind: type,
) -> None:
    """Inputs, metadata and serialised forms of runs are recorded without it, in LangSmith and OpenInference too."""
    other = "sk-one-call-77aa"
    trace = RunCollectorCallbackHandler()
    tracer, received = langsmith
    chain: Any = langchain.as_runnable()
    given: Any = {"query": QUERY, "documents": documents()}
    if form == "retriever":
        chain, given = RerankRetriever(base_retriever=Everything(), reranker=langchain), QUERY
    for handler in (trace, tracer):
        way_of_key(chain, call, given, handler, kind(other))
    assert {request.headers["authorization"] for request in stub.received} == {f"Bearer {other}"}
    recorded = [
        *(f"{run.model_dump_json()} {run!r}" for run in runs_in(trace.traced_runs)),
        *(run.model_dump_json() for run in trace.traced_runs),
        json.dumps(received()),
        *(span.to_json() for span in exporter.get_finished_spans()),
    ]
    assert QUERY in recorded[0]
    assert other not in "".join(recorded)
