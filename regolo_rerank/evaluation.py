"""Does reranking help on one's own data? Measures before and after, with intervals, a verdict and what it takes."""

from collections.abc import Iterable, Mapping
from typing import Any

from regolo_rerank.client import RegoloClient
from regolo_rerank.errors import InvalidInputError

try:
    from regolo_rerank._evaluation.figures import Evaluation, Measure, QueryChange, Threshold, TopN, Variant
    from regolo_rerank._evaluation.queries import read_queries
    from regolo_rerank._evaluation.runs import Run
except ImportError as error:
    raise ImportError('regolo_rerank.evaluation needs ir-measures: pip install "regolo_rerank[evaluate]"') from error

__all__ = ["Evaluation", "Measure", "QueryChange", "Threshold", "TopN", "Variant", "evaluate", "example_queries"]


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
    runs = {name: Run(read, client, show_progress=show_progress) for name, client in named.items()}
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
