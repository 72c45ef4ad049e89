"""Checks of queries and documents, before anything is made of them."""

from collections.abc import Callable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from typing import Any, Final, TypeVar

from regolo_rerank.errors import InvalidInputError

__all__ = ["BlankQueryError", "check_documents", "check_pair", "check_query", "get_texts"]

T = TypeVar("T")


class BlankQueryError(InvalidInputError):
    """The query is blank. `on_error` of the adapters covers this, because agents do call tools with empty queries."""


def check_pair(pair: object) -> tuple[Any, Any]:
    """Return a query and its documents, or raise InvalidInputError for anything but a tuple or list of two."""
    if isinstance(pair, tuple | list) and len(pair) == 2:
        return pair[0], pair[1]
    length = f" of {len(pair)}" if isinstance(pair, tuple | list) else ""
    raise InvalidInputError(f"must be (query, documents), got {type(pair).__name__}{length}")


def check_query(query: object) -> str:
    """Return the query, or raise InvalidInputError if it is not a string, or blank: its scores would mean nothing."""
    if not isinstance(query, str):
        raise InvalidInputError(f"query: must be a string, got {type(query).__name__}")
    if not query.strip():
        raise BlankQueryError("query: must not be blank")
    return query


def check_documents(documents: Iterable[T], name: str = "documents") -> list[T]:
    """Return documents as a list.

    Args:
        documents: A list, a tuple, an iterator, or a one-dimensional array or Series.
        name: The argument's name.

    Raises:
        InvalidInputError: It is a single text, a collection without an order, or has two dimensions.
    """
    if isinstance(documents, list | tuple):
        return list(documents)
    kind = type(documents).__name__
    if getattr(documents, "ndim", 1) != 1:
        columns = getattr(documents, "columns", None)
        advice = 'Pass one column, such as df["text"]' if columns is not None else "Pass one column of it"
        raise InvalidInputError(f"{name}: must be a list, got {kind} with {documents.ndim} dimensions. {advice}")  # type: ignore[attr-defined]
    if isinstance(documents, str | bytes | Mapping | AbstractSet) or not isinstance(documents, Iterable):
        raise InvalidInputError(f"{name}: must be a list, got {kind}")
    return list(documents)


def get_texts(documents: list[Any], text: str | Callable[[Any], str] | None) -> list[str]:
    """Return the texts of documents.

    Args:
        documents: N documents.
        text: A field name (key of a mapping, or attribute), or a function of one document, or None for strings.

    Raises:
        InvalidInputError: A text is missing or not a string. The message contains its position.
    """
    if text is None:
        texts = documents
    elif callable(text):
        texts = []
        for index, document in enumerate(documents):
            try:
                texts.append(text(document))
            except Exception as error:
                problem = f"documents[{index}]: the function text raised {type(error).__name__}: {error}"
                raise InvalidInputError(problem) from error
    elif isinstance(text, str):
        texts = [_get_field(index, document, text) for index, document in enumerate(documents)]
    else:
        raise InvalidInputError(f"text: must be a field name or a function, got {type(text).__name__}")
    for index, value in enumerate(texts):
        if not isinstance(value, str):
            raise InvalidInputError(f"documents[{index}]: {_describe_wrong_text(value, text)}")
    return texts


def _get_field(index: int, document: Any, name: str) -> Any:
    try:
        return document[name] if isinstance(document, Mapping) else getattr(document, name)
    except (KeyError, AttributeError):
        fields = ", ".join(map(str, list(document)[:8])) if isinstance(document, Mapping) else ""
        found = f". It has {fields}" if fields else ""
        raise InvalidInputError(f"documents[{index}]: has no {name!r}, which text={name!r} asks for{found}") from None


_ADVICE: Final = {
    "Document": "Use regolo_rerank.langchain.RegoloRerank, or text='page_content'",
    "TextNode": "Use regolo_rerank.llama_index.RegoloRerank, or text=lambda node: node.get_content()",
    "NodeWithScore": "Use regolo_rerank.llama_index.RegoloRerank, or text=lambda node: node.get_content()",
    "dict": "Name the field of its text, such as text='body'",
}


def _describe_wrong_text(value: Any, text: object) -> str:
    """Return the problem with a value that should be a text. Missing values are named, also NaN and pandas.NA."""
    kind = type(value).__name__
    if value is None or kind == "NAType" or (isinstance(value, float) and value != value):  # noqa: PLR0124 - NaN differs from itself
        missing = "NaN" if isinstance(value, float) else "pandas.NA" if kind == "NAType" else "None"
        return f"must be a string, got {missing}, a missing value. Drop it or replace it by ''"
    if text is not None or (type(value).__module__ == "builtins" and kind not in _ADVICE):
        return f"must be a string, got {kind}"
    return f"must be a string, got {kind}. {_ADVICE.get(kind, _ADVICE['dict'])}"
