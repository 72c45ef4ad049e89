"""Every entry point of the package, called alike in both modes; the fixture `entry` has them all."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from langchain_core.documents import Document
from llama_index.core.schema import NodeWithScore, TextNode

from regolo_rerank import RegoloClient
from regolo_rerank.langchain import RegoloRerank as LangChainRerank
from regolo_rerank.llama_index import RegoloRerank as LlamaIndexRerank
from tests.conftest import KEY
from tests.support.stub import pairs

Reranker = RegoloClient | LangChainRerank | LlamaIndexRerank
Pairs = list[tuple[int, float]]

KINDS: dict[str, type[Reranker]] = {
    "core": RegoloClient,
    "langchain": LangChainRerank,
    "llama_index": LlamaIndexRerank,
}


@dataclass(frozen=True)
class Entry:
    """One entry point to a server, called in one mode, sync or async."""

    kind: type[Reranker]
    mode: str
    url: str

    def opened(self, **options: Any) -> Reranker:
        """Return the entry point's object; all results are kept unless `top_n` says otherwise."""
        return self.kind(**{"api_key": KEY, "base_url": self.url, "top_n": None, **options})

    def rank(self, reranker: Reranker, texts: Sequence[str], query: str = "q") -> Pairs:
        """Rank texts with an object that is open."""
        return ranked(reranker, texts, query) if self.mode == "sync" else asyncio.run(aranked(reranker, texts, query))

    def __call__(self, texts: Sequence[str], query: str = "q", **options: Any) -> Pairs:
        with self.opened(**options) as reranker:
            return self.rank(reranker, texts, query)


def ranked(reranker: Reranker, texts: Sequence[str], query: str = "q") -> Pairs:
    """Rank texts through an entry point's sync method."""
    if isinstance(reranker, RegoloClient):
        return pairs(reranker.rerank(query, texts).results)
    if isinstance(reranker, LangChainRerank):
        return pairs_of_documents(reranker.compress_documents(documents_of(texts), query))
    return pairs_of_nodes(reranker.postprocess_nodes(nodes_of(texts), query_str=query))


async def aranked(reranker: Reranker, texts: Sequence[str], query: str = "q") -> Pairs:
    """Rank texts through an entry point's async method."""
    if isinstance(reranker, RegoloClient):
        return pairs((await reranker.arerank(query, texts)).results)
    if isinstance(reranker, LangChainRerank):
        return pairs_of_documents(await reranker.acompress_documents(documents_of(texts), query))
    return pairs_of_nodes(await reranker.apostprocess_nodes(nodes_of(texts), query_str=query))


def documents_of(texts: Sequence[str]) -> list[Document]:
    """Return texts as LangChain's documents."""
    return [Document(text, id=f"id-{index}", metadata={"index": index}) for index, text in enumerate(texts)]


def pairs_of_documents(documents: Sequence[Document]) -> Pairs:
    """Return a ranking of `documents_of` texts as (index, score) pairs."""
    return [(document.metadata["index"], document.metadata["relevance_score"]) for document in documents]


def nodes_of(texts: Sequence[str]) -> list[NodeWithScore]:
    """Return texts as LlamaIndex's nodes."""
    return [NodeWithScore(node=TextNode(text=text, id_=str(index)), score=0.5) for index, text in enumerate(texts)]


def pairs_of_nodes(nodes: Sequence[NodeWithScore]) -> Pairs:
    """Return a ranking of `nodes_of` texts as (index, score) pairs."""
    return [(int(node.node_id), node.get_score(raise_error=True)) for node in nodes]
