"""What of the package is public, and what it holds and takes."""

import ast
import inspect
import textwrap
from dataclasses import is_dataclass
from itertools import pairwise
from types import FunctionType
from typing import Any, is_typeddict

from pydantic import BaseModel

import regolo_rerank
from regolo_rerank import APIResponseError, APIStatusError, evaluation, langchain, llama_index


def is_ours(thing: Any) -> bool:
    """Return whether a class or a function is this package's own."""
    return str(getattr(thing, "__module__", "")).startswith("regolo_rerank")


def methods_of(cls: type) -> dict[str, FunctionType]:
    """Return the public methods that a class defines itself, by name."""
    members = {name: getattr(member, "__func__", member) for name, member in list(vars(cls).items())}
    return {
        name: member
        for name, member in members.items()
        if not name.startswith("_") and inspect.isfunction(member) and is_ours(member)
    }


def fields_of(cls: type) -> set[str]:
    """Return the names of what an instance holds."""
    if issubclass(cls, BaseModel):
        return {name for base in cls.__mro__ if is_ours(base) for name in base.__annotations__} & set(cls.model_fields)
    if issubclass(cls, APIStatusError | APIResponseError):
        return set(vars(cls("message")))
    return set(cls.__annotations__) if is_dataclass(cls) or is_typeddict(cls) else set()


def descriptions_of(cls: type) -> dict[str, str]:
    """Return the docstrings of a model's fields, those of its bases included, as editors and the API page read them."""
    descriptions = {}
    for base in filter(is_ours, reversed(cls.__mro__)):
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        for field, docstring in pairwise(getattr(definition, "body", [])):
            match field, docstring:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                    descriptions[name] = text
    return descriptions


def parameters_of(method: FunctionType) -> set[str]:
    """Return the names of what a method takes."""
    return set(inspect.signature(method).parameters) - {"self", "cls"}


PUBLIC: list[type] = [
    *(getattr(regolo_rerank, name) for name in regolo_rerank.__all__ if name != "__version__"),
    *(langchain.RegoloRerank, langchain.Candidates, langchain.RankedIndex),
    *(llama_index.RegoloRerank, llama_index.RegoloReRankEndEvent),
    *(each for each in vars(evaluation).values() if isinstance(each, type) and each.__name__ in evaluation.__all__),
]

OPTIONS = {
    name: field
    for name, field in langchain.RegoloRerank.model_fields.items()
    if name in llama_index.RegoloRerank.model_fields
}
"""The options that both adapters have, and all but `on_error` the client too."""

CLASSES: list[type] = list(dict.fromkeys(base for cls in PUBLIC for base in cls.__mro__ if is_ours(base)))
"""The public classes, and those that they inherit from."""
