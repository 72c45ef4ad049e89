"""The numbers of an evaluation: measures by ir-measures, intervals by a paired bootstrap."""

import math
from collections.abc import Sequence
from typing import Any, Final, Literal, NamedTuple

import numpy as np
from ir_measures import RR, R, iter_calc, nDCG

from regolo_rerank._evaluation.queries import JudgedQuery

__all__ = ["MEASURES", "Difference", "Numbers", "compare", "f1_at", "measure", "recall_by_depth", "threshold_curve"]

Numbers = np.ndarray[Any, np.dtype[np.float64]]
Verdict = Literal["better", "worse", "cannot tell"]

MEASURES: Final = {"nDCG@10": nDCG @ 10, "MRR": RR, "Recall@1": R @ 1, "Recall@5": R @ 5, "Recall@10": R @ 10}

_DRAWS: Final = 10_000
_AT_ONCE: Final = 100
_FEWEST: Final = 10
"""With fewer queries, the intervals of a bootstrap are too narrow to say anything."""
_ALPHA_AND_POWER: Final = 1.96 + 0.84
"""Standard errors from zero at which 95 % intervals leave zero out in four of five samples."""
_CURVE_POINTS: Final = 100


class Difference(NamedTuple):
    """What a change brings on average, with its 95 % interval."""

    mean: float
    low: float
    high: float
    verdict: Verdict
    queries_needed: int | None


def measure(queries: Sequence[JudgedQuery], orders: Sequence[Sequence[int]]) -> Numbers:
    """Return a row for each query, a column for each of `MEASURES`.

    Args:
        queries: N queries, each with something relevant.
        orders: The indices of each query's candidates, the best first.
    """
    qrels = {str(index): query.grades for index, query in enumerate(queries)}
    # The place stands for the score, so that equal scores stay in the order in which they were ranked.
    run = {
        str(index): {query.names[each]: 1 / place for place, each in enumerate(order, 1)}
        for index, (query, order) in enumerate(zip(queries, orders, strict=True))
    }
    columns = {each: column for column, each in enumerate(MEASURES.values())}
    values = np.zeros((len(queries), len(columns)))
    for value in iter_calc(list(columns), qrels, run):
        values[int(value.query_id), columns[value.measure]] = value.value
    return values


def compare(before: Numbers, after: Numbers) -> list[Difference]:
    """Return the difference of each column, by a paired bootstrap over N rows."""
    change = after - before
    random, means = np.random.default_rng(0), []
    for _ in range(_DRAWS // _AT_ONCE):
        draws = random.integers(len(change), size=(_AT_ONCE, len(change)))
        means.append(change[draws].mean(axis=1))
    lows, highs = np.percentile(np.concatenate(means), [2.5, 97.5], axis=0)
    return [
        _difference(column, float(low), float(high)) for column, low, high in zip(change.T, lows, highs, strict=True)
    ]


def _difference(change: Numbers, low: float, high: float) -> Difference:
    mean = float(change.mean())
    enough = len(change) >= _FEWEST
    verdict: Verdict = "better" if enough and low > 0 else "worse" if enough and high < 0 else "cannot tell"
    needed = None
    if verdict == "cannot tell" and mean:
        needed = max(_FEWEST, len(change) + 1, math.ceil((_ALPHA_AND_POWER * change.std() / mean) ** 2))
    return Difference(mean, low, high, verdict, needed)


def recall_by_depth(queries: Sequence[JudgedQuery], orders: Sequence[Sequence[int]]) -> Numbers:
    """Return the share of all relevant candidates that is among the first n of their query.

    Args:
        queries: Queries with M relevant candidates in all.
        orders: The indices of each query's candidates, N at most, the best first.

    Returns:
        N shares, for n from 1; all of them 1 where M is 0.
    """
    relevant = [
        [query.names[each] in query.grades for each in order] for query, order in zip(queries, orders, strict=True)
    ]
    found = np.zeros(max(map(len, relevant), default=0))
    for flags in relevant:
        found[: len(flags)] += flags
    total = found.sum()
    shares: Numbers = found.cumsum() / total if total else np.ones(len(found))
    return shares


def threshold_curve(scores: Numbers, relevant: Numbers) -> Numbers:
    """Return thresholds with what they keep, the highest first.

    Args:
        scores: N scores of candidates of all queries.
        relevant: N zeros and ones.

    Returns:
        A row for each threshold, of at most 100 and the best: threshold, precision, recall of what is relevant among
        the candidates, and F1.
    """
    order = np.argsort(-scores, kind="stable")
    scores, hits = scores[order], relevant[order].cumsum()
    last = np.append(np.flatnonzero(np.diff(scores)), len(scores) - 1)  # of equal scores, which are kept together
    kept, hits = last + 1.0, hits[last]
    rows = np.stack([scores[last], hits / kept, hits / hits[-1], 2 * hits / (kept + hits[-1])], axis=1)
    # The highest thresholds, which keep few candidates, are the interesting ones.
    shown = np.geomspace(1, len(rows), _CURVE_POINTS).round().astype(int) - 1
    chosen: Numbers = rows[np.union1d(shown, rows[:, 3].argmax())]
    return chosen


def f1_at(threshold: float, scores: Numbers, relevant: Numbers) -> float:
    """Return the F1 of what reaches a threshold, as `threshold_curve` counts it."""
    kept = scores >= threshold
    return float(2 * relevant[kept].sum() / (kept.sum() + relevant.sum()))
