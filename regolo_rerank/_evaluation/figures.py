"""What an evaluation comes to."""

from dataclasses import dataclass, field
from typing import Literal, Protocol

__all__ = ["Figures", "Measure", "QueryChange", "Threshold", "TopN", "Variant"]


@dataclass(frozen=True, slots=True)
class Measure:
    """One measure of the rankings, as a mean over the queries.

    Attributes:
        before: The mean in the retriever's order, from 0 to 1.
        after: The mean after reranking, from 0 to 1.
        difference: What reranking brings, `after` less `before`.
        low: Lower end of the difference's 95 % interval, by a paired bootstrap over the queries (10,000 draws).
        high: Its upper end.
        verdict: "better" or "worse" where the interval leaves zero out, else "cannot tell"; with fewer than 10 queries
            always that.
        queries_needed: About how many queries it would take to tell, if the difference stays as it is, with a chance
            of 80 %. None where the verdict tells already, or where there is no difference at all.
    """

    before: float
    after: float
    difference: float
    low: float
    high: float
    verdict: Literal["better", "worse", "cannot tell"]
    queries_needed: int | None


@dataclass(frozen=True, slots=True)
class TopN:
    """How many documents of each query must be kept to keep 95 % of what is relevant among all candidates.

    Attributes:
        before: That number in the retriever's order.
        after: That number after reranking.
        characters_before: Characters of that many documents of a query, on average over the queries.
        characters_after: The same after reranking: what an LLM is given to read.
        recall_before: The share of all relevant candidates among the first n of their query, for n from 1.
        recall_after: The same after reranking.
    """

    before: int
    after: int
    characters_before: float
    characters_after: float
    recall_before: list[float] = field(repr=False)
    recall_after: list[float] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Threshold:
    """What a `score_threshold` keeps, over the candidates of all queries.

    Attributes:
        threshold: Candidates that score as much or more are kept.
        precision: How much of what is kept is relevant, from 0 to 1.
        recall: How much of what is relevant is kept, from 0 to 1.
        f1: The harmonic mean of both.
    """

    threshold: float
    precision: float
    recall: float
    f1: float


@dataclass(frozen=True, slots=True)
class QueryChange:
    """What became of one query.

    Attributes:
        query: The query.
        before: Its nDCG@10 in the retriever's order.
        after: Its nDCG@10 after reranking.
        place_before: The place of the first relevant document, from 1; None where no candidate is.
        place_after: The same after reranking.
        first: The document that reranking puts first.
    """

    query: str
    before: float
    after: float
    place_before: int | None
    place_after: int | None
    first: str


@dataclass(frozen=True, slots=True)
class Variant:
    """What one way of reranking brings.

    Attributes:
        name: Its name.
        measures: nDCG@10, MRR, and recall at 1, 5 and 10, by these names.
        over_first: Its nDCG@10 (after) beside that of the first variant (before); None for the first one.
        top_n: How far `top_n` can go down.
        thresholds: What thresholds keep, the highest first, 101 of them at most.
        best_threshold: The one of the best F1; None where no candidate is relevant.
        held_out_f1: The F1 of thresholds on queries that they were not chosen on: those of either half of the queries
            on the other half. Well below `best_threshold.f1`, the choice rests on too few queries.
        changes: Every query with something relevant, the one that gained most first.
        failed: What was wrong with each query that failed, by its index; such queries count nowhere.
        requests: HTTP requests sent, retries included. Scores from a cache take none.
        total_tokens: Tokens as the service counted them, None where it does not tell.
        cost: US dollars as the service counted them, None where it does not tell.
        seconds: Time that the reranking took.
    """

    name: str
    measures: dict[str, Measure]
    over_first: Measure | None
    top_n: TopN
    thresholds: list[Threshold] = field(repr=False)
    best_threshold: Threshold | None
    held_out_f1: float | None
    changes: list[QueryChange] = field(repr=False)
    failed: dict[int, str] = field(repr=False)
    requests: int
    total_tokens: int | None
    cost: float | None
    seconds: float


class Figures(Protocol):
    """What an evaluation has to show: see `regolo_rerank.evaluation.Evaluation`."""

    @property
    def queries(self) -> int: ...
    @property
    def others(self) -> int: ...
    @property
    def documents(self) -> int: ...
    @property
    def missed(self) -> float: ...
    @property
    def variants(self) -> list[Variant]: ...
