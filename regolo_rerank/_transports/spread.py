"""One httpx client, many connection pools: each request in flight has a pool of one connection to itself.

An httpcore pool looks through all of its requests and connections whenever one of them starts or ends, which with 64 at
once takes more time than all else. Where encode/httpcore#1035 is mended, a plain `httpx.HTTPTransport` does as well.
"""

import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, Final, Generic, TypeVar

import httpx

__all__ = ["AsyncSpreadTransport", "SpreadTransport"]

P = TypeVar("P", httpx.HTTPTransport, httpx.AsyncHTTPTransport)

KEEPALIVE: Final = 60.0
"""Seconds that an idle connection is kept."""


class _Spread(Generic[P]):
    """The pools that no request uses; deques are safe to share between threads.

    Args:
        kind: The class of the pools.
        **settings: Their arguments.

    Raises:
        ImportError: A proxy needs a package that is not installed.
        ValueError: A proxy's address is none.
    """

    def __init__(self, kind: type[P], **settings: Any) -> None:
        limits = httpx.Limits(max_connections=1, max_keepalive_connections=1, keepalive_expiry=KEEPALIVE)
        self._open: Callable[[], P] = lambda: kind(limits=limits, **settings)
        self._idle: deque[tuple[float, P]] = deque([(time.monotonic(), self._open())])
        self._closed = False

    def _take(self) -> P:
        """Return the pool that was used last, whose connection is the likeliest to be open."""
        try:
            return self._idle.pop()[1]
        except IndexError:
            return self._open()

    def _give_back(self, pool: P) -> list[P]:
        """Keep a pool for the next request; return those that have been idle for too long, for the caller to close."""
        now = time.monotonic()
        self._idle.append((now, pool))
        return self._drop(0.0 if self._closed else KEEPALIVE)

    def _drop(self, idle_for: float) -> list[P]:
        dropped = []
        try:
            while time.monotonic() - self._idle[0][0] >= idle_for:
                dropped.append(self._idle.popleft()[1])
        except IndexError:
            pass  # none is left, or another thread has taken it
        return dropped


class SpreadTransport(_Spread[httpx.HTTPTransport], httpx.BaseTransport):
    """Sends each request over a pool that no other request uses meanwhile.

    Args:
        **settings: Arguments of each `httpx.HTTPTransport`.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(httpx.HTTPTransport, **settings)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request, and return the reply with its body still to come."""
        pool = self._take()
        try:
            response = pool.handle_request(request)
        except BaseException:
            pool.close()  # a connection that was interrupted is not used again
            raise
        response.stream = _Body(response.stream, pool, self._done)
        return response

    def _done(self, pool: httpx.HTTPTransport) -> None:
        for dropped in self._give_back(pool):
            dropped.close()

    def close(self) -> None:
        """Close all connections; those in use are closed at the end of their reply."""
        self._closed = True
        for pool in self._drop(0.0):
            pool.close()


class AsyncSpreadTransport(_Spread[httpx.AsyncHTTPTransport], httpx.AsyncBaseTransport):
    """The same for async requests, in one event loop."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(httpx.AsyncHTTPTransport, **settings)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request, and return the reply with its body still to come."""
        pool = self._take()
        try:
            response = await pool.handle_async_request(request)
        except BaseException:
            await pool.aclose()
            raise
        response.stream = _AsyncBody(response.stream, pool, self._done)
        return response

    async def _done(self, pool: httpx.AsyncHTTPTransport) -> None:
        for dropped in self._give_back(pool):
            await dropped.aclose()

    async def aclose(self) -> None:
        """Close all connections; those in use are closed at the end of their reply."""
        self._closed = True
        for pool in self._drop(0.0):
            await pool.aclose()


class _Body(httpx.SyncByteStream):
    """The body of a reply, whose end frees its pool."""

    def __init__(self, stream: Any, pool: httpx.HTTPTransport, done: Callable[[httpx.HTTPTransport], None]) -> None:
        self._stream = stream
        self._pool = pool
        self._done = done

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._stream)

    def close(self) -> None:
        try:
            self._stream.close()
        except BaseException:
            self._pool.close()
            raise
        self._done(self._pool)


class _AsyncBody(httpx.AsyncByteStream):
    def __init__(
        self, stream: Any, pool: httpx.AsyncHTTPTransport, done: Callable[[httpx.AsyncHTTPTransport], Awaitable[None]]
    ) -> None:
        self._stream = stream
        self._pool = pool
        self._done = done

    def __aiter__(self) -> AsyncIterator[bytes]:
        stream: AsyncIterator[bytes] = aiter(self._stream)
        return stream

    async def aclose(self) -> None:
        try:
            await self._stream.aclose()
        except BaseException:
            await self._pool.aclose()
            raise
        await self._done(self._pool)
