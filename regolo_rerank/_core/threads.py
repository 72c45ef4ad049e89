"""Sync calls: does what a batch's flow says, in the caller's thread or in several, and waits for calls."""

import threading
import time
from collections import deque
from collections.abc import Generator, Iterator
from contextvars import copy_context
from typing import Any

import httpx

from regolo_rerank._core.call import Call
from regolo_rerank._core.queue import Job, WorkQueue
from regolo_rerank._core.request import rank_batch
from regolo_rerank._transports.spread import DONE_EXTENSION, Done
from regolo_rerank._wire.body import CONSUMED, RawReply

__all__ = ["finish", "finish_in_order"]


def finish(call: Call[Done], client: httpx.Client) -> None:
    """Send all batches of one call: in the caller's thread where one worker is enough, else in several."""
    threads = _Threads(min(call.config.options.max_concurrency, len(call.batches)), client)
    threads.queue.put(call)
    threads.start()
    call.done.wait()


def finish_in_order(calls: Iterator[Call[Done]], max_workers: int, client: httpx.Client) -> Generator[Call[Done]]:
    """Give calls in their order, each when it is done; what reading them has raised comes after those read before."""
    threads = _Threads(max_workers, client)
    pending: deque[Call[Done]] = deque()
    try:
        for call in calls:
            pending.append(call)
            threads.queue.put(call)
            threads.start()
            while not _wants_more(pending, threads.queue.read_ahead):
                yield _finish_first(pending)
    except Exception:
        while pending:
            yield _finish_first(pending)
        raise
    else:
        while pending:
            yield _finish_first(pending)
    finally:
        for call in pending:
            call.close()


def _wants_more(pending: deque[Call[Done]], read_ahead: int) -> bool:
    # Enough calls keep every worker busy; but nobody waits for a slow source while the next ranking is there.
    return len(pending) < read_ahead and not (0 < len(pending) <= read_ahead // 2 and pending[0].done.is_set())


def _finish_first(pending: deque[Call[Done]]) -> Call[Done]:
    pending[0].done.wait()
    return pending.popleft()


class _Threads:
    """The threads that send a queue's batches; the caller's own where there may be only one, or no other starts."""

    def __init__(self, max_workers: int, client: httpx.Client) -> None:
        self.queue: WorkQueue[Done] = WorkQueue(max_workers)
        self._client = client

    def start(self) -> None:
        """Start as many workers as there is room and work for."""
        for _ in range(self.queue.add_workers()):
            if self.queue.max_workers == 1:
                self._work()
                return
            # A daemon, so that Ctrl-C ends the process at once; in a copy of the context, so that traces nest.
            thread = threading.Thread(target=copy_context().run, args=(self._work,), daemon=True, name="regolo_rerank")
            try:
                thread.start()
            except (RuntimeError, MemoryError):  # the system has none left, or no memory for one
                self._work()

    def _work(self) -> None:
        while (job := self.queue.get()) is not None:
            try:
                self._rank(job)
            except BaseException as error:
                if job.call.done.is_set() and not isinstance(error, Exception):
                    self.queue.leave()
                    raise  # an interrupt of which the call would not tell any more
                job.call.fail(error)
            if self.queue.max_workers > 1:
                self.start()  # there may be room for one more

    def _rank(self, job: Job[Done]) -> None:
        flow = rank_batch(job, self.queue)
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

    def _perform(self, step: httpx.Request | float, call: Call[Done]) -> RawReply | None:
        if isinstance(step, float):
            call.done.wait(step)
            return None
        deadline = None
        if (timeout := call.config.timeout) is not None:
            deadline = time.monotonic() + timeout
            step.extensions["timeout"] = dict.fromkeys(("connect", "read", "write", "pool"), timeout)
        step.extensions[DONE_EXTENSION] = call.done
        response = self._client.send(step, **call.config.send_options)
        stream: Any = response.stream  # what `iter_raw` gives, whose own frames take 2 % of a call
        try:
            reply = RawReply(response, deadline)
            if not reply.is_complete:
                for chunk in stream:
                    reply.add(chunk)
        finally:
            response.close()
            response.stream = CONSUMED
        return reply
