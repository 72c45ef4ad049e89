"""Async calls: does what a batch's flow says, in tasks of the running event loop, and waits for calls."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from typing import Any, Self

import httpx

from regolo_rerank._core.call import Call
from regolo_rerank._core.queue import Job, WorkQueue
from regolo_rerank._core.request import rank_batch
from regolo_rerank._wire.body import CONSUMED, RawReply

__all__ = ["FinishInOrder", "finish"]


async def finish(call: Call[asyncio.Event], client: httpx.AsyncClient) -> None:
    """Send all batches of one call: in the caller's task where one worker is enough, else in several."""
    tasks = _Tasks(min(call.config.options.max_concurrency, len(call.batches)), client)
    tasks.queue.put(call)
    try:
        await tasks.wait_for(call)
    finally:
        await tasks.stop()


class _Tasks:
    """The tasks that send a queue's batches; the caller's own where there may be only one."""

    def __init__(self, max_workers: int, client: httpx.AsyncClient) -> None:
        self.queue: WorkQueue[asyncio.Event] = WorkQueue(max_workers)
        self._client = client
        self._progress = asyncio.Event()
        self._workers: set[asyncio.Task[None]] = set()

    async def wait_for(self, call: Call[asyncio.Event]) -> None:
        """Wait until a call is done."""
        if self.queue.max_workers == 1 and self.queue.add_workers():
            await self._work()
        while not call.done.is_set():
            self._start()
            await self._progress.wait()
            self._progress.clear()

    async def stop(self) -> None:
        """Cancel all workers, and wait for their end."""
        workers = list(self._workers)
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)

    def _start(self) -> None:
        """Start as many workers as there is room and work for."""
        for _ in range(self.queue.add_workers()):
            self._workers.add(worker := asyncio.create_task(self._work()))
            worker.add_done_callback(self._workers.discard)

    async def _work(self) -> None:
        while (job := self.queue.get()) is not None:
            try:
                await self._rank(job)
            except BaseException as error:
                job.call.fail(error)
                if not isinstance(error, Exception):  # somebody has cancelled this worker
                    self.queue.leave()
                    error.__traceback__ = None  # whose frames, some of anyio's, hold the task that holds the error
                    raise
            finally:
                self._progress.set()

    async def _rank(self, job: Job[asyncio.Event]) -> None:
        flow = rank_batch(job, self.queue)
        try:
            step = next(flow)
            while True:
                try:
                    reply = await self._perform(step, job.call)
                except Exception as error:  # noqa: BLE001 - the flow knows what it means
                    step = flow.throw(error)
                else:
                    step = flow.send(reply)
        except StopIteration:
            return

    async def _perform(self, step: httpx.Request | float, call: Call[asyncio.Event]) -> RawReply | None:
        if isinstance(step, float):
            with suppress(TimeoutError):
                async with asyncio.timeout(step):
                    await call.done.wait()
            return None
        async with asyncio.timeout(call.config.timeout):
            response = await self._client.send(step, **call.config.send_options)
            stream: Any = response.stream  # what `aiter_raw` gives, whose own frames take 2 % of a call
            try:
                reply = RawReply(response, deadline=None)
                if not reply.is_complete:
                    async for chunk in stream:
                        reply.add(chunk)
            finally:
                await response.aclose()
                response.stream = CONSUMED
        return reply


class FinishInOrder(_Tasks):
    """Gives calls in their order, each when it is done; what reading them has raised comes after those read before.

    One task reads the calls, so that a slow source holds back no ranking. This is no async generator: when the loop
    shuts down, asyncio would close it at the same time as its consumer.
    """

    def __init__(self, calls: AsyncGenerator[Call[asyncio.Event]], max_workers: int, client: httpx.AsyncClient) -> None:
        super().__init__(max_workers, client)
        self._calls = calls
        self._pending: deque[Call[asyncio.Event]] = deque()
        self._room = asyncio.Semaphore(self.queue.read_ahead)
        self._reader = asyncio.create_task(self._read())
        self._reader.add_done_callback(lambda _: self._progress.set())

    async def _read(self) -> None:
        async with aclosing(self._calls) as calls:
            await self._room.acquire()
            async for call in calls:
                self._pending.append(call)
                self.queue.put(call)
                self._start()
                self._progress.set()
                await self._room.acquire()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Call[asyncio.Event]:
        while not self._pending:
            if self._reader.done():
                self._reader.result()
                raise StopAsyncIteration
            await self._progress.wait()
            self._progress.clear()
        await self.wait_for(self._pending[0])
        self._room.release()
        return self._pending.popleft()

    async def aclose(self) -> None:
        """Give up what is under way."""
        for call in self._pending:
            call.close()
        self._reader.cancel()
        await self.stop()
        await asyncio.gather(self._reader, return_exceptions=True)
