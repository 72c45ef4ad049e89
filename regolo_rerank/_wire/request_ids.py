"""The name of a request, by which its reply is known and support can find it."""

import os
from collections.abc import Mapping
from typing import Final

import httpx
from pydantic import SecretStr

from regolo_rerank._wire.masking import clean

__all__ = ["is_reply_to_another", "new_id_headers", "request_id_of"]

_ID_HEADERS: Final = ("x-litellm-call-id", "x-request-id")
_PREFIX: Final = "regolo_rerank-"
"""How the names of this package's requests begin."""


def new_id_headers() -> dict[str, str]:
    """Return the headers that give a request a name: LiteLLM takes the first for its own, vLLM the second."""
    return dict.fromkeys(_ID_HEADERS, f"{_PREFIX}{os.urandom(16).hex()}")


def is_reply_to_another(response: httpx.Response, headers: Mapping[str, str]) -> bool:
    """Return whether a reply has the name of another request of this package.

    Of two replies to one request, httpx takes the second for the next one's. A recorded reply is from no server.
    """
    if "network_stream" in response.extensions:
        for header in _ID_HEADERS:
            name = headers.get(header, "")
            if name.startswith(_PREFIX) and response.request.headers.get(header, "") not in name:
                return True
    return False


def request_id_of(headers: Mapping[str, str], secret: SecretStr | None) -> str | None:
    """Return the server's name for a request, where it gives one."""
    return clean(next(filter(None, map(headers.get, _ID_HEADERS)), None), secret)
