"""What may go over the wire: checks of single options, whose errors pydantic puts beside the option's name."""

import json
import os
import re
from collections.abc import Mapping
from typing import Any, Final

from pydantic import SecretStr
from pydantic_core import to_json

from regolo_rerank._wire.endpoint import read_base_url
from regolo_rerank.errors import InvalidInputError

__all__ = [
    "API_KEY_VARIABLE",
    "check_base_url",
    "check_cache",
    "check_extra_body",
    "check_headers",
    "check_key",
    "check_text",
    "dump_key",
    "read_environment_key",
]

API_KEY_VARIABLE: Final = "REGOLO_API_KEY"


def check_base_url(base_url: str) -> str:
    """Return a base URL that can be read, without spaces around it."""
    base_url = base_url.strip()
    read_base_url(base_url)
    return base_url


def read_key(text: str) -> SecretStr:
    """Return an API key, without spaces around it."""
    text = text.strip()
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
    return read_key(value)


def read_environment_key() -> SecretStr:
    """Return the environment's API key; an empty one where it has none.

    Raises:
        InvalidInputError: It holds a character that no key has.
    """
    try:
        return read_key(os.environ.get(API_KEY_VARIABLE, ""))
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


def check_text(text: str) -> str:
    """Return a text that is not blank."""
    if not text.strip():
        raise ValueError("must not be blank")
    return text


def check_extra_body(fields: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of further fields of a request, which are plain JSON."""
    if ours := fields.keys() & {"model", "query", "documents", "top_n"}:
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
