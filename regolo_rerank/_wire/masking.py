"""The API key, where a server quotes it: "***" is shown."""

import json
from typing import Any

from pydantic import SecretStr

from regolo_rerank._wire.messages import repair

__all__ = ["clean", "mask", "spell"]


def mask(text: str, secret: SecretStr | None) -> str:
    """Return a text in which the key, where it is quoted, is "***"."""
    for quoted in spell(secret):
        text = text.replace(quoted, "***")
    return text


def clean(value: Any, secret: SecretStr | None) -> str | None:
    """Return what a server says in a field as text that can be printed; None where it says nothing."""
    if isinstance(value, bool) or not isinstance(value, str | int) or value in {"", "None"}:
        return None
    return mask(repair(str(value)), secret)


def spell(secret: SecretStr | None) -> set[str]:
    """Return the key as it is, and as JSON may write it."""
    key = secret.get_secret_value() if secret else ""
    written = json.dumps(key)[1:-1]
    return {key, written, written.replace("/", "\\/")} - {""}
