import fcntl
import resource
import signal
import subprocess
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.bulk import COUNT, Files, content, failing, number_of, numbers, query, ranking, read
from tests.support.stub import Received, Reply, Stub, error, scored

if TYPE_CHECKING:
    from pathlib import Path


def test_a_run_that_was_stopped_at_any_byte_ends_the_same(files: Files) -> None:
    """Cut off after any byte that it writes, a run goes on to the same files, and takes no whole line back."""
    files.write(query(0), b"nonsense", {**query(1), "query": " "}, query(2), {"id": 3}, {**query(4), "documents": []})
    assert files.run("--local") == 1
    whole = files.contents()
    written: list[tuple[Path, bytes]] = []
    lines = {files.out: iter(whole[0].splitlines(True)), files.errors: iter(whole[1].splitlines(True))}  # noqa: FBT003 - the builtin's only argument
    for file in (files.out, files.errors, files.errors, files.out, files.errors, files.out):
        written += [(file, bytes([byte])) for byte in next(lines[file])]
    for stop in range(0, len(written), 7):
        for file in lines:
            file.unlink(missing_ok=True)
            if kept := b"".join(byte for at, byte in written[:stop] if at == file):
                file.write_bytes(kept)
        assert files.run("--local") == 1
        assert files.contents() == whole


@pytest.mark.parametrize(
    ("sent", "status"), [(signal.SIGKILL, -9), (signal.SIGTERM, -15), (signal.SIGINT, 130)], ids=["kill", "term", "int"]
)
def test_a_process_that_is_killed_goes_on_where_it_was(
    sent: signal.Signals, status: int, at_stub: Stub, files: Files
) -> None:
    """Every line that was written stays as it is, no finished query is sent again, and the end is the same."""
    finish, answer = threading.Event(), failing(lambda number: number in {3, 17}, error("too long", 400))

    def waiting(request: Received) -> Reply:
        if (number_of(request) or 0) >= 12:
            finish.wait(20)
        return answer(request)

    at_stub.reply = waiting
    with subprocess.Popen(files.command(), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:  # noqa: S603 - our own command
        while content(files.out).count(b"\n") < 8:
            assert process.poll() is None
            time.sleep(0.002)
        process.send_signal(sent)
        printed = process.communicate()
        finish.set()
    assert process.returncode == status
    assert (printed[0], printed[1].count(b"\n")) == (b"", int(status > 0))
    finished = files.contents()
    count = sum(part.count(b"\n") for part in finished)
    assert 9 <= count <= 12
    # Another server: what was half sent may still arrive at the first.
    with Stub(answer) as another:
        assert files.run("--base-url", another.url) == 1
        assert numbers(another) == list(range(count, COUNT))
    assert read(files.out) == [ranking(number) for number in range(COUNT) if number not in {3, 17}]
    assert [line["line"] for line in read(files.errors)] == [4, 18]
    assert all(now.startswith(before) for now, before in zip(files.contents(), finished, strict=True))


@pytest.mark.parametrize("room", [1_000, -5], ids=["middle", "last line"])
def test_a_full_disk_stops_the_run(room: int, files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    """It is told in one line with status 1, and the half line is no obstacle to the next run."""
    assert files.run("--local") == 0
    whole = files.out.read_bytes()
    files.out.unlink()
    capsys.readouterr()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room % len(whole), limits[1]))
    try:
        assert files.run("--local") == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (
        f"regolo-rerank: {files.out}: File too large; run again, it goes on where it was\n" in capsys.readouterr().err
    )
    assert files.out.read_bytes() == whole[:room]
    assert files.run("--local") == 0
    assert files.out.read_bytes() == whole


def test_lines_that_were_added_to_the_input_are_ranked_by_another_run(at_stub: Stub, files: Files) -> None:
    """An input may grow at its end, and only what is new is sent."""
    files.write(*map(query, range(5)))
    assert files.run() == 0
    files.write(*map(query, range(COUNT)))
    assert files.run() == 0
    assert len(at_stub.received) == COUNT
    assert read(files.out) == [ranking(number) for number in range(COUNT)]


@pytest.mark.parametrize(("bad", "status"), [([], 0), ([b"nonsense"], 1)])
def test_nothing_left_to_do(
    bad: list[bytes], status: int, at_stub: Stub, files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    """A finished run changes and sends nothing when it is run again; failures of before still show in the status."""
    files.write(*map(query, range(5)), *bad)
    assert files.run() == status
    finished = files.contents()
    at_stub.received.clear()
    capsys.readouterr()
    assert files.run() == status
    assert (files.contents(), at_stub.received) == (finished, [])
    assert f", {5 + status} finished before; " in capsys.readouterr().err


def changed(number: int, **fields: Any) -> list[Any]:
    """Return IN with another line in one place."""
    return [query(n) | (fields if n == number else {}) for n in range(COUNT)]


@pytest.mark.parametrize(
    ("lines", "out", "errors", "said"),
    [
        (changed(2, id="id-3"), None, None, "rankings.jsonl, line 2: does not belong to"),
        (changed(4, id="other"), None, None, "rankings.jsonl.errors, line 2: does not belong to"),
        (changed(5, documents=["a", {"id": "d6", "text": "b"}]), None, None, "rankings.jsonl, line 4: does not"),
        (changed(5, documents=["a"]), None, None, "rankings.jsonl, line 4: does not belong to"),
        (changed(2)[:9], None, None, "rankings.jsonl, line 8: does not belong to"),
        (changed(2)[:4], None, None, "rankings.jsonl, line 4: does not belong to"),
        ([b"nonsense", *changed(2)[1:]], None, None, "rankings.jsonl, line 1: does not belong to"),
        (None, b"", None, "rankings.jsonl.errors, line 1: does not belong to"),
        (None, None, b"", "rankings.jsonl, line 2: does not belong to"),
        (None, b'{"id": "id-0", "results": []}\n{"id": "id-1"}\n', b"", "rankings.jsonl, line 2: does not belong to"),
        (None, b"notes\n", None, "rankings.jsonl, line 1: not written by this command"),
        (None, b"notes without end", b"", "rankings.jsonl, line 1: not written by this command"),
        (None, b"[]", b"", "rankings.jsonl, line 1: not written by this command"),
        (None, b"[1]\n", b"", "rankings.jsonl, line 1: not written by this command"),
        (None, None, b'{"id": 1', "rankings.jsonl.errors, line 1: not written by this command"),
        (None, b'{"id": "id-0", "query": "q"}', b"", "rankings.jsonl, line 1: not written by this command"),
        (None, None, b'{"line": 3, "text": "notes"}', "rankings.jsonl.errors, line 1: not written by this command"),
    ],
)
def test_the_output_of_another_input_is_refused(
    lines: list[Any] | None,
    out: bytes | None,
    errors: bytes | None,
    said: str,
    at_stub: Stub,
    files: Files,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Status 2 in one line, nothing is sent, and no file is touched."""
    files.write(*[line if n not in {1, 4} else {**line, "query": " "} for n, line in enumerate(changed(-1))])
    assert files.run() == 1
    at_stub.received.clear()
    capsys.readouterr()
    if lines is not None:
        files.write(*lines)
    for file, replaced in ((files.out, out), (files.errors, errors)):
        if replaced is not None:
            file.write_bytes(replaced)
    before = (files.contents(), files.out.stat().st_mtime_ns, files.errors.stat().st_mtime_ns)
    assert files.run() == 2
    assert (files.contents(), files.out.stat().st_mtime_ns, files.errors.stat().st_mtime_ns) == before
    assert at_stub.received == []
    printed = capsys.readouterr()
    assert printed.out == ""
    assert said in printed.err
    assert printed.err.count("\n") == 1


def test_two_runs_at_once_are_refused(at_stub: Stub, files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    """While one run writes OUT, another one ends with status 2, and the first is not disturbed."""
    statuses: list[int] = []

    def answer(request: Received) -> Reply:
        if number_of(request) == 9:
            statuses.append(files.run())
        return scored(request)

    at_stub.reply = answer
    assert files.run() == 0
    assert statuses == [2]
    assert f"{files.out}: another run is writing it\n" in capsys.readouterr().err
    assert read(files.out) == [ranking(number) for number in range(COUNT)]


def test_a_lock_of_before_is_gone(files: Files) -> None:
    """Whatever ended the run that wrote OUT, its lock ended too."""
    assert files.run("--local") == 0
    with files.out.open("ab") as opened:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
