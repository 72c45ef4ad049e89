import fcntl
import resource
import signal
import subprocess
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from tests.conftest import KEY
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
    lines = {file: iter(content(file).splitlines(keepends=True)) for file in (files.out, files.errors, files.state)}
    written += [(files.state, bytes([byte])) for byte in next(lines[files.state])]
    for file in (files.out, files.errors, files.errors, files.out, files.errors, files.out):
        written += [(each, bytes([byte])) for each in (files.state, file) for byte in next(lines[each])]
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
    assert printed[0] == b""
    assert (b"interrupted; run the same command again, it goes on where it was\n" in printed[1]) == (status > 0)
    finished = files.contents()
    count = sum(part.count(b"\n") for part in finished)
    assert 9 <= count <= 12
    # Another server: what was half sent may still arrive at the first.
    with Stub(answer) as another:
        assert files.run("--base-url", another.url, "--allow-changed-options") == 1
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


BLANKED = [query(number) | ({"query": " "} if number in {1, 4} else {}) for number in range(COUNT)]
"""An IN of which the second line and the fifth fail."""


def changed(number: int, **fields: Any) -> list[Any]:
    """Return it with another line in one place."""
    return [line | (fields if n == number else {}) for n, line in enumerate(BLANKED)]


OTHER = "is not what stood there before; name another OUT, or remove "
UNKNOWN = "so nobody knows what was ranked; name another OUT, or remove what stands there"
FOREIGN = "not written by this command; name another OUT"


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (changed(2, id="id-3"), f"queries.jsonl, line 3: {OTHER}"),
        (changed(2, query="q3"), f"queries.jsonl, line 3: {OTHER}"),
        (changed(4, id="other"), f"queries.jsonl, line 5: {OTHER}"),
        (changed(5, documents=["a", {"id": "d5", "text": "b"}]), f"queries.jsonl, line 6: {OTHER}"),
        ([b"nonsense", *BLANKED[1:]], f"queries.jsonl, line 1: {OTHER}"),
        ([BLANKED[0], b"", *BLANKED[1:]], f"queries.jsonl, line 3: {OTHER}"),
        (BLANKED[:9], "queries.jsonl: ends before what is finished; name another OUT, or remove "),
        ([], "queries.jsonl: ends before what is finished; name another OUT, or remove "),
    ],
    ids=["id", "query", "failed", "documents", "nonsense", "blank", "shorter", "empty"],
)
def test_another_input_is_refused(
    lines: list[Any], said: str, at_stub: Stub, files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where a finished line is another one now, all is refused as it is; and with OUT removed, all is ranked anew."""
    files.write(*BLANKED)
    assert files.run() == 1
    files.write(*lines)
    refuse(files, said, at_stub, capsys)
    files.out.unlink()
    files.run()
    ranked = [line["id"] for line in lines if isinstance(line, dict) and line["query"] != " "]
    assert [line["id"] for line in read(files.out)] == ranked


@pytest.mark.parametrize(
    ("replaced", "said"),
    [
        ({"state": b""}, f"rankings.jsonl, line 1: not in {{state}}, {UNKNOWN}"),
        ({"state": b"", "out": b'{"id": 1, "query": "q"}'}, f"rankings.jsonl, line 1: not in {{state}}, {UNKNOWN}"),
        ({"state": b"", "out": b""}, f"rankings.jsonl.errors, line 1: not in {{state}}, {UNKNOWN}"),
        ({"state": 10}, f"rankings.jsonl, line 8: not in {{state}}, {UNKNOWN}"),
        ({"state": 5}, f"rankings.jsonl, line 4: not in {{state}}, {UNKNOWN}"),
        ({"state": b"notes"}, f"rankings.jsonl.state, line 1: {FOREIGN}"),
        ({"state": b'{"options": 7}\n'}, f"rankings.jsonl.state, line 1: {FOREIGN}"),
        ({"state": b'{"options": {}\n'}, f"rankings.jsonl.state, line 1: {FOREIGN}"),
        ({"state": b"+\n"}, f"rankings.jsonl, line 2: not in {{state}}, {UNKNOWN}"),
        ({"out": b"notes\n"}, f"rankings.jsonl, line 1: {FOREIGN}"),
        ({"out": b"notes without end"}, f"rankings.jsonl, line 1: {FOREIGN}"),
        ({"out": b"[]"}, f"rankings.jsonl, line 1: {FOREIGN}"),
        ({"errors": b'{"id": 1'}, f"rankings.jsonl.errors, line 1: {FOREIGN}"),
        ({"errors": b'{"line": 2}\n{"line": 5}\n{"line": 7}\n'}, "rankings.jsonl.errors, line 3: not in {state}, "),
        ({"errors": b'{"line": 2}\n{"line": 5}\n{"l'}, "rankings.jsonl.errors, line 3: not in {state}, "),
    ],
)
def test_files_that_do_not_fit_together_are_refused(
    replaced: dict[str, bytes | int], said: str, at_stub: Stub, files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    """What OUT.state does not know stays as it is, and so does what this command has not written."""
    files.write(*BLANKED)
    assert files.run() == 1
    for name, value in replaced.items():
        file: Path = getattr(files, name)
        lines = file.read_bytes().splitlines(keepends=True)
        file.write_bytes(b"".join(lines[:value]) if isinstance(value, int) else value)
    refuse(files, said.format(state=files.state), at_stub, capsys)


def refuse(files: Files, said: str, stub: Stub, capsys: pytest.CaptureFixture[str], *options: str) -> None:
    """See status 2 in one line, nothing sent, and no file touched."""
    stub.received.clear()
    capsys.readouterr()
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files.given.parent.iterdir()}
    assert files.run(*options) == 2
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files.given.parent.iterdir()} == before
    assert stub.received == []
    printed = capsys.readouterr()
    assert printed.out == ""
    assert said in printed.err
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["--model", "other"], 'model was "Qwen3-Reranker-4B", and is "other" now'),
        (["--top-n", "1"], "top_n was null, and is 1 now"),
        (["--threshold", "0.0"], "score_threshold was null, and is 0.0 now"),
        (["--instruction", "Be strict"], 'query", and is "Be strict" now'),
        (["--local"], '/rerank", and is "local://embedded/rerank" now'),
        (["--top-n", "1", "--model", "other"], 'and is "other" now; top_n was null, and is 1 now'),
    ],
)
def test_other_options_are_refused(
    changes: list[str], said: str, at_stub: Stub, files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    """OUT mixes no models, instructions or limits by accident; who wants that says so, and says it once."""
    files.write(*BLANKED[:6])
    assert files.run() == 1
    refuse(files, said, at_stub, capsys, *changes)
    files.write(*BLANKED)
    refuse(files, said, at_stub, capsys, *changes)
    before = files.contents()
    assert files.run(*changes, "--allow-changed-options") == 1
    assert all(now.startswith(then) for now, then in zip(files.contents(), before, strict=True))
    assert len(read(files.out)) == COUNT - 2
    assert files.run(*changes) == 1
    assert [line[:1] for line in files.state.read_text().splitlines()] == [*"{+-++-+{", *"+" * (COUNT - 6)]
    refuse(files, "now; name another OUT, take the same options, or mix them by", at_stub, capsys)


def test_what_does_not_change_a_ranking_may_change(at_stub: Stub, files: Files) -> None:
    """Another pace, or another way to write the same server, is no other option; and neither is it without OUT."""
    files.write(*BLANKED[:6])
    assert files.run() == 1
    files.write(*BLANKED)
    assert files.run("--max-concurrency", "2", "--base-url", f"{at_stub.url}/rerank/?key={KEY}") == 1
    assert len(at_stub.received) == COUNT - 2
    assert KEY not in files.state.read_text()
    files.out.unlink()
    assert files.run("--local") == 1
    assert files.state.read_text().count("options") == 1


def test_without_a_ranking_a_run_starts_anew(files: Files) -> None:
    """As long as OUT has no line, as where it was removed, failures of before bind nobody to their IN."""
    files.write({**query(0), "query": " "}, query(1))
    assert files.run("--local") == 1
    files.out.unlink()
    files.write({**query(2), "query": " "}, query(3))
    assert files.run("--local") == 1
    assert [line["id"] for line in read(files.out)] == ["id-3"]
    assert [line["input"]["id"] for line in read(files.errors)] == ["id-2"]


@pytest.mark.parametrize("lost", [0, 1, 20, -2, -1])
def test_the_end_of_errors_is_not_lost_for_good(lost: int, at_stub: Stub, files: Files) -> None:
    """Where OUT.errors alone lost its end, nothing is sent again, and the lines that had failed stand there again."""
    files.write(*BLANKED)
    assert files.run() == 1
    out, errors = files.contents()
    at_stub.received.clear()
    files.errors.write_bytes(errors[:lost])
    assert files.run() == 1
    assert (files.out.read_bytes(), at_stub.received) == (out, [])
    failures = read(files.errors)
    assert [(line["line"], line["input"]) for line in failures] == [(2, BLANKED[1]), (5, BLANKED[4])]
    assert failures[1]["error"]["message"] == "failed in an earlier run, and what was said then is lost"
    assert files.run() == 1
    assert read(files.errors) == failures


def test_the_end_of_rankings_is_ranked_again(at_stub: Stub, files: Files) -> None:
    """Where OUT alone lost its end, as in a power cut, what is missing there is sent again."""
    files.write(*BLANKED)
    assert files.run() == 1
    whole = files.contents()
    for kept in (1, 3, 10):
        at_stub.received.clear()
        files.out.write_bytes(b"".join(whole[0].splitlines(keepends=True)[:kept]) + b'{"id')
        assert files.run() == 1
        assert files.contents() == whole
        assert len(at_stub.received) == COUNT - 2 - kept


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
