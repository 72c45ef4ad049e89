"""The connections behind a client: kept alive across calls, and never in anybody's way.

One pool serves all sync calls. Async calls have one pool an event loop, because a connection that was opened in one
loop fails in another, and it closes with its loop.
"""

import asyncio
import functools
import os
import ssl
import threading
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from types import TracebackType
from typing import Any, Final, Literal, Self, TypeVar

import httpcore
import httpx

from regolo_rerank.errors import APIConnectionError
from regolo_rerank.local import EmbeddedTransport
from regolo_rerank.options import Endpoint
from regolo_rerank.retry import Gate

__all__ = ["Pools", "is_proxied"]

Route = Literal["embedded", "loopback", "remote"]

C = TypeVar("C", httpx.Client, httpx.AsyncClient)

_LIMITS: Final = httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=60.0)

_fork_lock = threading.Lock()

_inherited: list[object] = []
"""A parent process's connections: closing them here would speak over its conversations."""


@functools.cache
def _ssl_context() -> ssl.SSLContext:
    return httpx.create_ssl_context()  # takes 22 ms, so once for all


def _route(endpoint: Endpoint) -> Route:
    if endpoint.embedded:
        return "embedded"
    return "loopback" if endpoint.loopback else "remote"


def _settings(route: Route) -> dict[str, Any]:
    """Return the arguments for an httpx client of either kind."""
    if route == "embedded":
        return {"transport": EmbeddedTransport()}
    # The environment's proxies are honoured, but loopback is never proxied.
    return {"verify": _ssl_context(), "limits": _LIMITS, "trust_env": route == "remote"}


def _opened(kind: type[C], route: Route) -> C:
    try:
        return kind(**_settings(route))
    except (ImportError, OSError, ValueError, httpx.InvalidURL) as error:
        problem = f"the environment's proxies or certificates cannot be used: {error}"
    raise APIConnectionError(problem)


def is_proxied(client: httpx.Client | httpx.AsyncClient, url: httpx.URL) -> bool:
    """Return whether a client reaches a URL through a proxy."""
    transport = client._transport_for_url(url)  # noqa: SLF001 - httpx tells nobody else
    pool = getattr(transport, "_pool", None)
    return isinstance(
        pool, httpcore.HTTPProxy | httpcore.AsyncHTTPProxy | httpcore.SOCKSProxy | httpcore.AsyncSOCKSProxy
    )


class Pools:
    """Every connection of one client, and the gate that its requests share.

    Pools open at first use, and again at the next use after they were closed. In a forked process all starts anew.
    """

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        self._lock = threading.Lock()
        self._clients: dict[Route, _Pool] = {}
        self._loops: dict[asyncio.AbstractEventLoop, _LoopPools] = {}
        self._gate = Gate()
        # Nobody is told when a client is forgotten; its sockets must close without a warning.
        weakref.finalize(self, _close, self._clients, os.getpid())
        weakref.finalize(self, self._loops.clear).atexit = False
        self._pid = os.getpid()  # last: from here on, other threads see all of it

    def _forked(self) -> None:
        if self._pid != os.getpid():
            with _fork_lock:
                if self._pid != os.getpid():
                    _inherited.append((self._clients, dict(self._loops)))
                    self._start()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Give a copied client connections of its own."""
        return type(self)()

    @property
    def gate(self) -> Gate:
        """The wait after a 429."""
        self._forked()
        return self._gate

    @contextmanager
    def pool(self, endpoint: Endpoint) -> "Iterator[_Pool]":
        """Give the pool for sync calls, to be entered by each thread that uses it."""
        self._forked()
        route = _route(endpoint)
        with ExitStack() as used:
            with self._lock:
                if route not in self._clients:
                    self._clients[route] = _Pool(_opened(httpx.Client, route))
                pool = self._clients[route]
                used.enter_context(pool)
            yield pool

    @asynccontextmanager
    async def async_pool(self, endpoint: Endpoint) -> AsyncIterator[httpx.AsyncClient]:
        """Give the running event loop's pool."""
        self._forked()
        loop = asyncio.get_running_loop()
        with self._lock:
            pools = self._loops.get(loop)
            if pools is None:
                for other in list(self._loops):
                    if other.is_closed():
                        self._loops.pop(other, None)
                pools = self._loops[loop] = _LoopPools(self, loop)
        async with pools:
            yield pools.client(_route(endpoint))

    def close(self) -> None:
        """Close the pool for sync calls, once the calls under way in other threads have ended."""
        self._forked()
        with self._lock:
            pools = [self._clients.pop(route) for route in list(self._clients)]
        for pool in pools:
            pool.close()

    async def aclose(self) -> None:
        """Close the running event loop's pool, and the one for sync calls, once the calls under way have ended."""
        self.close()
        if pools := self._loops.pop(asyncio.get_running_loop(), None):
            await pools.close()

    def forget(self, loop: asyncio.AbstractEventLoop, clients: dict[Route, httpx.AsyncClient]) -> None:
        """Drop a loop's pools, but not those that have taken their place since they were closed."""
        pools = self._loops.get(loop)
        if pools is not None and pools.clients is clients:
            self._loops.pop(loop, None)


class _Pool:
    """The pool for sync calls: it closes when nobody uses it any more.

    A thread whose call has failed elsewhere may still be waiting for its reply, long after the call.
    """

    def __init__(self, client: httpx.Client) -> None:
        self._client = client
        self._users = 0
        self._closing = False
        self._lock = threading.Lock()

    def __enter__(self) -> httpx.Client:
        with self._lock:
            self._users += 1
        return self._client

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with self._lock:
            self._users -= 1
        self._close_if_idle()

    def close(self) -> None:
        self._closing = True
        self._close_if_idle()

    def _close_if_idle(self) -> None:
        with self._lock:
            idle = self._closing and not self._users
        if idle:
            self._client.close()


class _LoopPools:
    """One event loop's pools.

    An async generator guards them: it is started in the loop, so asyncio runs its `finally` when the loop shuts down,
    or when nobody holds it any more.
    """

    def __init__(self, owner: Pools, loop: asyncio.AbstractEventLoop) -> None:
        self.clients: dict[Route, httpx.AsyncClient] = {}
        self._guard = _guarded(weakref.ref(owner), loop, self.clients)
        self._started = False
        self._users = 0
        self._closing = False

    async def __aenter__(self) -> None:
        self._users += 1
        if not self._started:
            self._started = True
            await anext(self._guard)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._users -= 1
        await self._close_if_idle()

    def client(self, route: Route) -> httpx.AsyncClient:
        if route not in self.clients:
            self.clients[route] = _opened(httpx.AsyncClient, route)
        return self.clients[route]

    async def close(self) -> None:
        self._closing = True
        await self._close_if_idle()

    async def _close_if_idle(self) -> None:
        if self._closing and not self._users:
            await self._guard.aclose()


async def _guarded(
    owner: weakref.ref[Pools], loop: asyncio.AbstractEventLoop, clients: dict[Route, httpx.AsyncClient]
) -> AsyncGenerator[None]:
    try:
        yield
    finally:
        if pools := owner():
            pools.forget(loop, clients)
        with suppress(RuntimeError):  # a loop that was left open, as nest_asyncio's is, is gone when Python ends
            asyncio.get_running_loop()
            for client in clients.values():
                await client.aclose()


def _renew_fork_lock() -> None:
    global _fork_lock  # noqa: PLW0603 - another thread of the parent may have held it
    _fork_lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_fork_lock)


def _close(clients: "dict[Route, _Pool]", pid: int) -> None:
    if pid == os.getpid():
        for client in clients.values():
            client.close()
