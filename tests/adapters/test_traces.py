"""What handlers, tracers, events, spans and logs tell of a rerank, seen by real ones of both frameworks."""

import asyncio
import json
import logging
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import pytest
from langchain_classic.retrievers import ContextualCompressionRetriever
from langchain_core.callbacks import AsyncCallbackHandler, BaseCallbackHandler, CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.load import dumps
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import RunnablePassthrough
from langchain_core.tracers import Run
from langchain_core.tracers.run_collector import RunCollectorCallbackHandler
from llama_index.core import MockEmbedding, VectorStoreIndex
from llama_index.core.callbacks import CallbackManager, CBEventType, EventPayload, LlamaDebugHandler
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events import BaseEvent
from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
from llama_index.core.instrumentation.span_handlers import SimpleSpanHandler
from llama_index.core.llms import MockLLM
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index_instrumentation import get_dispatcher
from openinference.instrumentation.langchain import LangChainInstrumentor
from openinference.instrumentation.langchain._tracer import OpenInferenceTracer
from openinference.instrumentation.llama_index import LlamaIndexInstrumentor
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from pydantic import Field

from regolo_rerank import (
    AuthenticationError,
    BadRequestError,
    InvalidInputError,
    RegoloError,
    RerankFallbackWarning,
    Usage,
)
from regolo_rerank.langchain import RegoloRerank as LangChainRerank
from regolo_rerank.llama_index import RegoloRerank as LlamaIndexRerank
from regolo_rerank.llama_index import RegoloReRankEndEvent
from tests.conftest import KEY
from tests.support.stub import Received, Reply, Stub, error, scored

Adapter = LangChainRerank | LlamaIndexRerank

QUERY = "capital of China"
TEXTS = ["a score=0.1", "b score=0.9", "c score=0.5"]

USAGES: dict[str, dict[str, Any]] = {
    "usage": {"usage": {"prompt_tokens": 5, "total_tokens": 7}},
    "prompt tokens": {"usage": {"prompt_tokens": 7}},
    "billed units": {"meta": {"billed_units": {"total_tokens": 7}, "tokens": {"input_tokens": 5}}},
    "meta tokens": {"meta": {"tokens": {"input_tokens": 7}}},
}
"""A reply's seven tokens, in each of the places where the gateway's backends write them."""


class Handler(BaseCallbackHandler):
    """Keeps what LangChain tells a handler of chains: what happened, in which run, and with what."""

    def __init__(self) -> None:
        self.told: list[tuple[str, Any, Any]] = []

    def on_chain_start(self, serialized: Any, inputs: Any, *, run_id: Any, **kwargs: Any) -> None:
        del serialized, kwargs
        self.told.append(("start", run_id, inputs))

    def on_chain_end(self, outputs: Any, *, run_id: Any, **kwargs: Any) -> None:
        del kwargs
        self.told.append(("end", run_id, outputs))

    def on_chain_error(self, error: BaseException, *, run_id: Any, **kwargs: Any) -> None:
        del kwargs
        self.told.append(("error", run_id, error))


class AsyncHandler(AsyncCallbackHandler):
    """Keeps the same, in the event loop."""

    def __init__(self) -> None:
        self.told: list[tuple[str, Any, Any]] = []

    async def on_chain_start(self, serialized: Any, inputs: Any, *, run_id: Any, **kwargs: Any) -> None:
        del serialized, kwargs
        self.told.append(("start", run_id, inputs))

    async def on_chain_end(self, outputs: Any, *, run_id: Any, **kwargs: Any) -> None:
        del kwargs
        self.told.append(("end", run_id, outputs))

    async def on_chain_error(self, error: BaseException, *, run_id: Any, **kwargs: Any) -> None:
        del kwargs
        self.told.append(("error", run_id, error))


class Events(BaseEventHandler):
    """Keeps LlamaIndex's events of reranking."""

    seen: list[BaseEvent] = Field(default_factory=list)

    def handle(self, event: BaseEvent, **_: Any) -> None:
        if isinstance(event, ReRankStartEvent | ReRankEndEvent):
            self.seen.append(event)


class Everything(BaseRetriever):
    """Retrieves the documents of the texts."""

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:
        del query, run_manager
        return documents()


class Call(Protocol):
    """Reranks the texts, or other documents or nodes, with an adapter; a handler is for LangChain's."""

    def __call__(
        self, adapter: Adapter, items: Any = None, handler: Any = None, *, query: str = QUERY
    ) -> list[Any]: ...


class Way(Protocol):
    """Reranks the texts in one of LangChain's ways, with a callback handler or none."""

    def __call__(self, reranker: LangChainRerank, handler: Any = None) -> list[Document]: ...


def documents() -> list[Document]:
    """Return the texts as LangChain's documents; only the first has an id and metadata."""
    return [Document(TEXTS[0], id="id-0", metadata={"source": "x"}), *(Document(text) for text in TEXTS[1:])]


def nodes() -> list[NodeWithScore]:
    """Return the texts as LlamaIndex's nodes."""
    return [NodeWithScore(node=TextNode(text=text, id_=text[0]), score=0.25) for text in TEXTS]


@pytest.fixture
def langchain(stub: Stub) -> LangChainRerank:
    """A reranker that sends texts as they are and does not retry."""
    return LangChainRerank(KEY, base_url=stub.url, prompt_format="plain", max_retries=0, top_n=2)


@pytest.fixture
def llama_index(stub: Stub) -> LlamaIndexRerank:
    """The same for LlamaIndex."""
    return LlamaIndexRerank(KEY, base_url=stub.url, prompt_format="plain", max_retries=0, top_n=2)


@pytest.fixture(params=["langchain", "llama_index"])
def adapter(request: pytest.FixtureRequest) -> Adapter:
    """Both of them."""
    made: Adapter = request.getfixturevalue(request.param)
    return made


@pytest.fixture
def call(mode: str) -> Call:
    """Call an adapter in both modes."""

    def call(adapter: Adapter, items: Any = None, handler: Any = None, *, query: str = QUERY) -> list[Any]:
        if isinstance(adapter, LangChainRerank):
            given = documents() if items is None else items
            callbacks = [] if handler is None else [handler]
            if mode == "sync":
                return adapter.compress_documents(given, query, callbacks)
            return asyncio.run(adapter.acompress_documents(given, query, callbacks))
        given = nodes() if items is None else items
        if mode == "sync":
            return adapter.postprocess_nodes(given, query_str=query)
        return asyncio.run(adapter.apostprocess_nodes(given, query_str=query))

    return call


@pytest.fixture(params=["compressor", "retriever", "step"])
def way(request: pytest.FixtureRequest, mode: str) -> Way:
    """Rerank in LangChain by a call of the compressor, in a retriever, and as a step of a chain, in both modes."""

    def call(reranker: LangChainRerank, handler: Any = None) -> list[Document]:
        callbacks = [] if handler is None else [handler]
        if request.param == "compressor" and mode == "sync":
            return reranker.compress_documents(documents(), QUERY, callbacks)
        if request.param == "compressor":
            return asyncio.run(reranker.acompress_documents(documents(), QUERY, callbacks))
        chain: Any = {"query": RunnablePassthrough(), "documents": Everything()} | reranker.as_runnable()
        if request.param == "retriever":
            chain = ContextualCompressionRetriever(base_compressor=reranker, base_retriever=Everything())
        config = {"callbacks": callbacks}
        return list(chain.invoke(QUERY, config) if mode == "sync" else asyncio.run(chain.ainvoke(QUERY, config)))

    return call


@pytest.fixture
def events() -> Iterator[list[BaseEvent]]:
    """What LlamaIndex's root dispatcher is told of reranking."""
    handler, root = Events(), get_dispatcher()
    root.event_handlers.append(handler)
    yield handler.seen
    root.event_handlers.remove(handler)


@pytest.fixture
def spans() -> Iterator[SimpleSpanHandler]:
    """The spans of LlamaIndex's root dispatcher."""
    handler, root = SimpleSpanHandler(), get_dispatcher()
    root.span_handlers.append(handler)
    yield handler
    root.span_handlers.remove(handler)


@pytest.fixture
def exporter() -> Iterator[InMemorySpanExporter]:
    """What OpenInference's instrumentors of both frameworks export."""
    kept, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(kept))
    instrumentors: list[Any] = [LangChainInstrumentor(), LlamaIndexInstrumentor()]
    for instrumentor in instrumentors:
        instrumentor.instrument(tracer_provider=provider)
    yield kept
    for instrumentor in instrumentors:
        instrumentor.uninstrument()
    del instrumentors[1]._span_handler  # its thread ends with it
    provider.shutdown()


def runs_in(roots: list[Run]) -> list[Run]:
    """Return runs and all below them."""
    return [run for root in roots for run in (root, *runs_in(root.child_runs))]


def reranks_in(roots: list[Run]) -> list[Run]:
    """Return the runs that are reranks."""
    return [run for run in runs_in(roots) if run.name == "RegoloRerank"]


def reranker_spans(exporter: InMemorySpanExporter) -> list[ReadableSpan]:
    """Return the exported spans that are a reranker's."""
    return [
        span
        for span in exporter.get_finished_spans()
        if (span.attributes or {}).get("openinference.span.kind") == "RERANKER"
    ]


def documents_in(span: ReadableSpan, side: str) -> list[tuple[Any, Any]]:
    """Return content and score of each document that goes into a span, or comes out of it."""
    attributes = span.attributes or {}
    prefix = f"reranker.{side}_documents"
    count = len({key for key in attributes if re.fullmatch(rf"{prefix}\.\d+\.document\.content", key)})
    names = [f"{prefix}.{index}.document" for index in range(count)]
    return [(attributes.get(f"{name}.content"), attributes.get(f"{name}.score")) for name in names]


def scored_with(request: Received, **fields: Any) -> dict[str, Any]:
    """Return the JSON of what the service answers, with further fields."""
    return {**json.loads(scored(request).encoded()), **fields}


def telling(request: Received) -> Reply:
    """Answer as the service does, with seven tokens for each request and a name for it."""
    return Reply(scored_with(request, id="r-1", **USAGES["usage"]), headers={"x-litellm-call-id": "call-1"})


TOLD = {
    "response_id": "r-1",
    "request_ids": ["call-1", "call-1"],
    "usage": {"total_tokens": 14, "requests": 2},
    "fallback": False,
    "error": None,
}
"""What is told of a ranking of two such requests."""

FALLEN_BACK = {
    "response_id": None,
    "request_ids": ["call-9"],
    "usage": None,
    "fallback": True,
    "error": "ServerError: down [HTTP 500, request call-9]",
}
DOWN = Reply({"error": {"message": "down"}}, 500, {"x-litellm-call-id": "call-9"})


# --- LangChain --------------------------------------------------------------------------------------------------------


def test_a_run_tells_what_came_in_and_out_and_what_it_took(way: Way, langchain: LangChainRerank, stub: Stub) -> None:
    """Query, documents, model and top_n go in; documents, scores, ids and usage of all requests come out."""
    langchain.batch_size, stub.reply = 2, telling
    trace = RunCollectorCallbackHandler()
    kept = way(langchain, trace)
    (run,) = reranks_in(trace.traced_runs)
    assert (run.run_type, run.error) == ("chain", None)
    assert run.inputs == {"query": QUERY, "documents": documents(), "model": "Qwen3-Reranker-4B", "top_n": 2}
    assert run.outputs == {"documents": kept, "scores": [0.9, 0.5], **TOLD}
    json.dumps([run.outputs["scores"], {name: run.outputs[name] for name in TOLD}])


def test_a_handler_is_told_of_a_start_and_an_end(mode: str, call: Call, langchain: LangChainRerank) -> None:
    """A handler of either kind is told of one run, once of its start and once of its end."""
    handler = Handler() if mode == "sync" else AsyncHandler()
    kept = call(langchain, handler=handler)
    (started, run_id, inputs), (ended, same_id, outputs) = handler.told
    assert (started, ended, same_id) == ("start", "end", run_id)
    assert (inputs["query"], outputs["documents"]) == (QUERY, kept)


@pytest.mark.parametrize("on_error", ["raise", "return_input"])
def test_a_handler_is_told_of_an_error(way: Way, langchain: LangChainRerank, stub: Stub, on_error: Any) -> None:
    """A wrong key ends the run with the error that the caller gets, whatever `on_error` says, and with no output."""
    langchain.on_error = on_error
    stub.always(error("no such key", 401))
    handler, trace = Handler(), RunCollectorCallbackHandler()
    for listener in (handler, trace):
        with pytest.raises(AuthenticationError, match="no such key"):
            way(langchain, listener)
    errors = [told for what, _, told in handler.told if what == "error"]
    assert {type(told) for told in errors} == {AuthenticationError}
    (run,) = reranks_in(trace.traced_runs)
    assert "AuthenticationError" in str(run.error)
    assert not run.outputs


def test_a_fallback_shows_in_the_run(way: Way, langchain: LangChainRerank, stub: Stub) -> None:
    """A run that has fallen back ends well, and says so and why, with no score anywhere."""
    langchain.on_error = "return_input"
    stub.always(DOWN)
    trace = RunCollectorCallbackHandler()
    with pytest.warns(RerankFallbackWarning, match="down"):
        kept = way(langchain, trace)
    (run,) = reranks_in(trace.traced_runs)
    assert kept == documents()[:2]
    assert run.error is None
    assert run.outputs == {"documents": kept, "scores": None, **FALLEN_BACK}


def test_nothing_is_written_down_where_nobody_listens(
    way: Way, langchain: LangChainRerank, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a handler, a call does not even put together what it would tell one."""

    def fail(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr("regolo_rerank.langchain._outputs", fail)
    assert len(way(langchain)) == 2
    with pytest.raises(AssertionError):
        way(langchain, Handler())


def test_an_interrupted_call_ends_its_run(call: Call, langchain: LangChainRerank) -> None:
    """Ctrl-C leaves no run open: its error is the interruption."""

    def interrupted(query: str, documents: list[str]) -> list[float]:
        raise KeyboardInterrupt(query, documents)

    handler = Handler()
    langchain.base_url, langchain.scorer = "local://", interrupted
    with pytest.raises(KeyboardInterrupt):
        call(langchain, handler=handler)
    assert [(what, type(told)) for what, _, told in handler.told] == [("start", dict), ("error", KeyboardInterrupt)]


# --- LlamaIndex -------------------------------------------------------------------------------------------------------


def test_the_end_event_tells_what_a_call_took(
    call: Call, llama_index: LlamaIndexRerank, stub: Stub, events: list[BaseEvent]
) -> None:
    """It is core's own event for a handler written for that, and has ids and usage of all requests besides."""
    llama_index.batch_size, stub.reply = 2, telling
    debug = LlamaDebugHandler(print_trace_on_end=False)
    llama_index.callback_manager = CallbackManager([debug])
    kept = call(llama_index)
    _, end = events
    assert isinstance(end, ReRankEndEvent)
    assert end.class_name() == ReRankEndEvent.class_name()
    assert end.nodes == kept
    assert isinstance(end, RegoloReRankEndEvent)
    assert (end.response_id, end.request_ids, end.usage) == ("r-1", ["call-1", "call-1"], Usage(14, 2))
    assert (end.fallback, end.error) == (False, None)
    assert {name: end.model_dump()[name] for name in TOLD} == TOLD
    ((_, ended),) = debug.get_event_pairs(CBEventType.RERANKING)
    assert ended.payload == {EventPayload.NODES: kept, EventPayload.ADDITIONAL_KWARGS: TOLD}


def test_a_fallback_shows_in_the_event(
    call: Call, llama_index: LlamaIndexRerank, stub: Stub, events: list[BaseEvent]
) -> None:
    """The end of a call that has fallen back says so and why, with the retriever's scores and no others."""
    llama_index.on_error = "return_input"
    stub.always(DOWN)
    debug = LlamaDebugHandler(print_trace_on_end=False)
    llama_index.callback_manager = CallbackManager([debug])
    with pytest.warns(RerankFallbackWarning, match="down"):
        kept = call(llama_index)
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
    call: Call,
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
        kept = call(llama_index, given, query=query)
    else:
        with pytest.raises(problem):
            call(llama_index, given, query=query)
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


# --- both -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [*USAGES, "none"])
def test_usage_adds_up_over_requests(
    call: Call, adapter: Adapter, stub: Stub, events: list[BaseEvent], shape: str
) -> None:
    """Tokens of all requests, in whichever place they come, and requests with the one that was sent again."""
    stub.script(error("try again", 500))
    stub.reply = lambda request: Reply(scored_with(request, **USAGES.get(shape, {})))
    adapter.batch_size, adapter.max_retries = 1, 1
    handler = Handler()
    call(adapter, handler=handler)
    told = handler.told[-1][-1] if isinstance(adapter, LangChainRerank) else events[-1].model_dump()
    assert told["usage"] == {"total_tokens": None if shape == "none" else 21, "requests": 4}


def too_long(request: Received) -> Reply:
    """Refuse a request with a document of more than 20 characters, as the gateway does."""
    if max(map(len, request.documents)) > 20:
        return error("This model's maximum context length is 4096 tokens.", 400)
    return scored(request)


def test_a_document_that_is_too_long_is_named_and_can_be_cut(call: Call, adapter: Adapter, stub: Stub) -> None:
    """The error names it by its place among the caller's own, and the option by which it ranks and comes back whole."""
    stub.reply = too_long
    adapter.batch_size, adapter.max_concurrency, adapter.top_n, adapter.on_error = 2, 1, None, "return_input"
    texts = ["a score=0.1", " ", "a score=0.1", "b score=0.9", "c score=0.5", "d score=0.3 " + "x" * 30, "e score=0.2"]
    given: list[Any] = [Document(text) for text in texts]
    if isinstance(adapter, LlamaIndexRerank):
        given = [NodeWithScore(node=TextNode(text=text)) for text in texts]
    said = r"the longest document sent is documents\[5\] with 42 characters; the option max_document_chars cuts"
    with pytest.raises(BadRequestError, match=said):
        call(adapter, given)
    adapter.max_document_chars = 20
    kept = [item.text if isinstance(item, NodeWithScore) else item.page_content for item in call(adapter, given)]
    assert kept == [texts[index] for index in (3, 4, 5, 6, 0, 2, 1)]
    assert max(len(text) for request in stub.received[-3:] for text in request.documents) == 20


def test_requests_and_retries_are_in_the_log(
    call: Call, adapter: Adapter, stub: Stub, caplog: pytest.LogCaptureFixture
) -> None:
    """The logger `regolo_rerank` has a line at DEBUG for each request, and one at WARNING for each that is repeated."""
    caplog.set_level(logging.DEBUG, "regolo_rerank")
    stub.script(error("try again", 500))
    adapter.max_retries = 1
    call(adapter)
    said = [(record.levelname, record.getMessage()) for record in caplog.records if record.name == "regolo_rerank"]
    assert [level for level, _ in said] == ["DEBUG", "WARNING", "DEBUG"]
    assert "answered 500 to 3 documents" in said[0][1]
    assert re.match(r"attempt 1 failed, next in \d\.\d\d s: ServerError: try again", said[1][1])
    assert "answered 200 to 3 documents" in said[2][1]


# --- OpenInference ----------------------------------------------------------------------------------------------------


def test_openinference_sees_a_reranker_in_langchain(
    way: Way, langchain: LangChainRerank, stub: Stub, exporter: InMemorySpanExporter
) -> None:
    """A call is one RERANKER span, with all that is known of it, and still a run of a chain for other handlers."""
    langchain.batch_size, stub.reply = 2, telling
    trace = RunCollectorCallbackHandler()
    way(langchain, trace)
    (span,) = reranker_spans(exporter)
    attributes = span.attributes or {}
    assert (span.name, span.status.status_code) == ("RegoloRerank", StatusCode.OK)
    assert attributes["reranker.query"] == QUERY
    assert attributes["reranker.model_name"] == "Qwen3-Reranker-4B"
    assert attributes["reranker.top_k"] == 2
    assert documents_in(span, "input") == [(text, None) for text in TEXTS]
    assert documents_in(span, "output") == [(TEXTS[1], 0.9), (TEXTS[2], 0.5)]
    assert attributes["reranker.input_documents.0.document.id"] == "id-0"
    assert attributes["reranker.input_documents.0.document.metadata"] == '{"source": "x"}'
    assert attributes["regolo_rerank.response_id"] == "r-1"
    assert attributes["regolo_rerank.request_ids"] == ("call-1", "call-1")
    assert (attributes["regolo_rerank.total_tokens"], attributes["regolo_rerank.requests"]) == (14, 2)
    assert attributes["regolo_rerank.fallback"] is False
    (run,) = reranks_in(trace.traced_runs)
    assert run.run_type == "chain"
    spans = {found.context.span_id: found for found in exporter.get_finished_spans() if found.context}
    above = spans[span.parent.span_id].name if span.parent else None
    assert (above is None) == (run.parent_run_id is None)
    assert above in {None, "ContextualCompressionRetriever", "RunnableSequence"}


def test_openinference_sees_a_reranker_in_llama_index(
    mode: str, llama_index: LlamaIndexRerank, stub: Stub, exporter: InMemorySpanExporter
) -> None:
    """In an engine's trace, a rerank is one RERANKER span with query, model, top_k, documents and scores."""
    llama_index.batch_size, stub.reply = 2, telling
    index = VectorStoreIndex([node.node for node in nodes()], embed_model=MockEmbedding(embed_dim=2))
    engine = index.as_query_engine(llm=MockLLM(), node_postprocessors=[llama_index], similarity_top_k=3)
    if mode == "sync":
        engine.query(QUERY)
    else:
        asyncio.run(engine.aquery(QUERY))
    (span,) = reranker_spans(exporter)
    attributes = span.attributes or {}
    assert span.parent is not None
    assert span.status.status_code is StatusCode.OK
    assert attributes["reranker.query"] == QUERY
    assert attributes["reranker.model_name"] == "Qwen3-Reranker-4B"
    assert attributes["reranker.top_k"] == 2
    assert sorted(content for content, _ in documents_in(span, "input")) == TEXTS
    assert documents_in(span, "output") == [(TEXTS[1], 0.9), (TEXTS[2], 0.5)]
    assert attributes["regolo_rerank.request_ids"] == ("call-1", "call-1")
    assert (attributes["regolo_rerank.total_tokens"], attributes["regolo_rerank.requests"]) == (14, 2)
    assert attributes["regolo_rerank.fallback"] is False


def test_openinference_sees_that_all_are_kept(call: Call, adapter: Adapter, exporter: InMemorySpanExporter) -> None:
    """Without a top_n, a span's top_k is the number of its documents."""
    adapter.top_n = None
    assert len(call(adapter)) == 3
    (span,) = reranker_spans(exporter)
    assert (span.attributes or {})["reranker.top_k"] == 3
    assert len(documents_in(span, "output")) == 3


def test_openinference_sees_that_a_reranker_failed(
    call: Call, adapter: Adapter, stub: Stub, exporter: InMemorySpanExporter
) -> None:
    """The span of a call that raises has what went in, nothing that came out, and the error."""
    stub.always(error("no such key", 401))
    with pytest.raises(AuthenticationError):
        call(adapter)
    (span,) = reranker_spans(exporter)
    assert span.status.status_code is StatusCode.ERROR
    assert "no such key" in str(span.status.description)
    assert [event.name for event in span.events] == ["exception"]
    assert [content for content, _ in documents_in(span, "input")] == TEXTS
    assert documents_in(span, "output") == []


def test_openinference_sees_a_fallback(
    call: Call, adapter: Adapter, stub: Stub, exporter: InMemorySpanExporter
) -> None:
    """The span of a call that has fallen back says so, and has no score but the retriever's."""
    adapter.on_error = "return_input"
    stub.always(DOWN)
    with pytest.warns(RerankFallbackWarning, match="down"):
        call(adapter)
    (span,) = reranker_spans(exporter)
    attributes = span.attributes or {}
    assert span.status.status_code is StatusCode.OK
    assert attributes["regolo_rerank.fallback"] is True
    assert attributes["regolo_rerank.request_ids"] == ("call-9",)
    assert "regolo_rerank.requests" not in attributes
    score = None if isinstance(adapter, LangChainRerank) else 0.25
    assert documents_in(span, "output") == [(text, score) for text in TEXTS[:2]]
    assert None not in attributes.values()


def test_what_matters_stays_in_a_span_of_many_documents(
    call: Call, langchain: LangChainRerank, exporter: InMemorySpanExporter
) -> None:
    """Where OpenTelemetry drops attributes, 128 being its limit, these are input documents from the end."""
    call(langchain, [Document(f"{number} score=0.{number:03}") for number in range(200)])
    (span,) = reranker_spans(exporter)
    attributes = span.attributes or {}
    assert span.dropped_attributes > 0
    assert attributes["reranker.query"] == QUERY
    assert attributes["reranker.top_k"] == 2
    assert attributes["regolo_rerank.requests"] == 2
    assert documents_in(span, "output") == [("199 score=0.199", 0.199), ("198 score=0.198", 0.198)]
    assert documents_in(span, "input")[0] == ("0 score=0.000", None)


@pytest.mark.usefixtures("exporter")
def test_a_fault_of_a_tracer_is_not_the_callers(
    call: Call, adapter: Adapter, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A call ranks even where OpenInference's span cannot be told of it; the log has why."""

    def fail(*_: Any) -> None:
        raise LookupError("no such span")

    monkeypatch.setattr(OpenInferenceTracer, "get_span", fail)
    monkeypatch.setattr("openinference.instrumentation.llama_index.get_current_span", fail)
    assert len(call(adapter)) == 2
    assert "a trace is incomplete: LookupError: no such span" in caplog.text


def test_openinference_is_never_loaded_for_a_trace() -> None:
    """Calls with handlers work without it, and do not import it where it is installed."""
    program = """
import sys
from langchain_core.documents import Document
from langchain_core.tracers.run_collector import RunCollectorCallbackHandler
from llama_index.core.schema import NodeWithScore, TextNode
from regolo_rerank import langchain, llama_index

trace = RunCollectorCallbackHandler()
langchain.RegoloRerank(base_url="local://").compress_documents([Document("a")], "a", callbacks=[trace])
llama_index.RegoloRerank(base_url="local://").postprocess_nodes([NodeWithScore(node=TextNode(text="a"))], query_str="a")
print(trace.traced_runs[0].name, [name for name in sys.modules if name.startswith("openinference")])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)  # noqa: S603 - our own
    assert done.stdout == "RegoloRerank []\n", done.stderr


# --- the key ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reply", [None, "fallback", "error"])
@pytest.mark.filterwarnings("ignore::regolo_rerank.errors.RerankFallbackWarning")  # what it says is in test_secrets.py
def test_no_trace_shows_the_key(
    call: Call,
    adapter: Adapter,
    stub: Stub,
    exporter: InMemorySpanExporter,
    events: list[BaseEvent],
    spans: SimpleSpanHandler,
    reply: str | None,
) -> None:
    """Runs, events, callbacks and exported spans hold the key in no form, not even where the server quotes it."""
    handler, trace, debug = Handler(), RunCollectorCallbackHandler(), LlamaDebugHandler(print_trace_on_end=False)
    adapter.on_error = "return_input" if reply == "fallback" else "raise"
    if isinstance(adapter, LlamaIndexRerank):
        adapter.callback_manager = CallbackManager([debug])
    if reply is not None:
        body = {"error": {"message": f"key {KEY} has a problem", "code": KEY, "type": KEY}}
        stub.always(Reply(body, 500, {"x-litellm-call-id": KEY}))

    def calls() -> None:
        for listener in (handler, trace):
            call(adapter, handler=listener)

    if reply == "error":
        with pytest.raises(RegoloError):
            calls()
        with pytest.raises(RegoloError):
            call(adapter, handler=trace)
    else:
        calls()
    assert stub.received[0].headers["authorization"] == f"Bearer {KEY}"
    exported = "".join(span.to_json() for span in exporter.get_finished_spans())
    assert QUERY in exported
    assert bool(reply) == ("***" in exported)
    told = [
        *map(repr, [handler.told, events, spans.completed_spans, spans.dropped_spans]),
        *(run.model_dump_json() for run in trace.traced_runs),
        *(event.model_dump_json() for event in events),
        *(repr(event.payload) for event in debug.get_events()),
    ]
    assert KEY not in exported + "".join(told)


@pytest.mark.parametrize("form", [dumps, repr, pickle.dumps, lambda step: step.get_graph().draw_mermaid()])
def test_no_form_of_a_step_shows_the_key(form: Callable[[Any], Any], langchain: LangChainRerank) -> None:
    """A step, alone and in a chain, can be dumped, shown, pickled and drawn without the key."""
    step = langchain.as_runnable()
    steps: list[Any] = [step, RunnablePassthrough() | step, step.with_retry(), step.with_config(tags=["x"])]
    for shown in steps:
        assert "RegoloRerank" in str(form(shown))
        assert KEY not in str(form(shown))
