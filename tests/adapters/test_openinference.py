import subprocess
import sys
from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_core.tracers.run_collector import RunCollectorCallbackHandler
from llama_index.core import MockEmbedding, VectorStoreIndex
from llama_index.core.llms import MockLLM
from openinference.instrumentation.langchain._tracer import OpenInferenceTracer
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from regolo_rerank import AuthenticationError, RerankFallbackWarning
from regolo_rerank.langchain import RegoloRerank as LangChainRerank
from regolo_rerank.llama_index import RegoloRerank as LlamaIndexRerank
from tests.support.modes import Call
from tests.support.stub import Stub, error
from tests.support.traces import (
    DOWN,
    QUERY,
    TEXTS,
    Adapter,
    Rerank,
    Way,
    documents_in,
    nodes,
    reranker_spans,
    reranks_in,
    telling,
)


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
    assert attributes["regolo_rerank.cost"] == 0.5
    assert attributes["regolo_rerank.fallback"] is False
    (run,) = reranks_in(trace.traced_runs)
    assert run.run_type == "chain"
    spans = {found.context.span_id: found for found in exporter.get_finished_spans() if found.context}
    above = spans[span.parent.span_id].name if span.parent else None
    assert (above is None) == (run.parent_run_id is None)
    assert above in {None, "ContextualCompressionRetriever", "RunnableSequence"}


def test_openinference_sees_a_reranker_in_llama_index(
    call: Call, llama_index: LlamaIndexRerank, stub: Stub, exporter: InMemorySpanExporter
) -> None:
    """In an engine's trace, a rerank is one RERANKER span with query, model, top_k, documents and scores."""
    llama_index.batch_size, stub.reply = 2, telling
    index = VectorStoreIndex([node.node for node in nodes()], embed_model=MockEmbedding(embed_dim=2))
    engine = index.as_query_engine(llm=MockLLM(), node_postprocessors=[llama_index], similarity_top_k=3)
    call(engine.query, QUERY)
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
    assert attributes["regolo_rerank.cost"] == 0.5
    assert attributes["regolo_rerank.fallback"] is False


def test_openinference_sees_that_all_are_kept(rerank: Rerank, adapter: Adapter, exporter: InMemorySpanExporter) -> None:
    """Without a top_n, a span's top_k is the number of its documents."""
    adapter.top_n = None
    assert len(rerank(adapter)) == 3
    (span,) = reranker_spans(exporter)
    assert (span.attributes or {})["reranker.top_k"] == 3
    assert len(documents_in(span, "output")) == 3


def test_openinference_sees_that_a_reranker_failed(
    rerank: Rerank, adapter: Adapter, stub: Stub, exporter: InMemorySpanExporter
) -> None:
    """The span of a call that raises has what went in, nothing that came out, and the error."""
    stub.always(error("no such key", 401))
    with pytest.raises(AuthenticationError):
        rerank(adapter)
    (span,) = reranker_spans(exporter)
    assert span.status.status_code is StatusCode.ERROR
    assert "no such key" in str(span.status.description)
    assert [event.name for event in span.events] == ["exception"]
    assert [content for content, _ in documents_in(span, "input")] == TEXTS
    assert documents_in(span, "output") == []


def test_openinference_sees_a_fallback(
    rerank: Rerank, adapter: Adapter, stub: Stub, exporter: InMemorySpanExporter
) -> None:
    """The span of a call that has fallen back says so, and has no score but the retriever's."""
    adapter.on_error = "return_input"
    stub.always(DOWN)
    with pytest.warns(RerankFallbackWarning, match="down"):
        rerank(adapter)
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
    rerank: Rerank, langchain: LangChainRerank, exporter: InMemorySpanExporter
) -> None:
    """Where OpenTelemetry drops attributes, 128 being its limit, these are input documents from the end."""
    rerank(langchain, [Document(f"{number} score=0.{number:03}") for number in range(200)])
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
    rerank: Rerank, adapter: Adapter, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A call ranks even where OpenInference's span cannot be told of it; the log has why."""

    def fail(*_: Any) -> None:
        raise LookupError("no such span")

    monkeypatch.setattr(OpenInferenceTracer, "get_span", fail)
    monkeypatch.setattr("openinference.instrumentation.llama_index.get_current_span", fail)
    assert len(rerank(adapter)) == 2
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
