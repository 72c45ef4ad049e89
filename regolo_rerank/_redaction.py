"""Redaction of the API key in everything that a server sends."""

import re

from pydantic import SecretStr

__all__ = ["redact"]

_SHORTEST: int = 8
"""Shorter keys are dummies such as "none", and their letters may occur in any text."""


def redact(text: str, key: SecretStr | None) -> str:
    """Return text with "***" in place of the key, as it is and as JSON may escape it.

    Args:
        text: A body, a header or a message.
        key: The API key. One of less than 8 characters is not redacted.
    """
    secret = "" if key is None else key.get_secret_value()
    if len(secret) < _SHORTEST:
        return text
    if secret.isdigit():  # must not match the digits of a score
        return re.sub(rf"(?<![\d.]){secret}(?!\d)", "***", text)
    escaped = secret.replace("\\", "\\\\").replace('"', '\\"')
    for spelling in (secret, escaped, escaped.replace("/", "\\/")):
        text = text.replace(spelling, "***")
    return text
