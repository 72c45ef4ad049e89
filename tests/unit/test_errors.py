import copy
import pickle
import re
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

import regolo_rerank
from regolo_rerank import APIResponseError, APIStatusError, RerankWarning, errors
from regolo_rerank.errors import error_for_status, warn

CLASSES: dict[str, type[Exception]] = {
    name: value
    for name, value in vars(errors).items()
    if isinstance(value, type) and value.__module__ == errors.__name__
}
CLASS = pytest.mark.parametrize("name", CLASSES)


def drawn() -> dict[str, tuple[list[str], str]]:
    """Return the bases and the note of each class that the module's docstring draws, from the top."""
    tree: dict[str, tuple[list[str], str]] = {}
    above: list[str] = []
    line = re.compile(r"(?m)^([│├└─ ]*)(\w+(?:Error|Warning))(?:\((\w+)\))? *(.*)")
    for branch, name, other, note in line.findall(errors.__doc__ or ""):
        depth = len(branch) // 4
        above[depth:] = [name]
        tree[name] = [above[depth - 1] if depth else "Exception", *filter(None, [other])], note
    return tree


def test_the_drawn_tree_is_the_real_one() -> None:
    """Every class is drawn, below the one that it inherits from."""
    bases = {name: [base.__name__ for base in cls.__bases__] for name, cls in CLASSES.items()}
    tree = {name: bases for name, (bases, _) in drawn().items()}
    assert tree == bases | {"RegoloError": ["Exception"], "RerankWarning": ["Exception", "UserWarning"]}
    assert bases["RerankWarning"] == ["UserWarning"]


@CLASS
def test_a_class_is_imported_from_the_package(name: str) -> None:
    """Whatever a caller may want to catch is one import away, and documented."""
    assert getattr(regolo_rerank, name) is CLASSES[name]
    assert name in errors.__all__
    assert CLASSES[name].__doc__


@pytest.mark.parametrize("status", [*range(300, 512), 599, 600, 999])
def test_a_status_becomes_the_documented_class(status: int) -> None:
    """The tree names the statuses of each class, and all others are the base class."""
    noted = [name for name, (_, note) in drawn().items() if re.search(rf"(^|[ ,]){status}(,|$)", note)]
    error = error_for_status(status, "words", code="c")
    assert [type(error).__name__] == (noted or ["ServerError" if status >= 500 else "APIStatusError"])
    assert (str(error), error.status_code, error.code) == ("words", status, "c")
    assert error.retryable is (status in {408, 429} or status >= 500)
    assert error_for_status(status, "", type="budget_exceeded").retryable is False


def attributes_of(cls: type[Exception]) -> dict[str, Any]:
    """Return a value for each attribute that a class takes."""
    reply = {"request_id": "call-1", "code": "c", "body": "{}"}
    if issubclass(cls, APIStatusError):
        return reply | {"status_code": 429, "type": "t", "retry_after": 0.5}
    return reply if issubclass(cls, APIResponseError) else {}


def pickled(error: Exception) -> Any:
    """Send an error through a pickle."""
    return pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes


@CLASS
@pytest.mark.parametrize("duplicate", [pickled, copy.copy, copy.deepcopy])
def test_an_error_survives_a_pickle(name: str, duplicate: Callable[[Exception], Exception]) -> None:
    """The copy that another process gets has the same class, message and attributes."""
    cls = CLASSES[name]
    error: Any = cls("words", **attributes_of(cls))
    error.index, error.retryable = 3, True
    copied = duplicate(error)
    assert type(copied) is cls
    assert str(copied) == "words"
    assert vars(copied) == vars(error) == attributes_of(cls) | {"index": 3, "retryable": True}


@pytest.mark.parametrize("package", ["regolo_rerank.x", "langchain_core.y", "llama_index.core.z", "wrapt"])
def test_a_warning_points_at_the_callers_line(package: str) -> None:
    """Frames of this package and of the frameworks are skipped."""
    frame: dict[str, Any] = {"__name__": package}
    exec("def call(function): function()", frame)  # noqa: S102 - a module of another name
    with warnings.catch_warnings(record=True, action="always") as caught:
        frame["call"](partial(warn, "words", RerankWarning))
    assert [(warning.filename, str(warning.message)) for warning in caught] == [(__file__, "words")]
