"""Where else the key must not show; objects, logs, errors and mistakes are in test_peers.py."""

import gc
import json
import logging
import types
import warnings
from typing import Any

import pytest
from langchain_core.tracers.run_collector import RunCollectorCallbackHandler
from llama_index.core.callbacks import CallbackManager, LlamaDebugHandler
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events import BaseEvent
from llama_index.core.instrumentation.span_handlers import SimpleSpanHandler
from llama_index_instrumentation import get_dispatcher
from pydantic import Field, SecretStr

from regolo_rerank import RateLimitError, RerankFallbackWarning, ServerError
from regolo_rerank.langchain import RegoloRerank as LangChainRerank
from regolo_rerank.llama_index import RegoloRerank as LlamaIndexRerank
from tests.conftest import KEY
from tests.support.entries import Entry, documents_of, nodes_of
from tests.support.inside import private_state_of, refusal_of
from tests.support.modes import Call
from tests.support.stub import Reply, Stub

CANARY = "canary"
TEXTS = ["a score=0.2", "b score=0.9", "c score=0.5"]
QUOTING = Reply({"error": {"message": f"key {KEY} has a problem", "code": KEY, "type": KEY}}, 500)


class Collector(BaseEventHandler):
    """Keeps every event of LlamaIndex."""

    events: list[str] = Field(default_factory=list)

    def handle(self, event: BaseEvent, **_: Any) -> None:
        self.events.append(repr(event) + event.model_dump_json())


def holders(root: object) -> list[object]:
    """Return every object within reach of another, by any path, whose own text holds the canary."""
    seen, found, todo = {id(root)}, [], [root]
    while todo:
        owner = todo.pop()
        for held in gc.get_referents(owner):
            if id(held) in seen or isinstance(held, type | types.ModuleType | types.FunctionType | SecretStr):
                continue
            seen.add(id(held))
            if isinstance(held, str | bytes | bytearray) and CANARY in str(held):
                found.append(owner)
            todo.append(held)
    return found


def test_the_key_is_nowhere_but_in_its_secret(entry: Entry, stub: Stub) -> None:
    """After a call, nothing within reach of a reranker holds the key, its connections and errors included."""
    with entry.opened(max_retries=1) as reranker:
        entry.rank(reranker, TEXTS)
        assert stub.received[0].headers["authorization"] == f"Bearer {KEY}"
        assert holders(vars(reranker)) == []
        assert holders(private_state_of(reranker)) == []
        stub.always(QUOTING)
        with pytest.raises(Exception, match=r"key \*\*\* has a problem") as caught:
            entry.rank(reranker, TEXTS)
        assert holders(vars(caught.value)) == []
        # A refusal is kept for as long as it holds other requests back.
        stub.always(Reply(QUOTING.body, 429, {"retry-after-ms": "50"}))
        with pytest.raises(RateLimitError):
            entry.rank(reranker, TEXTS)
        assert refusal_of(reranker) is not None
        assert holders(private_state_of(reranker)) == []
        assert CANARY not in f"{reranker} {reranker!r} {caught.value} {caught.value!r}"


def test_the_search_for_holders_finds_the_key_where_it_is() -> None:
    """The check above would see a key in a dict, an attribute or bytes."""
    for place in ({"x": [KEY]}, types.SimpleNamespace(x=KEY), [(KEY.encode(),)]):
        assert holders([place])


def test_no_trace_of_langchain_shows_the_key(call: Call, stub: Stub) -> None:
    """Runs that end well and runs that fail are recorded without the key."""
    reranker, traced = LangChainRerank(KEY, base_url=stub.url, max_retries=0), RunCollectorCallbackHandler()
    step = reranker.as_runnable().with_config(callbacks=[traced])
    given: Any = {"query": "q", "documents": documents_of(TEXTS)}
    reranker.compress_documents(given["documents"], "q", callbacks=[traced])
    call(step.invoke, given)
    stub.always(QUOTING)
    with pytest.raises(ServerError):
        reranker.compress_documents(given["documents"], "q", callbacks=[traced])
    with pytest.raises(ServerError):
        call(step.invoke, given)
    runs = [run.model_dump() for run in traced.traced_runs]
    assert [bool(run["error"]) for run in runs] == [False, False, True, True]
    assert CANARY not in repr(runs) + json.dumps(runs, default=repr)


def test_no_event_or_span_of_llama_index_shows_the_key(mode: str, stub: Stub) -> None:
    """Events, spans and callbacks of reranks that end well and that fail are recorded without the key."""
    collector, spans, debug = Collector(), SimpleSpanHandler(), LlamaDebugHandler(print_trace_on_end=False)
    root = get_dispatcher()
    root.add_event_handler(collector)
    root.add_span_handler(spans)
    try:
        entry = Entry(LlamaIndexRerank, mode, stub.url)
        with entry.opened(callback_manager=CallbackManager([debug]), max_retries=0) as reranker:
            entry.rank(reranker, TEXTS)
            stub.always(QUOTING)
            with pytest.raises(Exception, match="has a problem"):
                entry.rank(reranker, TEXTS)
            assert isinstance(reranker, LlamaIndexRerank)
            reranker.postprocess_nodes(nodes_of([]), query_str="q")
    finally:
        root.event_handlers.remove(collector)
        root.span_handlers.remove(spans)
    assert len(collector.events) >= 6
    assert spans.completed_spans
    assert spans.dropped_spans
    events = [event.payload for event in debug.get_events()]
    assert CANARY not in repr([collector.events, spans.completed_spans, spans.dropped_spans, events])


@pytest.mark.parametrize("kind", [LangChainRerank, LlamaIndexRerank], ids=["langchain", "llama_index"])
def test_no_warning_shows_the_key(entry: Entry, call: Call, stub: Stub, caplog: pytest.LogCaptureFixture) -> None:
    """A fallback warns of the server's words without the key that they quote, and so do the logs of retries."""
    stub.always(QUOTING)
    with caplog.at_level(logging.DEBUG), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with entry.opened(max_retries=1, on_error="return_input", top_n=2) as reranker:
            if isinstance(reranker, LangChainRerank):
                assert call(reranker.compress_documents, documents_of(TEXTS), "q") == documents_of(TEXTS)[:2]
            elif isinstance(reranker, LlamaIndexRerank):
                assert len(call(reranker.postprocess_nodes, nodes_of(TEXTS), query_str="q")) == 2
    assert [warning.category for warning in caught] == [RerankFallbackWarning]
    assert "key *** has a problem" in str(caught[0].message)
    assert CANARY not in caplog.text + "".join(map(str, (warning.message for warning in caught)))
    assert CANARY not in repr([vars(record) for record in caplog.records])
