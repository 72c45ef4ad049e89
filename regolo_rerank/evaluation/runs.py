"""Reranks the queries with each client and compares the results."""

import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from regolo_rerank._files import Row
from regolo_rerank.client import RegoloClient
from regolo_rerank.errors import (
    AuthenticationError,
    InvalidInputError,
    MissingAPIKeyError,
    NotFoundError,
    PermissionDeniedError,
    RegoloError,
)
from regolo_rerank.evaluation.figures import Evaluation, Measure, QueryResult, Threshold, TopN, Variant
from regolo_rerank.evaluation.measures import (
    DEFAULT_MEASURES,
    Numbers,
    compare,
    f1_at,
    measure,
    parse_measures,
    threshold_curve,
)
from regolo_rerank.evaluation.queries import JudgedQuery, read_queries

if TYPE_CHECKING:
    from regolo_rerank.results import Usage

__all__ = ["evaluate"]

KEPT_SHARE: Final = 0.95
SAME_SCORE: Final = 1e-6  # servers return the same score with float noise of about 1e-7

HOPELESS: Final = AuthenticationError, MissingAPIKeyError, NotFoundError, PermissionDeniedError
"""Errors that would hit every query."""


def evaluate(
    queries: Iterable[Mapping[str, Any] | Row],
    clients: RegoloClient | Mapping[str, RegoloClient],
    *,
    measures: str | Iterable[Any] = DEFAULT_MEASURES,
    text_field: str = "text",
    title_field: str | None = "title",
    show_progress: bool = False,
) -> Evaluation:
    """Measure the effect of reranking on queries with known relevant documents.

    The clients' `top_n` and `score_threshold` are ignored. With `cache`, an interrupted evaluation resumes, and
    repeating a finished one sends no requests.

    Each query is a mapping with `query`, the `documents` in the retriever's order, and one of these two:

    - `relevant`: a list of ids, or of indices if the documents have no ids, or a mapping from them to grades. Ids may
      include relevant documents that the retriever missed.
    - `labels`: one grade per document, in the order of the documents.

    Documents are strings, or mappings with `text` and optionally `id` and `title`. A title is scored in front of the
    text. Grades below 1 mean "not relevant". Arrays and Series are accepted as lists. A query with a problem is
    skipped and reported.

    Args:
        queries: Judged queries, for example from `read_beir`, `read_trec` or `from_pairs`.
        clients: The client, or several by name to compare them.
        measures: Names of ir-measures separated by spaces, such as "nDCG@20 AP P@5". The first is the main measure.
        text_field: Field of a document with its text.
        title_field: Field of a document with its title. None leaves titles out.
        show_progress: Show a progress bar for each variant on a terminal or in a notebook.

    Raises:
        InvalidInputError: More than half of the queries have a problem, `relevant` could hold labels, or no query has a
            relevant document.
        RegoloError: The server rejects the key, the model or the address, or all queries fail. A query that fails
            alone is excluded and reported in `Variant.failed`.
    """
    named: Any = {"reranked": clients} if isinstance(clients, RegoloClient) else clients
    if not isinstance(named, Mapping) or not named:
        raise InvalidInputError('clients: expected a client, or several by name such as {"a": client_a, "b": client_b}')
    parsed = parse_measures(measures)
    judged, skipped = read_queries(queries, text_field=text_field, title_field=title_field)
    runs = [_Run(name, judged, parsed) for name in named]
    for run in runs:
        run.rerank(named[run.name], show_progress=show_progress)
    found = sum(name in query.relevant for query in judged for name in query.documents)
    return Evaluation(
        queries=sum(bool(query.relevant) for query in judged),
        others=sum(not query.relevant for query in judged),
        documents=sum(len(query.documents) for query in judged),
        titles=sum(query.titles for query in judged),
        missed=1 - found / sum(len(query.relevant) for query in judged),
        forms=dict(Counter(query.form for query in judged)),
        skipped=skipped,
        variants=[run.summarise(runs[:index]) for index, run in enumerate(runs)],
    )


class _Run:
    """One client's scores for all queries.

    Attributes:
        scores: Scores by document id, best first, by the query's index.
        rows: Row of a ranked query with relevant documents in `before` and `after`, by the query's index.
        before: Measures in the retriever's order.
        after: Measures after reranking.
    """

    def __init__(self, name: str, queries: Sequence[JudgedQuery], measures: dict[str, Any]) -> None:
        self.name = name
        self.queries = queries
        self.measures = measures
        self.scores: dict[int, dict[str, float]] = {}
        self.failed: dict[str, str] = {}
        self.usages: list[Usage] = []

    def rerank(self, client: RegoloClient, *, show_progress: bool) -> None:
        """Rerank and measure all queries.

        Raises:
            RegoloError: An error that would hit every query, or the first error if no query could be ranked.
        """
        started, first_error = time.perf_counter(), None
        pairs = [(query.query, list(query.documents.values())) for query in self.queries]
        everything = client.with_options(top_n=None, score_threshold=None)
        with closing(everything.rerank_many(pairs, return_exceptions=True)) as outcomes:
            for index, outcome in enumerate(_track(outcomes, self.name, len(pairs)) if show_progress else outcomes):
                if isinstance(outcome, HOPELESS):
                    raise outcome
                if isinstance(outcome, RegoloError):
                    first_error = first_error or outcome
                    self.failed[self.queries[index].place] = str(outcome)
                    continue
                names = list(self.queries[index].documents)
                self.scores[index] = {names[result.index]: result.relevance_score for result in outcome.results}
                self.usages.append(outcome.usage)
        self.seconds = time.perf_counter() - started
        self.rows = {index: row for row, index in enumerate(i for i in self.scores if self.queries[i].relevant)}
        if not self.rows and first_error:
            raise first_error
        judged = [self.queries[index] for index in self.rows]
        self.before = measure(self.measures, judged, [query.documents for query in judged])
        self.after = measure(self.measures, judged, [self.scores[index] for index in self.rows])

    def summarise(self, earlier: Sequence["_Run"]) -> Variant:
        """Return the results, compared with those of earlier runs."""
        thresholds = _find_thresholds(*self._flag(self.scores))
        tokens = [usage.total_tokens for usage in self.usages if usage.total_tokens is not None]
        costs = [usage.cost for usage in self.usages if usage.cost is not None]
        return Variant(
            name=self.name,
            measures=dict(zip(self.measures, compare(self.before, self.after), strict=True)),
            over_first=self._compare_with(earlier[0]) if earlier else None,
            same_as=next((run.name for run in earlier if self._has_scores_of(run)), None),
            top_n=self._find_top_n(),
            thresholds=thresholds,
            best_threshold=max(thresholds, key=lambda each: each.f1, default=None),
            held_out_f1=self._cross_validate(),
            per_query=[self._describe(index) for index in self.scores],
            failed=self.failed,
            requests=sum(usage.requests for usage in self.usages),
            total_tokens=sum(tokens) if tokens else None,
            cost=sum(costs) if costs else None,
            seconds=self.seconds,
        )

    def _compare_with(self, first: "_Run") -> Measure | None:
        """Return the first measure after reranking in two runs, on the queries that both ranked."""
        if not (both := [index for index in self.rows if index in first.rows]):
            return None
        before, after = (run.after[[run.rows[index] for index in both], :1] for run in (first, self))
        return compare(before, after)[0]

    def _has_scores_of(self, other: "_Run") -> bool:
        return self.scores.keys() == other.scores.keys() and all(
            abs(score - other.scores[index][name]) <= SAME_SCORE
            for index, scores in self.scores.items()
            for name, score in scores.items()
        )

    def _flag(self, indices: Iterable[int]) -> tuple[Numbers, Numbers]:
        """Return the scores of the candidates of some queries, and a one for each relevant candidate."""
        pairs = [
            (score, float(name in self.queries[index].relevant))
            for index in indices
            for name, score in self.scores[index].items()
        ]
        scores, relevant = np.array(pairs).reshape(-1, 2).T
        return scores, relevant

    def _cross_validate(self) -> float | None:
        halves = [self._flag(list(self.scores)[start::2]) for start in (0, 1)]
        if not all(relevant.any() for _, relevant in halves):
            return None
        best = [max(_find_thresholds(*half), key=lambda each: each.f1).threshold for half in halves]
        return (f1_at(best[0], *halves[1]) + f1_at(best[1], *halves[0])) / 2

    def _find_top_n(self) -> TopN:
        queries = [self.queries[index] for index in self.rows]
        before, recall_before = _find_depth(queries, [query.documents for query in queries])
        after, recall_after = _find_depth(queries, [self.scores[index] for index in self.rows])
        characters_before = [len(text) for query in queries for text in list(query.documents.values())[:before]]
        characters_after = [
            len(self.queries[index].documents[name]) for index in self.rows for name in list(self.scores[index])[:after]
        ]
        means = sum(characters_before) / len(queries), sum(characters_after) / len(queries)
        return TopN(before, after, *means, recall_before, recall_after)

    def _describe(self, index: int) -> QueryResult:
        query, scores, row = self.queries[index], self.scores[index], self.rows.get(index)
        before, after = (
            {} if row is None else dict(zip(self.measures, values[row].tolist(), strict=True))
            for values in (self.before, self.after)
        )
        rank_before, rank_after = (
            next((rank for rank, name in enumerate(names, 1) if name in query.relevant), None)
            for names in (query.documents, scores)
        )
        return QueryResult(
            query.id, query.query, before, after, rank_before, rank_after, list(scores), list(scores.values())
        )


def _find_depth(queries: Sequence[JudgedQuery], rankings: Sequence[Collection[str]]) -> tuple[int, list[float]]:
    """Return how many documents keep 95 % of the relevant candidates, and the kept share for each number from 1."""
    found = np.zeros(max(map(len, rankings)))
    for query, ranking in zip(queries, rankings, strict=True):
        found[: len(ranking)] += [name in query.relevant for name in ranking]
    shares = found.cumsum() / found.sum() if found.any() else np.ones(len(found))
    # 19 of 20 is a share of 0.95, even if binary fractions are a little below it.
    return int((shares < KEPT_SHARE - 1e-9).sum()) + bool(len(shares)), shares.tolist()


def _find_thresholds(scores: Numbers, relevant: Numbers) -> list[Threshold]:
    return [Threshold(*row) for row in threshold_curve(scores, relevant).tolist()] if relevant.any() else []


def _track(outcomes: Iterator[Any], name: str, total: int) -> Iterator[Any]:
    """Yield outcomes with a progress bar on a terminal and in a notebook."""
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import track

    console = Console(stderr=True)
    hidden = not console.is_terminal and not console.is_jupyter
    yield from track(outcomes, escape(name), total=total, console=console, transient=True, disable=hidden)
