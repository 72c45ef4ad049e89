"""Reads judged queries from BEIR folders, TREC files and DataFrames."""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import ir_measures
import numpy as np

from regolo_rerank._files import read_document, read_lines, read_rows
from regolo_rerank.errors import InvalidInputError
from regolo_rerank.evaluation.queries import as_list

__all__ = ["bm25_search", "from_pairs", "read_beir", "read_trec"]

CANDIDATES: Final = 100


def read_beir(
    folder: str | Path,
    split: str = "test",
    run: str | Path | None = None,
    *,
    text_field: str = "text",
    title_field: str | None = "title",
) -> list[dict[str, Any]]:
    """Return the judged queries of a BEIR folder, for `evaluate`.

    Args:
        folder: Folder with `corpus.jsonl`, `queries.jsonl` and `qrels/SPLIT.tsv`, each of them plain or as `.gz`.
        split: Which of the qrels.
        run: A TREC run with the candidates. By default BM25 finds the best 100.
        text_field: Field of the corpus with the text.
        title_field: Field with the title, which is scored in front of the text. None leaves titles out.

    Raises:
        InvalidInputError: A file is missing or malformed. The message has the file and the line.
    """
    folder = Path(folder)
    if not (qrels := _find(folder / "qrels" / f"{split}.tsv")).exists():
        splits = sorted(file.name.partition(".")[0] for file in folder.glob("qrels/*.tsv*"))
        raise InvalidInputError(f"{qrels}: no such split. Available: {', '.join(splits) or 'none'}")
    corpus, queries = _find(folder / "corpus.jsonl"), _find(folder / "queries.jsonl")
    return read_trec(qrels, run, queries, corpus, text_field=text_field, title_field=title_field)


def read_trec(
    qrels: str | Path,
    run: str | Path | None,
    queries: str | Path,
    corpus: str | Path,
    *,
    text_field: str = "text",
    title_field: str | None = "title",
) -> list[dict[str, Any]]:
    """Return the queries of TREC files, for `evaluate`. Like trec_eval, it sorts the run by score, then by id.

    Args:
        qrels: Relevant documents: `query-id 0 document-id grade`, or BEIR's `query-id document-id grade` with tabs.
        run: Candidates: `query-id Q0 document-id rank score tag`. None lets BM25 find the best 100.
        queries: Texts of the queries: JSON with `_id` and `text`, or lines with an id, a tab and the text.
        corpus: Texts of the documents in the same formats.
        text_field: Field of the corpus with the text.
        title_field: Field with the title, which is scored in front of the text. None leaves titles out.

    Returns:
        All queries of the qrels. A query that the run lacks has no candidates.

    Raises:
        InvalidInputError: A file is missing or malformed, or an id has no text.
    """
    judged = _read_qrels(qrels)
    questions = _read_texts(queries, set(judged))
    _require(judged.keys() - questions.keys(), "queries", qrels, queries)
    if run is None:
        texts = _read_texts(corpus, None, text_field, title_field)
        ids, search = list(texts), bm25_search(list(texts.values()), CANDIDATES)
        ranked = {query: [ids[index] for index in search(questions[query])] for query in judged}
    else:
        ranked = {query: found for query, found in _read_run(run).items() if query in judged}
        wanted = {document for found in ranked.values() for document in found}
        texts = _read_texts(corpus, wanted, text_field, title_field)
        _require(wanted - texts.keys(), "documents", run, corpus)
    return [
        {
            "id": query,
            "query": questions[query],
            "documents": [{"id": document, "text": texts[document]} for document in ranked.get(query, [])],
            "relevant": grades,
        }
        for query, grades in judged.items()
    ]


def from_pairs(
    pairs: Any, *, query: str = "query", document: str = "document", label: str = "label"
) -> list[dict[str, Any]]:
    """Return the queries of a table with one row per query and document, for `evaluate`.

    Args:
        pairs: A DataFrame, or a mapping from column names to values. The rows of a query are in the retriever's order.
        query: Column with the query.
        document: Column with the text of the document.
        label: Column with the grade of the document: an integer or a boolean.

    Raises:
        InvalidInputError: The table lacks a column.
    """
    names = [str(name) for name in getattr(pairs, "columns", pairs)]
    for name in (query, document, label):
        if name not in names:
            raise InvalidInputError(f'no column "{name}" in the table. Its columns: {", ".join(names)}')
    grouped: dict[Any, dict[str, Any]] = {}
    columns = (as_list(pairs[name], name) for name in (query, document, label))
    for question, text, grade in zip(*columns, strict=True):
        group = grouped.setdefault(question, {"query": question, "documents": [], "labels": []})
        group["documents"].append(text)
        group["labels"].append(grade)
    return list(grouped.values())


def bm25_search(texts: Sequence[str], count: int) -> Callable[[str], list[int]]:
    """Return a function that finds the texts for a query by BM25, best first: indices of at most `count` texts.

    Raises:
        InvalidInputError: bm25s is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # in a notebook without widgets, its progress bar warns
            import bm25s
    except ImportError:
        raise InvalidInputError('BM25 needs bm25s: pip install "regolo_rerank[evaluate]"') from None
    index = bm25s.BM25()
    index.index(bm25s.tokenize(list(texts), stopwords=None, show_progress=False), show_progress=False)

    def search(query: str) -> list[int]:
        (words,) = bm25s.tokenize(query, stopwords=None, return_ids=False, show_progress=False)
        scores = index.get_scores(words)
        return [int(best) for best in (-scores).argsort(kind="stable")[:count] if scores[best] > 0]

    return search


def _find(file: Path) -> Path:
    compressed = file.with_name(f"{file.name}.gz")
    return compressed if compressed.exists() and not file.exists() else file


def _require(missing: set[str], what: str, source: str | Path, file: str | Path) -> None:
    if missing:
        raise InvalidInputError(f'{file}: {len(missing):,} {what} of {source} are missing, such as "{min(missing)}"')


def _read_qrels(file: str | Path) -> dict[str, dict[str, int]]:
    grades: dict[str, dict[str, int]] = {}
    for number, line in read_lines(file):
        fields = line.split("\t")
        if not line.strip() or (number == 1 and len(fields) == 3 and not fields[2].strip().lstrip("-").isdigit()):
            continue  # blank, or the heading of a BEIR file
        try:
            if len(fields) == 3:
                grades.setdefault(fields[0], {})[fields[1]] = int(fields[2])
            else:
                (qrel,) = ir_measures.read_trec_qrels(f"{line}\n")  # type: ignore[no-untyped-call]
                grades.setdefault(qrel.query_id, {})[qrel.doc_id] = qrel.relevance
        except ValueError:
            raise InvalidInputError(f'{file}, line {number}: expected "query-id 0 document-id grade"') from None
    return grades


def _read_run(file: str | Path) -> dict[str, list[str]]:
    """Return the document ids of each query in the order of trec_eval: by score in single precision, then by id."""
    scored: dict[str, list[tuple[np.float32, str]]] = {}
    for number, line in read_lines(file):
        try:
            for entry in ir_measures.read_trec_run(f"{line}\n"):  # type: ignore[no-untyped-call]
                scored.setdefault(entry.query_id, []).append((np.float32(entry.score), entry.doc_id))
        except ValueError:
            raise InvalidInputError(
                f'{file}, line {number}: expected "query-id Q0 document-id rank score tag"'
            ) from None
    return {query: [document for _, document in sorted(found, reverse=True)] for query, found in scored.items()}


def _read_texts(
    file: str | Path, wanted: set[str] | None, text_field: str = "text", title_field: str | None = "title"
) -> dict[str, str]:
    """Return texts by id, only the wanted ones."""
    texts = {}
    for row in read_rows(file):
        if isinstance(row.value, str) and "\t" in row.value:
            name, _, text = row.value.partition("\t")
        else:
            try:
                document = read_document(row.value, text_field=text_field, title_field=title_field)
            except InvalidInputError as error:
                raise InvalidInputError(f"{file}, {row.place}: {error}") from None
            if document.id is None:
                raise InvalidInputError(
                    f'{file}, {row.place}: missing id. Expected JSON with "_id", or an id and a tab'
                )
            name, text = str(document.id), document.text
        if wanted is None or name in wanted:
            texts[name] = text
    return texts
