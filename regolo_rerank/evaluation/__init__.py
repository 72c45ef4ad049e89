"""Measures whether reranking helps on your own data: results before and after, intervals, top_n and thresholds.

from regolo_rerank import RegoloClient
from regolo_rerank.evaluation import evaluate, read_beir

print(evaluate(read_beir("scifact"), RegoloClient(cache="scores.db")))
"""

try:
    from regolo_rerank.evaluation.examples import example_queries
    from regolo_rerank.evaluation.figures import Evaluation, Measure, QueryResult, Threshold, TopN, Variant
    from regolo_rerank.evaluation.readers import from_pairs, read_beir, read_trec
    from regolo_rerank.evaluation.runs import evaluate
except ImportError as error:
    raise ImportError(
        f'regolo_rerank.evaluation needs more packages: pip install "regolo_rerank[evaluate]" ({error})'
    ) from error

__all__ = [
    "Evaluation",
    "Measure",
    "QueryResult",
    "Threshold",
    "TopN",
    "Variant",
    "evaluate",
    "example_queries",
    "from_pairs",
    "read_beir",
    "read_trec",
]
