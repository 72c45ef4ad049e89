"""Computes the figures of an evaluation: measures with ir-measures, intervals with a paired bootstrap."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, Final

import ir_measures
import numpy as np

from regolo_rerank.errors import InvalidInputError
from regolo_rerank.evaluation.figures import Measure
from regolo_rerank.evaluation.queries import JudgedQuery

__all__ = ["DEFAULT_MEASURES", "compare", "f1_at", "measure", "parse_measures", "recall_by_depth", "threshold_curve"]

Numbers = np.ndarray[Any, np.dtype[np.float64]]

DEFAULT_MEASURES: Final = "nDCG@10 MRR Recall@1 Recall@5 Recall@10"

DRAWS: Final = 10_000
DRAWS_AT_ONCE: Final = 100
FEWEST_QUERIES: Final = 10  # with fewer, bootstrap intervals are too narrow
POWER: Final = 1.96 + 0.84  # standard errors from zero for 95 % confidence and 80 % power
CURVE_POINTS: Final = 100


def parse_measures(given: str | Iterable[Any]) -> dict[str, Any]:
    """Return the measures of ir-measures by their names.

    Raises:
        InvalidInputError: A measure is unknown, or ir-measures cannot compute it here.
    """
    measures = {}
    for name in given.split() if isinstance(given, str) else given:
        try:
            measures[str(name)] = ir_measures.parse_measure(name)
            list(ir_measures.iter_calc([measures[str(name)]], {"0": {"0": 1}}, {"0": {"0": 1.0}}))
        except Exception as error:  # noqa: BLE001 - ir-measures raises NameError, AssertionError and others
            raise InvalidInputError(
                f'measures: cannot compute "{name}" ({error}). Examples: nDCG@20 AP P@5. All measures: '
                "https://ir-measur.es/en/latest/measures.html"
            ) from None
    if not measures:
        raise InvalidInputError("measures: give at least one, such as nDCG@10")
    return measures


def measure(measures: dict[str, Any], queries: Sequence[JudgedQuery], orders: Sequence[Sequence[int]]) -> Numbers:
    """Return a row for each query and a column for each measure.

    Args:
        measures: Measures by name.
        queries: N queries, each with a relevant document.
        orders: Indices of each query's candidates, best first.
    """
    qrels = {str(index): query.grades for index, query in enumerate(queries)}
    # Ranks take the place of scores, so that documents with equal scores stay in their order.
    run = {
        str(index): {query.names[each]: 1 / rank for rank, each in enumerate(order, 1)}
        for index, (query, order) in enumerate(zip(queries, orders, strict=True))
    }
    columns: dict[Any, list[int]] = {}
    for column, each in enumerate(measures.values()):
        columns.setdefault(each, []).append(column)
    values = np.zeros((len(queries), len(measures)))
    for value in ir_measures.iter_calc(list(columns), qrels, run):
        values[int(value.query_id), columns[value.measure]] = value.value
    return values


def compare(before: Numbers, after: Numbers) -> list[Measure]:
    """Return the comparison of each column, with a paired bootstrap over the N rows."""
    change = after - before
    random, means = np.random.default_rng(0), []
    for _ in range(DRAWS // DRAWS_AT_ONCE):
        draws = random.integers(len(change), size=(DRAWS_AT_ONCE, len(change)))
        means.append(change[draws].mean(axis=1))
    intervals = np.percentile(np.concatenate(means), [2.5, 97.5], axis=0).T.tolist()
    return [_compare(*columns) for columns in zip(before.T, after.T, intervals, strict=True)]


def _compare(before: Numbers, after: Numbers, interval: list[float]) -> Measure:
    change, (low, high) = after - before, interval
    difference, enough = float(change.mean()), len(change) >= FEWEST_QUERIES
    verdict: Any = "better" if enough and low > 0 else "worse" if enough and high < 0 else "inconclusive"
    needed = None
    if verdict == "inconclusive" and difference:
        needed = max(FEWEST_QUERIES, len(change) + 1, math.ceil((POWER * change.std() / difference) ** 2))
    return Measure(float(before.mean()), float(after.mean()), difference, low, high, verdict, needed)


def recall_by_depth(queries: Sequence[JudgedQuery], orders: Sequence[Sequence[int]]) -> Numbers:
    """Return the share of all relevant candidates among the first n of their query, for n from 1.

    If no candidate is relevant, all shares are 1.
    """
    flags = [
        [query.names[each] in query.relevant for each in order] for query, order in zip(queries, orders, strict=True)
    ]
    found = np.zeros(max(map(len, flags), default=0))
    for row in flags:
        found[: len(row)] += row
    total = found.sum()
    shares: Numbers = found.cumsum() / total if total else np.ones(len(found))
    return shares


def threshold_curve(scores: Numbers, relevant: Numbers) -> Numbers:
    """Return a row for each threshold, the highest first: threshold, precision, recall and F1.

    Args:
        scores: Scores of N candidates of all queries.
        relevant: N zeros and ones.

    Returns:
        At most 100 thresholds and the one with the best F1.
    """
    order = np.argsort(-scores, kind="stable")
    scores, hits = scores[order], relevant[order].cumsum()
    last = np.append(np.flatnonzero(np.diff(scores)), len(scores) - 1)  # equal scores are kept together
    kept, hits = last + 1.0, hits[last]
    rows = np.stack([scores[last], hits / kept, hits / hits[-1], 2 * hits / (kept + hits[-1])], axis=1)
    # The highest thresholds, which keep few candidates, matter most.
    shown = np.geomspace(1, len(rows), CURVE_POINTS).round().astype(int) - 1
    chosen: Numbers = rows[np.union1d(shown, rows[:, 3].argmax())]
    return chosen


def f1_at(threshold: float, scores: Numbers, relevant: Numbers) -> float:
    """Return the F1 of a threshold."""
    kept = scores >= threshold
    return float(2 * relevant[kept].sum() / (kept.sum() + relevant.sum()))
