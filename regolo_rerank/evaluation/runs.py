"""Reranks the queries with each client and compares the results."""

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any, Final

import numpy as np

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
    recall_by_depth,
    threshold_curve,
)
from regolo_rerank.evaluation.queries import JudgedQuery, read_queries
from regolo_rerank.results import RerankResponse

__all__ = ["evaluate"]

KEPT_SHARE: Final = 0.95
SAME_SCORE: Final = 1e-6  # servers return the same score with float noise of about 1e-7

HOPELESS: Final = AuthenticationError, MissingAPIKeyError, NotFoundError, PermissionDeniedError
"""Errors that would hit every query."""


def evaluate(
    queries: Iterable[Mapping[str, Any]],
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
    named = {"reranked": clients} if isinstance(clients, RegoloClient) else clients
    if not isinstance(named, Mapping) or not named:
        raise InvalidInputError('clients: expected a client, or several by name such as {"a": client_a, "b": client_b}')
    parsed = parse_measures(measures)
    judged, skipped = read_queries(queries, text_field=text_field, title_field=title_field)
    runs: list[_Run] = []
    variants: list[Variant] = []
    for name, client in named.items():
        run = _Run(name, judged, parsed)
        run.rank(client, show_progress=show_progress)
        over_first = run.compare_with(runs[0]) if runs else None
        same_as = next((each.name for each in runs if run.has_scores_of(each)), None)
        variants.append(replace(run.summarise(), over_first=over_first, same_as=same_as))
        runs.append(run)
    found = sum(name in query.relevant for query in judged for name in query.names)
    return Evaluation(
        queries=sum(bool(query.relevant) for query in judged),
        others=sum(not query.relevant for query in judged),
        documents=sum(len(query.documents) for query in judged),
        missed=1 - found / sum(len(query.relevant) for query in judged),
        forms=dict(Counter(query.form for query in judged)),
        skipped=skipped,
        variants=variants,
    )


class _Run:
    """One client's rankings of all queries.

    Attributes:
        responses: Rankings by the query's index.
        failed: Errors by the query's place.
        judged: Indices of the ranked queries with relevant documents. The rows of `before` and `after` belong to them.
        before: Measures in the retriever's order, a row for each query.
        after: Measures after reranking.
    """

    def __init__(self, name: str, queries: Sequence[JudgedQuery], measures: dict[str, Any]) -> None:
        self.name = name
        self.queries = queries
        self.measures = measures
        self.responses: dict[int, RerankResponse[str]] = {}
        self.failed: dict[str, str] = {}
        self.seconds = 0.0

    def rank(self, client: RegoloClient, *, show_progress: bool) -> None:
        """Rerank the queries and measure the rankings.

        Raises:
            RegoloError: An error that would hit every query, or the first error if no query could be ranked.
        """
        started = time.perf_counter()
        pairs = [(query.query, query.documents) for query in self.queries]
        everything = client.with_options(top_n=None, score_threshold=None)
        first_error: RegoloError | None = None
        with closing(everything.rerank_many(pairs, return_exceptions=True)) as outcomes:
            shown = _show_progress(outcomes, self.name, len(pairs)) if show_progress else outcomes
            for index, outcome in enumerate(shown):
                if isinstance(outcome, HOPELESS):
                    raise outcome
                if isinstance(outcome, RegoloError):
                    first_error = first_error or outcome
                    self.failed[self.queries[index].place] = str(outcome)
                else:
                    self.responses[index] = outcome
        self.seconds = time.perf_counter() - started
        self.judged = [index for index in self.responses if self.queries[index].relevant]
        if not self.judged and first_error:
            raise first_error
        queries = [self.queries[index] for index in self.judged]
        self.orders_before = [range(len(query.names)) for query in queries]
        self.orders_after = [[result.index for result in self.responses[index]] for index in self.judged]
        self.before = measure(self.measures, queries, self.orders_before)
        self.after = measure(self.measures, queries, self.orders_after)

    def compare_with(self, first: "_Run") -> Measure | None:
        """Return the first measure after reranking, compared with another run on the queries that both ranked."""
        both = [index for index in self.judged if index in first.responses]
        if not both:
            return None
        before, after = (np.array([run.after[run.judged.index(index)] for index in both]) for run in (first, self))
        return compare(before, after)[0]

    def has_scores_of(self, other: "_Run") -> bool:
        """Return whether both runs gave the same scores to all candidates."""
        if self.responses.keys() != other.responses.keys():
            return False
        scores = [
            [result.relevance_score for index in run.responses for result in _in_input_order(run.responses[index])]
            for run in (self, other)
        ]
        return bool(np.allclose(scores[0], scores[1], rtol=0, atol=SAME_SCORE))

    def summarise(self) -> Variant:
        """Return the results, without the comparison with other runs."""
        thresholds = self._compute_thresholds()
        usages = [response.usage for response in self.responses.values()]
        tokens = [usage.total_tokens for usage in usages if usage.total_tokens is not None]
        costs = [usage.cost for usage in usages if usage.cost is not None]
        return Variant(
            name=self.name,
            measures=dict(zip(self.measures, compare(self.before, self.after), strict=True)),
            over_first=None,
            same_as=None,
            top_n=self._compute_top_n(),
            thresholds=thresholds,
            best_threshold=max(thresholds, key=lambda each: each.f1, default=None),
            held_out_f1=self._compute_held_out_f1(),
            per_query=[self._describe(index) for index in self.responses],
            failed=self.failed,
            requests=sum(usage.requests for usage in usages),
            total_tokens=sum(tokens) if tokens else None,
            cost=sum(costs) if costs else None,
            seconds=self.seconds,
        )

    def _compute_top_n(self) -> TopN:
        queries = [self.queries[index] for index in self.judged]
        recall_before = recall_by_depth(queries, self.orders_before)
        recall_after = recall_by_depth(queries, self.orders_after)
        # 19 of 20 is a share of 0.95, even if binary fractions are a little below it.
        before, after = (
            int(np.searchsorted(recall, KEPT_SHARE - 1e-9)) + 1 if len(recall) else 0
            for recall in (recall_before, recall_after)
        )
        return TopN(
            before=before,
            after=after,
            characters_before=_mean_characters(queries, self.orders_before, before),
            characters_after=_mean_characters(queries, self.orders_after, after),
            recall_before=recall_before.tolist(),
            recall_after=recall_after.tolist(),
        )

    def _collect_scores(self, indices: Iterable[int]) -> tuple[Numbers, Numbers]:
        """Return the scores of all candidates of some queries, and a one for each relevant candidate."""
        pairs = [
            (result.relevance_score, float(query.names[result.index] in query.relevant))
            for index in indices
            for query in [self.queries[index]]
            for result in self.responses[index]
        ]
        scores, relevant = np.array(pairs).reshape(-1, 2).T
        return scores, relevant

    def _compute_thresholds(self) -> list[Threshold]:
        scores, relevant = self._collect_scores(self.responses)
        if not relevant.any():
            return []
        return [Threshold(*row) for row in threshold_curve(scores, relevant).tolist()]

    def _compute_held_out_f1(self) -> float | None:
        halves = [self._collect_scores(list(self.responses)[start::2]) for start in (0, 1)]
        if not all(relevant.any() for _, relevant in halves):
            return None
        values = []
        for chosen, checked in (halves, halves[::-1]):
            curve = threshold_curve(*chosen)
            values.append(f1_at(curve[curve[:, 3].argmax(), 0], *checked))
        return sum(values) / 2

    def _describe(self, index: int) -> QueryResult:
        query, results = self.queries[index], self.responses[index].results
        ranked = [query.names[result.index] for result in results]
        before: dict[str, float] = {}
        after: dict[str, float] = {}
        if query.relevant:
            row = self.judged.index(index)
            before = dict(zip(self.measures, self.before[row].tolist(), strict=True))
            after = dict(zip(self.measures, self.after[row].tolist(), strict=True))
        return QueryResult(
            id=query.id,
            query=query.query,
            before=before,
            after=after,
            rank_before=_find_rank(query, query.names),
            rank_after=_find_rank(query, ranked),
            ranked=ranked,
            scores=[result.relevance_score for result in results],
            first=query.documents[results[0].index] if results else "",
        )


def _show_progress(outcomes: Iterator[Any], name: str, total: int) -> Iterator[Any]:
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import track

    console = Console(stderr=True)
    hidden = not console.is_terminal and not console.is_jupyter
    with closing(
        track(outcomes, escape(name), total=total, console=console, transient=True, disable=hidden)  # type: ignore[type-var]
    ) as shown:
        yield from shown


def _in_input_order(response: RerankResponse[str]) -> list[Any]:
    return sorted(response, key=lambda result: result.index)


def _mean_characters(queries: Sequence[JudgedQuery], orders: Sequence[Sequence[int]], top_n: int) -> float:
    """Return the mean length of the first documents of a query together."""
    lengths = [
        len(query.documents[each]) for query, order in zip(queries, orders, strict=True) for each in order[:top_n]
    ]
    return sum(lengths) / len(queries)


def _find_rank(query: JudgedQuery, ranked: Sequence[str]) -> int | None:
    return next((rank for rank, name in enumerate(ranked, 1) if name in query.relevant), None)
