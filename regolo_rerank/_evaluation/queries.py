"""Reads the queries of an evaluation, each with its candidates and what of them is relevant."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from regolo_rerank.errors import InvalidInputError

__all__ = ["JudgedQuery", "read_queries", "read_query"]


@dataclass(frozen=True, slots=True)
class JudgedQuery:
    """A query, its candidates in the retriever's order, and what is relevant.

    Attributes:
        query: The query.
        names: A name for each of N candidates: its id, or its index in decimal.
        documents: N texts.
        grades: How relevant a document is, by its name, each at least 1; it may name what the retriever has missed.
    """

    query: str
    names: list[str]
    documents: list[str]
    grades: dict[str, int]


def read_queries(lines: Iterable[Any]) -> list[JudgedQuery]:
    """Read queries as `evaluate` takes them.

    Raises:
        InvalidInputError: One of them is wrong; the message says which and how.
    """
    read = []
    for index, line in enumerate(lines):
        try:
            read.append(read_query(line))
        except InvalidInputError as error:
            raise InvalidInputError(f"queries[{index}]: {error}") from None
    if not any(query.grades for query in read):
        raise InvalidInputError("queries: none of them has a relevant document, so there is nothing to measure")
    return read


def read_query(line: Any) -> JudgedQuery:
    """Read one query.

    Raises:
        InvalidInputError: It is wrong.
    """
    if not isinstance(line, Mapping):
        raise InvalidInputError(f"must be a mapping with query, documents and relevant, got {type(line).__name__}")
    if missing := [name for name in ("query", "documents", "relevant") if name not in line]:
        raise InvalidInputError(f"has no {missing[0]}")
    query = line["query"]
    if not isinstance(query, str) or not query.strip():
        raise InvalidInputError("query: must be a string that is not blank")
    names, documents = _documents(line["documents"])
    grades = _grades(line["relevant"])
    indices = bool(documents) and isinstance(line["documents"][0], str)
    if indices and (strange := grades.keys() - set(names)):
        raise InvalidInputError(f"relevant: {min(strange)!r} is no index of {len(names)} documents without ids")
    return JudgedQuery(query, names, documents, {name: grade for name, grade in grades.items() if grade})


def _documents(given: Any) -> tuple[list[str], list[str]]:
    """Return names and texts."""
    if not isinstance(given, list | tuple):
        raise InvalidInputError(f"documents: must be a list, got {type(given).__name__}")
    if all(isinstance(document, str) for document in given):
        return [str(index) for index in range(len(given))], list(given)
    names = []
    for index, document in enumerate(given):
        if not isinstance(document, Mapping) or not isinstance(document.get("text"), str) or "id" not in document:
            raise InvalidInputError(
                f"documents[{index}]: must be a string as all others are, or a mapping with id and text as all others"
            )
        names.append(_name(document["id"], f"documents[{index}].id"))
    if len(set(names)) < len(names):
        raise InvalidInputError(f"documents: {max(names, key=names.count)!r} is the id of two of them")
    return names, [document["text"] for document in given]


def _grades(given: Any) -> dict[str, int]:
    if isinstance(given, Mapping):
        for name, grade in given.items():
            if not isinstance(grade, int) or grade < 0:
                raise InvalidInputError(f"relevant[{name!r}]: a grade must be an integer from 0, got {grade!r}")
        return {_name(name, "relevant"): int(grade) for name, grade in given.items()}
    if not isinstance(given, list | tuple):
        raise InvalidInputError(
            f"relevant: must be a list of indices or ids, or a mapping from them to grades, got {type(given).__name__}"
        )
    return {_name(name, "relevant"): 1 for name in given}


def _name(given: Any, place: str) -> str:
    # The keys of a JSON object are strings, whatever the ids are.
    if isinstance(given, bool) or not isinstance(given, str | int):
        raise InvalidInputError(f"{place}: must be a string or an integer, got {type(given).__name__}")
    return str(given)
