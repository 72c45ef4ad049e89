"""What both frameworks tell of a rerank; what each of them tells is in the files beside this one."""

import logging
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_core.load import dumps
from langchain_core.runnables import RunnablePassthrough
from langchain_core.tracers.run_collector import RunCollectorCallbackHandler
from llama_index.core.callbacks import CallbackManager, EventPayload, LlamaDebugHandler
from llama_index.core.instrumentation.events import BaseEvent
from llama_index.core.instrumentation.span_handlers import SimpleSpanHandler
from llama_index.core.schema import NodeWithScore, TextNode
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from regolo_rerank import BadRequestError, RegoloError
from regolo_rerank.langchain import RegoloRerank as LangChainRerank
from regolo_rerank.llama_index import RegoloRerank as LlamaIndexRerank
from tests.conftest import KEY
from tests.support.stub import Received, Reply, Stub, error, scored
from tests.support.traces import QUERY, USAGES, Adapter, Handler, Rerank, scored_with


@pytest.mark.parametrize("shape", [*USAGES, "none"])
def test_usage_adds_up_over_requests(
    rerank: Rerank, adapter: Adapter, stub: Stub, events: list[BaseEvent], shape: str
) -> None:
    """Tokens of all requests, in whichever place they come, and requests with the one that was sent again."""
    stub.script(error("try again", 500))
    stub.reply = lambda request: Reply(scored_with(request, **USAGES.get(shape, {})))
    adapter.batch_size, adapter.max_retries = 1, 1
    handler = Handler()
    rerank(adapter, handler=handler)
    told = handler.told[-1][-1] if isinstance(adapter, LangChainRerank) else events[-1].model_dump()
    assert told["usage"] == {"total_tokens": None if shape == "none" else 21, "requests": 4, "cost": None}


def test_whoever_is_told_gets_lists_of_its_own(rerank: Rerank, adapter: Adapter, stub: Stub) -> None:
    """A handler that changes what it is shown, while the call goes on or after it, changes nothing of the ranking."""
    handler, debug = Handler(), LlamaDebugHandler(print_trace_on_end=False)
    if isinstance(adapter, LlamaIndexRerank):
        adapter.callback_manager = CallbackManager([debug])

    def shown() -> list[list[Any]]:
        payloads = [event.payload or {} for event in debug.get_events()]
        return [told["documents"] for _, _, told in handler.told] + [
            payload[EventPayload.NODES] for payload in payloads
        ]

    def reply(request: Received) -> Reply:
        (given,) = shown()
        given.reverse()
        return scored(request)

    stub.reply = reply
    kept = rerank(adapter, handler=handler)
    _, came_out = shown()
    came_out.clear()
    found = [(item.page_content, item.metadata["relevance_score"]) for item in kept if isinstance(item, Document)]
    found += [(item.text, item.score) for item in kept if isinstance(item, NodeWithScore)]
    assert found == [("b score=0.9", 0.9), ("c score=0.5", 0.5)]


def too_long(request: Received) -> Reply:
    """Refuse a request with a document of more than 20 characters, as the gateway does."""
    if max(map(len, request.documents)) > 20:
        return error("This model's maximum context length is 4096 tokens.", 400)
    return scored(request)


def test_a_document_that_is_too_long_is_named_and_can_be_cut(rerank: Rerank, adapter: Adapter, stub: Stub) -> None:
    """The error names it by its place among the caller's own, and the option by which it ranks and comes back whole."""
    stub.reply = too_long
    adapter.batch_size, adapter.max_concurrency, adapter.top_n, adapter.on_error = 2, 1, None, "return_input"
    texts = ["a score=0.1", " ", "a score=0.1", "b score=0.9", "c score=0.5", "d score=0.3 " + "x" * 30, "e score=0.2"]
    given: list[Any] = [Document(text) for text in texts]
    if isinstance(adapter, LlamaIndexRerank):
        given = [NodeWithScore(node=TextNode(text=text)) for text in texts]
    said = (
        r"the longest document sent is documents\[5\] with 42 characters; .* max_document_chars=8192, .* "
        r"extra_body={\"truncate_prompt_tokens\": 4096}"
    )
    with pytest.raises(BadRequestError, match=said):
        rerank(adapter, given)
    adapter.max_document_chars = 20
    kept = [item.text if isinstance(item, NodeWithScore) else item.page_content for item in rerank(adapter, given)]
    assert kept == [texts[index] for index in (3, 4, 5, 6, 0, 2, 1)]
    assert max(len(text) for request in stub.received[-3:] for text in request.documents) == 20


def test_requests_and_retries_are_in_the_log(
    rerank: Rerank, adapter: Adapter, stub: Stub, caplog: pytest.LogCaptureFixture
) -> None:
    """The logger `regolo_rerank` has a line at DEBUG for each request, and one at WARNING for each that is repeated."""
    caplog.set_level(logging.DEBUG, "regolo_rerank")
    stub.script(error("try again", 500))
    adapter.max_retries = 1
    rerank(adapter)
    said = [(record.levelname, record.getMessage()) for record in caplog.records if record.name == "regolo_rerank"]
    assert [level for level, _ in said] == ["DEBUG", "WARNING", "DEBUG"]
    assert "answered 500 to 3 documents" in said[0][1]
    assert re.match(r"regolo_rerank: attempt 1 failed, next in \d\.\d\d s: ServerError: try again", said[1][1])
    assert "answered 200 to 3 documents" in said[2][1]


@pytest.mark.parametrize("reply", [None, "fallback", "error"])
@pytest.mark.filterwarnings("ignore::regolo_rerank.errors.RerankFallbackWarning")  # what it says is in test_secrets.py
def test_no_trace_shows_the_key(
    rerank: Rerank,
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
            rerank(adapter, handler=listener)

    if reply == "error":
        with pytest.raises(RegoloError):
            calls()
        with pytest.raises(RegoloError):
            rerank(adapter, handler=trace)
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
