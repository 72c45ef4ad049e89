"""Sync calls: does what a batch's flow says, in the caller's thread or in several, and waits for calls."""

import threading
import time
from collections import deque
from collections.abc import Generator, Iterator
from contextvars import copy_context

import httpx

from regolo_rerank._core.call import Call
from regolo_rerank._core.queue import Job, WorkQueue
from regolo_rerank._core.request import Reply, Sleep, rank_batch
from regolo_rerank._transports.spread import DONE_EXTENSION
from regolo_rerank._wire.body import READ, ReplyBody

__all__ = ["finish", "finish_in_order"]


def finish(call: Call[threading.Event], client: httpx.Client) -> None:
    """Send all batches of one call: in the caller's thread where it has one, else in several."""
    queue: WorkQueue[threading.Event] = WorkQueue(min(call.config.options.max_concurrency, len(call.plan.batches)))
    queue.put(call)
    _Threads(queue, client).wait_for(call)


def finish_in_order(
    calls: Iterator[Call[threading.Event] | Exception], max_workers: int, client: httpx.Client
) -> Generator[Call[threading.Event] | Exception]:
    """Give calls in their order, each when it is done; what could not become a call is passed through."""
    queue: WorkQueue[threading.Event] = WorkQueue(max_workers)
    threads = _Threads(queue, client)
    pending: deque[Call[threading.Event] | Exception] = deque()
    has_more = True
    try:
        while has_more or pending:
            while has_more and _wants_more(pending, queue.read_ahead):
                call = next(calls, None)
                if call is None:
                    has_more = False
                else:
                    pending.append(call)
                    if isinstance(call, Call):
                        queue.put(call)
                        threads.start()
            if pending:
                threads.wait_for(pending[0])
                yield pending.popleft()
    finally:
        for call in pending:
            if isinstance(call, Call):
                call.close()


def _wants_more(pending: deque[Call[threading.Event] | Exception], read_ahead: int) -> bool:
    # Enough calls keep every worker busy; but nobody waits for a slow source while the next ranking is there.
    return len(pending) < read_ahead and not (0 < len(pending) <= read_ahead // 2 and _is_done(pending[0]))


def _is_done(call: Call[threading.Event] | Exception) -> bool:
    return not isinstance(call, Call) or call.done.is_set()


class _Threads:
    """The threads that send a queue's batches; the caller's own where there may be only one, or no other starts."""

    def __init__(self, queue: WorkQueue[threading.Event], client: httpx.Client) -> None:
        self._queue = queue
        self._client = client
        self._progress = threading.Event()

    def wait_for(self, call: Call[threading.Event] | Exception) -> None:
        """Wait until a call is done."""
        while not _is_done(call):
            self.start()
            self._progress.wait()
            self._progress.clear()

    def start(self) -> None:
        """Start as many workers as there is room and work for."""
        for _ in range(self._queue.add_workers()):
            if self._queue.max_workers == 1 or not self._start_thread():
                self._work()

    def _start_thread(self) -> bool:
        # A daemon, so that Ctrl-C ends the process at once; in a copy of the context, so that traces nest.
        thread = threading.Thread(target=copy_context().run, args=(self._work,), daemon=True, name="regolo_rerank")
        try:
            thread.start()
        except RuntimeError:  # the system has none left
            return False
        return True

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            try:
                self._rank(job)
            except BaseException as error:
                if job.call.done.is_set() and not isinstance(error, Exception):
                    raise  # an interrupt of which the call would not tell any more
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
        step.extensions[DONE_EXTENSION] = call.done
        response = self._client.send(step, **call.config.send_options)
        try:
            body = ReplyBody(response, deadline)
            if not body.is_complete:
                for chunk in response.iter_raw():
                    body.add(chunk)
        finally:
            response.close()
            response.stream = READ
        return Reply(response.status_code, body.headers, body.content)
