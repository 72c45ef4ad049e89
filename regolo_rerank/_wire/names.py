"""The names of requests, by which a reply is known to be the one that was asked for."""

import uuid
from typing import Final

import httpx

__all__ = ["NAME_HEADERS", "is_reply_to_another", "new_name"]

NAME_HEADERS: Final = ("x-litellm-call-id", "x-request-id")
"""LiteLLM takes the first for its own name and gives it back, vLLM the second with `--enable-request-id-headers`."""

_NAME: Final = "regolo_rerank-"
"""How the names of this package's requests begin."""


def new_name() -> dict[str, str]:
    """Return the headers that give a request a name."""
    return dict.fromkeys(NAME_HEADERS, f"{_NAME}{uuid.uuid4().hex}")


def is_reply_to_another(response: httpx.Response) -> bool:
    """Return whether a reply has the name of another request of this package.

    Of two replies to one request, httpx takes the second for the next one's. A recorded reply is from no server.
    """
    return "network_stream" in response.extensions and any(
        (name := response.headers.get(header, "")).startswith(_NAME)
        and response.request.headers.get(header, "") not in name
        for header in NAME_HEADERS
    )
