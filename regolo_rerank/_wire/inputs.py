"""What callers give, checked before anything is made of it."""

from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from typing import Any, Final, TypeVar

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
                raise InvalidInputError(f"{name}[{index}]: must be {_name(kinds)}, got {given}{_advise(given, kinds)}")
    return listed


def _name(kinds: tuple[type, ...]) -> str:
    return " or ".join(kind.__name__ for kind in kinds)


_TEXTS: Final = {
    "Document": "; pass its page_content, or rerank by regolo_rerank.langchain.RegoloRerank",
    "TextNode": "; pass its get_content(), or rerank by regolo_rerank.llama_index.RegoloRerank",
    "NodeWithScore": "; pass its get_content(), or rerank by regolo_rerank.llama_index.RegoloRerank",
}
"""What to do with what is no text, by its type."""

_OBJECTS: Final = {
    "Document": "; pass Document(page_content=...), or call rerank(documents, query), which takes strings",
    "NodeWithScore": "; pass NodeWithScore(node=TextNode(text=...)), or call RegoloClient.rerank with strings",
}
"""What to do with a text, by the type that was wanted."""


def _advise(given: str, kinds: tuple[type, ...]) -> str:
    """Return what to do with a document of another kind, where that is known, without loading any framework."""
    if kinds == (str,):
        return _TEXTS.get(given, "")
    if given == "str":
        return _OBJECTS.get(kinds[0].__name__, "")
    return ""
