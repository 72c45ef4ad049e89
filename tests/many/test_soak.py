"""Many calls on one client against a server that fails a fifth of them: `python -m pytest --no-cov -s -m long`."""

import asyncio
import gc
import itertools
import logging
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from regolo_rerank import RegoloClient, RegoloError
from tests.support.inside import loops_of
from tests.support.stub import pairs

pytestmark = [pytest.mark.long, pytest.mark.timeout(1_200)]

MEBIBYTE = 2**20


@pytest.fixture
def url() -> Iterator[str]:
    """Run the server in a process of its own."""
    command = [sys.executable, "-m", "tests.support.soak_server"]
    root = Path(__file__).parents[2]
    with subprocess.Popen(  # noqa: S603 - our own interpreter
        command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}"
        assert process.stdin is not None
        process.stdin.close()


@pytest.fixture(autouse=True)
def _no_log(caplog: pytest.LogCaptureFixture) -> None:
    """Keep pytest from collecting thousands of warnings of retries, which would look like a leak."""
    caplog.set_level(logging.ERROR, "regolo_rerank")


class Tally:
    """Counts outcomes, and the memory at each quarter of the calls."""

    def __init__(self, calls: int) -> None:
        self.outcomes: Counter[str] = Counter()
        self.memory: list[float] = []
        self._calls = calls
        self._numbers = itertools.count()

    def next_call(self) -> int | None:
        """Return the next call's number; None when all are made."""
        number = next(self._numbers)
        if number < self._calls and number % (self._calls // 4) == self._calls // 4 - 1:
            gc.collect()
            self.memory.append(int(Path("/proc/self/statm").read_text().split()[1]) * 4_096 / MEBIBYTE)
        return number if number < self._calls else None

    def count(self, number: int, rank: Callable[[], list[tuple[int, float]]]) -> None:
        """Count one call's outcome, which must be its own ranking or an error of ours."""
        try:
            ranking = rank()
        except RegoloError as error:
            self.outcomes[type(error).__name__] += 1
        else:
            assert ranking == expected(number)
            self.outcomes["right"] += 1

    def report(self, started: float, calls: int) -> None:
        """Print the figures, and check that nothing was lost and memory is flat."""
        seconds = time.monotonic() - started
        memory = ", ".join(f"{quarter:.1f}" for quarter in self.memory)
        print(f"\n{calls} calls in {seconds:.0f} s, {calls / seconds:.0f} a second: {dict(self.outcomes)}")  # noqa: T201
        print(f"memory at each quarter, MiB: {memory}; open files: {open_files()}")  # noqa: T201
        assert sum(self.outcomes.values()) == calls
        assert self.outcomes["right"] > 0.99 * calls
        assert self.memory[-1] - self.memory[0] < 8


def texts(number: int) -> list[str]:
    """Return one to three documents that no other call has."""
    return [f"call {number} document {index} score={number + index / 4}" for index in range(number % 3 + 1)]


def expected(number: int) -> list[tuple[int, float]]:
    """Return the right ranking of a call's documents."""
    return [(index, number + index / 4) for index in reversed(range(number % 3 + 1))]


def ranked(client: RegoloClient, number: int) -> list[tuple[int, float]]:
    """Make one sync call."""
    return pairs(client.rerank("q", texts(number)).results)


def open_files() -> int:
    """Count this process's open files, sockets included."""
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - the count alone


def test_20000_async_calls_lose_nothing(url: str) -> None:
    """64 tasks make 20,000 calls: each ranking is its own, and all that was opened is closed again."""
    calls = 20_000
    tally = Tally(calls)

    async def work(client: RegoloClient) -> None:
        while (number := tally.next_call()) is not None:
            try:
                response = await client.arerank("q", texts(number))
            except RegoloError as error:
                tally.outcomes[type(error).__name__] += 1
            else:
                assert pairs(response.results) == expected(number)
                tally.outcomes["right"] += 1

    async def main(client: RegoloClient) -> None:
        async with asyncio.TaskGroup() as tasks:
            for _ in range(64):
                tasks.create_task(work(client))
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert len(loops_of(client)) == 1

    files, threads, started = open_files(), threading.active_count(), time.monotonic()
    client = RegoloClient(base_url=url, max_retries=6)
    asyncio.run(main(client))
    tally.report(started, calls)
    assert not loops_of(client)
    assert (open_files(), threading.active_count()) == (files, threads)


def test_4000_calls_in_32_threads_lose_nothing(url: str) -> None:
    """32 threads make 4,000 calls: each ranking is its own, and all that was opened is closed again."""
    calls = 4_000
    tally = Tally(calls)
    files, started = open_files(), time.monotonic()

    def work(client: RegoloClient) -> None:
        while (number := tally.next_call()) is not None:
            tally.count(number, partial(ranked, client, number))

    with RegoloClient(base_url=url, max_retries=6) as client:
        threads = [threading.Thread(target=work, args=(client,)) for _ in range(32)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    tally.report(started, calls)
    assert open_files() == files
