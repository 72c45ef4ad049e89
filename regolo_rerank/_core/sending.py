"""The only file that sends: two thin drivers, threads and tasks, over the same calls and the same crew.

One call is sent and waited for; many are given in their order, each when it has ended, while others are read ahead.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from concurrent.futures import wait
from contextlib import AbstractContextManager, aclosing
from contextvars import copy_context
from typing import Generic, Self, TypeVar

import httpx

from regolo_rerank._core.calls import Call, Crew, EndedError, Event, LeftError
from regolo_rerank._core.retry import Patience, pause
from regolo_rerank._transports.lines import AsyncLine, Line
from regolo_rerank.errors import APIConnectionError, RegoloError

__all__ = ["AsyncEnded", "AsyncLines", "Lines", "afinish", "aprepare", "ended", "finish", "prepare"]

Lines = Callable[[], AbstractContextManager[Line | httpx.Client]]
AsyncLines = Callable[[], AbstractContextManager[AsyncLine | httpx.AsyncClient]]

T = TypeVar("T", bound=BaseException)


def prepare(call: Call[threading.Event]) -> None:
    """Find out what a call has to send, after the calls that are asking for the same."""
    until = time.monotonic() + call.terms.options.max_retry_seconds
    while (other := call.prepare()) is not None:
        wait([other], max(0.0, until - time.monotonic()))


async def aprepare(call: Call[asyncio.Event]) -> None:
    """Do the same without blocking the event loop."""
    until = time.monotonic() + call.terms.options.max_retry_seconds
    while (other := call.prepare(asyncio.get_running_loop())) is not None:
        await asyncio.wait([asyncio.wrap_future(other)], timeout=max(0.0, until - time.monotonic()))


def finish(call: Call[threading.Event], lines: Lines) -> None:
    """Send all of one call: in the caller's thread where it has one request, else in several."""
    crew = call.crew_of_its_own()
    crew.add(call)
    _wait_for(call, crew, lines, threading.Event())


async def afinish(call: Call[asyncio.Event], lines: AsyncLines) -> None:
    """Send all of one call: in the caller's task where it has one request, else in several."""
    crew = call.crew_of_its_own()
    crew.add(call)
    if crew.most == 1:
        crew.due()  # which is this task
        await _awork(crew, lines, asyncio.Event())
        return
    tasks = _Tasks(crew, lines)
    try:
        await tasks.wait_for(call)
    finally:
        await tasks.stop()


def ended(
    calls: Iterator[Call[threading.Event] | T], crew: Crew[threading.Event], lines: Lines
) -> Generator[Call[threading.Event] | T]:
    """Give calls in their order, each when it has ended; what could not become a call is passed through.

    Args:
        calls: The calls, read in the caller's thread. What reading them raises comes after those that were read.
        crew: Who sends: threads, or the caller's own where the crew is of one.
        lines: Opens a line for one request.
    """
    pending: deque[Call[threading.Event] | T] = deque()
    woken = threading.Event()
    more, failure = True, None
    try:
        while True:
            while more and _wants_more(pending, crew.window):
                try:
                    pending.append(call := next(calls))
                except StopIteration:
                    more = False
                except Exception as error:  # noqa: BLE001 - the caller's iterable may raise anything
                    more, failure = False, error
                else:
                    if isinstance(call, Call):
                        crew.add(call)
                        _start(crew, lines, woken)
            if not pending:
                break
            _wait_for(pending[0], crew, lines, woken)
            yield pending.popleft()
    finally:
        _close(pending)
    if failure is not None:
        raise failure


class AsyncEnded(Generic[T]):
    """Does the same with tasks; one of them reads the calls, so that a slow source holds back no ranking.

    It is no generator: at its end asyncio would close it beside the one that goes through it.
    """

    def __init__(
        self, calls: AsyncGenerator[Call[asyncio.Event] | T], crew: Crew[asyncio.Event], lines: AsyncLines
    ) -> None:
        self._calls = calls
        self._crew = crew
        self._pending: deque[Call[asyncio.Event] | T] = deque()
        self._room = asyncio.Semaphore(crew.window)
        self._tasks = _Tasks(crew, lines)
        self._reader = asyncio.create_task(self._read())
        self._reader.add_done_callback(lambda _: self._tasks.woken.set())

    async def _read(self) -> None:
        async with aclosing(self._calls) as calls:
            await self._room.acquire()
            async for call in calls:
                self._pending.append(call)
                if isinstance(call, Call):
                    self._crew.add(call)
                    self._tasks.start()
                self._tasks.woken.set()
                await self._room.acquire()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Call[asyncio.Event] | T:
        while not self._pending:
            if self._reader.done():
                self._reader.result()
                raise StopAsyncIteration
            await self._tasks.until_woken()
        await self._tasks.wait_for(self._pending[0])
        self._room.release()
        return self._pending.popleft()

    async def aclose(self) -> None:
        """Give up what is under way."""
        _close(self._pending)
        self._reader.cancel()
        await self._tasks.stop(self._reader)


class _Tasks:
    """The tasks of a crew, in the running event loop."""

    def __init__(self, crew: Crew[asyncio.Event], lines: AsyncLines) -> None:
        self.woken = asyncio.Event()
        self._crew = crew
        self._lines = lines
        self._workers: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        for _ in range(self._crew.due()):
            self._workers.add(worker := asyncio.create_task(_awork(self._crew, self._lines, self.woken)))
            worker.add_done_callback(self._left)

    def _left(self, worker: asyncio.Task[None]) -> None:
        if not worker.cancelled():
            self._workers.discard(worker)
        self.woken.set()

    async def until_woken(self) -> None:
        await self.woken.wait()
        self.woken.clear()
        if any(worker.cancelled() for worker in self._workers):
            # Somebody has cancelled a worker, and its batch is unranked.
            raise asyncio.CancelledError

    async def wait_for(self, call: Call[asyncio.Event] | BaseException) -> None:
        while not _is_over(call):
            self.start()
            await self.until_woken()

    async def stop(self, *others: asyncio.Task[None]) -> None:
        for worker in self._workers:
            worker.cancel()
        await asyncio.gather(*self._workers, *others, return_exceptions=True)


async def _awork(crew: Crew[asyncio.Event], lines: AsyncLines, woken: asyncio.Event) -> None:
    answered = False
    while (todo := crew.take()) is not None:
        call, batch = todo
        if rest := crew.rest():
            await pause(call.over, rest)
        try:
            with lines() as line:
                await _asend(call, batch, line, call.patience(batch, hurries=answered and not rest))
        except LeftError:
            return
        except EndedError:
            continue
        except Exception as error:  # noqa: BLE001 - raised in the caller's task
            call.fail(error)
        else:
            answered = True
            call.ranked_one()
        woken.set()


def _start(crew: Crew[threading.Event], lines: Lines, woken: threading.Event) -> None:
    workers = crew.due()
    if workers and crew.most == 1:
        _work(crew, lines, woken)
        return
    try:
        for _ in range(workers):
            # Daemons, so that Ctrl-C ends the process at once; each in a copy of the context, so that traces nest.
            run = copy_context().run
            threading.Thread(target=run, args=(_work, crew, lines, woken), daemon=True, name="regolo_rerank").start()
    except RuntimeError as error:
        raise APIConnectionError(f"no thread for a request: {error}; lower max_concurrency") from error


def _work(crew: Crew[threading.Event], lines: Lines, woken: threading.Event) -> None:
    answered = False
    while (todo := crew.take()) is not None:
        call, batch = todo
        if rest := crew.rest():
            call.over.wait(rest)
        try:
            with lines() as line:
                _send(call, batch, line, call.patience(batch, hurries=answered and not rest))
        except LeftError:
            return
        except EndedError:
            continue
        except BaseException as error:  # noqa: BLE001 - raised in the caller's thread
            call.fail(error)
        else:
            answered = True
            call.ranked_one()
        woken.set()


def _wait_for(
    call: Call[threading.Event] | BaseException, crew: Crew[threading.Event], lines: Lines, woken: threading.Event
) -> None:
    while not _is_over(call):
        _start(crew, lines, woken)
        woken.wait()
        woken.clear()


def _wants_more(pending: deque[Call[Event] | T], window: int) -> bool:
    # A full window keeps every worker busy; but nobody waits for a slow source while the next ranking is there.
    return len(pending) < window and not (pending and len(pending) <= window // 2 and _is_over(pending[0]))


def _is_over(call: Call[Event] | BaseException) -> bool:
    return not isinstance(call, Call) or call.over.is_set()


def _close(pending: deque[Call[Event] | T]) -> None:
    for call in pending:
        if isinstance(call, Call):
            call.close()


def _send(call: Call[threading.Event], batch: range, line: Line | httpx.Client, patience: Patience) -> None:
    """Send one batch until its reply is good, or its patience ends."""

    def attempt() -> None:
        with call.unless_over():
            patience.before_sending()
            body, started = bytearray(), time.monotonic()
            with call.errors(batch), line.stream(**call.request(batch)) as response, call.decoding(response, body):
                for chunk in response.iter_bytes():
                    body += chunk
                    call.check(body, started)
            call.learn(batch, response, body, patience, started)

    try:
        attempt()
    except RegoloError as error:
        patience.has_failed(error)
    else:
        return
    from regolo_rerank._core.backoff import again

    again(patience, call.over)(attempt)


async def _asend(
    call: Call[asyncio.Event], batch: range, line: AsyncLine | httpx.AsyncClient, patience: Patience
) -> None:
    """Send one batch until its reply is good, or its patience ends."""

    async def attempt() -> None:
        with call.unless_over():
            patience.before_sending()
            body, started = bytearray(), time.monotonic()
            with call.errors(batch):
                async with asyncio.timeout(call.terms.timeout), line.stream(**call.request(batch)) as response:
                    with call.decoding(response, body):
                        async for chunk in response.aiter_bytes():
                            body += chunk
                            call.check(body, started)
            call.learn(batch, response, body, patience, started)

    try:
        await attempt()
    except RegoloError as error:
        patience.has_failed(error)
    else:
        return
    from regolo_rerank._core.backoff import async_again

    await async_again(patience, call.over)(attempt)
