"""Code of a user, for the type checker only: `mypy` fails if a type that users rely on is lost."""

from collections.abc import AsyncIterator, Generator
from dataclasses import dataclass
from typing import Any, assert_type

from langchain_core.documents import Document
from langchain_core.runnables import RunnableLambda
from llama_index.core.schema import NodeWithScore

from regolo_rerank import RegoloClient, RegoloError, RerankResponse, RerankResult
from regolo_rerank.langchain import RegoloRerank, RerankRetriever
from regolo_rerank.llama_index import RegoloRerank as LlamaIndexRerank


@dataclass
class Row:
    """A document of the user's own type."""

    body: str


def use_client(client: RegoloClient, rows: list[Row]) -> None:
    """Texts give results of strings, other documents results of their own type."""
    texts = client.rerank("q", ["a", "b"], top_n=1)
    assert_type(texts, RerankResponse[str])
    assert_type(texts[0], RerankResult[str])
    assert_type(texts[:2], list[RerankResult[str]])
    assert_type(texts[0].document, str)
    assert_type(client.rerank("q", rows, text="body")[0].document, Row)
    assert_type(client.rerank("q", rows, text=lambda row: row.body)[0].document, Row)
    assert_type(client.score("q", rows, text="body"), list[float])
    assert_type(client.rerank_many([("q", ["a"])]), Generator[RerankResponse[Any]])
    for outcome in client.rerank_many([("q", ["a"])], return_exceptions=True):
        if isinstance(outcome, RegoloError):
            assert_type(outcome.index, int | None)
    assert_type(client.with_options(top_n=3), RegoloClient)
    client.rerank("q", rows)  # type: ignore[arg-type]  # other documents need `text`
    client.rerank("q", ["a"], topn=1)  # type: ignore[call-overload]  # no such argument


async def use_client_async(client: RegoloClient, pairs: AsyncIterator[tuple[str, list[str]]]) -> None:
    """The async methods have the types of the sync ones."""
    assert_type(await client.arerank("q", ["a"]), RerankResponse[str])
    assert_type(await client.ascore("q", ["a"]), list[float])
    async for ranking in client.arerank_many(pairs):
        assert_type(ranking, RerankResponse[Any])


def use_adapters(documents: list[Document], nodes: list[NodeWithScore]) -> None:
    """Adapters take their options by name and return the frameworks' own types."""
    reranker = RegoloRerank(model="m", top_n=3, metadata_fields=("title",), score_metadata_key=None)
    assert_type(reranker.with_options(top_n=1), RegoloRerank)
    assert_type(list(reranker.compress_documents(documents, "q")), list[Document])
    retriever = RerankRetriever(base_retriever=RunnableLambda(lambda _: documents), reranker=reranker, k=3)
    assert_type(retriever.invoke("q"), list[Document])
    postprocessor = LlamaIndexRerank(top_n=3, on_error="return_input", keep_retrieval_score=True)
    assert_type(postprocessor.postprocess_nodes(nodes, query_str="q"), list[NodeWithScore])
    RegoloRerank(topn=1)  # type: ignore[call-arg]  # no such option
