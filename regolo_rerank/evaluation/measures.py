"""Computes the figures of an evaluation: measures with ir-measures, intervals with a paired bootstrap."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, Final

import ir_measures
import numpy as np

from regolo_rerank.errors import InvalidInputError
from regolo_rerank.evaluation.figures import Measure
from regolo_rerank.evaluation.queries import JudgedQuery

__all__ = ["DEFAULT_MEASURES", "Numbers", "compare", "f1_at", "measure", "parse_measures", "threshold_curve"]

Numbers = np.ndarray[Any, np.dtype[np.float64]]

DEFAULT_MEASURES: Final = "nDCG@10 MRR Recall@1 Recall@5 Recall@10"

DRAWS: Final = 100  # of 100 samples each
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
            measures[str(name)] = _parse(name)
            list(ir_measures.iter_calc([measures[str(name)]], {"0": {"0": 1}}, {"0": {"0": 1.0}}))
        except Exception as error:  # noqa: BLE001 - ir-measures raises NameError, AssertionError and others
            raise InvalidInputError(
                f'measures: cannot compute "{name}" ({error}). Examples: nDCG@20 AP P@5 (https://ir-measur.es)'
            ) from None
    if not measures:
        raise InvalidInputError("measures: give at least one, such as nDCG@10")
    return measures


def _parse(name: Any) -> Any:
    """Return a measure for a name such as `AP` or `nDCG@10`; ir-measures' own parser fails on Python 3.14."""
    if not isinstance(name, str) or "(" in name:
        return ir_measures.parse_measure(name)
    base, _, cutoff = name.partition("@")
    found = getattr(ir_measures, base, None)
    if not isinstance(found, ir_measures.Measure):
        raise ValueError("unknown measure")  # noqa: TRY004 - the name is wrong, and not its type
    return found @ int(cutoff) if cutoff else found


def measure(measures: dict[str, Any], queries: Sequence[JudgedQuery], rankings: Sequence[Iterable[str]]) -> Numbers:
    """Return a row for each query and a column for each measure. A ranking has document ids, best first."""
    qrels = {str(index): query.grades for index, query in enumerate(queries)}
    # Ranks take the place of scores, so that documents with equal scores stay in their order.
    run = {
        str(index): {name: 1 / rank for rank, name in enumerate(ranking, 1)} for index, ranking in enumerate(rankings)
    }
    rows: dict[tuple[str, Any], float] = {
        (value.query_id, value.measure): value.value
        for value in ir_measures.iter_calc(list(measures.values()), qrels, run)
    }
    values = [[rows.get((query, each), 0.0) for each in measures.values()] for query in qrels]
    return np.array(values).reshape(len(queries), len(measures))


def compare(before: Numbers, after: Numbers) -> list[Measure]:
    """Return the comparison of each column, with a paired bootstrap over the N rows."""
    change, random = after - before, np.random.default_rng(0)
    count = len(change)
    draws = [change[random.integers(count, size=(100, count))].mean(axis=1) for _ in range(DRAWS)]
    intervals = np.percentile(np.concatenate(draws), [2.5, 97.5], axis=0).T.tolist()
    found = []
    for old, new, each, (low, high) in zip(before.T, after.T, change.T, intervals, strict=True):
        difference, enough, needed = float(each.mean()), count >= FEWEST_QUERIES, None
        verdict: Any = "better" if enough and low > 0 else "worse" if enough and high < 0 else "inconclusive"
        if verdict == "inconclusive" and difference:
            needed = max(FEWEST_QUERIES, count + 1, math.ceil((POWER * each.std() / difference) ** 2))
        found.append(Measure(float(old.mean()), float(new.mean()), difference, low, high, verdict, needed))
    return found


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
