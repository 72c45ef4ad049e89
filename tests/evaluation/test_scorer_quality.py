"""The quality of the offline scorer on its reference data."""

import json
from pathlib import Path
from typing import Any

import pytest

from regolo_rerank import RegoloClient
from regolo_rerank.evaluation import Variant, evaluate, example_queries
from regolo_rerank.evaluation.examples import documents

HOUSEHOLD = Path(__file__).parents[2] / "notebooks" / "data" / "household.jsonl"


def household() -> list[dict[str, Any]]:
    """Return 40 questions about the household, nature and health, each with all 40 paragraphs, unsorted."""
    lines = [json.loads(line) for line in HOUSEHOLD.read_text("utf-8").splitlines()]
    paragraphs = [{"id": line["id"], "text": line["text"]} for line in lines]
    return [{"query": line["question"], "documents": paragraphs, "relevant": [line["id"]]} for line in lines]


def everything() -> list[dict[str, Any]]:
    """Return the 100 questions about Python with all documents as candidates."""
    candidates = [{"id": name, "text": text} for name, text in documents().items()]
    return [{**query, "documents": candidates} for query in example_queries()]


@pytest.fixture(scope="module")
def local() -> RegoloClient:
    """Return a client with the offline scorer, which scores each pair once."""
    return RegoloClient(base_url="local://", cache={})


def reranked(queries: list[dict[str, Any]], client: RegoloClient) -> Variant:
    """Return the results of reranking."""
    return evaluate(queries, client).variants[0]


def test_it_improves_the_order_of_bm25(local: RegoloClient) -> None:
    """On 100 paraphrased questions every measure improves, and less than half of the documents are enough."""
    found = reranked(example_queries(), local)
    assert {measure.verdict for measure in found.measures.values()} == {"better"}
    assert found.measures["nDCG@10"].after > 0.42
    assert found.top_n.after < found.top_n.before / 2


def test_it_ranks_all_documents_better_than_bm25(local: RegoloClient) -> None:
    """BM25 has 0.31, because only 57 of the 100 answers share a word with the question."""
    assert reranked(everything(), local).measures["nDCG@10"].after > 0.48


def test_it_works_beyond_python(local: RegoloClient) -> None:
    """On 40 questions about the household, in other words than the answers, it finds half of them."""
    found = reranked(household(), local)
    assert found.measures["nDCG@10"].after > 0.45
    assert found.measures["Recall@10"].after > 0.6


def test_half_separates_right_from_wrong(local: RegoloClient) -> None:
    """On both sets, most answers score above 0.5 and most other documents below."""
    right: list[float] = []
    wrong: list[float] = []
    for queries in (everything()[::3], household()):
        pairs = ((query["query"], [each["text"] for each in query["documents"]]) for query in queries)
        for query, response in zip(queries, local.rerank_many(pairs), strict=True):
            for result in response.results:
                answers = query["documents"][result.index]["id"] in query["relevant"]
                (right if answers else wrong).append(result.relevance_score)
    assert sum(score > 0.5 for score in right) / len(right) > 0.55
    assert sum(score < 0.5 for score in wrong) / len(wrong) > 0.75
