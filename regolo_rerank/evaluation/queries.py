"""Reads judged queries. A shape that could mean two things is rejected, because a guess would change the result."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Final

from regolo_rerank._files import Document, Row, read_document, read_id
from regolo_rerank.errors import InvalidInputError

__all__ = ["JudgedQuery", "as_list", "list_problems", "read_queries"]

LISTED_PROBLEMS: Final = 10
SUGGEST_LABELS: Final = 'If it holds one label per document, call the field "labels"'


class AmbiguousError(InvalidInputError):
    """The relevant documents can be read in two ways, so the other queries may be misread too."""


@dataclass(frozen=True, slots=True)
class JudgedQuery:
    """A query with its candidates and its relevant documents.

    Attributes:
        place: Where it was found, for messages: "queries[3]" or "line 4".
        id: Its id, or its position in the input.
        query: Its text.
        documents: Texts of the candidates by id, or by index as a string, in the retriever's order.
        grades: Grades by document id, including judged documents that were not retrieved.
        relevant: Ids of the documents with a grade of at least 1.
        form: How the relevant documents are given: "labels", "ids", "indices", "grades by id" or "grades by index".
        titles: Number of candidates with a title.
    """

    place: str
    id: str
    query: str
    documents: dict[str, str]
    grades: dict[str, int]
    relevant: frozenset[str]
    form: str
    titles: int

    @property
    def may_have_labels(self) -> bool:
        """Whether its indices could also be one label of 0 or 1 per document."""
        return len(self.grades) == len(self.documents) > 1 and self.grades.keys() <= {"0", "1"}


def read_queries(
    lines: Iterable[Any], *, text_field: str, title_field: str | None
) -> tuple[list[JudgedQuery], dict[str, str]]:
    """Return the usable queries, and the problem of each other one by its place.

    Raises:
        InvalidInputError: More than half of the queries are unusable, the relevant documents are ambiguous, or no
            query has a relevant document.
    """
    if isinstance(lines, Mapping) or hasattr(lines, "columns"):
        raise InvalidInputError(
            f"queries: expected a list of queries, got {type(lines).__name__}. "
            "evaluation.from_pairs makes one from a DataFrame"
        )
    queries: dict[str, JudgedQuery] = {}
    skipped: dict[str, str] = {}
    for index, line in enumerate(lines):
        row = line if isinstance(line, Row) else Row(index, line, f"queries[{index}]")
        try:
            query = _read_query(row, str(index), text_field, title_field)
        except AmbiguousError as error:
            raise AmbiguousError(f"{row.place}: {error}") from None
        except InvalidInputError as error:
            skipped[row.place] = str(error)
            continue
        if queries.setdefault(query.id, query) is not query:
            skipped[row.place] = f'the id "{query.id}" is already used by {queries[query.id].place}'
    if len(skipped) > len(queries):
        total = len(skipped) + len(queries)
        raise InvalidInputError(f"{len(skipped)} of {total} queries are unusable. {list_problems(skipped)}")
    if not any(query.relevant for query in queries.values()):
        raise InvalidInputError("no query has a relevant document, so there is nothing to measure")
    by_index = [query for query in queries.values() if query.form == "indices"]
    if by_index and all(query.may_have_labels for query in by_index):
        raise AmbiguousError(f'{by_index[0].place}: "relevant" could hold indices or labels. {SUGGEST_LABELS}')
    return list(queries.values()), skipped


def list_problems(problems: Mapping[str, str]) -> str:
    """Return the first ten problems in one line."""
    listed = [f"{place}: {problem}" for place, problem in list(problems.items())[:LISTED_PROBLEMS]]
    more = len(problems) - len(listed)
    return " | ".join([*listed, f"and {more:,} more"] if more else listed)


def as_list(value: Any, name: str) -> list[Any]:
    """Return a list, a tuple, an array or a Series as a list of Python objects.

    Raises:
        InvalidInputError: It is something else.
    """
    for method in ("tolist", "to_list"):  # of NumPy and pandas, and of Polars
        if hasattr(value, method):
            value = getattr(value, method)()
    if isinstance(value, list | tuple):
        return list(value)
    hint = '. Pass one of its columns, such as df["text"]' if hasattr(value, "columns") else ""
    raise InvalidInputError(f"{name}: expected a list, got {type(value).__name__}{hint}")


def _read_query(row: Row, position: str, text_field: str, title_field: str | None) -> JudgedQuery:
    line: Any = row.value
    if not isinstance(line, Mapping):
        got = "" if line is None else f", got {type(line).__name__}"
        raise InvalidInputError(f'expected an object with "query", "documents" and "relevant" or "labels"{got}')
    given = {name: line[name] for name in ("query", "documents", "relevant", "labels") if line.get(name) is not None}
    for fields in (["query"], ["documents"], ["relevant", "labels"]):
        if not given.keys() & set(fields):
            raise InvalidInputError("missing field " + " or ".join(f'"{field}"' for field in fields))
    if len(given) > 3:
        raise InvalidInputError('has both "relevant" and "labels", keep one')
    query = given["query"]
    if not isinstance(query, str) or not query.strip():
        raise InvalidInputError("query: must be a string that is not blank")
    documents = _read_documents(given["documents"], text_field, title_field)
    names = [str(index if document.id is None else document.id) for index, document in enumerate(documents)]
    by_id = not documents or documents[0].id is not None
    if "labels" in given:
        form, grades = "labels", _grade_labels(as_list(given["labels"], "labels"), names)
    else:
        form, grades = _grade_relevant(given["relevant"], by_id=by_id)
    if not by_id and (unknown := grades.keys() - set(names)):
        raise InvalidInputError(f"relevant: {min(unknown)} is not an index of the {len(names)} documents")
    texts: dict[str, str] = {}
    for name, document in zip(names, documents, strict=True):
        if texts.setdefault(name, document.text) != document.text:
            raise InvalidInputError(f'documents: two different texts have the id "{name}"')
    found = frozenset(name for name, grade in grades.items() if grade >= 1)
    id_ = read_id(line)
    titles = len({name for name, document in zip(names, documents, strict=True) if document.title})
    return JudgedQuery(row.place, position if id_ is None else str(id_), query, texts, grades, found, form, titles)


def _read_documents(given: Any, text_field: str, title_field: str | None) -> list[Document]:
    documents: list[Document] = []
    for index, value in enumerate(as_list(given, "documents")):
        try:
            documents.append(read_document(value, text_field=text_field, title_field=title_field))
        except InvalidInputError as error:
            raise InvalidInputError(f"documents[{index}]: {error}") from None
        if (documents[index].id is None) != (documents[0].id is None):
            raise InvalidInputError(f"documents[{index}]: either all documents must have an id or none")
    return documents


def _grade_labels(labels: list[Any], names: list[str]) -> dict[str, int]:
    if len(labels) != len(names):
        raise InvalidInputError(f"labels: {len(labels)} labels for {len(names)} documents")
    grades: dict[str, int] = {}
    for index, (name, label) in enumerate(zip(names, labels, strict=True)):
        grades[name] = max(_grade(label, f"labels[{index}]"), grades.get(name, 0))
    return grades


def _grade_relevant(given: Any, *, by_id: bool) -> tuple[str, dict[str, int]]:
    """Return how the relevant documents are given, and their grades."""
    if isinstance(given, Mapping):
        grades = {_name(name): _grade(grade, f"relevant[{name!r}]") for name, grade in given.items()}
        return "grades by id" if by_id else "grades by index", grades
    entries = as_list(given, "relevant")
    names = [_name(entry) for entry in entries]
    if len(set(names)) < len(names) and not any(isinstance(entry, str) for entry in entries):
        raise AmbiguousError(f"relevant: {entries} repeats an index. {SUGGEST_LABELS}")
    return "ids" if by_id else "indices", dict.fromkeys(names, 1)


def _grade(value: Any, place: str) -> int:
    """Return a grade. 1.0 equals 1, and everything below 1 is 0, because it means "not relevant"."""
    number = value.item() if hasattr(value, "item") else value
    if not isinstance(number, int | float) or not math.isfinite(number) or (number >= 1 and number != int(number)):
        raise InvalidInputError(f"{place}: a grade must be a whole number, got {number!r}")
    return max(0, int(number))


def _name(given: Any) -> str:
    # The keys of a JSON object are strings, and pandas turns integers into floats if a value is missing.
    if isinstance(given, float) and given.is_integer():
        given = int(given)
    if isinstance(given, bool) or not isinstance(given, str | Integral):
        raise InvalidInputError(f"relevant: {given!r} is not an id or an index. {SUGGEST_LABELS}")
    return str(given)
