"""The only file that sends: two thin drivers, threads and tasks, over the same calls and the same crew.

Both give calls in their order, each when it has ended, and read ahead of the one that was given last: one call is a
window of one.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Generator, Iterator
from contextlib import AbstractContextManager, aclosing, closing, suppress
from contextvars import copy_context
from functools import partial
from typing import TypeVar

import httpx
from tenacity import AsyncRetrying, Retrying, sleep_using_event

from regolo_rerank.calls import Call, Crew, EndedError, Event, LeftError
from regolo_rerank.errors import APIConnectionError, RegoloError
from regolo_rerank.lines import AsyncLine, Line

__all__ = ["AsyncLines", "Lines", "aended", "afinish", "aprepare", "ended", "finish", "prepare"]

Lines = Callable[[], AbstractContextManager[Line | httpx.Client]]
AsyncLines = Callable[[], AbstractContextManager[AsyncLine | httpx.AsyncClient]]

T = TypeVar("T", bound=BaseException)


def prepare(call: Call[threading.Event]) -> None:
    """Find out what a call has to send, after the calls that are asking for the same."""
    bound = call.terms.options.max_retry_seconds
    alone = _in_an_event_loop()  # whose calls would wait for this one to end
    while (other := call.prepare(alone=alone)) is not None:
        try:
            other.result(bound)
        except TimeoutError:
            alone = True


async def aprepare(call: Call[asyncio.Event]) -> None:
    """Do the same without blocking the event loop."""
    alone = False
    while (other := call.prepare(alone=alone)) is not None:
        try:
            async with asyncio.timeout(call.terms.options.max_retry_seconds):
                await asyncio.shield(asyncio.wrap_future(other))
        except TimeoutError:
            alone = True


def _in_an_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def finish(call: Call[threading.Event], lines: Lines) -> None:
    """Send all of one call: in the caller's thread where it has one request, else in several."""
    crew = call.crew_of_its_own()
    if crew.most == 1:
        crew.add(call)
        _work(crew, lines, threading.Event())
    else:
        with closing(ended(iter([call]), crew, lines)) as calls:
            next(calls)


def ended(
    calls: Iterator[Call[threading.Event] | T], crew: Crew[threading.Event], lines: Lines
) -> Generator[Call[threading.Event] | T]:
    """Give calls in their order, each when it has ended; what could not become a call is passed through.

    Args:
        calls: The calls, read in the caller's thread.
        crew: Who sends: threads, or the caller's own where the crew is of one.
        lines: Opens a line for one request.
    """
    pending: deque[Call[threading.Event] | T] = deque()
    woken = threading.Event()
    try:
        while True:
            while _wants_more(pending, crew.window) and (call := next(calls, None)) is not None:
                pending.append(call)
                if isinstance(call, Call):
                    _start(crew.add(call), crew, lines, woken)
            if not pending:
                return
            while not _is_over(pending[0]):
                woken.wait()
                woken.clear()
            yield pending.popleft()
    finally:
        _give_up(pending)


def _start(workers: int, crew: Crew[threading.Event], lines: Lines, woken: threading.Event) -> None:
    if crew.most == 1:
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
    follows_success = False
    while (todo := crew.take()) is not None:
        call, batch = todo
        try:
            with lines() as line:
                _send(call, batch, line, follows_success=follows_success)
        except LeftError:
            return
        except EndedError:
            continue
        except BaseException as error:  # noqa: BLE001 - raised in the caller's thread
            call.fail(error)
        else:
            follows_success = True
            call.ranked_one()
        woken.set()


async def afinish(call: Call[asyncio.Event], lines: AsyncLines) -> None:
    """Send all of one call: in the caller's task where it has one request, else in several."""
    crew = call.crew_of_its_own()
    if crew.most == 1:
        crew.add(call)
        await _awork(crew, lines, asyncio.Event())
    else:
        async with aclosing(aended(_alone(call), crew, lines)) as calls:
            await anext(calls)


async def _alone(call: Call[asyncio.Event]) -> AsyncGenerator[Call[asyncio.Event]]:
    yield call


async def aended(
    calls: AsyncGenerator[Call[asyncio.Event] | T], crew: Crew[asyncio.Event], lines: AsyncLines
) -> AsyncGenerator[Call[asyncio.Event] | T]:
    """Do the same with tasks, or in the caller's own where the crew is of one."""
    pending: deque[Call[asyncio.Event] | T] = deque()
    woken = asyncio.Event()
    workers: set[asyncio.Task[None]] = set()
    try:
        while True:
            while _wants_more(pending, crew.window) and (call := await anext(calls, None)) is not None:
                pending.append(call)
                if isinstance(call, Call):
                    await _astart(crew.add(call), crew, lines, woken, workers)
            if not pending:
                return
            while not _is_over(pending[0]):
                await woken.wait()
                woken.clear()
                if any(worker.cancelled() for worker in workers):
                    # Somebody has cancelled a worker, and its batch is unranked.
                    raise asyncio.CancelledError
            yield pending.popleft()
    finally:
        _give_up(pending)
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
        await calls.aclose()


async def _astart(
    count: int,
    crew: Crew[asyncio.Event],
    lines: AsyncLines,
    woken: asyncio.Event,
    workers: set[asyncio.Task[None]],
) -> None:
    def left(worker: asyncio.Task[None]) -> None:
        if not worker.cancelled():
            workers.discard(worker)
        woken.set()

    if crew.most == 1:
        await _awork(crew, lines, woken)
        return
    for _ in range(count):
        workers.add(worker := asyncio.create_task(_awork(crew, lines, woken)))
        worker.add_done_callback(left)


async def _awork(crew: Crew[asyncio.Event], lines: AsyncLines, woken: asyncio.Event) -> None:
    follows_success = False
    while (todo := crew.take()) is not None:
        call, batch = todo
        try:
            with lines() as line:
                await _asend(call, batch, line, follows_success=follows_success)
        except LeftError:
            return
        except EndedError:
            continue
        except Exception as error:  # noqa: BLE001 - raised in the caller's task
            call.fail(error)
        else:
            follows_success = True
            call.ranked_one()
        woken.set()


def _wants_more(pending: deque[Call[Event] | T], window: int) -> bool:
    # A full window keeps every worker busy; but nobody waits for a slow source while the next ranking is there.
    return len(pending) < window and not (pending and len(pending) <= window // 2 and _is_over(pending[0]))


def _is_over(call: Call[Event] | BaseException) -> bool:
    return not isinstance(call, Call) or call.over.is_set()


def _give_up(pending: deque[Call[Event] | T]) -> None:
    for call in pending:
        if isinstance(call, Call):
            call.close()


def _send(call: Call[threading.Event], batch: range, line: Line | httpx.Client, *, follows_success: bool) -> None:
    """Send one batch until its reply is good, or its patience ends."""
    patience = call.patience(batch, follows_success=follows_success)

    def attempt() -> None:
        with call.unless_over():
            patience.before_sending()
            body, started = bytearray(), time.monotonic()
            with call.errors(), line.stream(**call.request(batch)) as response, call.decoding(response, body):
                for chunk in response.iter_bytes():
                    body += chunk
                    call.check(body, started)
            call.learn(batch, response, body, patience, started)

    if held := call.terms.gate.held_for():
        call.over.wait(held)
    try:
        attempt()
    except RegoloError as error:
        patience.has_failed(error)
    else:
        return
    Retrying(sleep=sleep_using_event(call.over), **patience.policy())(attempt)


async def _asend(
    call: Call[asyncio.Event], batch: range, line: AsyncLine | httpx.AsyncClient, *, follows_success: bool
) -> None:
    """Send one batch until its reply is good, or its patience ends."""
    patience = call.patience(batch, follows_success=follows_success)

    async def attempt() -> None:
        with call.unless_over():
            patience.before_sending()
            body, started = bytearray(), time.monotonic()
            with call.errors():
                async with asyncio.timeout(call.terms.timeout), line.stream(**call.request(batch)) as response:
                    with call.decoding(response, body):
                        async for chunk in response.aiter_bytes():
                            body += chunk
                            call.check(body, started)
            call.learn(batch, response, body, patience, started)

    # Not the call: tenacity's objects refer to themselves, and would keep all of it alive.
    pause = partial(_pause, call.over)
    if held := call.terms.gate.held_for():
        await pause(held)
    try:
        await attempt()
    except RegoloError as error:
        patience.has_failed(error)
    else:
        return
    await AsyncRetrying(sleep=pause, **patience.policy())(attempt)


async def _pause(over: asyncio.Event, seconds: float) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await over.wait()
