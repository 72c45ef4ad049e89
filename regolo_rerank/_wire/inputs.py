"""What callers give, checked before anything is made of it."""

from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from typing import Any, TypeVar

from regolo_rerank._wire.checks import advise
from regolo_rerank.errors import InvalidInputError

__all__ = ["check_documents", "check_pair", "check_query"]

T = TypeVar("T")


def check_pair(pair: object) -> tuple[Any, Any]:
    """Return a query and its documents, still to be checked, or refuse what is no pair.

    Raises:
        InvalidInputError: It is neither a tuple nor a list of two.
    """
    if isinstance(pair, tuple | list) and len(pair) == 2:
        return pair[0], pair[1]
    given = f"{type(pair).__name__}{f' of {len(pair)}' if isinstance(pair, tuple | list) else ''}"
    raise InvalidInputError(f"must be (query, documents), got {given}")


def check_query(query: object) -> str:
    """Return the query, or refuse it.

    Raises:
        InvalidInputError: It is no string, or blank: the service would answer with meaningless scores.
    """
    if not isinstance(query, str):
        raise InvalidInputError(f"query: must be a string, got {type(query).__name__}")
    if not query.strip():
        raise InvalidInputError("query: must not be blank")
    return query


def check_documents(documents: Iterable[T], *kinds: type, name: str = "documents") -> list[T]:
    """Return the documents of a list, a tuple or an iterator as a list, or refuse them.

    Args:
        documents: What the caller gave.
        *kinds: The types that an item may have.
        name: What the argument is called.

    Raises:
        InvalidInputError: It is a single document, has no order to take indices from, or holds something else.
    """
    if not isinstance(documents, list | tuple) and (
        isinstance(documents, (str, bytes, Mapping, AbstractSet, *kinds)) or not isinstance(documents, Iterable)
    ):
        raise InvalidInputError(f"{name}: must be a list of {_name(kinds)}, got {type(documents).__name__}")
    listed = list(documents)
    if not set(map(type, listed)) <= set(kinds):
        for index, document in enumerate(listed):
            if not isinstance(document, kinds):
                given = type(document).__name__
                raise InvalidInputError(f"{name}[{index}]: must be {_name(kinds)}, got {given}{advise(given, kinds)}")
    return listed


def _name(kinds: tuple[type, ...]) -> str:
    return " or ".join(kind.__name__ for kind in kinds)
