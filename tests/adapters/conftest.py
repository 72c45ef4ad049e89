import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from langchain_classic.retrievers import ContextualCompressionRetriever
from langchain_core.documents import Document
from langchain_core.runnables import RunnablePassthrough
from llama_index.core.instrumentation.events import BaseEvent
from llama_index.core.instrumentation.span_handlers import SimpleSpanHandler
from llama_index_instrumentation import get_dispatcher
from openinference.instrumentation.langchain import LangChainInstrumentor
from openinference.instrumentation.llama_index import LlamaIndexInstrumentor
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from regolo_rerank.langchain import RegoloRerank as LangChainRerank
from regolo_rerank.langchain import RerankRetriever
from regolo_rerank.llama_index import RegoloRerank as LlamaIndexRerank
from tests.adapters.helpers import (
    QUERY,
    Adapter,
    Events,
    Everything,
    Rerank,
    Way,
    appended,
    aranked,
    documents,
    nodes,
    ranked,
)
from tests.conftest import KEY
from tests.support.modes import Call
from tests.support.stub import Stub


@pytest.fixture
def langchain(stub: Stub) -> LangChainRerank:
    """A reranker that sends texts as they are, keeps two documents and does not retry."""
    return LangChainRerank(api_key=KEY, base_url=stub.url, prompt_format="plain", max_retries=0, top_n=2)


@pytest.fixture
def llama_index(stub: Stub) -> LlamaIndexRerank:
    """The same for LlamaIndex."""
    return LlamaIndexRerank(api_key=KEY, base_url=stub.url, prompt_format="plain", max_retries=0, top_n=2)


@pytest.fixture(params=["langchain", "llama_index"])
def adapter(request: pytest.FixtureRequest) -> Adapter:
    """Each of the two."""
    made: Adapter = request.getfixturevalue(request.param)
    return made


@pytest.fixture
def rerank(call: Call) -> Rerank:
    """Call an adapter, sync and async."""

    def rerank(adapter: Adapter, items: Any = None, query: str = QUERY, *, handler: Any = None) -> list[Any]:
        if items is None:
            items = documents() if isinstance(adapter, LangChainRerank) else nodes()
        arguments = (adapter, items, query, [] if handler is None else [handler])
        return asyncio.run(aranked(*arguments)) if call.mode == "async" else ranked(*arguments)

    return rerank


@pytest.fixture(params=["compressor", "step", "retriever", "compression retriever"])
def way(request: pytest.FixtureRequest, call: Call) -> Way:
    """Rerank in each of LangChain's ways, sync and async."""

    def way(reranker: LangChainRerank, handler: Any = None) -> list[Document]:
        callbacks = [] if handler is None else [handler]
        chain: Any
        if request.param == "compressor":
            return list(call(reranker.compress_documents, documents(), QUERY, callbacks))
        if request.param == "step":
            chain = {"query": RunnablePassthrough(), "documents": Everything()} | reranker.as_runnable()
        elif request.param == "retriever":
            chain = RerankRetriever(base_retriever=Everything(), reranker=reranker)
        else:
            chain = ContextualCompressionRetriever(base_compressor=reranker, base_retriever=Everything())
        return list(call(chain.invoke, QUERY, {"callbacks": callbacks}))

    return way


@pytest.fixture
def events() -> Iterator[list[BaseEvent]]:
    """LlamaIndex's events of reranking."""
    with appended(get_dispatcher().event_handlers, Events()) as handler:
        yield handler.seen


@pytest.fixture
def spans() -> Iterator[SimpleSpanHandler]:
    """LlamaIndex's spans."""
    with appended(get_dispatcher().span_handlers, SimpleSpanHandler()) as handler:
        yield handler


@pytest.fixture
def exporter() -> Iterator[InMemorySpanExporter]:
    """The exported spans of OpenInference's instrumentors of both frameworks."""
    exported, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exported))
    instrumentors: list[Any] = [LangChainInstrumentor(), LlamaIndexInstrumentor()]
    for instrumentor in instrumentors:
        instrumentor.instrument(tracer_provider=provider)
    yield exported
    for instrumentor in instrumentors:
        instrumentor.uninstrument()
    del instrumentors[1]._span_handler  # noqa: SLF001 - it owns a thread that nothing else ends
    provider.shutdown()
