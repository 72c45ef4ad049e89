"""The drivers of calls: the caller's own thread, worker threads, and tasks.

The caller's thread sends the only request of a sync call, if the request has a time limit. Other sync calls and
`rerank_many` put batches into a queue, and `max_concurrency` threads work on it: each drives the retry loop of one
batch after the other. An async call with several batches starts a task for each, and a semaphore lets
`max_concurrency` of them send.

A task can be cancelled, a thread cannot. So the caller stops waiting at `total_timeout` or Ctrl-C, even if a thread is
stuck. A thread that is left behind is a daemon, and ends with its request.

An example, with three batches and `max_concurrency=2`: threads 1 and 2 take batches A and B. Thread 1 gets its reply,
takes batch C, and C fails for good. The call ends with that error, and the caller raises it. Thread 2 is still in its
request for B. It no longer counts as busy, and when its reply comes, it finds that the call is done and stops.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterable, Callable, Generator, Iterable, Iterator
from contextvars import copy_context
from functools import partial
from typing import Any, Final

from regolo_rerank._call import Batch, Call
from regolo_rerank._http import Connections
from regolo_rerank._retries import Pause, Sleep, attempts

__all__ = ["TasksInOrder", "run", "run_async", "run_in_order"]

READ_AHEAD: Final = 4
"""Calls in progress per worker of `rerank_many`, so that a slow call leaves no worker idle."""


def run(call: Call, connections: Connections, pause: Pause) -> None:
    """Send the batches of one call, and wait until it is done.

    Raises:
        RegoloError: The only request failed. With several requests, `call.response()` raises.
    """
    # A local scorer, and a caller's own HTTP client, may have no time limit. They run in a thread, which the caller can
    # stop waiting for.
    if len(call.batches) == 1 and call.settings.timeout is not None:
        _drive(call, call.batches[0], connections, pause, time.sleep)
        call.keep_scores()
        return
    threads = _Threads(call.settings.options.max_concurrency, connections, pause)
    try:
        threads.submit(call)
        threads.wait(call)
    finally:
        threads.stop([call])  # after Ctrl-C the workers send nothing more


async def run_async(call: Call, connections: Connections, pause: Pause) -> None:
    """Send the batches of one call, and wait until it is done.

    Raises:
        RegoloError: The only request failed. With several requests, `call.response()` raises.
    """
    if len(call.batches) == 1:  # needs no further task
        await _drive_async(call, call.batches[0], connections, pause)
        call.keep_scores()
        return
    semaphore = asyncio.Semaphore(call.settings.options.max_concurrency)
    await _finish(call, _start(call, connections, pause, semaphore))


def _start(
    call: Call, connections: Connections, pause: Pause, semaphore: asyncio.Semaphore
) -> list[asyncio.Task[None]]:
    """Start a task for each batch. The semaphore lets them send in the order in which they were started."""

    async def send(batch: Batch) -> None:
        try:
            async with semaphore:
                await _drive_async(call, batch, connections, pause)
        except BaseException as error:
            call.fail(error)
            # At the end of `total_timeout` the other requests of the call are ending by themselves. Cancelling them in
            # that moment could leave their connections open.
            if call.seconds_left() != 0.0:
                for task in tasks:
                    if task is not asyncio.current_task():
                        task.cancel()
            if not isinstance(error, Exception):  # this task was cancelled
                raise

    tasks = [asyncio.create_task(send(batch)) for batch in call.batches]
    return tasks


async def _finish(call: Call, tasks: list[asyncio.Task[None]]) -> None:
    """Wait for the tasks of a call, and keep its scores. If the caller is cancelled, they are cancelled too."""
    try:
        if tasks:
            await asyncio.wait(tasks)
    finally:
        try:
            await _cancel(tasks)
        finally:
            call.keep_scores()


async def _cancel(tasks: Iterable[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _drive(call: Call, batch: Batch, connections: Connections, pause: Pause, sleep: Callable[[float], object]) -> None:
    """Do what the retry loop of a batch asks for."""
    steps, outcome = attempts(call, batch, pause), None
    while True:
        try:
            step = steps.send(outcome)
        except StopIteration:
            return
        if isinstance(step, Sleep):
            outcome = None
            sleep(step.seconds)
        else:
            outcome = connections.post(call.settings, step.body, step.seconds)


async def _drive_async(call: Call, batch: Batch, connections: Connections, pause: Pause) -> None:
    """Do what the retry loop of a batch asks for."""
    steps, outcome = attempts(call, batch, pause), None
    while True:
        try:
            step = steps.send(outcome)
        except StopIteration:
            return
        if isinstance(step, Sleep):
            outcome = None
            await asyncio.sleep(step.seconds)
        else:
            outcome = await connections.apost(call.settings, step.body, step.seconds)


_Job = tuple[Call, Batch]


class _Threads:
    """Drives calls in daemon threads, first come, first served, in a copy of the caller's context.

    A thread may still be in a request after its call has ended. Such a thread is not counted as busy.
    """

    def __init__(self, max_workers: int, connections: Connections, pause: Pause) -> None:
        self._max_workers = max_workers
        self._connections = connections
        self._pause = pause
        self._waiting: deque[_Job] = deque()
        self._running: set[_Job] = set()
        self._changed = threading.Condition()

    def submit(self, call: Call) -> None:
        """Start to send the batches of a call."""
        with self._changed:
            self._waiting.extend((call, batch) for batch in call.batches)
        self._start_workers()

    def wait(self, call: Call) -> None:
        """Wait until a call is done, at most until its `total_timeout` expires."""
        while not call.is_finished:
            self._wait_until_finished(call, call.seconds_left())
            if call.seconds_left() == 0.0:
                self.end(call, call.timeout_error())

    def end(self, call: Call, error: BaseException) -> None:
        """End a call with an error.

        Its workers that sleep wake up and stop. Workers that are stuck in a request are replaced by new ones.
        """
        with self._changed:
            call.fail(error)
            self._changed.notify_all()
        self._start_workers()

    def stop(self, calls: Iterable[Call]) -> None:
        """End calls without starting others. Keep the scores that have arrived, because their requests are paid."""
        with self._changed:
            for call in calls:
                call.fail(GeneratorExit())
            self._changed.notify_all()
        for call in calls:
            call.keep_scores()

    def _wait_until_finished(self, call: Call, seconds: float | None) -> None:
        with self._changed:
            self._changed.wait_for(lambda: call.is_finished, seconds)

    def _start_workers(self) -> None:
        while (job := self._take()) is not None:
            context = copy_context()
            thread = threading.Thread(target=context.run, args=(self._work, job), name="regolo_rerank", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # the system cannot start another thread, so this one does the work
                context.run(self._work, job)

    def _take(self) -> _Job | None:
        """Return the next batch, or None if none waits or all workers are busy."""
        with self._changed:
            if sum(not call.is_finished for call, _ in self._running) >= self._max_workers:
                return None
            while self._waiting:
                job = self._waiting.popleft()
                if not job[0].is_finished:
                    self._running.add(job)
                    return job
            return None

    def _work(self, job: _Job | None) -> None:
        while job is not None:
            call, batch = job
            sleep = partial(self._wait_until_finished, call)
            try:
                _drive(call, batch, self._connections, self._pause, sleep)
            except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
                self.end(call, error)
            with self._changed:
                self._running.discard(job)
                self._changed.notify_all()
            job = self._take()


def run_in_order(calls: Iterator[Call], max_workers: int, connections: Connections, pause: Pause) -> Generator[Call]:
    """Send the batches of many calls, and yield each call when it is done, in order.

    An exception of the iterator is raised after the calls that were read before it.
    """
    threads = _Threads(max_workers, connections, pause)
    pending: deque[Call] = deque()
    interruption: Exception | None = None

    def take_first() -> Call:
        threads.wait(pending[0])
        pending[0].keep_scores()
        return pending.popleft()

    try:
        while True:
            try:
                call = next(calls)
            except StopIteration:
                break
            except Exception as error:  # noqa: BLE001 - raised below
                interruption = error
                break
            pending.append(call)
            threads.submit(call)
            # Yield finished calls before the next pair is read, because the source may be slow. Otherwise read on, so
            # that no worker is idle.
            while pending and (len(pending) >= max_workers * READ_AHEAD or pending[0].is_finished):
                yield take_first()
        while pending:
            yield take_first()
        if interruption is not None:
            raise interruption
    finally:
        threads.stop(pending)


class TasksInOrder:
    """Sends the batches of many calls in tasks, and returns each call when it is done, in order.

    A separate task reads the pairs, so that a slow async source does not hold back a finished call. This is a class,
    because asyncio closes all async generators at once when its loop ends, and the client's own generator must be able
    to stop these tasks.

    Args:
        pairs: The caller's pairs.
        begin: Returns the call for a pair.
        max_workers: Maximum number of concurrent requests.
        connections: The connections of the client.
        pause: The pause after a 429.
    """

    def __init__(
        self,
        pairs: Iterable[Any] | AsyncIterable[Any],
        begin: Callable[[Any], Call],
        max_workers: int,
        connections: Connections,
        pause: Pause,
    ) -> None:
        self._begin = begin
        semaphore = asyncio.Semaphore(max_workers)
        self._start = partial(_start, connections=connections, pause=pause, semaphore=semaphore)
        self._pending: asyncio.Queue[tuple[Call, list[asyncio.Task[None]]] | None] = asyncio.Queue()
        self._room = asyncio.Semaphore(max_workers * READ_AHEAD)
        self._reader = asyncio.create_task(self._read(pairs))

    async def _read(self, pairs: Iterable[Any] | AsyncIterable[Any]) -> None:
        try:
            await self._room.acquire()
            if isinstance(pairs, AsyncIterable):
                async for pair in pairs:
                    await self._submit(pair)
            else:
                for pair in pairs:
                    await self._submit(pair)
        finally:
            self._pending.put_nowait(None)

    async def _submit(self, pair: Any) -> None:
        """Start to send the batches of a pair, and wait until another pair may be read."""
        call = self._begin(pair)
        self._pending.put_nowait((call, self._start(call)))
        await self._room.acquire()

    async def next(self) -> Call | None:
        """Return the next call when it is done; None after the last one. Raises an exception of the pairs."""
        pending = await self._pending.get()
        if pending is None:
            await self._reader
            return None
        call, tasks = pending
        await _finish(call, tasks)
        self._room.release()
        return call

    async def stop(self) -> None:
        """Cancel all tasks, wait until they have ended, and keep the scores that are there."""
        pending = [self._pending.get_nowait() for _ in range(self._pending.qsize())]
        calls = [each for each in pending if each is not None]
        try:
            await _cancel([self._reader, *(task for _, tasks in calls for task in tasks)])
        finally:
            for call, _ in calls:
                call.keep_scores()
