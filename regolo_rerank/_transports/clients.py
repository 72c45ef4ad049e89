"""The httpx clients behind a reranker: opened at the first call, kept for later ones, and never in anybody's way.

One client serves all sync calls to an endpoint. Async calls have one an event loop, because a connection that was
opened in one loop fails in another. There is no lock, which a forked process could inherit locked.
"""

import asyncio
import functools
import os
import ssl
import weakref
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from typing import Any, Self, TypeVar
from urllib.request import getproxies, proxy_bypass

import httpx

from regolo_rerank._transports.local import EmbeddedTransport
from regolo_rerank._transports.spread import AsyncSpreadTransport, SpreadTransport
from regolo_rerank._wire.endpoint import Endpoint, check_host
from regolo_rerank.errors import APIConnectionError

__all__ = ["Clients", "proxy_for"]

T = TypeVar("T")

_Guarded = tuple[httpx.AsyncClient, AsyncGenerator[None]]
"""The client of an event loop, and what closes its connections."""


class Clients:
    """The httpx clients of one reranker; a copy of it opens its own, and so does a forked process."""

    def __init__(self) -> None:
        self._clients: dict[tuple[int, str], httpx.Client] = {}
        self._loops: dict[asyncio.AbstractEventLoop, dict[str, _Guarded]] = {}
        # In a cycle that nobody refers to, a guard would end beside what it guards, and not before it.
        weakref.finalize(self, self._loops.clear).atexit = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return type(self)()

    def client(self, endpoint: Endpoint) -> httpx.Client:
        """Return the client for sync calls to an endpoint; its connections close when nobody holds it any more."""
        key = os.getpid(), endpoint.address
        # Of two threads that open one at the same time, both get the first.
        return self._clients.get(key) or self._clients.setdefault(key, _open_client(endpoint))

    async def loop_client(self, endpoint: Endpoint) -> httpx.AsyncClient:
        """Return the running event loop's client for calls to an endpoint; its connections close with the loop."""
        loop = asyncio.get_running_loop()
        if loop not in self._loops:
            for other in list(self._loops):
                if other.is_closed():
                    self._loops.pop(other, None)
        clients = self._loops.setdefault(loop, {})
        if endpoint.address not in clients:
            transport = EmbeddedTransport() if endpoint.embedded else _open(AsyncSpreadTransport, endpoint)
            guard = _close_with_loop(transport)
            await anext(guard)
            # A timeout of its own for each wait would cost 3 % of a call, and `tasks` has one around all of them.
            clients[endpoint.address] = _AsyncClient(transport=transport, trust_env=False, timeout=None), guard
        return clients[endpoint.address][0]

    def close(self) -> None:
        """Close the connections of sync calls, once the calls under way in other threads have ended."""
        self._clients.clear()

    async def aclose(self) -> None:
        """Close those of sync calls, and of async calls in the running loop; a request under way comes to its end."""
        self.close()
        for _, guard in self._loops.pop(asyncio.get_running_loop(), {}).values():
            await guard.aclose()


async def _close_with_loop(transport: httpx.AsyncBaseTransport) -> AsyncGenerator[None]:
    """Close connections when the event loop shuts down or nobody holds this any more: asyncio sees to both."""
    try:
        yield
    finally:
        with suppress(RuntimeError):  # a loop that was left open, as nest_asyncio's is, is gone when Python ends
            asyncio.get_running_loop()
            await transport.aclose()


class _NoCookies(httpx.Cookies):
    def extract_cookies(self, response: httpx.Response) -> None:
        """Keep nothing: to look for cookies takes a twelfth of a call."""


class _Client(httpx.Client):
    cookies = _NoCookies()  # type: ignore[override]  # a property there, which nobody sets here


class _AsyncClient(httpx.AsyncClient):
    cookies = _NoCookies()  # type: ignore[override]  # the same


def _open_client(endpoint: Endpoint) -> httpx.Client:
    transport = EmbeddedTransport() if endpoint.embedded else _open(SpreadTransport, endpoint)
    client = _Client(transport=transport, trust_env=False)
    # Nobody is told when a client is forgotten; its sockets must close without a warning.
    weakref.finalize(client, _close, transport, os.getpid())
    return client


def _close(transport: httpx.BaseTransport, pid: int) -> None:
    # A parent process's connections are not closed here: that would speak over its conversations.
    if pid == os.getpid():
        transport.close()


def _open(kind: Callable[..., T], endpoint: Endpoint) -> T:
    try:
        proxy = proxy_for(endpoint)
        secure = endpoint.url.scheme == "https" or proxy is not None
        # Plain http without a proxy meets no certificate.
        verify = _ssl_context() if secure else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        return kind(verify=verify, proxy=proxy)
    except (ImportError, OSError, ValueError, httpx.InvalidURL) as error:
        problem = f"the environment's proxies or certificates cannot be used: {error}"
    raise APIConnectionError(problem)


def proxy_for(endpoint: Endpoint) -> str | None:
    """Return the environment's proxy for an endpoint: httpx leaves that to whoever brings a transport."""
    proxies = getproxies()
    proxy = proxies.get(endpoint.url.scheme) or proxies.get("all")
    if endpoint.loopback or not proxy or proxy_bypass(endpoint.url.netloc.decode()):
        return None
    proxy = proxy if "://" in proxy else f"http://{proxy}"
    check_host(httpx.URL(proxy))
    return proxy


@functools.cache
def _ssl_context() -> ssl.SSLContext:
    return httpx.create_ssl_context()  # takes 22 ms, so once for all
