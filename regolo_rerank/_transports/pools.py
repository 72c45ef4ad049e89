"""The connections behind a client: kept alive across calls, and never in anybody's way.

One pool serves all sync calls. Async calls have one pool an event loop, because a connection that was opened in one
loop fails in another, and it closes with its loop. A pool has as many lines as its requests in flight need.
"""

import asyncio
import functools
import math
import os
import ssl
import threading
import weakref
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, Final, Literal, Self, TypeVar

import httpx

from regolo_rerank._core.retry import Gate
from regolo_rerank._transports.lines import AsyncLine, Line
from regolo_rerank._transports.local import EmbeddedTransport
from regolo_rerank._wire.endpoint import Endpoint
from regolo_rerank.errors import APIConnectionError, InvalidInputError

__all__ = ["Pools"]

Route = Literal["embedded", "plain", "loopback", "remote"]
Transport = Literal["httpx", "aiohttp"]

C = TypeVar("C", httpx.Client, httpx.AsyncClient)
L = TypeVar("L", Line, AsyncLine)

_KEEPALIVE: Final = 60.0
"""Seconds that an idle connection is kept."""

_LIMITS: Final = httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=_KEEPALIVE)

_MOST_LINES: Final = 16
"""Of a pool: with more requests in flight than they have room for, they share what there is."""

_fork_lock = threading.Lock()

_inherited: list[object] = []
"""A parent process's connections: closing them here would speak over its conversations."""


@functools.cache
def _ssl_context() -> ssl.SSLContext:
    return httpx.create_ssl_context()  # takes 22 ms, so once for all


def _route(endpoint: Endpoint) -> Route:
    if endpoint.embedded:
        return "embedded"
    if endpoint.loopback:
        return "plain" if endpoint.url.scheme == "http" else "loopback"
    return "remote"


def _settings(route: Route, transport: Transport = "httpx") -> dict[str, Any]:
    """Return the arguments for an httpx client of either kind."""
    if route == "embedded":
        return {"transport": EmbeddedTransport()}
    # The environment's proxies are honoured, but loopback is never proxied.
    trust_env = route == "remote"
    # Plain http on this machine, where no redirect is followed and no proxy asked, meets no certificate.
    verify = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT) if route == "plain" else _ssl_context()
    if transport == "aiohttp":
        from regolo_rerank._transports.aiohttp_transport import AiohttpTransport

        return {"transport": AiohttpTransport(verify, _KEEPALIVE, trust_env=trust_env), "trust_env": False}
    return {"verify": verify, "limits": _LIMITS, "trust_env": trust_env}


def _opened(kind: type[C], route: Route, transport: Transport = "httpx") -> C:
    try:
        return kind(**_settings(route, transport))
    except InvalidInputError:
        raise  # an extra is missing
    except (ImportError, OSError, ValueError, httpx.InvalidURL) as error:
        problem = f"the environment's proxies or certificates cannot be used: {error}"
    raise APIConnectionError(problem)


def _taken(lines: list[L], opened: Callable[[], L]) -> L:
    """Return the first line that has room, a new one, or the least busy one, and count its user."""
    line = next((line for line in lines if line.users < line.room), None)
    if line is None and len(lines) < _MOST_LINES:
        lines.append(line := opened())
    line = line or min(lines, key=lambda line: line.users)
    line.users += 1
    return line


class Pools:
    """Every connection of one client, and the gate that its requests share.

    Pools open at first use, and again at the next use after they were closed. In a forked process all starts anew.
    """

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        self._lock = threading.Lock()
        self._pools: dict[Route, _Pool] = {}
        self._loops: dict[asyncio.AbstractEventLoop, _LoopPools] = {}
        self._gate = Gate()
        # Nobody is told when a client is forgotten; its sockets must close without a warning.
        weakref.finalize(self, _close, self._pools, os.getpid())
        weakref.finalize(self, self._loops.clear).atexit = False
        self._pid = os.getpid()  # last: from here on, other threads see all of it

    def _forked(self) -> None:
        if self._pid != os.getpid():
            with _fork_lock:
                if self._pid != os.getpid():
                    _inherited.append((self._pools, dict(self._loops)))
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
    def pool(self, endpoint: Endpoint) -> Iterator[Callable[[], AbstractContextManager[Line]]]:
        """Give what opens a line for a thread that sends, and keep the pool for sync calls open."""
        self._forked()
        route = _route(endpoint)
        with self._lock:
            if route not in self._pools:
                self._pools[route] = _Pool(route)
            pool = self._pools[route]
            pool.entered()
        try:
            yield pool.line
        finally:
            pool.left()

    def async_pool(self, endpoint: Endpoint, transport: Transport) -> "_LoopUse":
        """Give what opens a line for a task that sends, and keep the running event loop's pools open."""
        self._forked()
        loop = asyncio.get_running_loop()
        with self._lock:
            pools = self._loops.get(loop)
            if pools is None:
                for other in list(self._loops):
                    if other.is_closed():
                        self._loops.pop(other, None)
                pools = self._loops[loop] = _LoopPools(self, loop)
        return _LoopUse(pools, pools.pool(_route(endpoint), transport))

    def close(self) -> None:
        """Close the pool for sync calls, once the calls under way in other threads have ended."""
        self._forked()
        with self._lock:
            pools = [self._pools.pop(route) for route in list(self._pools)]
        for pool in pools:
            pool.close()

    async def aclose(self) -> None:
        """Close the running event loop's pool, and the one for sync calls, once the calls under way have ended."""
        self.close()
        if pools := self._loops.pop(asyncio.get_running_loop(), None):
            await pools.close()

    def forget(self, loop: asyncio.AbstractEventLoop, pools: "dict[tuple[Route, Transport], _LoopPool]") -> None:
        """Drop a loop's pools, but not those that have taken their place since they were closed."""
        known = self._loops.get(loop)
        if known is not None and known.pools is pools:
            self._loops.pop(loop, None)


class _Pool:
    """The pool for sync calls: it closes when nobody uses it any more.

    A thread whose call has failed elsewhere may still be waiting for its reply, long after the call.
    """

    def __init__(self, route: Route) -> None:
        self._users = 0
        self._opened = lambda: Line(_opened(httpx.Client, route))
        self._lines: list[Line] = []
        self._closing = False
        self._lock = threading.Lock()

    @contextmanager
    def line(self) -> Iterator[Line]:
        """Give a line to one thread."""
        with self._lock:
            line = _taken(self._lines, self._opened)
            self._users += 1
        try:
            yield line
        finally:
            self.left(line)

    def entered(self) -> None:
        """Count a call in, which keeps the pool open."""
        with self._lock:
            self._users += 1

    def left(self, line: Line | None = None) -> None:
        """Count a call out, or a thread and its line."""
        with self._lock:
            self._users -= 1
            if line is not None:
                line.users -= 1
        self._close_if_idle()

    def close(self) -> None:
        self._closing = True
        self._close_if_idle()

    def _close_if_idle(self) -> None:
        if self._closing and not self._users:
            for line in self._lines:
                line.client.close()


class _LoopPool:
    """The pool of one event loop."""

    def __init__(self, route: Route, transport: Transport) -> None:
        room = {"room": math.inf} if transport == "aiohttp" else {}
        self._opened = lambda: AsyncLine(_opened(httpx.AsyncClient, route, transport), **room)
        self.lines: list[AsyncLine] = []

    @contextmanager
    def line(self) -> Iterator[AsyncLine]:
        """Give a line to one task."""
        line = _taken(self.lines, self._opened)
        try:
            yield line
        finally:
            line.users -= 1


class _LoopPools:
    """One event loop's pools.

    An async generator guards them: it is started in the loop, so asyncio runs its `finally` when the loop shuts down,
    or when nobody holds it any more.
    """

    def __init__(self, owner: Pools, loop: asyncio.AbstractEventLoop) -> None:
        self.pools: dict[tuple[Route, Transport], _LoopPool] = {}
        self._guard = _guarded(weakref.ref(owner), loop, self.pools)
        self._started = False
        self._users = 0
        self._closing = False

    async def entered(self) -> None:
        """Count a call in, which keeps the pools open."""
        self._users += 1
        if not self._started:
            self._started = True
            await anext(self._guard)

    async def left(self) -> None:
        """Count a call out."""
        self._users -= 1
        await self._close_if_idle()

    def pool(self, route: Route, transport: Transport) -> _LoopPool:
        if (pool := self.pools.get((route, transport))) is None:
            pool = self.pools[route, transport] = _LoopPool(route, transport)
        return pool

    async def close(self) -> None:
        self._closing = True
        await self._close_if_idle()

    async def _close_if_idle(self) -> None:
        if self._closing and not self._users:
            await self._guard.aclose()


class _LoopUse:
    """One call's use of its event loop's pools: no generator, which asyncio would end beside the call's own."""

    def __init__(self, pools: _LoopPools, pool: _LoopPool) -> None:
        self._pools = pools
        self._pool = pool

    async def __aenter__(self) -> Callable[[], AbstractContextManager[AsyncLine]]:
        await self._pools.entered()
        return self._pool.line

    async def __aexit__(self, *_: object) -> None:
        await self._pools.left()


async def _guarded(
    owner: weakref.ref[Pools], loop: asyncio.AbstractEventLoop, pools: dict[tuple[Route, Transport], _LoopPool]
) -> AsyncGenerator[None]:
    try:
        yield
    finally:
        if owned := owner():
            owned.forget(loop, pools)
        with suppress(RuntimeError):  # a loop that was left open, as nest_asyncio's is, is gone when Python ends
            asyncio.get_running_loop()
            for pool in pools.values():
                for line in pool.lines:
                    await line.client.aclose()


def _renew_fork_lock() -> None:
    global _fork_lock  # noqa: PLW0603 - another thread of the parent may have held it
    _fork_lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_fork_lock)


def _close(pools: "dict[Route, _Pool]", pid: int) -> None:
    if pid == os.getpid():
        for pool in pools.values():
            pool.close()
