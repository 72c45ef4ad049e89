"""The results of an evaluation."""

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from regolo_rerank.errors import InvalidInputError

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Evaluation", "Measure", "QueryResult", "Threshold", "TopN", "Variant"]


@dataclass(frozen=True, slots=True)
class Measure:
    """One measure as a mean over the queries.

    Attributes:
        before: Mean in the retriever's order.
        after: Mean after reranking.
        difference: `after` minus `before`.
        low: Lower end of the 95 % interval of the difference, from a paired bootstrap over the queries (10,000 draws).
        high: Upper end of that interval.
        verdict: "better" or "worse" if the interval excludes zero and there are at least 10 queries.
        queries_needed: Roughly how many queries would settle it at this difference (80 % power). None if it is settled
            or if the difference is zero.
    """

    before: float
    after: float
    difference: float
    low: float
    high: float
    verdict: Literal["better", "worse", "inconclusive"]
    queries_needed: int | None


@dataclass(frozen=True, slots=True)
class TopN:
    """How many documents per query keep 95 % of the relevant candidates.

    Attributes:
        before: That number in the retriever's order.
        after: That number after reranking.
        characters_before: Mean length of the first `before` documents of a query together.
        characters_after: Mean length of the first `after` documents after reranking, which the LLM would read.
        recall_before: Share of the relevant candidates among the first n documents, for n from 1.
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
    """Effect of a `score_threshold` on the candidates of all queries.

    Attributes:
        threshold: Candidates with at least this score are kept.
        precision: Share of the kept candidates that are relevant.
        recall: Share of the relevant candidates that are kept.
        f1: Harmonic mean of precision and recall.
    """

    threshold: float
    precision: float
    recall: float
    f1: float


@dataclass(frozen=True, slots=True)
class QueryResult:
    """The ranking of one query and its measures.

    Attributes:
        id: Id of the query, or its position in the input.
        query: Text of the query.
        before: Measures in the retriever's order. Empty if the query has no relevant document.
        after: Measures after reranking.
        rank_before: Rank of the first relevant document, from 1. None if no candidate is relevant.
        rank_after: The same after reranking.
        ranked: Document ids, best first. Indices as strings if the documents have no ids.
        scores: Their scores.
    """

    id: str
    query: str
    before: dict[str, float]
    after: dict[str, float]
    rank_before: int | None
    rank_after: int | None
    ranked: list[str] = field(repr=False)
    scores: list[float] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Variant:
    """Results of one client.

    Attributes:
        name: Name of the client.
        measures: Results by measure.
        over_first: First measure after reranking, compared with the first variant (`before`). None for the first one.
        same_as: Name of an earlier variant with the same scores for all candidates, or None.
        top_n: How few documents are enough.
        thresholds: At most 101 thresholds, the highest first. Empty if no candidate is relevant.
        best_threshold: The threshold with the best F1.
        held_out_f1: F1 of thresholds on queries that they were not chosen on (two halves). If it is well below
            `best_threshold.f1`, there are too few queries to choose a threshold.
        per_query: Result of each ranked query, in input order.
        failed: Errors of the queries that could not be ranked, by the query's place. They are excluded.
        requests: HTTP requests sent, retries included. Cached scores need none.
        total_tokens: Tokens as counted by the server, or None.
        cost: Cost as counted by the server, or None.
        seconds: Duration of the reranking.
    """

    name: str
    measures: dict[str, Measure]
    over_first: Measure | None
    same_as: str | None
    top_n: TopN
    thresholds: list[Threshold] = field(repr=False)
    best_threshold: Threshold | None
    held_out_f1: float | None
    per_query: list[QueryResult] = field(repr=False)
    failed: dict[str, str] = field(repr=False)
    requests: int
    total_tokens: int | None
    cost: float | None
    seconds: float

    @property
    def changes(self) -> list[QueryResult]:
        """Queries with relevant documents, by gain in the first measure, the largest first."""
        main = next(iter(self.measures))
        judged = [result for result in self.per_query if result.before]
        return sorted(judged, key=lambda result: result.before[main] - result.after[main])


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Results of `evaluate`. `print` shows a report, and a notebook shows tables.

    Attributes:
        queries: Number of queries with relevant documents. The measures are means over them.
        others: Number of queries without one. They count for the thresholds only, where every kept document is wrong.
        documents: Number of candidates of all queries.
        titles: Number of candidates with a title, which was scored in front of the text.
        missed: Share of the relevant documents that the retriever did not find.
        forms: How the relevant documents were read ("labels", "ids", "indices", "grades by id" or "grades by index"),
            with the number of queries.
        skipped: Problems of the queries that could not be read, by place: "queries[3]" or "line 4".
        variants: Results of each client.
    """

    queries: int
    others: int
    documents: int
    titles: int
    missed: float
    forms: dict[str, int]
    skipped: dict[str, str]
    variants: list[Variant]

    def to_frame(self) -> "pd.DataFrame":
        """Return a pandas DataFrame with one row per variant and query: measures before and after, and ranks."""
        import pandas as pd

        rows = []
        for variant in self.variants:
            for result in variant.per_query:
                row: dict[str, object] = {"variant": variant.name, "id": result.id, "query": result.query}
                for name in variant.measures:
                    row |= {f"{name} before": result.before.get(name), f"{name} after": result.after.get(name)}
                rows.append(row | {"rank before": result.rank_before, "rank after": result.rank_after})
        return pd.DataFrame(rows)

    def save_per_query(self, path: str | Path) -> None:
        """Write JSON Lines with one line per variant and query: its `QueryResult`."""
        with Path(path).open("w", encoding="utf-8") as file:
            for variant in self.variants:
                lines = ({"variant": variant.name, **asdict(result)} for result in variant.per_query)
                file.writelines(f"{json.dumps(line)}\n" for line in lines)

    def save_run(self, path: str | Path) -> list[Path]:
        """Write a TREC run per variant and return the files. With several, each has the variant's name in its own name.

        Raises:
            InvalidInputError: An id contains a space, which the format does not allow.
        """
        files = []
        for variant in self.variants:
            tag, file = re.sub(r"[^\w.-]+", "_", variant.name), Path(path)
            if len(self.variants) > 1:
                file = file.with_name(f"{file.stem}.{tag}{file.suffix}")
            file.write_text("".join(_run_lines(variant, tag)), encoding="utf-8")
            files.append(file)
        return files

    def __str__(self) -> str:
        from regolo_rerank.evaluation.report import text

        return text(self)

    def _repr_html_(self) -> str:
        from regolo_rerank.evaluation.report import html

        return html(self)


def _run_lines(variant: Variant, tag: str) -> Iterator[str]:
    for result in variant.per_query:
        # trec_eval sorts by score in single precision and breaks ties by id. Scores that fall strictly keep our order.
        score = np.float32(np.inf)
        for rank, (name, exact) in enumerate(zip(result.ranked, result.scores, strict=True), 1):
            if len(f"{result.id} {name}".split()) != 2:
                raise InvalidInputError(f'a TREC run cannot hold the ids "{result.id}" and "{name}": no spaces allowed')
            score = min(np.float32(exact), np.nextafter(score, np.float32(-np.inf)))
            yield f"{result.id} Q0 {name} {rank} {score!s} {tag}\n"
