import copy
import pickle
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest

import regolo_rerank
from regolo_rerank import APIResponseError, APIStatusError, RegoloError, ServerError, errors
from regolo_rerank.errors import error_for_status
from tests.support.exchanges import CLASSES

DOCUMENTATION = errors.__doc__ or ""


class Drawn(NamedTuple):
    """One line of the tree in the docstring."""

    name: str
    bases: list[str]
    note: str


def drawn() -> Iterator[Drawn]:
    """Read the tree that errors.py draws, from the top."""
    line = re.compile(r" {4}([│├└─ ]*)(\w+Error)(?:\((\w+)\))? *(.*)")
    above: list[str] = []
    for branch, name, other, note in line.findall(DOCUMENTATION):
        depth = len(branch) // 4
        above[depth:] = [name]
        yield Drawn(name, [above[depth - 1] if depth else "Exception", *filter(None, [other])], note)


TREE = {line.name: line for line in drawn()}


def public_classes() -> dict[str, type[Exception]]:
    """Return the classes that errors.py defines."""
    return {
        name: value
        for name, value in vars(errors).items()
        if isinstance(value, type) and value.__module__ == errors.__name__ and not name.startswith("_")
    }


CLASS = pytest.mark.parametrize("name", public_classes())


def test_the_drawn_hierarchy_is_the_real_one() -> None:
    """The docstring draws every error once, below the class that it inherits from."""
    bases = {name: [base.__name__ for base in error.__bases__] for name, error in public_classes().items()}
    for warning in ("RerankCacheWarning", "RerankFallbackWarning", "RerankSubstituteWarning"):
        assert bases.pop(warning) == ["UserWarning"]
        assert warning in DOCUMENTATION
    assert {line.name: line.bases for line in TREE.values()} == bases
    assert len(list(drawn())) == len(TREE)


def test_all_names_the_public_classes() -> None:
    """`__all__` is sorted, and holds the classes of the module and nothing else."""
    assert errors.__all__ == sorted(public_classes())


@CLASS
def test_an_error_is_imported_from_the_package(name: str) -> None:
    """What a caller may want to catch is one import away, and documented."""
    assert getattr(regolo_rerank, name) is public_classes()[name]
    assert name in regolo_rerank.__all__
    assert public_classes()[name].__doc__


@pytest.mark.parametrize("status", [*range(300, 512), 599, 600, 999])
def test_a_status_becomes_the_documented_class(status: int) -> None:
    """The tree names the statuses of each class, 5xx is the server's fault, and the rest is the base class."""
    by_note = [line.name for line in TREE.values() if str(status) in re.findall(r"\b\d{3}\b", line.note)]
    error = error_for_status(status, "words", code="c")
    assert [type(error).__name__] == (by_note or ["ServerError" if status >= 500 else "APIStatusError"])
    assert type(error) is CLASSES.get(status, ServerError if status >= 500 else APIStatusError)
    assert (str(error), error.status_code, error.code) == ("words", status, "c")


def attributes_of(error: type[Exception]) -> dict[str, Any]:
    """Return a value for each attribute that a class takes."""
    if issubclass(error, APIStatusError):
        return {
            "status_code": 429,
            "request_id": "call-1",
            "code": "c",
            "type": "t",
            "body": "{}",
            "retry_after": 0.5,
        }
    if issubclass(error, APIResponseError):
        return {"request_id": "call-1", "code": "c", "body": "{}"}
    return {}


def pickled(error: Exception) -> Any:
    """Send an error through a pickle."""
    return pickle.loads(pickle.dumps(error))  # noqa: S301 - it was made in the line itself


@CLASS
@pytest.mark.parametrize("duplicate", [pickled, copy.copy, copy.deepcopy])
def test_an_error_survives_a_pickle(name: str, duplicate: Callable[[Exception], Exception]) -> None:
    """The copy that another process gets has the same class, words and attributes."""
    cls = public_classes()[name]
    error = cls("words", **attributes_of(cls))
    copied = duplicate(error)
    assert type(copied) is cls
    assert str(copied) == "words"
    assert vars(copied) == vars(error) == attributes_of(cls)


@pytest.mark.parametrize("cls", [APIStatusError, APIResponseError])
def test_attributes_that_a_reply_lacks_are_none(cls: type[RegoloError]) -> None:
    """An error of a reply without body, code and request id still has these attributes."""
    assert {name: getattr(cls("words"), name) for name in ("request_id", "code", "body")} == {
        "request_id": None,
        "code": None,
        "body": "",
    }
