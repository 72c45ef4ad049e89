"""One line to a server: requests on an httpx transport of our own.

An httpx client merges headers, keeps cookies and looks for redirects at each request, which is a third of what a call
costs; none of it is wanted here, so requests go to the client's transport, which also knows the environment's proxies.
"""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Final, Generic, TypeVar

import httpx

__all__ = ["AsyncLine", "Line", "is_proxied"]

C = TypeVar("C", httpx.Client, httpx.AsyncClient)

_ROOM: Final = 8
"""Requests at once on one line: httpx's pool looks through all of its requests and connections at each of them."""

_WAITS: Final = ("connect", "read", "write", "pool")


def _transport(client: httpx.Client | httpx.AsyncClient, url: httpx.URL) -> Any:
    return client._transport_for_url(url)  # noqa: SLF001 - httpx tells nobody else


def is_proxied(client: httpx.Client | httpx.AsyncClient, url: httpx.URL) -> bool:
    """Return whether a client reaches a URL through a proxy."""
    import httpcore

    pool = getattr(_transport(client, url), "_pool", None)
    return isinstance(
        pool, httpcore.HTTPProxy | httpcore.AsyncHTTPProxy | httpcore.SOCKSProxy | httpcore.AsyncSOCKSProxy
    )


class _Line(Generic[C]):
    """A client's transport.

    Attributes:
        client: The httpx client, which is closed with the line.
        users: How many requests use it now.
        room: How many may use it at once before another line serves better.
    """

    def __init__(self, client: C, room: float = _ROOM) -> None:
        self.client: C = client
        self.users = 0
        self.room = room
        self._headers = {"accept-encoding": client.headers["accept-encoding"], "connection": "keep-alive"}

    def _request(
        self,
        method: str,
        url: httpx.URL,
        *,
        content: bytes,
        headers: dict[str, str],
        auth: httpx.Auth | None = None,
        timeout: float | None = None,
        extensions: dict[str, Any] | None = None,
    ) -> httpx.Request:
        request = httpx.Request(
            method,
            url,
            content=content,
            headers={**self._headers, **headers},
            extensions={"timeout": dict.fromkeys(_WAITS, timeout), **(extensions or {})},
        )
        return next(auth.auth_flow(request)) if auth else request


class Line(_Line[httpx.Client]):
    """A line for sync calls."""

    @contextmanager
    def stream(self, method: str, url: httpx.URL, **arguments: Any) -> Iterator[httpx.Response]:
        """Send a request as `httpx.Client.stream` does."""
        response: httpx.Response = _transport(self.client, url).handle_request(
            self._request(method, url, **arguments)  # no name for it: the request holds the key
        )
        try:
            yield response
        finally:
            response.close()


class AsyncLine(_Line[httpx.AsyncClient]):
    """A line for async calls in one event loop."""

    @asynccontextmanager
    async def stream(self, method: str, url: httpx.URL, **arguments: Any) -> AsyncIterator[httpx.Response]:
        """Send a request as `httpx.AsyncClient.stream` does."""
        response: httpx.Response = await _transport(self.client, url).handle_async_request(
            self._request(method, url, **arguments)
        )
        try:
            yield response
        finally:
            await response.aclose()
