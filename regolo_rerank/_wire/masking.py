"""The API key, where a server quotes it: "***" is shown."""

import re
from typing import Any, Final

from pydantic import SecretStr

from regolo_rerank._wire.messages import repair

__all__ = ["clean", "mask", "mask_all", "spell"]


_SHORT: Final = 8
"""Characters from which on no word holds a key by chance."""


def mask(text: str, secret: SecretStr | None) -> str:
    """Return a text in which the key, where it is quoted, is "***"; a short one, such as "1", only as a whole word."""
    for quoted in spell(secret):
        if len(quoted) < _SHORT:
            text = re.sub(rf"(?<!\w){re.escape(quoted)}(?!\w)", "***", text)
        else:
            text = text.replace(quoted, "***")
    return text


def mask_all(value: Any, secret: SecretStr) -> Any:
    """Return JSON in whose strings the key is "***"."""
    if isinstance(value, str):
        return mask(value, secret)
    if isinstance(value, list):
        return [mask_all(item, secret) for item in value]
    if isinstance(value, dict):
        return {mask(key, secret): mask_all(item, secret) for key, item in value.items()}
    return value


def clean(value: Any, secret: SecretStr | None) -> str | None:
    """Return what a server says in a field as text that can be printed; None where it says nothing."""
    if isinstance(value, bool) or not isinstance(value, str | int) or value in {"", "None"}:
        return None
    return mask(repair(str(value)), secret)


def spell(secret: SecretStr | None) -> set[str]:
    """Return the key as it is, and as JSON may write it."""
    key = "" if secret is None else secret.get_secret_value()
    written = key.replace("\\", "\\\\").replace('"', '\\"')
    return {key, written, written.replace("/", "\\/")} - {""}
