"""Reads judged queries from BEIR folders, TREC files and DataFrames."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import ir_measures
import numpy as np

from regolo_rerank._files import Document, read_documents, read_lines
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
        text_field: Field of the corpus with the text. Pass the same name to `evaluate`, also for `title_field`.
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
        text_field: Field of the corpus with the text. Pass the same name to `evaluate`, also for `title_field`.
        title_field: Field with the title, which is scored in front of the text. None leaves titles out.

    Returns:
        All queries of the qrels. A query that the run lacks has no candidates.

    Raises:
        InvalidInputError: A file is missing or malformed, or an id has no text.
    """
    judged: dict[str, dict[str, int]] = {}
    for qrel in _parse(qrels, _parse_qrel, "query-id 0 document-id grade"):
        judged.setdefault(qrel.query_id, {})[qrel.doc_id] = qrel.relevance
    questions = _read_by_id(queries, set(judged), qrels)
    if run is None:
        found = _read_by_id(corpus, None, qrels, text_field, title_field)
        ids, search = list(found), bm25_search([document.text for document in found.values()], CANDIDATES)
        ranked = {query: [ids[index] for index in search(questions[query].text)] for query in judged}
    else:
        scored: dict[str, list[tuple[np.float32, str]]] = {query: [] for query in judged}
        for entry in _parse(run, ir_measures.read_trec_run, "query-id Q0 document-id rank score tag"):
            if entry.query_id in scored:
                scored[entry.query_id].append((np.float32(entry.score), entry.doc_id))
        # trec_eval compares scores in single precision and breaks ties by id.
        ranked = {query: [name for _, name in sorted(entries, reverse=True)] for query, entries in scored.items()}
        found = _read_by_id(corpus, {name for names in ranked.values() for name in names}, run, text_field, title_field)
    documents = {
        name: {"id": name, text_field: document.body} | ({str(title_field): document.title} if document.title else {})
        for name, document in found.items()
    }
    return [
        {
            "id": query,
            "query": questions[query].text,
            "documents": [documents[name] for name in ranked[query]],
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


def _parse(file: str | Path, parse: Callable[[str], Iterator[Any]], shape: str) -> Iterator[Any]:
    for number, line in read_lines(file):
        try:
            yield from parse(f"{line}\n")
        except ValueError:
            raise InvalidInputError(f'{file}, line {number}: expected "{shape}"') from None


def _parse_qrel(line: str) -> Iterator[Any]:
    fields = line.split("\t")
    if len(fields) == 3:  # BEIR, with a heading
        line = "\n" if fields[0] == "query-id" else "\t".join([fields[0], "0", *fields[1:]])
    found: Iterator[Any] = ir_measures.read_trec_qrels(line)  # type: ignore[no-untyped-call]
    return found


def _read_by_id(
    file: str | Path,
    wanted: set[str] | None,
    source: str | Path,
    text_field: str = "text",
    title_field: str | None = None,
) -> dict[str, Document]:
    """Return the documents with the wanted ids of another file, or all documents."""
    found = {}
    for each in read_documents(file, text_field=text_field, title_field=title_field):
        name, document = str(each.id), each
        if each.id is None:
            name, tab, text = each.text.partition("\t")
            if not tab:
                raise InvalidInputError(f'{file}, line {each.number}: expected JSON with "_id", or an id and a tab')
            document = replace(each, text=text)
        if wanted is None or name in wanted:
            found[name] = document
    if wanted and (missing := wanted - found.keys()):
        raise InvalidInputError(f'{file}: no text for {len(missing):,} ids of {source}, such as "{min(missing)}"')
    return found
