"""What users of the package write, with the type of every public call: mypy checks it, and test_types.py runs it."""

import asyncio
from collections.abc import AsyncGenerator, Generator, MutableMapping, Sequence
from typing import Any, Literal, assert_type

import httpx
from langchain_classic.retrievers import ContextualCompressionRetriever
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import RunnableParallel, RunnablePassthrough, RunnableSerializable
from llama_index.core import VectorStoreIndex
from llama_index.core.base.base_query_engine import BaseQueryEngine
from llama_index.core.base.response.schema import RESPONSE_TYPE
from llama_index.core.schema import MetadataMode, NodeWithScore
from pydantic import SecretStr

from regolo_rerank import (
    APIResponseError,
    APIStatusError,
    InvalidInputError,
    PromptFormat,
    RateLimitError,
    RegoloClient,
    RegoloError,
    RerankResponse,
    RerankResult,
    Usage,
)
from regolo_rerank.langchain import Candidates, RankedIndex
from regolo_rerank.langchain import RegoloRerank as DocumentReranker
from regolo_rerank.llama_index import RegoloRerank as NodeReranker
from regolo_rerank.plot import Picture, rank_changes
from tests.support.corpus import QUERY


def with_the_client(texts: list[str]) -> RerankResponse:
    """Rank with a client, in all its arguments."""
    with RegoloClient("", base_url="local://") as client:
        assert_type(client, RegoloClient)
        response = client.rerank(
            QUERY, texts, top_n=2, model="m", instruction="Find it", score_threshold=0.0, extra_body={"user": "me"}
        )
        assert_type(client.rerank(QUERY, (text for text in texts)), RerankResponse)
        assert_type(client.close(), None)
    assert_type(response, RerankResponse)
    assert_type(response.id, str | None)
    assert_type(response.results, list[RerankResult])
    assert_type(response[0], RerankResult)
    assert_type(response[:2], list[RerankResult])
    assert_type([result.index for result in response], list[int])
    assert_type(response.results[0].index, int)
    assert_type(response.results[0].relevance_score, float)
    assert_type(response.results[0].document, str)
    assert_type(response.usage, Usage)
    assert_type(response.usage.total_tokens, int | None)
    assert_type(response.usage.requests, int)
    assert_type(response.usage.cost, float | None)
    assert_type(response.model, str | None)
    assert_type(response.request_ids, list[str])
    assert_type(response.meta, Any)
    assert_type(rank_changes(texts, response, labels=texts), Picture)
    return response


async def with_the_async_client(texts: list[str]) -> RerankResponse:
    """Rank two queries at once."""
    async with RegoloClient(base_url="local://") as client:
        assert_type(client, RegoloClient)
        first, second = await asyncio.gather(client.arerank(QUERY, texts), client.arerank(QUERY, texts, top_n=1))
        assert_type(first, RerankResponse)
        assert_type(await client.aclose(), None)
    return second


def with_many_queries(pairs: list[tuple[str, list[str]]]) -> list[RerankResponse]:
    """Rank the documents of many queries."""
    with RegoloClient(base_url="local://") as client:
        assert_type(client.rerank_many(pairs), Generator[RerankResponse])
        assert_type(client.rerank_many(iter(pairs), return_exceptions=True), Generator[RerankResponse | RegoloError])
        return list(client.rerank_many(pairs, top_n=1, max_concurrency=2))


async def with_many_async_queries(pairs: list[tuple[str, list[str]]]) -> list[RerankResponse]:
    """Rank the documents of many queries in an event loop."""
    async with RegoloClient(base_url="local://") as client:
        responses = client.arerank_many(pairs, return_exceptions=True)
        assert_type(responses, AsyncGenerator[RerankResponse | RegoloError])
        assert_type(client.arerank_many(pairs), AsyncGenerator[RerankResponse])
        return [response async for response in responses if isinstance(response, RerankResponse)]


def with_options() -> RegoloClient:
    """Set options, and assign them later."""

    def longest_first(query: str, documents: list[str]) -> Sequence[float]:
        return [float(len(document)) for document in documents if query]

    client = RegoloClient(
        SecretStr("sk-made-up"), base_url="local://", top_n=3, prompt_format="chat", scorer=longest_first
    )
    client.top_n = None
    client.prompt_format = PromptFormat(query="Task: {instruction}\nQuery: {query}", document="{document}")
    client.default_headers = {"x-litellm-tags": "docs"}
    assert_type(client.api_key, SecretStr | str | None)
    assert_type(client.base_url, str | None)
    assert_type(client.model, str)
    assert_type(client.instruction, str)
    assert_type(client.score_threshold, float | None)
    assert_type(client.timeout, float)
    client.timeout = 10
    assert_type(client.max_retries, int)
    assert_type(client.max_retry_seconds, float)
    assert_type(client.batch_size, int)
    assert_type(client.max_request_bytes, int)
    assert_type(client.max_concurrency, int)
    assert_type(client.max_document_chars, int | None)
    assert_type(client.extra_body, dict[str, Any] | None)
    assert_type(client.allow_http, bool)
    assert_type(client.cache, MutableMapping[str, float] | None)
    client.cache = {}
    assert_type(client.http_client, httpx.Client | None)
    assert_type(client.async_http_client, httpx.AsyncClient | None)
    assert_type(client.model_copy(update={"top_n": 1}), RegoloClient)
    reranker = NodeReranker()
    assert_type(reranker.top_n, int | None)
    assert_type(reranker.on_error, Literal["raise", "return_input"])
    assert_type(PromptFormat().format_query(QUERY, client.instruction), str)
    assert_type(PromptFormat().format_document("a document"), str)
    return client


def with_errors(client: RegoloClient) -> str:
    """Tell errors apart."""
    try:
        client.rerank("", ["a document"])
    except RateLimitError as error:
        assert_type(error.retry_after, float | None)
    except APIStatusError as error:
        assert_type(error.status_code, int)
        assert_type(error.request_id, str | None)
        assert_type(error.code, str | None)
        assert_type(error.type, str | None)
        assert_type(error.body, str)
    except APIResponseError as error:
        assert_type(error.request_id, str | None)
    except InvalidInputError as error:
        mistake: ValueError = error
        return str(mistake)
    except RegoloError as error:
        return str(error)
    return ""


def with_langchain(retriever: BaseRetriever) -> list[Document]:
    """Rerank in LangChain, by each of its ways."""
    reranker = DocumentReranker(top_n=1, base_url="local://", metadata_fields=("title",), on_error="return_input")
    found = retriever.invoke(QUERY)
    assert_type(reranker.compress_documents(found, QUERY), list[Document])
    ranking = reranker.rerank(["a text", Document("another"), {"text": "a third"}], "a text", top_n=2)
    assert_type(ranking, list[RankedIndex])
    assert_type(ranking[0]["index"], int)
    assert_type(ranking[0]["relevance_score"], float)

    step = reranker.as_runnable()
    assert_type(step, RunnableSerializable[Candidates | dict[str, Any], list[Document]])
    candidates: Candidates = {"query": QUERY, "documents": found}
    assert_type(step.invoke(candidates), list[Document])
    assert_type(step.batch([{"query": QUERY, "documents": found}]), list[list[Document]])
    chain = {"query": RunnablePassthrough[str](), "documents": retriever} | reranker.as_runnable()
    kept: list[Document] = chain.invoke(QUERY)
    parallel = RunnableParallel(query=RunnablePassthrough[str](), documents=retriever) | step
    assert_type(parallel.invoke(QUERY), list[Document])
    state = RunnablePassthrough.assign(documents=step).invoke({"query": QUERY, "documents": found})
    assert state["documents"] == kept == parallel.invoke(QUERY)
    compression = ContextualCompressionRetriever(base_compressor=reranker, base_retriever=retriever)
    return kept + compression.invoke(QUERY)


async def with_async_langchain(retriever: BaseRetriever) -> list[Document]:
    """Rerank in LangChain's event loop."""
    reranker = DocumentReranker(regolo_api_key="sk-made-up", base_url="local://", top_n=1)
    found = await retriever.ainvoke(QUERY)
    assert_type(await reranker.arerank(found, QUERY), list[RankedIndex])
    kept = await reranker.acompress_documents(found, QUERY)
    assert_type(kept, list[Document])
    return kept


def with_llama_index(index: VectorStoreIndex) -> list[NodeWithScore]:
    """Rerank nodes, by hand and in an engine."""
    reranker = NodeReranker(base_url="local://", top_n=1, metadata_mode=MetadataMode.NONE, keep_retrieval_score=True)
    found = index.as_retriever(similarity_top_k=3).retrieve(QUERY)
    kept = reranker.postprocess_nodes(found, query_str=QUERY)
    assert_type(kept, list[NodeWithScore])
    engine = index.as_query_engine(similarity_top_k=3, node_postprocessors=[reranker])
    assert_type(engine, BaseQueryEngine)
    answer = engine.query(QUERY)
    assert_type(answer, RESPONSE_TYPE)
    return kept + answer.source_nodes


async def with_async_llama_index(index: VectorStoreIndex) -> list[NodeWithScore]:
    """Rerank nodes in LlamaIndex's event loop."""
    found = await index.as_retriever(similarity_top_k=3).aretrieve(QUERY)
    kept = await NodeReranker(base_url="local://", top_n=1).apostprocess_nodes(found, query_str=QUERY)
    assert_type(kept, list[NodeWithScore])
    return kept
