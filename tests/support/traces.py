"""What handlers, tracers, events and spans of both frameworks are told of a rerank, kept by real ones."""

import json
import re
from typing import Any, Protocol

from langchain_core.callbacks import AsyncCallbackHandler, BaseCallbackHandler, CallbackManagerForRetrieverRun
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
QUERY = "capital of China"
TEXTS = ["a score=0.1", "b score=0.9", "c score=0.5"]
USAGES: dict[str, dict[str, Any]] = {
    "usage": {"usage": {"prompt_tokens": 5, "total_tokens": 7}},
    "prompt tokens": {"usage": {"prompt_tokens": 7}},
    "billed input": {"meta": {"billed_units": {"input_tokens": 7}}},
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


class Rerank(Protocol):
    """Reranks the texts, or other documents or nodes, with an adapter; a handler is for LangChain's."""

    def __call__(
        self, adapter: Adapter, items: Any = None, query: str = QUERY, *, handler: Any = None
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
    """Answer as the service does, with seven tokens and a price for each request, and a name for it."""
    headers = {"x-litellm-call-id": "call-1", "x-litellm-response-cost": "0.25"}
    return Reply(scored_with(request, id="r-1", **USAGES["usage"]), headers=headers)


TOLD = {
    "response_id": "r-1",
    "request_ids": ["call-1", "call-1"],
    "usage": {"total_tokens": 14, "requests": 2, "cost": 0.5},
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
