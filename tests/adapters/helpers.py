"""Documents, nodes and recorders that the tests of the adapters share."""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from langchain_core.callbacks import BaseCallbackHandler, CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from langchain_core.tracers import Run
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events import BaseEvent
from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
from llama_index.core.schema import NodeWithScore, TextNode
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from pydantic import Field

from regolo_rerank.langchain import RegoloRerank as LangChainRerank
from regolo_rerank.llama_index import RegoloRerank as LlamaIndexRerank
from tests.support.stub import Received, Reply, scored

Adapter = LangChainRerank | LlamaIndexRerank
Rerank = Callable[..., list[Any]]
"""Reranks the texts, or other documents or nodes: `rerank(adapter, items=None, query=QUERY, handler=None)`."""
Way = Callable[..., list[Document]]
"""Reranks the texts in one of LangChain's ways: `way(reranker, handler=None)`."""
QUERY = "capital of China"
TEXTS = ["a score=0.1", "b score=0.9", "c score=0.5"]
BEST = ["b score=0.9", "c score=0.5"]
"""The two best texts, in order."""
DOWN = Reply({"error": {"message": "down"}}, 500, {"x-litellm-call-id": "call-9"})


class Everything(BaseRetriever):
    """Retrieves the documents of the texts."""

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:
        del query, run_manager
        return documents()


class Handler(BaseCallbackHandler):
    """Records what LangChain reports of chains: what happened, in which run, and with which data."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, Any, Any]] = []

    def on_chain_start(self, serialized: Any, inputs: Any, *, run_id: Any, **kwargs: Any) -> None:
        del serialized, kwargs
        self.seen.append(("start", run_id, inputs))

    def on_chain_end(self, outputs: Any, *, run_id: Any, **kwargs: Any) -> None:
        del kwargs
        self.seen.append(("end", run_id, outputs))

    def on_chain_error(self, error: BaseException, *, run_id: Any, **kwargs: Any) -> None:
        del kwargs
        self.seen.append(("error", run_id, error))


class Events(BaseEventHandler):
    """Records LlamaIndex's events of reranking."""

    seen: list[BaseEvent] = Field(default_factory=list)

    def handle(self, event: BaseEvent, **_: Any) -> None:
        if isinstance(event, ReRankStartEvent | ReRankEndEvent):
            self.seen.append(event)


def documents() -> list[Document]:
    """Return the texts as LangChain's documents. Only the first has an id and metadata."""
    return [Document(TEXTS[0], id="id-0", metadata={"source": "x"}), *(Document(text) for text in TEXTS[1:])]


def nodes(texts: list[str] | None = None) -> list[NodeWithScore]:
    """Return texts as LlamaIndex's nodes."""
    return [
        NodeWithScore(node=TextNode(text=text, id_=str(index)), score=0.25) for index, text in enumerate(texts or TEXTS)
    ]


def items_for(adapter: Adapter, texts: list[str]) -> list[Any]:
    """Return texts as the documents or nodes of an adapter's framework."""
    if isinstance(adapter, LangChainRerank):
        return [Document(text, id=str(index)) for index, text in enumerate(texts)]
    return nodes(texts)


def ranked(adapter: Adapter, items: list[Any], query: str = QUERY, callbacks: Any = None) -> list[Any]:
    """Rerank documents or nodes."""
    if isinstance(adapter, LangChainRerank):
        return adapter.compress_documents(items, query, callbacks)
    return adapter.postprocess_nodes(items, query_str=query)


async def aranked(adapter: Adapter, items: list[Any], query: str = QUERY, callbacks: Any = None) -> list[Any]:
    """Rerank documents or nodes by the async method."""
    if isinstance(adapter, LangChainRerank):
        return await adapter.acompress_documents(items, query, callbacks)
    return await adapter.apostprocess_nodes(items, query_str=query)


def ids_of(items: list[Any]) -> list[str]:
    """Return the ids of documents or nodes."""
    return [item.node_id if isinstance(item, NodeWithScore) else item.id for item in items]


def texts_of(items: list[Any]) -> list[str]:
    """Return the texts of documents or nodes."""
    return [item.text if isinstance(item, NodeWithScore) else item.page_content for item in items]


def metadata_of(item: Any) -> dict[str, Any]:
    """Return the metadata of a document or node."""
    metadata: dict[str, Any] = (item.node if isinstance(item, NodeWithScore) else item).metadata
    return metadata


def scores_of(items: list[Any]) -> list[float | None]:
    """Return the relevance scores that an adapter has set."""
    return [item.score if isinstance(item, NodeWithScore) else item.metadata["relevance_score"] for item in items]


def runs_in(roots: list[Run], name: str = "RegoloRerank") -> list[Run]:
    """Return all runs of a name, at any depth."""
    return [run for root in roots for run in ([root] * (root.name == name) + runs_in(root.child_runs, name))]


def tree(run: Run) -> Any:
    """Return the names of a run and of those below it."""
    return {run.name: [tree(child) for child in run.child_runs]} if run.child_runs else run.name


def reranker_spans(exporter: InMemorySpanExporter) -> list[ReadableSpan]:
    """Return the exported spans of kind RERANKER."""
    return [
        span
        for span in exporter.get_finished_spans()
        if (span.attributes or {}).get("openinference.span.kind") == "RERANKER"
    ]


def documents_in(span: ReadableSpan, side: str) -> list[tuple[Any, Any]]:
    """Return content and score of each "input" or "output" document of a span."""
    attributes = span.attributes or {}
    prefix = f"reranker.{side}_documents"
    count = len({key for key in attributes if re.fullmatch(rf"{prefix}\.\d+\.document\.content", key)})
    names = [f"{prefix}.{index}.document" for index in range(count)]
    return [(attributes.get(f"{name}.content"), attributes.get(f"{name}.score")) for name in names]


def with_usage(request: Received) -> Reply:
    """Answer as the service does, with seven tokens, a price and a request id."""
    body = {**json.loads(scored(request).encoded()), "id": "r-1", "usage": {"prompt_tokens": 5, "total_tokens": 7}}
    return Reply(body, headers={"x-litellm-call-id": "call-1", "x-litellm-response-cost": "0.25"})


REPORT = {
    "response_id": "r-1",
    "request_ids": ["call-1", "call-1"],
    "usage": {"total_tokens": 14, "requests": 2, "cost": 0.5},
    "fallback": False,
    "error": None,
}
"""The report of a ranking of two such requests."""

FALLBACK_REPORT = {
    "response_id": None,
    "request_ids": ["call-9"],
    "usage": None,
    "fallback": True,
    "error": "ServerError: down [HTTP 500, request call-9]",
}
"""The report of a call that fell back because the server was `DOWN`."""


@contextmanager
def appended(handlers: list[Any], handler: Any) -> Iterator[Any]:
    """Add a handler to a dispatcher's list for the time of a test."""
    handlers.append(handler)
    try:
        yield handler
    finally:
        handlers.remove(handler)
