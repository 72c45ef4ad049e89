"""One way of reranking all queries of an evaluation, and what it brings."""

from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np

from regolo_rerank._evaluation.figures import Measure, QueryChange, Threshold, TopN, Variant
from regolo_rerank._evaluation.measures import (
    MEASURES,
    Numbers,
    compare,
    f1_at,
    measure,
    recall_by_depth,
    threshold_curve,
)
from regolo_rerank._evaluation.queries import JudgedQuery
from regolo_rerank.errors import RegoloError
from regolo_rerank.results import RerankResponse

__all__ = ["Run"]

_SHARE: Final = 0.95
"""Of what is relevant, that is to be kept."""


class Run:
    """A client's rankings of N queries.

    Raises:
        RegoloError: All queries that have something relevant failed.
    """

    def __init__(
        self,
        queries: Sequence[JudgedQuery],
        responses: dict[int, RerankResponse],
        errors: dict[int, RegoloError],
        seconds: float,
    ) -> None:
        self.queries = queries
        self.responses = responses
        self.seconds = seconds
        self.failed = {index: str(error) for index, error in errors.items()}
        self.judged = [index for index in self.responses if queries[index].grades]
        if not self.judged:
            raise next(iter(errors.values()))
        judged = [queries[index] for index in self.judged]
        self.orders_before = [range(len(query.names)) for query in judged]
        self.orders_after = [[result.index for result in self.responses[index].results] for index in self.judged]
        self.before, self.after = measure(judged, self.orders_before), measure(judged, self.orders_after)

    def variant(self, name: str, first: "Run") -> Variant:
        """Return what it brings; the first client's run is given to be compared with."""
        thresholds = self._thresholds()
        usages = [response.usage for response in self.responses.values()]
        tokens = [usage.total_tokens for usage in usages if usage.total_tokens is not None]
        costs = [usage.cost for usage in usages if usage.cost is not None]
        return Variant(
            name=name,
            measures=dict(zip(MEASURES, _measures(self.before, self.after), strict=True)),
            over_first=None if self is first else self._over(first),
            top_n=self._top_n(),
            thresholds=thresholds,
            best_threshold=max(thresholds, key=lambda each: each.f1, default=None),
            held_out_f1=self._held_out_f1(),
            changes=sorted(map(self._change, range(len(self.judged))), key=lambda each: each.before - each.after),
            failed=self.failed,
            requests=sum(usage.requests for usage in usages),
            total_tokens=sum(tokens) if tokens else None,
            cost=sum(costs) if costs else None,
            seconds=self.seconds,
        )

    def _over(self, first: "Run") -> Measure | None:
        both = [index for index in self.judged if index in first.responses]
        if not both:
            return None
        before, after = (np.array([run.after[run.judged.index(index)] for index in both]) for run in (first, self))
        return _measures(before, after)[0]

    def _top_n(self) -> TopN:
        judged = [self.queries[index] for index in self.judged]
        recall_before = recall_by_depth(judged, self.orders_before)
        recall_after = recall_by_depth(judged, self.orders_after)
        # A share of 0.95 is reached by 19 of 20 too, whatever binary fractions make of it.
        before, after = (
            int(np.searchsorted(recall, _SHARE - 1e-9)) + 1 if len(recall) else 0
            for recall in (recall_before, recall_after)
        )
        return TopN(
            before=before,
            after=after,
            characters_before=_characters(judged, self.orders_before, before),
            characters_after=_characters(judged, self.orders_after, after),
            recall_before=recall_before.tolist(),
            recall_after=recall_after.tolist(),
        )

    def _score(self, indices: Iterable[int]) -> tuple[Numbers, Numbers]:
        """Return the scores of all candidates of some queries, and a one for each that is relevant."""
        pairs = [
            (result.relevance_score, float(query.names[result.index] in query.grades))
            for index in indices
            for query in [self.queries[index]]
            for result in self.responses[index].results
        ]
        scores, relevant = np.array(pairs).reshape(-1, 2).T
        return scores, relevant

    def _thresholds(self) -> list[Threshold]:
        scores, relevant = self._score(self.responses)
        if not relevant.any():
            return []
        return [Threshold(*row) for row in threshold_curve(scores, relevant).tolist()]

    def _held_out_f1(self) -> float | None:
        halves = [self._score(list(self.responses)[start::2]) for start in (0, 1)]
        if not all(relevant.any() for _, relevant in halves):
            return None
        values = []
        for chosen, checked in (halves, halves[::-1]):
            curve = threshold_curve(*chosen)
            values.append(f1_at(curve[curve[:, 3].argmax(), 0], *checked))
        return sum(values) / 2

    def _change(self, row: int) -> QueryChange:
        query = self.queries[self.judged[row]]
        order = self.orders_after[row]
        return QueryChange(
            query=query.query,
            before=float(self.before[row, 0]),
            after=float(self.after[row, 0]),
            place_before=_place(query, self.orders_before[row]),
            place_after=_place(query, order),
            first=query.documents[order[0]] if order else "",
        )


def _measures(before: Numbers, after: Numbers) -> list[Measure]:
    return [
        Measure(float(old), float(new), *difference)
        for old, new, difference in zip(before.mean(axis=0), after.mean(axis=0), compare(before, after), strict=True)
    ]


def _characters(queries: Sequence[JudgedQuery], orders: Sequence[Sequence[int]], top_n: int) -> float:
    """Return how long the first documents of a query are together, on average."""
    lengths = [
        len(query.documents[each]) for query, order in zip(queries, orders, strict=True) for each in order[:top_n]
    ]
    return sum(lengths) / len(queries)


def _place(query: JudgedQuery, order: Sequence[int]) -> int | None:
    return next((place for place, each in enumerate(order, 1) if query.names[each] in query.grades), None)
