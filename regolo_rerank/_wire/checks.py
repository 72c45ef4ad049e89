"""What may go over the wire: checks of single options, and how pydantic's error says that one is wrong."""

import difflib
import json
import os
import re
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar

from pydantic import BaseModel, SecretStr, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError, to_json

from regolo_rerank._wire.endpoint import read_base_url
from regolo_rerank.errors import InvalidInputError
from regolo_rerank.prompts import API_FIELDS

__all__ = [
    "API_KEY_VARIABLE",
    "check_base_url",
    "check_cache",
    "check_extra_body",
    "check_headers",
    "check_key",
    "check_text",
    "client_check",
    "dump_key",
    "explain",
    "read_environment_key",
]

T = TypeVar("T")

API_KEY_VARIABLE: Final = "REGOLO_API_KEY"


def check_base_url(base_url: str) -> str:
    """Return a base URL that can be read, without spaces around it."""
    base_url = base_url.strip()
    read_base_url(base_url)
    return base_url


def _read_key(text: str) -> SecretStr:
    """Return an API key, without spaces around it."""
    text = text.strip()
    if text.lower().startswith("bearer ") or text[:1] in {"'", '"'} or text[-1:] in {"'", '"'}:
        raise ValueError("must be the key alone, without 'Bearer ' in front and without quotes around it")
    for position, character in enumerate(text):
        if not "!" <= character <= "~":
            raise ValueError(
                f"holds a character at position {position} that no API key has: space, control or non-ASCII"
            )
    return SecretStr(text)


def check_key(value: object) -> SecretStr | None:
    """Return what was given as an API key as a secret; None where nothing was given."""
    if value is None:
        return None
    if isinstance(value, SecretStr):
        value = value.get_secret_value()
    if not isinstance(value, str):
        raise ValueError("must be a string")  # noqa: TRY004 - pydantic reports a ValueError, and lets a TypeError through
    return _read_key(value)


def read_environment_key() -> SecretStr:
    """Return the environment's API key; an empty one where it has none.

    Raises:
        InvalidInputError: It holds a character that no key has.
    """
    try:
        return _read_key(os.environ.get(API_KEY_VARIABLE, ""))
    except ValueError as error:
        problem = f"{API_KEY_VARIABLE}: {error}"
    raise InvalidInputError(problem)


def dump_key(key: SecretStr | None) -> str | None:
    """Return what a dump holds of a key: "" is no secret but a decision, to send none whatever the environment has."""
    return "" if key is not None and not key.get_secret_value() else None


def check_cache(cache: object) -> object:
    """Return a mapping that scores can be kept in."""
    writable = all(hasattr(cache, name) for name in ("get", "__getitem__", "__setitem__"))
    if cache is not None and (isinstance(cache, type) or not writable):
        raise ValueError("must be a mapping that can be written, such as a dict")
    return cache


def client_check(kind: type[T]) -> Callable[[object], T | None]:
    """Return what checks a client of the caller's own, which has to be of this class of httpx's."""

    def check(client: object) -> T | None:
        if client is None or isinstance(client, kind):
            return client
        raise ValueError(f"must be an httpx.{kind.__name__}")

    return check


def check_text(text: str) -> str:
    """Return a text that is not blank."""
    if not text.strip():
        raise ValueError("must not be blank")
    return text


def check_extra_body(fields: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of further fields of a request, which are plain JSON."""
    if ours := fields.keys() & API_FIELDS:
        raise ValueError(f"must not hold {', '.join(sorted(ours))}; pass it as the argument of that name")
    try:
        text = json.dumps(fields, allow_nan=False, ensure_ascii=False)
        copied: dict[str, Any] = json.loads(text.encode())
        to_json(copied)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"must be plain JSON: {error}") from None
    return copied


_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_HEADER_VALUE = re.compile(r"([!-~]([\t -~]*[!-~])?)?")


def check_headers(headers: Mapping[str, str]) -> Mapping[str, str]:
    """Return HTTP headers that can be sent, and hold no key."""
    for name, value in headers.items():
        if name.lower() in {"authorization", "proxy-authorization"}:
            raise ValueError(f"must not hold {name}; a key goes into api_key")
        if name.lower() in {"content-length", "transfer-encoding"}:
            raise ValueError(f"must not hold {name}, which says where a request ends")
        if not _HEADER_NAME.fullmatch(name) or not _HEADER_VALUE.fullmatch(value):
            raise ValueError("must be printable ASCII, names without spaces, values without spaces around them")
    return headers


def explain(error: ValidationError, cls: type[BaseModel]) -> ValidationError:
    """Return the same error with the type of each refused value in words, and the value itself left out."""
    lines = []
    for line in error.errors(include_url=False, include_context=False):
        reason, value, loc = line["msg"].removeprefix("Value error, "), line["input"], line["loc"]
        if loc == ("top_n",) and line["type"] == "greater_than_equal":
            reason += "; to keep all, set the option to None, or pass len(documents) to a call"
        if line["type"] in {"extra_forbidden", "no_such_attribute"} and len(loc) == 1:
            reason = _describe_unknown(cls, str(loc[0]))
        elif line["type"] == "extra_forbidden" and not re.fullmatch("[a-z_]{1,30}", str(loc[-1])):
            reason, loc = "holds a field that there is not", loc[:-1]  # anything at all, and perhaps the key
        # A number helps to find the mistake and is no key; but one of thousands of digits cannot even be shown.
        short = isinstance(value, float | None) or (isinstance(value, int) and abs(value) < 10**15)
        shown = f" ({value!r})" if short else ""
        problem = PydanticCustomError(
            line["type"],
            "{reason}, got {kind}",
            {"reason": reason, "kind": f"{_name_type(value)}{shown}"},
        )
        lines.append(InitErrorDetails(type=problem, loc=loc, input=...))
    return ValidationError.from_exception_data(error.title, lines, hide_input=True)


def _name_type(value: object) -> str:
    """Return the name of a value's type, and where it comes from: libraries call their types alike."""
    package, name = type(value).__module__.partition(".")[0], type(value).__name__
    return name if package == "builtins" else f"{package}.{name}"


_MEANS: Final = {
    "k": "top_n",
    "top_k": "top_n",
    "model_name": "model",
    "model_id": "model",
    "api_base": "base_url",
    "endpoint": "base_url",
    "url": "base_url",
    "similarity_cutoff": "score_threshold",
    "threshold": "score_threshold",
    "request_timeout": "timeout",
    "retries": "max_retries",
}
"""What other rerankers call the same option."""


def _describe_unknown(cls: type[BaseModel], name: str) -> str:
    means = "api_key" if name.endswith("api_key") else _MEANS.get(name)
    # Beside these, only a slip of the pen means the same.
    close = [means] if means else difflib.get_close_matches(name, cls.model_fields, n=1, cutoff=0.85)
    return f"no such option; did you mean {close[0]}?" if close else f"no such option of {cls.__name__}"
