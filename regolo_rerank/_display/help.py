"""What `help`, a notebook's `?` and completion show of a class with options, put together when somebody asks."""

import ast
import inspect
import re
from collections.abc import Iterator
from contextlib import suppress
from inspect import Parameter, Signature
from itertools import pairwise
from textwrap import dedent, fill
from types import SimpleNamespace
from typing import get_type_hints

from pydantic import BaseModel

__all__ = ["OptionsDocstring", "OptionsSignature"]


class OptionsSignature:
    """A class's `__signature__`: all of its options with their types and defaults."""

    def __get__(self, instance: BaseModel | None, cls: type[BaseModel]) -> Signature:
        if instance is not None:
            raise AttributeError("__signature__")  # an object is no callable
        fields = cls.model_fields
        hints = {name: field.annotation for name, field in fields.items()}
        types = get_type_hints(SimpleNamespace(__annotations__=hints))  # without how they are checked
        parameters = [
            Parameter(
                name,
                Parameter.POSITIONAL_OR_KEYWORD if field.kw_only is False else Parameter.KEYWORD_ONLY,
                default=... if field.default_factory else field.default,
                annotation=types[name],
            )
            for name, field in fields.items()
        ]
        return Signature(sorted(parameters, key=lambda parameter: parameter.kind))


class OptionsDocstring:
    """A class's `__doc__`: the text in its source, with all options in the place of `**options`.

    Args:
        text: The text in the source.
    """

    def __init__(self, text: str) -> None:
        self._text = text

    def __get__(self, instance: BaseModel | None, cls: type[BaseModel]) -> str:
        return re.sub(
            r"^( +)\*\*options: .*\n(?:\1 +.*\n)*",
            lambda found: "".join(_list_options(cls, found[1])),
            self._text,
            flags=re.MULTILINE,
        )


def _list_options(cls: type[BaseModel], indent: str) -> Iterator[str]:
    for name, text in _read_descriptions(cls).items():
        if name != "api_key":
            yield fill(
                f"{name}: {text}", 88, initial_indent=indent, subsequent_indent=f"{indent}    ", break_on_hyphens=False
            )
            yield "\n"


def _read_descriptions(cls: type[BaseModel]) -> dict[str, str]:
    """Return the docstrings below a class's fields, those of its bases included; none where there is no source."""
    descriptions = {}
    for base in reversed(cls.__mro__):
        with suppress(OSError, TypeError, SyntaxError):
            (definition,) = ast.parse(dedent(inspect.getsource(base))).body
            for field, docstring in pairwise(getattr(definition, "body", [])):
                match field, docstring:
                    case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                        descriptions[name] = " ".join(text.split())
    return {name: descriptions[name] for name in cls.model_fields if name in descriptions}
