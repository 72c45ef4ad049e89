"""Sync calls: does what a batch's flow says, in the caller's thread or in several, and waits for calls."""

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextvars import copy_context
from typing import Generic, Self, TypeVar

import httpx

from regolo_rerank._core.body import ReplyBody
from regolo_rerank._core.call import Call
from regolo_rerank._core.queue import Job, WorkQueue
from regolo_rerank._core.request import Reply, Sleep, rank_batch
from regolo_rerank.errors import APIConnectionError

__all__ = ["FinishInOrder", "finish"]

T = TypeVar("T", bound=Exception)


def finish(call: Call[threading.Event], client: httpx.Client) -> None:
    """Send all batches of one call: in the caller's thread where it has one, else in several."""
    queue: WorkQueue[threading.Event] = WorkQueue(min(call.config.options.max_concurrency, len(call.plan.batches)))
    queue.put(call)
    _Threads(queue, client).wait_for(call)


class FinishInOrder(Generic[T]):
    """Gives calls in their order, each when it is done; what could not become a call is passed through.

    Args:
        calls: The calls, read in the caller's thread.
        max_workers: Requests in flight at most, over all calls.
        client: Sends them.
    """

    def __init__(self, calls: Iterator[Call[threading.Event] | T], max_workers: int, client: httpx.Client) -> None:
        self._calls = calls
        self._queue: WorkQueue[threading.Event] = WorkQueue(max_workers)
        self._threads = _Threads(self._queue, client)
        self._pending: deque[Call[threading.Event] | T] = deque()
        self._has_more = True

    def _read(self) -> None:
        while self._has_more and self._wants_more():
            call = next(self._calls, None)
            if call is None:
                self._has_more = False
                return
            self._pending.append(call)
            if isinstance(call, Call):
                self._queue.put(call)
                self._threads.start()

    def _wants_more(self) -> bool:
        # Enough calls keep every worker busy; but nobody waits for a slow source while the next ranking is there.
        ahead, enough = len(self._pending), self._queue.read_ahead
        return ahead < enough and not (0 < ahead <= enough // 2 and _is_done(self._pending[0]))

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Call[threading.Event] | T:
        self._read()
        if not self._pending:
            raise StopIteration
        if isinstance(first := self._pending[0], Call):
            self._threads.wait_for(first)
        return self._pending.popleft()

    def close(self) -> None:
        """Give up what is under way."""
        for call in self._pending:
            if isinstance(call, Call):
                call.close()


def _is_done(call: Call[threading.Event] | Exception) -> bool:
    return not isinstance(call, Call) or call.done.is_set()


class _Threads:
    """The threads that send a queue's batches; the caller's own where there may be only one."""

    def __init__(self, queue: WorkQueue[threading.Event], client: httpx.Client) -> None:
        self._queue = queue
        self._client = client
        self._progress = threading.Event()

    def wait_for(self, call: Call[threading.Event]) -> None:
        """Wait until a call is done."""
        while not call.done.is_set():
            self.start()
            self._progress.wait()
            self._progress.clear()

    def start(self) -> None:
        """Start as many workers as there is room and work for.

        Raises:
            APIConnectionError: The system has no thread left.
        """
        workers = self._queue.add_workers()
        if workers and self._queue.max_workers == 1:
            self._work()
            return
        try:
            for _ in range(workers):
                # Daemons, so that Ctrl-C ends the process at once; each in a copy of the context, so that traces nest.
                threading.Thread(
                    target=copy_context().run, args=(self._work,), daemon=True, name="regolo_rerank"
                ).start()
        except RuntimeError as error:
            raise APIConnectionError(f"no thread for a request: {error}; lower max_concurrency") from error

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            try:
                self._rank(job)
            except BaseException as error:  # noqa: BLE001 - raised in the caller's thread
                job.call.fail(error)
            self._progress.set()

    def _rank(self, job: Job[threading.Event]) -> None:
        flow = rank_batch(job, self._queue)
        try:
            step = next(flow)
            while True:
                try:
                    reply = self._perform(step, job.call)
                except Exception as error:  # noqa: BLE001 - the flow knows what it means
                    step = flow.throw(error)
                else:
                    step = flow.send(reply)
        except StopIteration:
            return

    def _perform(self, step: httpx.Request | Sleep, call: Call[threading.Event]) -> Reply | None:
        if isinstance(step, Sleep):
            call.done.wait(step.seconds)
            return None
        timeout = call.config.timeout
        deadline = None if timeout is None else time.monotonic() + timeout
        response = self._client.send(step, **call.config.send_options)
        try:
            body = ReplyBody(response, deadline)
            if not body.is_complete:
                for chunk in response.iter_raw():
                    body.add(chunk)
        finally:
            response.close()
        return Reply(response, body.content)
