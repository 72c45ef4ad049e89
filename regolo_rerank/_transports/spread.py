"""One httpx client, many connection pools: each request in flight has a pool of one connection to itself.

An httpcore pool looks through all of its requests and connections whenever one of them starts or ends, which with 64 at
once takes more time than all else. Where encode/httpcore#1035 is mended, a plain `httpx.HTTPTransport` does as well.
"""

import socket
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any, Final, Generic, TypeVar

import httpx

__all__ = ["DONE_EXTENSION", "AsyncSpreadTransport", "Done", "SpreadTransport"]

P = TypeVar("P", "_Pool", httpx.AsyncHTTPTransport)

DONE_EXTENSION: Final = "regolo_rerank.done"
"""Key of the request's extension that holds the `Done` of its call."""

KEEPALIVE: Final = 60.0
"""Seconds that an idle connection is kept."""


class _IdlePools(Generic[P]):
    """The pools that no request uses; deques are safe to share between threads."""

    def __init__(self, kind: type[P], **settings: Any) -> None:
        limits = httpx.Limits(max_connections=1, max_keepalive_connections=1, keepalive_expiry=None)
        self._open: Callable[[], P] = lambda: kind(limits=limits, **settings)
        # One is opened now, so that a proxy that cannot be used is refused here.
        self._idle: deque[tuple[float, P]] = deque([(time.monotonic(), self._open())])

    def _take(self) -> P:
        """Return the pool that was used last: its connection is the likeliest to be open."""
        try:
            return self._idle.pop()[1]
        except IndexError:
            return self._open()

    def _take_old(self, seconds: float) -> P | None:
        """Return a pool that was idle for so long; whoever takes it closes it, before the next."""
        try:
            return self._idle.popleft()[1] if time.monotonic() - self._idle[0][0] >= seconds else None
        except IndexError:
            return None  # none is left, or another thread has taken it


class Done:
    """The end of a sync call, which wakes the threads that still wait for its replies: it shuts their sockets down.

    This is no `threading.Event`, in which an interrupt can leave a lock locked, and which takes three times as long.
    """

    def __init__(self) -> None:
        self._is_set = False
        self._pools: set[_Pool] = set()
        self._lock = threading.Lock()
        self._gate = threading.Lock()
        self._gate.acquire()

    def is_set(self) -> bool:
        """Return whether the call has ended."""
        return self._is_set

    def wait(self, seconds: float = -1) -> None:
        """Wait until the call has ended, for some seconds at most; -1 is for ever."""
        if self._gate.acquire(timeout=seconds):
            self._gate.release()

    def set(self) -> None:
        """End the call."""
        with self._lock:
            if not self._is_set:
                self._is_set = True
                self._gate.release()
            for pool in self._pools:
                pool.shut_down()

    def watch(self, pool: "_Pool") -> None:
        """Watch over a pool that sends a request of the call."""
        with self._lock:
            self._pools.add(pool)
            if self._is_set:
                pool.shut_down()

    def unwatch(self, pool: "_Pool") -> None:
        """Leave a pool alone from here on: it may send another call's request next."""
        with self._lock:
            self._pools.discard(pool)


class _Pool(httpx.HTTPTransport):
    """A pool that knows the network stream of its connection, as httpx's extensions tell it."""

    stream: Any = None

    def note(self, done: Done, event: str, info: dict[str, Any]) -> None:
        """Take the stream from what the extension `trace` tells of a connection."""
        if event.endswith((".connect_tcp.complete", ".start_tls.complete")):
            self.stream = info["return_value"]
            done.watch(self)

    def shut_down(self) -> None:
        """Wake whoever reads from the connection in another thread."""
        if self.stream is not None:
            with suppress(OSError):  # it is closed already
                # The method of the bare socket: that of one with TLS takes it from under its reader.
                socket.socket.shutdown(self.stream.get_extra_info("socket"), socket.SHUT_RDWR)

    def hang_up(self) -> None:
        """Close the connection past the pool's lock, which an interrupt may have left locked."""
        if self.stream is not None:
            self.stream.close()


class SpreadTransport(_IdlePools[_Pool], httpx.BaseTransport):
    """Sends each request over a pool that no other request uses meanwhile; its settings are those of each pool."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(_Pool, **settings)

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request, and return the reply with its body still to come."""
        while old := self._take_old(KEEPALIVE):
            old.close()
        pool = self._take()
        done: Done = request.extensions[DONE_EXTENSION]
        if pool.stream is None or pool.stream.get_extra_info("is_readable"):  # it opens a new connection
            request.extensions["trace"] = partial(pool.note, done)
        done.watch(pool)
        try:
            response = pool.handle_request(request)
        except BaseException:
            done.unwatch(pool)
            pool.hang_up()  # a connection that was interrupted is not used again
            raise
        pool.stream = response.extensions.get("network_stream")
        response.stream = _Body(response.stream, pool, done, self)
        return response

    def give_back(self, pool: _Pool) -> None:
        """Keep a pool for the next request."""
        self._idle.append((time.monotonic(), pool))

    def close(self) -> None:
        """Close the connections that no request uses."""
        while old := self._take_old(0.0):
            old.close()


class AsyncSpreadTransport(_IdlePools[httpx.AsyncHTTPTransport], httpx.AsyncBaseTransport):
    """The same for async requests, in one event loop."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(httpx.AsyncHTTPTransport, **settings)
        self._is_closed = False

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request, and return the reply with its body still to come."""
        while old := self._take_old(KEEPALIVE):
            await old.aclose()
        pool = self._take()
        try:
            response = await pool.handle_async_request(request)
        except BaseException:
            await pool.aclose()
            raise
        response.stream = _AsyncBody(response.stream, pool, self)
        return response

    async def give_back(self, pool: httpx.AsyncHTTPTransport) -> None:
        """Keep a pool for the next request."""
        self._idle.append((time.monotonic(), pool))
        if self._is_closed:
            await self.aclose()

    async def aclose(self) -> None:
        """Close all connections; those in use are closed at the end of their reply."""
        self._is_closed = True
        while old := self._take_old(0.0):
            await old.aclose()


class _Body(httpx.SyncByteStream):
    """The body of a reply, whose end frees its pool."""

    def __init__(self, stream: Any, pool: _Pool, done: Done, transport: SpreadTransport) -> None:
        self._stream = stream
        self._pool = pool
        self._done = done
        self._transport = transport
        self._is_read = False

    def __iter__(self) -> Iterator[bytes]:
        yield from self._stream
        self._is_read = True

    def close(self) -> None:
        end = self._pool.hang_up
        try:
            if self._is_read:
                self._stream.close()
                end = partial(self._transport.give_back, self._pool)
        finally:
            self._done.unwatch(self._pool)
            end()


class _AsyncBody(httpx.AsyncByteStream):
    def __init__(self, stream: Any, pool: httpx.AsyncHTTPTransport, transport: AsyncSpreadTransport) -> None:
        self._stream: httpx.AsyncByteStream = stream
        self._pool = pool
        self._transport = transport

    def __aiter__(self) -> AsyncIterator[bytes]:
        return aiter(self._stream)

    async def aclose(self) -> None:
        try:
            await self._stream.aclose()
        except BaseException:
            await self._pool.aclose()
            raise
        await self._transport.give_back(self._pool)
