"""Does reranking help on one's own data? Measures before and after, with intervals, a verdict and what it takes."""

import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from regolo_rerank.client import RegoloClient
from regolo_rerank.errors import (
    AuthenticationError,
    InvalidInputError,
    NotFoundError,
    PermissionDeniedError,
    RegoloError,
)

if TYPE_CHECKING:
    from regolo_rerank.results import RerankResponse

try:
    from regolo_rerank._evaluation.figures import Measure, QueryChange, Threshold, TopN, Variant
    from regolo_rerank._evaluation.queries import JudgedQuery, read_queries
    from regolo_rerank._evaluation.runs import Run
except ImportError as error:
    raise ImportError('regolo_rerank.evaluation needs ir-measures: pip install "regolo_rerank[evaluate]"') from error

__all__ = ["Evaluation", "Measure", "QueryChange", "Threshold", "TopN", "Variant", "evaluate", "example_queries"]

_HOPELESS: Final = AuthenticationError, InvalidInputError, NotFoundError, PermissionDeniedError
"""What is wrong with one query is wrong with all."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What reranking brings on some queries; `print` shows it as text, a notebook as tables.

    Attributes:
        queries: How many queries have something relevant: the measures are means over them.
        others: How many have nothing relevant: they count for thresholds only, where whatever is kept is wrong.
        documents: How many candidates all queries have together.
        missed: The share of what is relevant that the retriever has not found, from 0 to 1: no reranker brings it back.
        variants: What each way of reranking brings.
    """

    queries: int
    others: int
    documents: int
    missed: float
    variants: list[Variant]

    def __str__(self) -> str:
        from regolo_rerank._evaluation.tables import text

        return text(self)

    def _repr_html_(self) -> str:
        from regolo_rerank._evaluation.tables import html

        return html(self)


def evaluate(
    queries: Iterable[Mapping[str, Any]],
    clients: RegoloClient | Mapping[str, RegoloClient],
    *,
    show_progress: bool = False,
) -> Evaluation:
    """Measure what reranking brings on queries whose relevant documents are known.

    A client's `top_n` and `score_threshold` are left out of it: every candidate is scored. With a `cache` in the
    client, an evaluation that was interrupted goes on where it was, and one that is done costs nothing more.

    Args:
        queries: Mappings with `query`, a string; `documents`, the candidates in the retriever's order, strings or
            mappings with `id` and `text`; and `relevant`, a list of ids, or of indices where documents are strings, or
            a mapping from them to grades, integers from 0. Ids of documents that the retriever has missed may be there.
        clients: The client that reranks, or several by name, to be set side by side.
        show_progress: Whether a bar is shown for each variant, on a terminal and in a notebook; needs tqdm.

    Returns:
        What each client brings.

    Raises:
        InvalidInputError: A query is wrong, or none has a relevant document.
        RegoloError: The service refuses the key, the model or the address, or every query has failed. Else queries that
            fail are left out and told in `Variant.failed`.
    """
    read = read_queries(queries)
    named = {"reranked": clients} if isinstance(clients, RegoloClient) else dict(clients)
    if not named:
        raise InvalidInputError("clients: there is none")
    runs = {name: _rank(read, client, show_progress=show_progress) for name, client in named.items()}
    first = next(iter(runs.values()))
    relevant = sum(len(query.grades) for query in read)
    found = sum(name in query.grades for query in read for name in query.names)
    return Evaluation(
        queries=sum(bool(query.grades) for query in read),
        others=sum(not query.grades for query in read),
        documents=sum(len(query.documents) for query in read),
        missed=1 - found / relevant,
        variants=[run.variant(name, first) for name, run in runs.items()],
    )


def example_queries() -> list[dict[str, Any]]:
    """Return 100 questions about Python, each with the documents that BM25 finds for it, as `evaluate` takes them.

    The documents are the docstrings of the standard library's modules, as this Python has them, the first 1,000
    characters of each, and their ids are the modules' names.

    Raises:
        InvalidInputError: bm25s is not installed.
    """
    from regolo_rerank._examples.stdlib import queries

    return queries()


def _rank(queries: Sequence[JudgedQuery], client: RegoloClient, *, show_progress: bool) -> Run:
    """Rerank the candidates of all queries by a client, and keep what fails beside what does not."""
    responses: dict[int, RerankResponse] = {}
    errors: dict[int, RegoloError] = {}
    pairs = [(query.query, query.documents) for query in queries]
    started = time.perf_counter()
    with (
        client.model_copy(update={"top_n": None, "score_threshold": None}) as whole,
        closing(whole.rerank_many(pairs, return_exceptions=True, show_progress=show_progress)) as outcomes,
    ):
        for index, outcome in enumerate(outcomes):
            if isinstance(outcome, _HOPELESS):
                raise outcome
            if isinstance(outcome, RegoloError):
                errors[index] = outcome
            else:
                responses[index] = outcome
    return Run(queries, responses, errors, time.perf_counter() - started)
