"""The client: the only file that sends.

Sync and async calls share everything but the lines that wait: a `_Call` knows what to send and what a reply means, and
two thin drivers send it.
"""

import asyncio
import functools
import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from contextvars import copy_context
from queue import SimpleQueue
from traceback import clear_frames
from types import TracebackType
from typing import Any, ClassVar, Final, Self

import httpx
from pydantic import PrivateAttr, SecretStr
from tenacity import AsyncRetrying, Retrying, sleep_using_event

from regolo_rerank import __version__
from regolo_rerank.errors import (
    APIConnectionError,
    APIResponseError,
    APITimeoutError,
    BadRequestError,
    InvalidInputError,
    NotFoundError,
    RegoloError,
)
from regolo_rerank.local import SCORER_EXTENSION
from regolo_rerank.options import Options
from regolo_rerank.pools import Pools, is_proxied
from regolo_rerank.ranking import Plan, RerankResponse, checked_documents, checked_query
from regolo_rerank.retry import Gate, Patience, is_crowded
from regolo_rerank.wire import read_error, read_reply, request_id_of

__all__ = ["MAX_REPLY_BYTES", "RegoloClient", "Reranker"]

MAX_REPLY_BYTES: Final = 64 * 1024 * 1024
"""Bytes of a reply, decompressed, after which it is refused."""

_log = logging.getLogger("regolo_rerank")


class _BearerAuth(httpx.Auth):
    """Puts the key on the request at the last moment, so that no frame of ours ever holds the header."""

    def __init__(self, key: SecretStr) -> None:
        self._key = key

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response]:
        request.headers["Authorization"] = f"Bearer {self._key.get_secret_value()}"
        yield request


class _Crew:
    """A call's batches and the workers that share them.

    Where the account may have fewer requests in flight than there are workers, a worker that is refused hands its
    batch back and leaves; the last one stays and waits.
    """

    def __init__(self, batches: list[range], concurrency: int) -> None:
        self.batches = len(batches)
        self.workers = min(concurrency, len(batches))
        self._todo = deque(batches)
        self._lock = threading.Lock()

    def take(self) -> range | None:
        """Return the next batch; a worker that gets none has left."""
        with self._lock:
            if self._todo:
                return self._todo.popleft()
            self.workers -= 1
            return None

    def hand_back(self, batch: range) -> bool:
        """Give a batch to the others and leave, or return False to the last worker."""
        with self._lock:
            if self.workers == 1:
                return False
            self.workers -= 1
            self._todo.appendleft(batch)
            return True


class _LeftError(Exception):
    """Ends a worker whose batch is another's now, or whose call has failed elsewhere; nobody else sees it."""


class _Call:
    """One call: its options as they are now, its plan, and what to make of each reply."""

    def __init__(
        self,
        reranker: "Reranker",
        query: str,
        documents: Iterable[str],
        arguments: dict[str, Any],
        *,
        callers_client: httpx.Client | httpx.AsyncClient | None,
        gate: Gate,
    ) -> None:
        self.options = reranker.for_call(**arguments)
        self.gate = gate
        self.endpoint = self.options.endpoint()
        # A caller's client has a timeout of its own, and a scorer on this machine takes the time it takes.
        self.timeout = None if callers_client is not None or self.endpoint.embedded else self.options.timeout
        self.plan = Plan(
            checked_query(query),
            checked_documents(documents, str),
            self.options,
            self.options.format_for(self.endpoint),
        )
        self.crew = _Crew(self.plan.batches, self.options.max_concurrency)
        self._patience: dict[range, Patience] = {}
        self._key = self.options.key_for(self.endpoint) if self.plan.batches else None
        url = self.endpoint.url
        in_the_clear = self._key is not None and url.scheme == "http" and not self.options.allow_http
        if in_the_clear and callers_client is not None and is_proxied(callers_client, url):
            raise InvalidInputError(
                "http_client: its proxy would see the API key in the clear; use https, a client without a proxy, "
                "or allow_http=True"
            )
        self._headers = {
            "Accept": "application/json",
            "Content-Type": "application/json",
            "User-Agent": reranker.user_agent(),
            **(self.options.default_headers or {}),
        }

    def patience(self, batch: range, *, follows_success: bool) -> Patience:
        """Return the patience of a batch's request, the same one whoever sends it."""
        patience = self._patience.setdefault(batch, Patience(self.options, self.gate))
        patience.follows_success = follows_success
        return patience

    def request(self, batch: range) -> dict[str, Any]:
        """Return the arguments of a batch's request, for the `stream` of either httpx client."""
        arguments: dict[str, Any] = {
            "method": "POST",
            "url": self.endpoint.url,
            "content": self.plan.request(batch),
            "headers": self._headers,
            "follow_redirects": False,
        }
        if self.timeout is not None:
            arguments["timeout"] = self.timeout
        if self._key is not None:
            arguments["auth"] = _BearerAuth(self._key)
        if self.options.scorer is not None:
            arguments["extensions"] = {SCORER_EXTENSION: self.options.scorer}
        return arguments

    def learn(
        self, batch: range, response: httpx.Response, body: bytearray, patience: Patience, started: float
    ) -> None:
        """Take in a complete reply to what was sent at `started` by the monotonic clock.

        Raises:
            APIStatusError: The server said no.
            APIResponseError: The reply cannot be trusted.
        """
        request_id = request_id_of(response.headers)
        _log.debug(
            "%s answered %d to %d documents, request %s",
            self.endpoint.url,
            response.status_code,
            len(batch),
            request_id,
        )
        if response.is_success:
            self.plan.learn(batch, read_reply(body, response.headers, self._key), request_id, patience.sent)
            self.gate.took(time.monotonic() - started)
            return
        error = read_error(response.status_code, body, response.headers, self._key)
        if is_crowded(error) and patience.too_many() and self.crew.hand_back(batch):
            raise _LeftError
        if isinstance(error, NotFoundError):
            error.args = (f"{error}; nothing to rerank with at {self.endpoint.url}: see base_url",)
        if isinstance(error, BadRequestError) and "context length" in str(error):
            index, length = self.plan.longest(batch)
            hint = f"the longest document sent is documents[{index}] with {length} characters"
            error.args = (f"{error}; {hint}; the option max_document_chars cuts documents for scoring only",)
        raise error

    def check(self, body: bytearray, started: float) -> None:
        """Refuse a reply that grows without end, or comes too slowly (`started` in seconds of the monotonic clock).

        Raises:
            APIResponseError: It is too large.
            TimeoutError: It is too late.
        """
        if len(body) > MAX_REPLY_BYTES:
            raise APIResponseError(f"the reply cannot be trusted: it is larger than {MAX_REPLY_BYTES} bytes")
        if self.timeout is not None and time.monotonic() - started > self.timeout:
            raise TimeoutError

    @contextmanager
    def decoding(self, response: httpx.Response, body: bytearray) -> Iterator[None]:
        """Let an error reply that cannot be decompressed count by its status alone."""
        try:
            yield
        except httpx.DecodingError:
            if response.is_success:
                raise
            body.clear()

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Turn whatever can go wrong below into this package's errors."""
        host = self.endpoint.url.netloc.decode()
        try:
            yield
        except (httpx.TimeoutException, TimeoutError) as error:
            raise APITimeoutError(
                f"no complete reply from {host} within the timeout ({type(error).__name__})"
            ) from error
        except httpx.DecodingError as error:
            raise APIResponseError(f"the reply cannot be trusted: its body cannot be decompressed: {error}") from error
        except (httpx.HTTPError, httpx.StreamError, httpx.InvalidURL, OSError) as error:
            raise APIConnectionError(f"no complete reply from {host}: {str(error) or type(error).__name__}") from error
        except RuntimeError as error:
            raise APIConnectionError(
                f"the http client cannot be used: {error} An httpx client that was passed must be open, and an async "
                f"one belongs to the event loop that it was first used in"
            ) from error


@contextmanager
def _forgetful_errors() -> Iterator[None]:
    """Empty the frames behind an error: they hold replies, which may quote the key, and all of the documents."""
    callers_own = sys.exception()
    try:
        yield
    except RegoloError as error:
        todo: list[BaseException | None] = [error]
        seen = {id(None), id(callers_own)}
        while todo:
            link = todo.pop()
            if link is None or id(link) in seen:
                continue
            seen.add(id(link))
            clear_frames(link.__traceback__)
            todo += [link.__cause__, link.__context__]
        raise


class Reranker(Options):
    """What the client and both adapters are: options, connections, and one way to rank texts.

    Connections are opened at the first call, kept for later ones and closed when the object is forgotten; with a
    large number of short-lived objects, use each as a (async) context manager, or share one httpx client.
    """

    _pools: Pools = PrivateAttr(default_factory=Pools)

    framework: ClassVar[str] = ""
    """The framework and its version, for the User-Agent."""

    @classmethod
    def user_agent(cls) -> str:
        """Return what requests call themselves: this package, its version and the framework."""
        return f"regolo_rerank/{__version__} {cls.framework}".rstrip()

    def _rank(self, query: str, documents: Iterable[str], **arguments: Any) -> RerankResponse:
        with _forgetful_errors():
            client = self.http_client
            call = _Call(self, query, documents, arguments, callers_client=client, gate=self._pools.gate)
            if call.plan.batches:
                with nullcontext(nullcontext(client)) if client else self._pools.pool(call.endpoint) as pool:
                    _run(call.crew, pool, functools.partial(_send, call))
            return call.plan.response()

    async def _arank(self, query: str, documents: Iterable[str], **arguments: Any) -> RerankResponse:
        with _forgetful_errors():
            client = self.async_http_client
            call = _Call(self, query, documents, arguments, callers_client=client, gate=self._pools.gate)
            if call.plan.batches:
                async with nullcontext(client) if client else self._pools.async_pool(call.endpoint) as opened:
                    await _arun(call.crew, functools.partial(_asend, call, opened))
            return call.plan.response()

    def close(self) -> None:
        """Close the connections of sync calls; the next call opens new ones."""
        self._pools.close()

    async def aclose(self) -> None:
        """Close the connections of sync calls, and of async calls in the running event loop."""
        await self._pools.aclose()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()


class RegoloClient(Reranker):
    """Client of the Rerank API, for sync and async calls; options are fields and may be assigned at any time.

    Args:
        api_key: The key; without it, the environment's `REGOLO_API_KEY` is used at each call.
        **options: Any field below, by name.

    Raises:
        pydantic.ValidationError: An option is unknown or has a wrong value; the message names it.

    Example:
        >>> client = RegoloClient(base_url="local://")
        >>> client.rerank("capital of China", ["Rome", "Beijing, capital of China"], top_n=1).results
        [RerankResult(index=1, relevance_score=1.0, document='Beijing, capital of China')]
    """

    def rerank(
        self,
        query: str,
        documents: Iterable[str],
        *,
        top_n: int | None = None,
        model: str | None = None,
        instruction: str | None = None,
        score_threshold: float | None = None,
        extra_body: dict[str, Any] | None = None,
    ) -> RerankResponse:
        """Rank documents by their relevance to a query.

        An argument left None takes the client's option; for all results in one call, pass `top_n=len(documents)`.

        Args:
            query: What is searched; not blank.
            documents: N texts, in a list, a tuple or an iterator. Blank ones are not sent and rank last.
            top_n: Results kept, at least 1.
            model: Name of the reranking model.
            instruction: The task in a sentence, for prompt formats that have a place for it.
            score_threshold: Results that score lower are dropped, after `top_n` has been chosen from all N.
            extra_body: Further JSON fields of the request.

        Returns:
            The ranking, min(N, top_n) results at most, the best first.

        Raises:
            InvalidInputError: An argument is wrong; nothing was sent.
            MissingAPIKeyError: The host demands a key, and there is none.
            APIConnectionError: The server could not be reached; `APITimeoutError` where it was too slow.
            APIStatusError: The server said no; the subclass says why.
            APIResponseError: The server's reply cannot be trusted.
        """
        return self._rank(
            query,
            documents,
            top_n=top_n,
            model=model,
            instruction=instruction,
            score_threshold=score_threshold,
            extra_body=extra_body,
        )

    async def arerank(
        self,
        query: str,
        documents: Iterable[str],
        *,
        top_n: int | None = None,
        model: str | None = None,
        instruction: str | None = None,
        score_threshold: float | None = None,
        extra_body: dict[str, Any] | None = None,
    ) -> RerankResponse:
        """Rank documents as `rerank` does, without blocking the event loop; may be cancelled at any time."""
        return await self._arank(
            query,
            documents,
            top_n=top_n,
            model=model,
            instruction=instruction,
            score_threshold=score_threshold,
            extra_body=extra_body,
        )


def _send(call: _Call, client: httpx.Client, batch: range, stop: threading.Event, *, follows_success: bool) -> None:
    """Send one batch until its reply is good, or its patience ends."""
    patience = call.patience(batch, follows_success=follows_success)

    def attempt() -> None:
        if stop.is_set():
            raise _LeftError
        patience.before_sending()
        body, started = bytearray(), time.monotonic()
        try:
            with call.errors(), client.stream(**call.request(batch)) as response, call.decoding(response, body):
                for chunk in response.iter_bytes():
                    body += chunk
                    call.check(body, started)
            call.learn(batch, response, body, patience, started)
        except RegoloError:
            if stop.is_set():
                raise _LeftError from None
            raise

    stop.wait(call.gate.held_for())
    Retrying(sleep=sleep_using_event(stop), **patience.policy())(attempt)


async def _asend(call: _Call, client: httpx.AsyncClient, batch: range, *, follows_success: bool) -> None:
    """Send one batch until its reply is good, or its patience ends."""
    patience = call.patience(batch, follows_success=follows_success)

    async def attempt() -> None:
        patience.before_sending()
        body, started = bytearray(), time.monotonic()
        with call.errors():
            async with asyncio.timeout(call.timeout), client.stream(**call.request(batch)) as response:
                with call.decoding(response, body):
                    async for chunk in response.aiter_bytes():
                        body += chunk
                        call.check(body, started)
        call.learn(batch, response, body, patience, started)

    if held := call.gate.held_for():
        await asyncio.sleep(held)
    await AsyncRetrying(sleep=asyncio.sleep, **patience.policy())(attempt)


def _run(
    crew: _Crew,
    pool: AbstractContextManager[httpx.Client],
    send: Callable[..., None],
) -> None:
    """Send all batches, some at once; the first final failure stops those that have not started, and is raised."""
    stop = threading.Event()
    done: SimpleQueue[BaseException | None] = SimpleQueue()

    def work() -> None:
        succeeded = False
        with suppress(_LeftError), pool as client:
            while (batch := crew.take()) is not None:
                send(client, batch, stop, follows_success=succeeded)
                succeeded = True
                done.put(None)

    def work_for_the_caller() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - raised in the caller's thread
            done.put(error)

    if crew.workers == 1:
        work()
        return
    # Daemons, so that Ctrl-C ends the process at once; each in a copy of the context, so that traces nest.
    threads = [
        threading.Thread(target=copy_context().run, args=(work_for_the_caller,), daemon=True, name="regolo_rerank")
        for _ in range(crew.workers)
    ]
    try:
        _start(threads)
        for _ in range(crew.batches):
            if failure := done.get():
                raise failure
    finally:
        stop.set()


def _start(threads: list[threading.Thread]) -> None:
    try:
        for thread in threads:
            thread.start()
    except RuntimeError as error:
        raise APIConnectionError(f"no thread for a request: {error}; lower max_concurrency") from error


async def _arun(crew: _Crew, send: Callable[..., Awaitable[None]]) -> None:
    """Do the same with tasks."""

    async def work() -> None:
        succeeded = False
        with suppress(_LeftError):
            while (batch := crew.take()) is not None:
                await send(batch, follows_success=succeeded)
                succeeded = True

    if crew.workers == 1:
        await work()
        return
    try:
        async with asyncio.TaskGroup() as tasks:
            workers = [tasks.create_task(work()) for _ in range(crew.workers)]
    except ExceptionGroup as group:
        failure: BaseException = group.exceptions[0]
    else:
        if not any(worker.cancelled() for worker in workers):
            return
        failure = asyncio.CancelledError()  # somebody has cancelled a worker, and its batch is unranked
    raise failure
