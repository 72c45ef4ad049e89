import json
import os
import signal
import subprocess
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from regolo_rerank import RegoloClient
from regolo_rerank._cli import bulk
from tests.support.bulk import Files, query

MEBIBYTE = 2**20


@pytest.mark.parametrize(("count", "length", "allowed"), [(400, 2**15, 5), (140, 2**18, 16)], ids=["short", "long"])
def test_memory_does_not_grow_with_the_input(count: int, length: int, allowed: int, files: Files) -> None:
    """A run needs at its end what it needed at a quarter, and never more than the queries under way (in MiB)."""
    texts = ["x" * length, {"id": "d", "text": "y" * length}]
    bad: list[dict[str, Any]] = [{"query": 7}, {"id": None}, {}, {}, {}]
    files.write(*(query(number) | {"documents": texts} | bad[number % 5] for number in range(count)))
    client = RegoloClient(base_url="local://", scorer=lambda _, documents: [0.5] * len(documents), max_concurrency=2)
    held: list[int] = []

    def advance(_count: int = 1, _note: str = "", /) -> None:
        held.append(tracemalloc.get_traced_memory()[0])

    def peak() -> int:
        with files.given.open("rb") as source:
            tracemalloc.start()
            try:
                with bulk.resume(client, source, "IN", files.out) as run:
                    run.rank(client, advance)
                return tracemalloc.get_traced_memory()[1]
            finally:
                tracemalloc.stop()

    assert peak() < allowed * MEBIBYTE  # all of it
    assert peak() < allowed * MEBIBYTE  # finding that nothing is left
    assert len(held) == count
    quarters = [max(held[part : part + count // 4]) for part in range(0, count, count // 4)]
    assert quarters[-1] < quarters[0] + allowed / 2 * MEBIBYTE
    assert files.given.stat().st_size > 4 * allowed * MEBIBYTE


@pytest.mark.long
@pytest.mark.timeout(3_600)
def test_a_million_lines_in_constant_memory(files: Files) -> None:
    """A process that ranks a million queries, killed once on its way, is no larger at the end than at a quarter."""
    million = 1_000_000
    with files.given.open("wb") as given:
        for number in range(million):
            given.write(json.dumps(query(number)).encode() + b"\n")
    started = time.monotonic()
    command = files.command("--local", "--top-n", "1", "--max-concurrency", "1")
    sizes = watched(command, lambda: content_size(files.out) < 30 * million)
    print(f"\nkilled after {time.monotonic() - started:.0f} s, with {content_size(files.out):,} bytes of OUT")  # noqa: T201
    sizes += watched(command, lambda: True)
    quarter, end = max(sizes[: len(sizes) // 4]), max(sizes[-len(sizes) // 4 :])
    size = content_size(files.given) / MEBIBYTE
    print(f"IN of {size:.0f} MiB, {time.monotonic() - started:.0f} s")  # noqa: T201
    print(f"memory at a quarter {quarter:.1f} MiB, at the end {end:.1f} MiB")  # noqa: T201
    with files.out.open("rb") as out:
        assert sum(json.loads(line)["id"] == f"id-{number}" for number, line in enumerate(out)) == million
        assert out.tell() == content_size(files.out)
    assert end < quarter + 4


def watched(command: list[str], goes_on: Callable[[], bool]) -> list[float]:
    """Run a process, to its end or until it is killed; return the mebibytes that it had in memory meanwhile."""
    sizes = []
    with subprocess.Popen(command) as process:  # noqa: S603 - our own command
        while process.poll() is None and goes_on():
            sizes.append(resident(process.pid))
            time.sleep(0.2)
        process.kill()
    assert process.returncode in {0, -signal.SIGKILL}
    return sizes


def content_size(file: Path) -> int:
    """Return the bytes of a file that may not be there."""
    return file.stat().st_size if file.exists() else 0


def resident(pid: int) -> float:
    """Return the mebibytes that a process has in memory."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / MEBIBYTE
