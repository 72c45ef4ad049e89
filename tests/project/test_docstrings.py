import ast
import doctest
import inspect
import re
import textwrap
from types import FunctionType
from typing import Any

import griffe
import pytest
from pydantic import BaseModel, ValidationError

from regolo_rerank import RegoloError
from regolo_rerank.evaluation import evaluate, example_queries
from regolo_rerank.langchain import RegoloRerank as LangChainRerank
from regolo_rerank.plot import evaluation_summary, rank_changes
from tests.support.public import (
    CLASSES,
    OPTIONS,
    PUBLIC,
    descriptions_of,
    fields_of,
    is_ours,
    methods_of,
    parameters_of,
)

Kind = griffe.DocstringSectionKind

METHODS = [pytest.param(cls, method, id=method.__qualname__) for cls in CLASSES for method in methods_of(cls).values()]
ERRORS = {cls.__name__ for cls in PUBLIC if issubclass(cls, RegoloError)} | {f"pydantic.{ValidationError.__name__}"}
FUNCTIONS = [evaluate, example_queries, evaluation_summary, rank_changes]
UNITS = ("second", "byte", "character", "document", "result", "request", "attempt", "score")


def told(thing: Any, kind: Kind) -> set[str]:
    """Return the names that a section of a docstring tells of."""
    sections = griffe.Docstring(inspect.getdoc(thing) or "").parse("google", warnings=False)
    items = [item for section in sections if section.kind is kind for item in section.value]
    return {str(item.annotation if kind is Kind.raises else item.name).lstrip("*") for item in items}


def tellers(cls: type, method: FunctionType) -> list[FunctionType]:
    """Return a method, and those of the same class that its docstring names and so leaves the telling to."""
    named = [methods_of(cls).get(name) for name in re.findall(r"`(\w+)`", method.__doc__ or "")]
    return [method, *(twin for twin in named if twin is not None)]


def can_raise(cls: type, function: FunctionType) -> bool:
    """Return whether a function raises, itself or by calling another one of this package."""
    called: list[Any] = []
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
        match node:
            case ast.Raise():
                return True
            case ast.Call(func=ast.Name(id=name)):
                target = inspect.unwrap(function).__globals__.get(name)
                called.append(target.__init__ if inspect.isclass(target) else target)
            case ast.Call(func=ast.Attribute(value=ast.Name(id="self"), attr=name)):
                called.append(getattr(cls, name, None))
    return any(can_raise(cls, callee) for callee in called if inspect.isfunction(callee) and is_ours(callee))


@pytest.mark.parametrize(("cls", "method"), METHODS)
def test_a_method_tells_of_its_arguments(cls: type, method: FunctionType) -> None:
    """A docstring, or the one that it names, has each argument and no other."""
    assert parameters_of(method) in [told(teller, Kind.parameters) for teller in tellers(cls, method)]


@pytest.mark.parametrize(("cls", "method"), METHODS)
def test_a_method_tells_of_its_errors(cls: type, method: FunctionType) -> None:
    """A docstring, or the one that it names, says what a method raises, where it can raise, by names that exist."""
    errors = [told(teller, Kind.raises) for teller in tellers(cls, method)]
    assert any(errors) == can_raise(cls, method)
    assert set().union(*errors) <= ERRORS


@pytest.mark.parametrize("cls", PUBLIC)
def test_a_class_tells_of_what_it_holds(cls: type) -> None:
    """Each field is told of in the docstring of the class, or in one of its own; a model says how it refuses one."""
    assert cls.__doc__
    if not issubclass(cls, BaseModel):
        assert told(cls, Kind.attributes) == fields_of(cls) - set().union(*map(fields_of, cls.__bases__))
        return
    described = descriptions_of(cls).keys() & fields_of(cls)
    assert fields_of(cls) == described | told(cls, Kind.attributes)
    assert f"pydantic.{ValidationError.__name__}" in told(cls, Kind.raises)


def test_a_number_has_a_unit() -> None:
    """The description of each option that is a number says of what."""
    numbers = [name for name, field in OPTIONS.items() if re.search(r"\b(int|float)\b", str(field.annotation))]
    assert len(numbers) >= 9
    descriptions = descriptions_of(LangChainRerank)
    assert [name for name in numbers if not any(unit in descriptions[name].lower() for unit in UNITS)] == []


@pytest.mark.parametrize("thing", [*[method for cls in CLASSES for method in methods_of(cls).values()], *FUNCTIONS])
def test_what_is_returned_is_told_in_a_sentence(thing: FunctionType) -> None:
    """No words before a colon are taken for a type on the API page, which has the type from the signature."""
    docstring = griffe.Docstring(inspect.getdoc(thing) or "")
    sections = docstring.parse("google", returns_multiple_items=False, returns_named_value=False, warnings=False)
    returned = [item for section in sections if section.kind is Kind.returns for item in section.value]
    assert [item.annotation for item in returned if item.annotation is not None] == []


@pytest.mark.parametrize("thing", [*CLASSES, *FUNCTIONS])
def test_examples_are_true(thing: Any) -> None:
    """Each example gives what it says, in a section that the API page shows as code."""
    runner = doctest.DocTestRunner()
    for test in doctest.DocTestFinder().find(thing, thing.__name__):
        assert bool(test.examples) == bool(re.search("^ *Examples:$", test.docstring or "", re.MULTILINE)), test.name
        runner.run(test)
    assert not runner.summarize(verbose=False).failed
