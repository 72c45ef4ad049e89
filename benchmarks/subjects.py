"""Subjects of the measures: each is a context manager that returns the call of one warm client, sync or async.

A call returns its results, so that a measure can check that it did the work. Peers are imported where they are
opened, so that one that is not installed costs its own line and no other.
"""

import json
from collections.abc import AsyncIterator, Callable, Iterator, Sized
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection
from typing import Any

import httpx
from langchain_core.documents import BaseDocumentCompressor, Document
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import MetadataMode, NodeWithScore, TextNode
from pydantic_core import to_json

from benchmarks.server import MODEL
from regolo_rerank import RegoloClient
from regolo_rerank.langchain import RegoloRerank as LangChainRegoloRerank
from regolo_rerank.llama_index import RegoloRerank as LlamaIndexRegoloRerank

__all__ = [
    "ASYNC_FLOORS",
    "ASYNC_OURS",
    "ASYNC_PEERS",
    "ASYNC_SERVICES",
    "FLOORS",
    "OURS",
    "PEERS",
    "Call",
    "Job",
    "Opening",
    "Subject",
    "at_once",
]

Call = Callable[[], Any]
"""Returns its results, or an awaitable of them."""

Opening = AbstractContextManager[Call] | AbstractAsyncContextManager[Call]
Subject = Callable[["Job"], Opening]

_KEY = "made-up"
_JSON = {"Content-Type": "application/json"}


@dataclass(frozen=True)
class Job:
    """The job of each call of a measure.

    Attributes:
        url: The server.
        documents: Texts.
        top_n: Results wanted.
    """

    url: str
    documents: list[str]
    top_n: int
    query: str = "Which of these documents gives the price of a call?"

    @property
    def body(self) -> dict[str, Any]:
        """The JSON of a request, as a client without options sends it."""
        return {"model": MODEL, "query": self.query, "documents": self.documents, "top_n": self.top_n}

    @property
    def langchain_documents(self) -> list[Document]:
        """The documents as a LangChain retriever returns them."""
        return [Document(text, metadata={"source": f"{n}.txt"}) for n, text in enumerate(self.documents)]

    @property
    def nodes(self) -> list[NodeWithScore]:
        """The documents as LlamaIndex's directory reader makes them: with a name that is not embedded."""
        hidden = ["file_name"]
        return [
            NodeWithScore(
                node=TextNode(text=text, metadata={"file_name": f"{n}.txt"}, excluded_embed_metadata_keys=hidden)
            )
            for n, text in enumerate(self.documents)
        ]


# The floor: what a call costs that does nothing but send and read JSON.


@contextmanager
def _http_client(job: Job) -> Iterator[Call]:
    url = httpx.URL(job.url)
    connection = HTTPConnection(url.host, url.port)

    def call() -> Sized:
        connection.request("POST", "/rerank", json.dumps(job.body), _JSON)
        return _results(connection.getresponse().read())

    yield call
    connection.close()


@contextmanager
def _httpx(job: Job) -> Iterator[Call]:
    with httpx.Client(base_url=job.url, trust_env=False) as client:
        yield lambda: _results(client.post("/rerank", content=to_json(job.body), headers=_JSON).content)


@contextmanager
def _get_content(job: Job) -> Iterator[Call]:
    nodes = job.nodes
    yield lambda: [each.node.get_content(metadata_mode=MetadataMode.EMBED) for each in nodes][: job.top_n]


@asynccontextmanager
async def _aiohttp(job: Job) -> AsyncIterator[Call]:
    import aiohttp

    async def call() -> Sized:
        async with session.post("/rerank", data=json.dumps(job.body).encode(), headers=_JSON) as response:
            return _results(await response.read())

    async with aiohttp.ClientSession(job.url, connector=aiohttp.TCPConnector(limit=0)) as session:
        yield call


@asynccontextmanager
async def _async_httpx(job: Job) -> AsyncIterator[Call]:
    async def call() -> Sized:
        return _results((await client.post("/rerank", content=to_json(job.body), headers=_JSON)).content)

    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=60)
    async with httpx.AsyncClient(base_url=job.url, trust_env=False, limits=limits, timeout=60) as client:
        yield call


def _results(body: bytes) -> Sized:
    results: list[Any] = json.loads(body)["results"]
    return results


# This package.


def _regolo(**options: Any) -> Subject:
    @contextmanager
    def opened(job: Job) -> Iterator[Call]:
        with RegoloClient(_KEY, base_url=job.url, **options) as client:
            yield lambda: client.rerank(job.query, job.documents, top_n=job.top_n).results

    return opened


def _async_regolo(**options: Any) -> Subject:
    @asynccontextmanager
    async def opened(job: Job) -> AsyncIterator[Call]:
        async with RegoloClient(_KEY, base_url=job.url, **options) as client:

            async def call() -> Sized:
                return (await client.arerank(job.query, job.documents, top_n=job.top_n)).results

            yield call

    return opened


def at_once(concurrency: int) -> dict[str, Subject]:
    """Return this package's clients with that many requests of a call in flight at once."""
    options = {"max_concurrency": concurrency}
    return {"RegoloClient": _regolo(**options), "RegoloClient, async": _async_regolo(**options)}


def _regolo_langchain(job: Job) -> BaseDocumentCompressor:
    return LangChainRegoloRerank(api_key=_KEY, base_url=job.url, top_n=job.top_n)


def _regolo_llama_index(job: Job) -> BaseNodePostprocessor:
    return LlamaIndexRegoloRerank(api_key=_KEY, base_url=job.url, top_n=job.top_n)


# Peers get the address of the server through their own arguments, and a batch size for all documents if they have one.


@contextmanager
def _cohere(job: Job) -> Iterator[Call]:
    import cohere

    client = cohere.ClientV2(_KEY, base_url=job.url)
    yield lambda: client.rerank(model=MODEL, query=job.query, documents=job.documents, top_n=job.top_n).results


def _langchain_cohere(job: Job) -> BaseDocumentCompressor:
    from langchain_cohere import CohereRerank

    return CohereRerank(cohere_api_key=_KEY, base_url=job.url, model=MODEL, top_n=job.top_n)


def _langchain_nvidia(job: Job) -> BaseDocumentCompressor:
    from langchain_nvidia_ai_endpoints import NVIDIARerank

    options = {"max_batch_size": len(job.documents), "usage_telemetry_enabled": False}
    return NVIDIARerank(api_key=_KEY, base_url=f"{job.url}/v1", model=MODEL, top_n=job.top_n, **options)


def _langchain_voyage(job: Job) -> BaseDocumentCompressor:
    from langchain_voyageai import VoyageAIRerank

    return VoyageAIRerank(api_key=_KEY, base_url=f"{job.url}/voyage", model=MODEL, top_k=job.top_n)


def _llama_index_cohere(job: Job) -> BaseNodePostprocessor:
    from llama_index.postprocessor.cohere_rerank import CohereRerank

    return CohereRerank(api_key=_KEY, base_url=job.url, model=MODEL, top_n=job.top_n)


def _llama_index_nvidia(job: Job) -> BaseNodePostprocessor:
    from llama_index.postprocessor.nvidia_rerank import NVIDIARerank

    options = {"max_batch_size": len(job.documents)}
    return NVIDIARerank(api_key=_KEY, base_url=f"{job.url}/v1", model=MODEL, top_n=job.top_n, **options)


def _llama_index_jina(job: Job) -> BaseNodePostprocessor:
    from llama_index.postprocessor.jinaai_rerank import JinaRerank

    return JinaRerank(api_key=_KEY, base_url=f"{job.url}/v1", model=MODEL, top_n=job.top_n)


def _llama_index_siliconflow(job: Job) -> BaseNodePostprocessor:
    from llama_index.postprocessor.siliconflow_rerank import SiliconFlowRerank

    options = {"return_documents": False}
    return SiliconFlowRerank(api_key=_KEY, base_url=f"{job.url}/v1/rerank", model=MODEL, top_n=job.top_n, **options)


def _compressor(make: Callable[[Job], BaseDocumentCompressor]) -> Subject:
    @contextmanager
    def opened(job: Job) -> Iterator[Call]:
        reranker, documents = make(job), job.langchain_documents
        yield lambda: reranker.compress_documents(documents, job.query)

    return opened


def _async_compressor(make: Callable[[Job], BaseDocumentCompressor]) -> Subject:
    @asynccontextmanager
    async def opened(job: Job) -> AsyncIterator[Call]:
        reranker, documents = make(job), job.langchain_documents

        async def call() -> Sized:
            return await reranker.acompress_documents(documents, job.query)

        yield call

    return opened


def _postprocessor(make: Callable[[Job], BaseNodePostprocessor]) -> Subject:
    @contextmanager
    def opened(job: Job) -> Iterator[Call]:
        reranker, nodes = make(job), job.nodes
        yield lambda: reranker.postprocess_nodes(nodes, query_str=job.query)

    return opened


def _async_postprocessor(make: Callable[[Job], BaseNodePostprocessor]) -> Subject:
    @asynccontextmanager
    async def opened(job: Job) -> AsyncIterator[Call]:
        reranker, nodes = make(job), job.nodes

        async def call() -> Sized:
            return await reranker.apostprocess_nodes(nodes, query_str=job.query)

        yield call

    return opened


FLOORS: dict[str, Subject] = {
    "http.client": _http_client,
    "aiohttp": _aiohttp,
    "httpx": _httpx,
    "get_content of all nodes": _get_content,
}
OURS: dict[str, Subject] = {
    "RegoloClient": _regolo(),
    "LangChain RegoloRerank": _compressor(_regolo_langchain),
    "LlamaIndex RegoloRerank": _postprocessor(_regolo_llama_index),
}
PEERS: dict[str, Subject] = {
    "cohere SDK": _cohere,
    "LangChain CohereRerank": _compressor(_langchain_cohere),
    "LangChain NVIDIARerank": _compressor(_langchain_nvidia),
    "LangChain VoyageAIRerank": _compressor(_langchain_voyage),
    "LlamaIndex CohereRerank": _postprocessor(_llama_index_cohere),
    "LlamaIndex NVIDIARerank": _postprocessor(_llama_index_nvidia),
    "LlamaIndex JinaRerank": _postprocessor(_llama_index_jina),
    "LlamaIndex SiliconFlowRerank": _postprocessor(_llama_index_siliconflow),
}
ASYNC_FLOORS: dict[str, Subject] = {"aiohttp": _aiohttp, "httpx": _async_httpx}
ASYNC_OURS: dict[str, Subject] = {"RegoloClient, async": _async_regolo()}
ASYNC_SERVICES: dict[str, Subject] = {
    "LangChain RegoloRerank": _async_compressor(_regolo_langchain),
    "LlamaIndex RegoloRerank": _async_postprocessor(_regolo_llama_index),
}
ASYNC_PEERS: dict[str, Subject] = {
    "LangChain CohereRerank": _async_compressor(_langchain_cohere),
    "LangChain NVIDIARerank": _async_compressor(_langchain_nvidia),
    "LangChain VoyageAIRerank": _async_compressor(_langchain_voyage),
}
