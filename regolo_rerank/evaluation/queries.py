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
        grades: Grades by document id, including judged documents that were not retrieved. Below 1 is not relevant.
        relevant: Ids of the documents with a grade of at least 1.
        form: How the relevant documents are given: "labels", "ids", "indices", "grades by id" or "grades by index".
        may_be_labels: Whether the indices could also be one label of 0 or 1 per document.
    """

    place: str
    id: str
    query: str
    documents: dict[str, str]
    grades: dict[str, int]
    relevant: frozenset[str]
    form: str
    may_be_labels: bool = False


def read_queries(
    lines: Iterable[Any], *, text_field: str, title_field: str | None
) -> tuple[list[JudgedQuery], dict[str, str]]:
    """Return the usable queries, and the problem of each other one by its place.

    Args:
        lines: Mappings, or the rows of a file.
        text_field: Field of a document with its text.
        title_field: Field of a document with its title.

    Raises:
        InvalidInputError: More than half of the queries are unusable, the relevant documents are ambiguous, or no
            query has a relevant document.
    """
    if isinstance(lines, Mapping) or hasattr(lines, "columns"):
        raise InvalidInputError(
            f"queries: expected a list of queries, got {type(lines).__name__}. "
            "evaluation.from_pairs makes one from a DataFrame"
        )
    queries: list[JudgedQuery] = []
    skipped: dict[str, str] = {}
    places: dict[str, str] = {}
    for index, line in enumerate(lines):
        place, value = (line.place, line.value) if isinstance(line, Row) else (f"queries[{index}]", line)
        try:
            query = _read_query(value, place, str(index), text_field, title_field)
            if query.id in places:
                raise InvalidInputError(f'the id "{query.id}" is already used by {places[query.id]}')  # noqa: TRY301
        except AmbiguousError as error:
            raise AmbiguousError(f"{place}: {error}") from None
        except InvalidInputError as error:
            skipped[place] = str(error)
        else:
            places[query.id] = place
            queries.append(query)
    if len(skipped) > len(queries):
        raise InvalidInputError(
            f"{len(skipped)} of {len(skipped) + len(queries)} queries are unusable. {list_problems(skipped)}"
        )
    if not any(query.relevant for query in queries):
        raise InvalidInputError("no query has a relevant document, so there is nothing to measure")
    by_index = [query for query in queries if query.form == "indices"]
    if by_index and all(query.may_be_labels for query in by_index):
        raise AmbiguousError(f'{by_index[0].place}: "relevant" could hold indices or labels. {SUGGEST_LABELS}')
    return queries, skipped


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


def _read_query(line: Any, place: str, position: str, text_field: str, title_field: str | None) -> JudgedQuery:
    if not isinstance(line, Mapping):
        got = "" if line is None else f", got {type(line).__name__}"
        raise InvalidInputError(f'expected an object with "query", "documents" and "relevant" or "labels"{got}')
    if missing := [name for name in ("query", "documents") if line.get(name) is None]:
        raise InvalidInputError(f'missing field "{missing[0]}"')
    given = [name for name in ("relevant", "labels") if line.get(name) is not None]
    if len(given) != 1:
        raise InvalidInputError(
            'has both "relevant" and "labels", keep one' if given else 'missing field "relevant" or "labels"'
        )
    query = line["query"]
    if not isinstance(query, str) or not query.strip():
        raise InvalidInputError("query: must be a string that is not blank")
    documents = _read_documents(line["documents"], text_field, title_field)
    by_id = not documents or documents[0].id is not None
    names = [str(index if document.id is None else document.id) for index, document in enumerate(documents)]
    if given == ["labels"]:
        form, grades = "labels", _grade_labels(as_list(line["labels"], "labels"), names)
    elif isinstance(line["relevant"], Mapping):
        form = "grades by id" if by_id else "grades by index"
        grades = {_name(name): _grade(grade, f"relevant[{name!r}]") for name, grade in line["relevant"].items()}
    else:
        form, grades = "ids" if by_id else "indices", _grade_relevant(as_list(line["relevant"], "relevant"))
    if not by_id and (unknown := grades.keys() - set(names)):
        raise InvalidInputError(f"relevant: {min(unknown)} is not an index of the {len(names)} documents")
    texts: dict[str, str] = {}
    for name, document in zip(names, documents, strict=True):
        if texts.setdefault(name, document.text) != document.text:
            raise InvalidInputError(f'documents: two different texts have the id "{name}"')
    return JudgedQuery(
        place=place,
        id=str(position if (id_ := read_id(line)) is None else id_),
        query=query,
        documents=texts,
        grades=grades,
        relevant=frozenset(name for name, grade in grades.items() if grade >= 1),
        form=form,
        may_be_labels=form == "indices" and len(grades) == len(names) > 1 and grades.keys() <= {"0", "1"},
    )


def _read_documents(given: Any, text_field: str, title_field: str | None) -> list[Document]:
    documents = []
    for index, value in enumerate(as_list(given, "documents")):
        try:
            documents.append(read_document(value, text_field=text_field, title_field=title_field))
        except InvalidInputError as error:
            raise InvalidInputError(f"documents[{index}]: {error}") from None
    if len({document.id is None for document in documents}) > 1:
        index = next(index for index, document in enumerate(documents) if document.id is None)
        raise InvalidInputError(f"documents[{index}]: missing id, but other documents have one")
    return documents


def _grade_labels(labels: list[Any], names: list[str]) -> dict[str, int]:
    if len(labels) != len(names):
        raise InvalidInputError(f"labels: {len(labels)} labels for {len(names)} documents")
    grades: dict[str, int] = {}
    for index, (name, label) in enumerate(zip(names, labels, strict=True)):
        grades[name] = max(_grade(label, f"labels[{index}]"), grades.get(name, 0))
    return grades


def _grade_relevant(given: list[Any]) -> dict[str, int]:
    names = [_name(entry) for entry in given]
    if len(set(names)) < len(names) and not any(isinstance(entry, str) for entry in given):
        raise AmbiguousError(f"relevant: {given} repeats an index. {SUGGEST_LABELS}")
    return dict.fromkeys(names, 1)


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
