"""HTTP: the httpx clients behind a `RegoloClient`, and one POST within a time limit.

httpx is loaded with the first request. A caller's own client may be of httpx, httpx2 or any library with their
interface, so requests are built by the client's own `build_request`, and exceptions are recognised by their names.
"""

import asyncio
import functools
import os
import ssl
import time
import uuid
import weakref
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from dataclasses import dataclass
from http.cookiejar import CookieJar, DefaultCookiePolicy
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar
from urllib.request import getproxies

from regolo_rerank._endpoint import Endpoint
from regolo_rerank._forks import opening
from regolo_rerank._protocol import REQUEST_ID_HEADERS, Reply
from regolo_rerank._redaction import redact
from regolo_rerank.errors import APIConnectionError, APIResponseError, APITimeoutError, InvalidInputError, RegoloError
from regolo_rerank.options import Settings

if TYPE_CHECKING:
    import httpx

__all__ = ["Connections"]

MAX_REPLY_BYTES: Final = 64 * 1024 * 1024
REQUESTS_PER_CLIENT: Final = 2
"""Concurrent requests of one httpx client. With more its pool becomes slow (encode/httpcore#1035)."""
KEEPALIVE_SECONDS: Final = 60.0
CONNECT_SECONDS: Final = 5.0
"""Maximum time of a sync call to connect to one address. A host may have several, which are tried one by one."""
_REQUEST_ID_PREFIX: Final = "regolo_rerank-"

C = TypeVar("C", "httpx.Client", "httpx.AsyncClient")


class Connections:
    """HTTP connections that a client shares with its copies, opened when needed, per process and event loop.

    Requests are spread over several httpx clients. After a timeout or a lost connection, none of them gets new
    requests. A retry then opens a new connection, because the others may be dead too, for example after a node behind
    a load balancer has disappeared.
    """

    def __init__(self) -> None:
        self._start_process()
        self._loops: dict[asyncio.AbstractEventLoop, _LoopPools] = {}
        # Keeps the pools alive as long as this object. In a reference cycle, garbage collection could otherwise
        # destroy the httpx clients before they are closed.
        weakref.finalize(self, self._loops.clear).atexit = False
        # Created at most once for each object, because it takes 20 ms. A new object sees a changed SSL_CERT_FILE.
        self._tls_context = functools.cache(_create_tls_context)

    def _start_process(self) -> None:
        """Start without connections. After a fork, the old ones belong to the parent."""
        self._pools: dict[Endpoint, _Pool[httpx.Client]] = {}
        self._pid = os.getpid()
        weakref.finalize(self, _close_pools, self._pools, self._pid)

    def post(self, settings: Settings, body: bytes, seconds: float | None) -> Reply | RegoloError:
        """Send a request, and return the reply or the error that came instead.

        Args:
            settings: The settings of the call.
            body: The JSON of the request.
            seconds: Time limit of each network operation, and of the whole body. The caller's own client has its own
                limits unless the option `timeout` is given.

        Raises:
            APIConnectionError: The proxies or certificates in the environment cannot be used.
        """
        if settings.options.http_client is not None:
            return _send(settings.options.http_client, settings, body, seconds)
        if self._pid != os.getpid():
            self._start_process()
        pool = self._pools.get(settings.endpoint)
        if pool is None:
            open_client = functools.partial(_open_client, settings.endpoint, self._tls_context)
            pool = self._pools.setdefault(settings.endpoint, _Pool(open_client))
        member = pool.take()
        outcome: Reply | RegoloError | None = None
        try:
            outcome = _send(member.client, settings, body, seconds)
            return outcome
        finally:
            for client in pool.give_back(member, is_broken=isinstance(outcome, APIConnectionError)):
                client.close()

    async def apost(self, settings: Settings, body: bytes, seconds: float | None) -> Reply | RegoloError:
        """Send a request as `post` does. `seconds` limits the whole request."""
        if settings.options.async_http_client is not None:
            return await _asend(settings.options.async_http_client, settings, body, seconds)
        pools = await self._loop_pools()
        pool = pools.by_endpoint.get(settings.endpoint)
        if pool is None:
            open_client = functools.partial(_open_async_client, settings.endpoint, self._tls_context)
            pool = pools.by_endpoint[settings.endpoint] = _Pool(open_client)
        member = pool.take()
        outcome: Reply | RegoloError | None = None
        try:
            outcome = await _asend(member.client, settings, body, seconds)
            return outcome
        finally:
            for client in pool.give_back(member, is_broken=isinstance(outcome, APIConnectionError)):
                await client.aclose()

    def close(self) -> None:
        """Close the connections of sync calls. Requests in progress finish first."""
        _close_pools(self._pools, self._pid)

    async def aclose(self) -> None:
        """Close the connections of sync calls, and of async calls in the running event loop."""
        self.close()
        if pools := self._loops.pop(asyncio.get_running_loop(), None):
            await pools.guard.aclose()

    async def _loop_pools(self) -> "_LoopPools":
        loop = asyncio.get_running_loop()
        if loop not in self._loops:
            for other in [other for other in list(self._loops) if other.is_closed()]:
                self._loops.pop(other, None)
            by_endpoint: dict[Endpoint, _Pool[httpx.AsyncClient]] = {}
            guard = _close_with_loop(by_endpoint)
            await anext(guard)
            self._loops[loop] = _LoopPools(by_endpoint, guard)
        return self._loops[loop]


def _close_pools(pools: "dict[Endpoint, _Pool[httpx.Client]]", pid: int) -> None:
    """Close the connections of sync calls, but not in a process that was forked from theirs."""
    if pid == os.getpid():
        for pool in list(pools.values()):
            for client in pool.retire():
                client.close()


@dataclass(frozen=True, slots=True)
class _LoopPools:
    """The httpx clients of one event loop, and the generator that closes them with the loop."""

    by_endpoint: "dict[Endpoint, _Pool[httpx.AsyncClient]]"
    guard: AsyncGenerator[None]


async def _close_with_loop(by_endpoint: "dict[Endpoint, _Pool[httpx.AsyncClient]]") -> AsyncGenerator[None]:
    """Wait to be closed, and then close the connections.

    asyncio closes an async generator when its event loop shuts down and when it is garbage-collected. Both are the
    moment to close connections, and nothing else tells us about them.
    """
    try:
        yield
    finally:
        with suppress(RuntimeError):  # Python itself is shutting down, with a loop that was never closed
            asyncio.get_running_loop()
            for pool in by_endpoint.values():
                for client in pool.retire():
                    await client.aclose()


@dataclass(slots=True, eq=False)
class _Member(Generic[C]):
    client: C
    in_flight: int = 0
    is_retired: bool = False


class _Pool(Generic[C]):
    """httpx clients for one endpoint, each with at most `REQUESTS_PER_CLIENT` requests in flight."""

    def __init__(self, open_client: Callable[[], C]) -> None:
        self._open_client: Callable[[], C] = open_client
        self._members: list[_Member[C]] = []

    def take(self) -> _Member[C]:
        """Return the least busy client, or a new one if all are busy. One more request is now in flight there."""
        with opening:
            member = min(self._members, key=attrgetter("in_flight"), default=None)
            if member is None or member.in_flight >= REQUESTS_PER_CLIENT:
                member = _Member(self._open())
                self._members.append(member)
            member.in_flight += 1
            return member

    def _open(self) -> C:
        try:
            return self._open_client()
        except Exception as error:  # httpx raises many kinds
            failure = APIConnectionError(f"the proxies or certificates in the environment cannot be used: {error}")
            failure.retryable = False
            raise failure from error

    def give_back(self, member: _Member[C], *, is_broken: bool) -> list[C]:
        """Count a request as finished, and return the clients that the caller must close.

        If its connection is broken, no client of the pool is used again: their connections may be dead too.
        """
        with opening:
            member.in_flight -= 1
            if is_broken and not member.is_retired:
                return self.retire()
            return [member.client] if member.is_retired and member.in_flight == 0 else []

    def retire(self) -> list[C]:
        """Use none of the clients again, and return those that are idle, to be closed now."""
        with opening:
            members, self._members = self._members, []
            for member in members:
                member.is_retired = True
            return [member.client for member in members if member.in_flight == 0]


def _open_client(endpoint: Endpoint, tls_context: Callable[[], ssl.SSLContext]) -> "httpx.Client":
    import httpx

    return httpx.Client(**_client_options(endpoint, tls_context))


def _open_async_client(endpoint: Endpoint, tls_context: Callable[[], ssl.SSLContext]) -> "httpx.AsyncClient":
    import httpx

    return httpx.AsyncClient(**_client_options(endpoint, tls_context))


def _client_options(endpoint: Endpoint, tls_context: Callable[[], ssl.SSLContext]) -> dict[str, Any]:
    # Connecting imports this codec. It is imported here, under the lock that a fork waits for.
    import encodings.idna  # noqa: F401 - only to be loaded

    import httpx

    if endpoint.is_local:
        from regolo_rerank.local import LocalTransport

        return {"transport": LocalTransport()}
    needs_tls = endpoint.is_https or (getproxies() and not endpoint.is_loopback)
    return {
        "verify": tls_context() if needs_tls else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT),
        "trust_env": not endpoint.is_loopback,  # no proxy on the way to this machine
        "limits": httpx.Limits(keepalive_expiry=KEEPALIVE_SECONDS),
        # A cookie could carry something from one API key's requests into those of another.
        "cookies": CookieJar(DefaultCookiePolicy(allowed_domains=[])),
    }


def _create_tls_context() -> ssl.SSLContext:
    import httpx

    return httpx.create_ssl_context()


def _send(client: "httpx.Client", settings: Settings, body: bytes, seconds: float | None) -> Reply | RegoloError:
    started = time.monotonic()
    try:
        # Connect, read, write, and wait for a free connection.
        limits = None if seconds is None else (min(seconds, CONNECT_SECONDS), seconds, seconds, seconds)
        request = _build_request(client, settings, body, limits)
        response = client.send(request, **_send_options(settings))
        try:
            reader = _ReplyReader(response, settings, started)
            for chunk in response.iter_raw() if reader.is_streaming else ():
                reader.add(chunk)
                if seconds is not None and time.monotonic() - started > seconds:
                    raise TimeoutError
        finally:
            response.close()
        return reader.reply()
    except RegoloError as error:
        failure = error
    except Exception as error:  # noqa: BLE001 - raised again unless it comes from the HTTP library
        failure = _translate(error, settings, seconds)
    # Outside of `except`, so that the exception of httpx, which refers to the request and its key, is not the context.
    return failure


async def _asend(
    client: "httpx.AsyncClient", settings: Settings, body: bytes, seconds: float | None
) -> Reply | RegoloError:
    started = time.monotonic()
    try:
        async with asyncio.timeout(seconds):
            request = _build_request(client, settings, body, None)  # `seconds` limits the whole attempt already
            response = await client.send(request, **_send_options(settings))
            try:
                reader = _ReplyReader(response, settings, started)
                if reader.is_streaming:
                    async for chunk in response.aiter_raw():
                        reader.add(chunk)
            finally:
                await response.aclose()
            return reader.reply()
    except RegoloError as error:
        failure = error
    except Exception as error:  # noqa: BLE001 - raised again unless it comes from the HTTP library
        failure = _translate(error, settings, seconds)
    return failure


def _build_request(
    client: "httpx.Client | httpx.AsyncClient", settings: Settings, body: bytes, timeout: tuple[float, ...] | None
) -> "httpx.Request":
    headers = {
        "accept": "application/json",
        "accept-encoding": "identity",
        "content-type": "application/json",
        "user-agent": settings.options.user_agent,
        **dict.fromkeys(REQUEST_ID_HEADERS, f"{_REQUEST_ID_PREFIX}{uuid.uuid4().hex}"),
        **(settings.options.default_headers or {}),
    }
    own: dict[str, Any] = {} if settings.timeout is None else {"timeout": timeout}
    if settings.options.scorer is not None:
        own["extensions"] = {"regolo_rerank.scorer": settings.options.scorer}
    if settings.key is not None:
        headers["Authorization"] = f"Bearer {settings.key.get_secret_value()}"
    return client.build_request("POST", settings.endpoint.url, content=body, headers=headers, **own)


def _send_options(settings: Settings) -> dict[str, Any]:
    """Return the options of `send`. The API key replaces the authentication of the caller's client."""
    return {"stream": True, "follow_redirects": False, **({} if settings.key is None else {"auth": None})}


class _ReplyReader:
    """Collects the body of a response, up to `MAX_REPLY_BYTES`.

    Raises:
        APIResponseError: The body is compressed or too large, or belongs to another request.
    """

    def __init__(self, response: "httpx.Response", settings: Settings, started: float) -> None:
        self._status_code = response.status_code
        self._headers = {name.lower(): redact(value, settings.key) for name, value in response.headers.items()}
        self._key = settings.key
        self._started = started
        self._body = bytearray()
        # A mock or a hook of the caller's client may have read the body already.
        self.is_streaming = not response.is_stream_consumed
        if _belongs_to_another_request(response):
            failure = APIResponseError("invalid reply: it belongs to another request")
            failure.retryable = True
            raise failure
        if not self.is_streaming:
            self._body += response.content
        elif (encoding := self._headers.get("content-encoding", "identity").lower()) != "identity":
            # An error can be reported by its status alone, but a ranking has to be read.
            self.is_streaming = False
            if 200 <= response.status_code < 300:
                raise APIResponseError(
                    f"invalid reply: it is compressed ({encoding}), although the request accepts identity only"
                )

    def add(self, chunk: bytes) -> None:
        self._body += chunk
        if len(self._body) > MAX_REPLY_BYTES:
            raise APIResponseError(f"invalid reply: it is larger than {MAX_REPLY_BYTES} bytes")

    def reply(self) -> Reply:
        text = redact(self._body.decode("utf-8", "replace").removeprefix("\ufeff"), self._key)
        return Reply(self._status_code, self._headers, text, time.monotonic() - self._started)


def _belongs_to_another_request(response: "httpx.Response") -> bool:
    """Return whether a gateway's reply carries the id of another request of this package.

    If a server sends two replies to one request, httpx takes the second for the next request's. Mocks and recordings
    have no network stream and repeat ids, so they are not checked.
    """
    if "network_stream" not in response.extensions:
        return False
    for name in REQUEST_ID_HEADERS:
        sent, received = response.request.headers.get(name, ""), response.headers.get(name, "")
        if received.startswith(_REQUEST_ID_PREFIX) and sent not in received:
            return True
    return False


_HTTP_LIBRARIES: Final = {"aiohttp", "anyio", "h11", "h2", "httpcore", "httpcore2", "httpx", "httpx2", "ssl"}
_PERMANENT: Final = {"InvalidURL", "LocalProtocolError", "StreamError", "UnsupportedProtocol"}


def _translate(error: Exception, settings: Settings, seconds: float | None) -> RegoloError:
    """Return our error for an exception of the HTTP client. Raise it again if it comes from the caller's own code."""
    names = {base.__name__ for base in type(error).__mro__}
    host, words = settings.endpoint.host, redact(str(error), settings.key) or type(error).__name__
    if "TimeoutException" in names or isinstance(error, TimeoutError):
        if settings.timeout is None or seconds is None:
            return APITimeoutError(f"no complete reply from {host} within the timeout of the http client")
        if "ConnectTimeout" in names:
            return APITimeoutError(f"no connection to {host} within {min(seconds, CONNECT_SECONDS):.3g} s")
        return APITimeoutError(f"no complete reply from {host} within {seconds:.3g} s")
    if isinstance(error, OSError) or type(error).__module__.partition(".")[0] in _HTTP_LIBRARIES:
        failure = APIConnectionError(f"no complete reply from {host}: {words}")
        if "CERTIFICATE_VERIFY_FAILED" in words:
            failure = APIConnectionError(
                f"the certificate of {host} is not trusted: {words}. For a private certificate authority, set the "
                f"environment variable SSL_CERT_FILE to its file"
            )
            failure.retryable = False
        elif names & _PERMANENT:
            failure.retryable = False
        return failure
    if isinstance(error, RuntimeError) and (settings.options.http_client or settings.options.async_http_client):
        return InvalidInputError(
            f"http_client: it cannot be used: {words} It must be open, and an async client must belong to the running "
            f"event loop"
        )
    raise error
