"""The drivers of calls: the caller's own thread or task, worker threads, and worker tasks.

A call with a single request sends it where the caller is. A call with several requests, and `rerank_many`, keep a queue
of batches and at most `max_concurrency` workers, and each worker drives the retry loop of one batch after the other.
Threads and tasks are written side by side and differ only in how they wait.

The caller waits for workers until `total_timeout` expires or Ctrl-C is pressed, whatever the workers are doing. One
that is left behind is a daemon thread, and ends with its request.

An example, with three batches and `max_concurrency=2`: workers 1 and 2 take batches A and B. Worker 1 gets its reply,
takes batch C, and C fails for good. The call ends with that error, and the caller raises it. Worker 2 is still in its
request for B. It no longer counts as busy, and when its reply comes, it finds that the call is done and stops.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterable, Awaitable, Callable, Generator, Iterable, Iterator
from contextlib import suppress
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

from regolo_rerank._call import Batch, Call
from regolo_rerank._http import Connections
from regolo_rerank._retries import Pause, Sleep, attempts
from regolo_rerank.errors import RegoloError

__all__ = ["TasksInOrder", "run", "run_async", "run_in_order"]

READ_AHEAD: Final = 4
"""Calls in progress per worker of `rerank_many`, so that a slow call leaves no worker idle."""


def run(call: Call, connections: Connections, pause: Pause) -> None:
    """Send the batches of one call, and wait until it is done."""
    # A local scorer, and a caller's own HTTP client, may have no time limit. They run in a thread, which the caller can
    # stop waiting for.
    if len(call.batches) == 1 and call.settings.timeout is not None:
        _drive(call, call.batches[0], connections, pause, time.sleep)
        return
    threads = _Threads(call.settings.options.max_concurrency, connections, pause)
    try:
        threads.submit(call)
        threads.wait(call)
    except BaseException as interrupt:
        threads.end(call, interrupt)  # Ctrl-C: the workers send nothing more
        raise


async def run_async(call: Call, connections: Connections, pause: Pause) -> None:
    """Send the batches of one call, and wait until it is done."""
    if len(call.batches) == 1:
        await _drive_async(call, call.batches[0], connections, pause, asyncio.sleep)
        return
    tasks = _Tasks(call.settings.options.max_concurrency, connections, pause)
    try:
        tasks.submit(call)
        await tasks.wait(call)
    finally:
        await tasks.stop()


def _drive(call: Call, batch: Batch, connections: Connections, pause: Pause, sleep: Callable[[float], object]) -> None:
    """Do what the retry loop of a batch asks for."""
    steps = attempts(call, batch, pause)
    outcome = None
    with suppress(StopIteration):
        while True:
            step = steps.send(outcome)
            if isinstance(step, Sleep):
                outcome = None
                sleep(step.seconds)
            else:
                outcome = connections.post(call.settings, step.body, step.seconds)


async def _drive_async(
    call: Call, batch: Batch, connections: Connections, pause: Pause, sleep: Callable[[float], Awaitable[object]]
) -> None:
    """Do what the retry loop of a batch asks for."""
    steps = attempts(call, batch, pause)
    outcome = None
    with suppress(StopIteration):
        while True:
            step = steps.send(outcome)
            if isinstance(step, Sleep):
                outcome = None
                await sleep(step.seconds)
            else:
                outcome = await connections.apost(call.settings, step.body, step.seconds)


@dataclass(frozen=True, slots=True, eq=False)
class _Job:
    call: Call
    batch: Batch


class _Queue:
    """The batches to send, first come, first served, and the workers that are busy with one.

    A worker may still be in a request after its call has ended. Its caller has stopped waiting, so it does not count.
    """

    def __init__(self, max_workers: int) -> None:
        self._max_workers = max_workers
        self._waiting: deque[_Job] = deque()
        self._running: set[_Job] = set()

    def put(self, call: Call) -> None:
        self._waiting.extend(_Job(call, batch) for batch in call.batches)

    def take(self) -> _Job | None:
        """Return the next batch, or None if the queue is empty or all workers are busy."""
        if sum(not job.call.is_finished for job in self._running) >= self._max_workers:
            return None
        while self._waiting:
            job = self._waiting.popleft()
            if not job.call.is_finished:
                self._running.add(job)
                return job
        return None

    def finish(self, job: _Job) -> None:
        self._running.discard(job)


class _Threads:
    """Drives calls in daemon threads, in a copy of the caller's context."""

    def __init__(self, max_workers: int, connections: Connections, pause: Pause) -> None:
        self._queue = _Queue(max_workers)
        self._connections = connections
        self._pause = pause
        self._changed = threading.Condition()

    def submit(self, call: Call) -> None:
        """Start to send the batches of a call."""
        with self._changed:
            self._queue.put(call)
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

    def stop(self, calls: Iterable[Call | RegoloError]) -> None:
        """End calls without starting others, and keep the scores that are there."""
        with self._changed:
            for call in calls:
                if isinstance(call, Call):
                    call.fail(GeneratorExit())
            self._changed.notify_all()
        _keep_scores(calls)

    def take_first(self, pending: deque[Call | RegoloError]) -> Call | RegoloError:
        """Wait for the first of some calls, and remove it."""
        if isinstance(pending[0], Call):
            self.wait(pending[0])
        return pending.popleft()

    def _wait_until_finished(self, call: Call, seconds: float | None) -> None:
        with self._changed:
            self._changed.wait_for(lambda: call.is_finished, seconds)

    def _start_workers(self) -> None:
        while (job := self._take()) is not None:
            self._start_worker(job)

    def _start_worker(self, job: _Job) -> None:
        context = copy_context()
        thread = threading.Thread(target=context.run, args=(self._work, job), name="regolo_rerank", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the system allows no further thread, so the caller's does the work
            context.run(self._work, job)

    def _take(self) -> _Job | None:
        with self._changed:
            return self._queue.take()

    def _work(self, job: _Job | None) -> None:
        while job is not None:
            sleep = partial(self._wait_until_finished, job.call)
            try:
                _drive(job.call, job.batch, self._connections, self._pause, sleep)
            except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
                self.end(job.call, error)
            with self._changed:
                self._queue.finish(job)
                self._changed.notify_all()
                job = self._queue.take()


class _Tasks:
    """Drives calls in tasks of the running event loop."""

    def __init__(self, max_workers: int, connections: Connections, pause: Pause) -> None:
        self._queue = _Queue(max_workers)
        self._connections = connections
        self._pause = pause
        self._changed = asyncio.Event()
        self._workers: set[asyncio.Task[None]] = set()

    def submit(self, call: Call) -> None:
        """Start to send the batches of a call."""
        self._queue.put(call)
        self._start_workers()

    async def wait(self, call: Call) -> None:
        """Wait until a call is done, at most until its `total_timeout` expires."""
        while not call.is_finished:
            await self._wait_until_finished(call, call.seconds_left())
            if call.seconds_left() == 0.0:
                call.fail(call.timeout_error())
                self._start_workers()

    async def _wait_until_finished(self, call: Call, seconds: float | None) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not call.is_finished:
                    self._changed.clear()
                    await self._changed.wait()

    def _start_workers(self) -> None:
        while (job := self._queue.take()) is not None:
            worker = asyncio.create_task(self._work(job))
            self._workers.add(worker)
            worker.add_done_callback(self._workers.discard)

    async def _work(self, job: _Job | None) -> None:
        while job is not None:
            sleep = partial(self._wait_until_finished, job.call)
            try:
                await _drive_async(job.call, job.batch, self._connections, self._pause, sleep)
            except BaseException as error:  # raised again in the caller's task
                job.call.fail(error)
                if not isinstance(error, Exception):  # this task was cancelled
                    raise
                self._start_workers()  # in place of the call's other workers, which may be stuck
            finally:
                self._queue.finish(job)
                self._changed.set()
            job = self._queue.take()

    async def stop(self) -> None:
        """Cancel all workers, and wait until they have ended."""
        workers = list(self._workers)
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)


def run_in_order(
    calls: Iterator[Call | RegoloError], max_workers: int, connections: Connections, pause: Pause
) -> Generator[Call | RegoloError]:
    """Send the batches of many calls, and yield each call when it is done, in order. Errors are passed through.

    An exception of the iterator is raised after the calls that were read before it.
    """
    threads = _Threads(max_workers, connections, pause)
    pending: deque[Call | RegoloError] = deque()
    interruption: Exception | None = None
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
            if isinstance(call, Call):
                threads.submit(call)
            # Reading more pairs keeps the workers busy. Finished calls come first, because the source may be slow.
            while pending and (len(pending) >= max_workers * READ_AHEAD or _is_finished(pending[0])):
                yield threads.take_first(pending)
        while pending:
            yield threads.take_first(pending)
        if interruption is not None:
            raise interruption
    finally:
        threads.stop(pending)


def _keep_scores(calls: Iterable[Call | RegoloError | None]) -> None:
    """Keep the scores of calls whose rankings are not returned: their requests are paid."""
    for call in calls:
        if isinstance(call, Call):
            call.keep_scores()


def _is_finished(call: Call | RegoloError) -> bool:
    return isinstance(call, RegoloError) or call.is_finished


class TasksInOrder:
    """Sends the batches of many calls in tasks, and returns each call when it is done, in order.

    A separate task reads the pairs, so that a slow source does not hold back a finished call. This is a class,
    because the client has an async generator already, and an event loop that ends closes all generators at once.

    Args:
        pairs: The caller's pairs.
        begin: Returns the call for a pair, or its error, which is passed through.
        max_workers: Maximum number of concurrent requests.
        connections: The connections of the client.
        pause: The pause after a 429.
    """

    def __init__(
        self,
        pairs: Iterable[Any] | AsyncIterable[Any],
        begin: Callable[[Any], Call | RegoloError],
        max_workers: int,
        connections: Connections,
        pause: Pause,
    ) -> None:
        self._begin = begin
        self._tasks = _Tasks(max_workers, connections, pause)
        self._pending: asyncio.Queue[Call | RegoloError | None] = asyncio.Queue()
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
        if isinstance(call, Call):
            self._tasks.submit(call)
        self._pending.put_nowait(call)
        await self._room.acquire()

    async def next(self) -> Call | RegoloError | None:
        """Return the next call when it is done; None after the last one. Raises an exception of the pairs."""
        call = await self._pending.get()
        if call is None:
            await self._reader
        elif isinstance(call, Call):
            await self._tasks.wait(call)
        self._room.release()
        return call

    async def stop(self) -> None:
        """Cancel all tasks, and wait until they have ended."""
        self._reader.cancel()
        await self._tasks.stop()
        await asyncio.gather(self._reader, return_exceptions=True)
        _keep_scores(self._pending.get_nowait() for _ in range(self._pending.qsize()))
