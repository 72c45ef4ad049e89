import asyncio
import itertools
import signal
import subprocess
import time
from contextlib import suppress
from typing import Any

import pytest

from regolo_rerank import RegoloClient
from tests.conftest import KEY
from tests.support.inside import workers
from tests.support.many import Endless, Many, slowly, smalls
from tests.support.observed import asoon, soon
from tests.support.processes import own_process
from tests.support.stub import Reply, Stub


@pytest.mark.parametrize("max_concurrency", [1, 2])
def test_an_interrupt_in_the_loop_sends_nothing_more(client: RegoloClient, stub: Stub, max_concurrency: int) -> None:
    """KeyboardInterrupt in the consumer's own code ends what is under way."""
    stub.reply = slowly(0.02)

    def consume() -> None:
        for _ in client.rerank_many(iter(Endless()), max_concurrency=max_concurrency):
            raise KeyboardInterrupt

    with suppress(KeyboardInterrupt):
        consume()
    sent = len(stub.received)
    assert soon(lambda: not workers())
    time.sleep(0.05)
    assert len(stub.received) <= sent + max_concurrency


@pytest.mark.parametrize("max_concurrency", [1, 2])
def test_an_interrupt_in_a_scorer_is_the_callers(max_concurrency: int) -> None:
    """KeyboardInterrupt in the caller's scorer comes out in its place, also where errors are returned."""

    def scorer(query: str, documents: list[str]) -> list[float]:
        if query == "query 3":
            raise KeyboardInterrupt
        return [0.0] * len(documents)

    got: list[Any] = []
    client = RegoloClient(base_url="local://", scorer=scorer)
    with pytest.raises(KeyboardInterrupt):
        Many("sync")(client, smalls(9), into=got, return_exceptions=True, max_concurrency=max_concurrency)
    assert len(got) == 3


INTERRUPTED = """
import asyncio, itertools, sys
from regolo_rerank import RegoloClient
client = RegoloClient("k", base_url=sys.argv[1], max_concurrency=int(sys.argv[3]))
pairs = ((str(index), ["a", "b"]) for index in itertools.count())
async def consume():
    async for response in client.arerank_many(pairs):
        pass
if sys.argv[2] == "sync":
    for response in client.rerank_many(pairs):
        pass
else:
    asyncio.run(consume())
"""


@pytest.mark.parametrize(("way", "max_concurrency"), [("sync", "1"), ("sync", "3"), ("async", "3")])
def test_ctrl_c_ends_the_process_at_once(stub: Stub, way: str, max_concurrency: str) -> None:
    """Ctrl-C ends the process at once, whatever is in flight, with nothing but KeyboardInterrupt."""
    stub.reply = slowly(9)
    stub.script(*[Reply({}, 503, {"retry-after-ms": "1"})] * 3)
    process = own_process(INTERRUPTED, stub.url, way, max_concurrency, stderr=subprocess.PIPE)
    assert soon(lambda: len(stub.received) > 3)
    process.send_signal(signal.SIGINT)
    started = time.monotonic()
    _, errors = process.communicate(timeout=10)
    assert time.monotonic() - started < 3
    assert process.returncode == -signal.SIGINT
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert "never retrieved" not in errors


@pytest.mark.parametrize("max_concurrency", [1, 3])
@pytest.mark.parametrize("source", ["async", "async source"])
def test_a_consumer_can_be_cancelled_at_any_point(stub: Stub, source: str, max_concurrency: int) -> None:
    """Wherever the consuming task is cancelled, it ends as cancelled and leaves no task that could send."""
    stub.reply = slowly(0.001)

    async def cancelled(client: RegoloClient, turns: int) -> None:
        endless = Endless()
        consumer = asyncio.create_task(
            Many(source).consumed(client, iter(endless), endless.got, max_concurrency=max_concurrency)
        )
        for _ in range(turns):
            await asyncio.sleep(0)
        consumer.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(consumer, 5)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    async def run() -> None:
        for turns in [*range(25), *range(30, 200, 25)]:
            await cancelled(RegoloClient(KEY, base_url=stub.url), turns)

    asyncio.run(run())


@pytest.mark.parametrize("source", ["async", "async source"])
def test_a_task_that_somebody_else_cancels_hangs_nobody(stub: Stub, source: str) -> None:
    """Whichever task of ours a host cancels, the consumer ends as cancelled, and leaves no task."""
    stub.reply = slowly(0.05)

    async def run() -> None:
        for number in itertools.count():
            endless = Endless()
            before = asyncio.all_tasks()
            consumer = asyncio.create_task(
                Many(source).consumed(
                    RegoloClient(KEY, base_url=stub.url, max_concurrency=3), iter(endless), endless.got
                )
            )
            assert await asoon(lambda: len(endless.got) >= 2)  # noqa: B023 - awaited before the next turn
            ours = sorted(asyncio.all_tasks() - before - {consumer}, key=lambda task: task.get_name())
            if number >= len(ours):
                consumer.cancel()
                await asyncio.gather(consumer, return_exceptions=True)
                break
            ours[number].cancel()
            with pytest.raises(asyncio.CancelledError):
                await asyncio.wait_for(consumer, 5)
            assert asyncio.all_tasks() == before
        assert number >= 3

    asyncio.run(run())
