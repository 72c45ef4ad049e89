import gzip
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.cli.conftest import Run, read_lines, write_lines
from tests.support.stub import Received, Reply, Stub, error, scored

COUNT = 12


class Files(NamedTuple):
    """IN and OUT."""

    source: Path
    out: Path

    def rankings(self) -> list[dict[str, Any]]:
        """Return the lines of OUT without their digests."""
        return [{name: each[name] for name in each if name != "digest"} for each in read_lines(self.out)]


def query(number: int) -> dict[str, Any]:
    """Return a line of IN. One of its documents has an id."""
    texts = f"low score={number / 100}", f"high score={number / 100 + 0.5}"
    return {"id": f"q{number}", "query": f"query {number}", "documents": [texts[0], {"id": "d", "text": texts[1]}]}


def ranking(number: int) -> dict[str, Any]:
    """Return the line of OUT that belongs to it."""
    best = {"index": 1, "relevance_score": number / 100 + 0.5, "id": "d"}
    return {"id": f"q{number}", "results": [best, {"index": 0, "relevance_score": number / 100}]}


def failing(*numbers: int, status: int = 400) -> Callable[[Received], Reply]:
    """Return what answers as the service does, except for some queries."""
    endings = tuple(f"query {number}" for number in numbers)
    return lambda request: error("bad query", status) if request.json["query"].endswith(endings) else scored(request)


def sent(stub: Stub) -> list[str]:
    """Return the queries that were sent, without the probes."""
    texts = (request.json["query"].rpartition("<Query>: ")[2] for request in stub.received)
    return [text for text in texts if text.startswith("query")]


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """IN with some queries, and OUT, which does not exist yet."""
    return Files(write_lines(tmp_path / "in.jsonl", *map(query, range(COUNT))), tmp_path / "out.jsonl")


def test_each_line_becomes_a_ranking_in_order(files: Files, at_stub: Stub, run: Run) -> None:
    """OUT alone is written, and a finished run sends no requests."""
    done = run("bulk", *files)
    assert (done.status, done.out) == (0, "")
    assert files.rankings() == [ranking(number) for number in range(COUNT)]
    assert done.err.startswith("regolo-rerank: 12 ranked, 0 failed (12 requests, ")
    assert sorted(path.name for path in files.out.parent.iterdir()) == ["in.jsonl", "out.jsonl"]
    again = run("bulk", *files)
    assert again.status == 0
    assert "0 ranked, 0 failed, 12 finished before (0 requests" in again.err
    assert len(sent(at_stub)) == COUNT


def test_lines_that_are_no_query_are_errors_with_their_input(files: Files, at_stub: Stub, run: Run) -> None:
    """Blank lines do not count, ids default to the line's number, and what is still being written waits."""
    bad = {"id": "x", "query": " ", "documents": ["a"]}, {"query": "q", "documents": "a"}, "no json", '{"query": NaN}'
    write_lines(files.source, "", query(0), *bad, {"query": "q", "documents": [{"title": "t", "text": "a score=0.5"}]})
    with files.source.open("a") as file:
        file.write('{"query": "incom')
    done = run("bulk", *files)
    assert done.status == 1
    lines = files.rankings()
    assert lines[0] == ranking(0)
    assert [line["id"] for line in lines] == ["q0", "x", 4, 5, 6, 7]
    assert [line.get("input") for line in lines] == [None, *bad, None]
    assert lines[1]["error"] == {
        "type": "InvalidInputError",
        "message": '"query" must be a string that is not blank',
    }
    assert ["<Document>: t a score=0.5"] in at_stub.documents
    assert len(at_stub.received) == 2
    assert "Titles were scored in front of the texts" in done.err
    assert f"line 8 of {files.source} is incomplete. The next run will rank it." in done.err


@pytest.mark.parametrize("content", [b"id,query\n1,cats\n", b'[\n{"query": "q"}\n]\n', "x".encode("utf-16")])
def test_a_file_without_queries_is_rejected(content: bytes, files: Files, at_stub: Stub, run: Run) -> None:
    """CSV, a JSON array and UTF-16 are recognised before a request is sent."""
    files.source.write_bytes(content)
    done = run("bulk", *files)
    assert done.status == 2
    assert "Expected a line like" in done.err or "UTF-16" in done.err
    assert not at_stub.received


def test_gzip_and_standard_input_are_read(
    files: Files, at_stub: Stub, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both resume a run, because only the lines count."""
    packed = files.source.with_name("in.gz")
    packed.write_bytes(gzip.compress(files.source.read_bytes()))
    assert run("bulk", packed, files.out).status == 0
    with files.source.open(encoding="utf-8") as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        assert run("bulk", "-", files.out).status == 0
    assert len(sent(at_stub)) == COUNT


@pytest.mark.parametrize("cut", [1, 30, 10_000])
def test_a_run_continues_behind_the_last_complete_line(cut: int, files: Files, at_stub: Stub, run: Run) -> None:
    """An incomplete line of OUT is written again, whatever was lost."""
    run("bulk", *files)
    content = files.out.read_bytes()
    kept = content[:-cut]
    files.out.write_bytes(kept)
    lost = COUNT - kept.count(b"\n")
    assert run("bulk", *files).status == 0
    assert files.out.read_bytes() == content
    assert len(sent(at_stub)) == COUNT + lost


def test_a_source_that_grew_is_continued(files: Files, at_stub: Stub, run: Run) -> None:
    """Only the new lines are ranked."""
    run("bulk", *files)
    write_lines(files.source, *map(query, range(COUNT + 2)))
    assert run("bulk", *files).status == 0
    assert files.rankings() == [ranking(number) for number in range(COUNT + 2)]
    assert len(sent(at_stub)) == COUNT + 2


@pytest.mark.parametrize(
    ("lines", "options", "problem"),
    [
        ([query(0), query(2), query(1)], [], "line 2 has changed since it was ranked"),
        ([query(0)], [], "has fewer lines than"),
        ([query(0), query(1), query(2)], ["--top-n", 1], "made with another server, model or other options"),
        ([query(0), query(1), query(2)], ["--model", "m"], "made with another server, model or other options"),
        ([query(0), query(1), query(2)], ["--title-field", ""], "made with another server, model or other options"),
        ([query(0), query(1), query(2)], ["--local"], "made with another server, model or other options"),
    ],
)
@pytest.mark.parametrize("retry", [[], ["--retry-errors"]])
def test_an_out_of_something_else_is_rejected(
    lines: list[Any], options: list[Any], problem: str, retry: list[str], files: Files, at_stub: Stub, run: Run
) -> None:
    """A changed IN and changed options are recognised, and OUT stays as it is."""
    write_lines(files.source, *map(query, range(3)))
    run("bulk", *files)
    content = files.out.read_bytes()
    write_lines(files.source, *lines)
    done = run("bulk", *files, *options, *retry)
    assert done.status == 2
    assert problem in done.err
    assert files.out.read_bytes() == content
    assert len(at_stub.received) == 3


def test_foreign_files_are_not_touched(files: Files, at_stub: Stub, run: Run) -> None:
    """OUT must be a file that this command wrote, and not IN."""
    files.out.write_text("precious\n")
    assert "line 1: `bulk` did not write it" in run("bulk", *files).err
    assert files.out.read_text() == "precious\n"
    assert "is the input too" in run("bulk", files.source, files.source).err
    assert "must be a file" in run("bulk", files.source, files.out.parent).err
    assert "No such file" in run("bulk", files.source, files.out.parent / "nowhere" / "out").err
    assert not at_stub.received


def test_failed_queries_are_retried_in_place(files: Files, at_stub: Stub, run: Run) -> None:
    """The other lines of OUT stay, and no other file is left."""
    at_stub.reply = failing(3, 5)
    done = run("bulk", *files)
    assert done.status == 1
    assert "2 queries failed: bad query" in done.err
    failed = files.rankings()[3]
    assert failed["input"] == query(3)
    assert failed["error"]["status_code"] == 400
    assert "2 queries failed in earlier runs. Add --retry-errors" in run("bulk", *files).err
    at_stub.reply = failing(5)
    at_stub.received.clear()
    assert run("bulk", *files, "--retry-errors").status == 1
    assert sorted(sent(at_stub)) == ["query 3", "query 5"]
    assert [number for number, line in enumerate(files.rankings()) if "error" in line] == [5]
    at_stub.reply = scored
    assert run("bulk", *files, "--retry-errors").status == 0
    assert files.rankings() == [ranking(number) for number in range(COUNT)]
    assert sorted(path.name for path in files.out.parent.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_a_retry_that_stops_keeps_its_rankings(files: Files, at_stub: Stub, run: Run) -> None:
    """OUT gets the rankings that were paid for."""
    at_stub.reply = failing(3, 5)
    run("bulk", *files)
    at_stub.reply = lambda request: scored(request) if request.json["query"].endswith("query 3") else error("down", 401)
    done = run("bulk", *files, "--retry-errors", "--max-concurrency", 1)
    assert done.status == 1
    assert "stopped: down" in done.err
    assert [number for number, line in enumerate(files.rankings()) if "error" in line] == [5]


def test_a_service_that_fails_stops_the_run(files: Files, at_stub: Stub, run: Run) -> None:
    """A failure is recorded only if the service answers a small request, so it never becomes the fault of a query."""
    at_stub.reply = lambda request: (
        scored(request) if request.json["query"].endswith(("query 0", "query 1")) else error("unknown model", 400)
    )
    done = run("bulk", *files, "--max-concurrency", 1)
    assert done.status == 1
    assert "stopped: unknown model" in done.err
    assert "Repeat the same command to resume at line 3." in done.err
    assert files.rankings() == [ranking(0), ranking(1)]
    at_stub.reply = scored
    assert run("bulk", *files).status == 0
    assert files.rankings() == [ranking(number) for number in range(COUNT)]


def test_a_full_disk_stops_the_run(files: Files, at_stub: Stub, run: Run) -> None:
    """The incomplete line is discarded by the next run."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (400, 400))"
    code = f"{limit}; import sys; from regolo_rerank.cli.main import main; sys.exit(main())"
    command = [sys.executable, "-B", "-c", code, "bulk", *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    assert done.returncode == 1
    assert f"stopped: {files.out}: File too large. Repeat the same command" in done.stderr
    assert run("bulk", *files).status == 0
    assert files.rankings() == [ranking(number) for number in range(COUNT)]
    assert at_stub.received


def test_a_second_run_is_rejected(files: Files, at_stub: Stub, run: Run) -> None:
    """Two processes must not write one OUT."""
    inner: list[Any] = []

    def reply(request: Received) -> Reply:
        if not inner:
            command = [sys.executable, "-m", "regolo_rerank", "bulk", *map(str, files)]
            inner.append(subprocess.run(command, capture_output=True, text=True, check=False))  # noqa: S603
        return scored(request)

    at_stub.reply = reply
    assert run("bulk", *files, "--max-concurrency", 1).status == 0
    assert (inner[0].returncode, inner[0].stderr) == (2, f"regolo-rerank: {files.out}: another run is writing it\n")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_is_killed_loses_nothing_and_doubles_nothing(
    how: signal.Signals, files: Files, at_stub: Stub, run: Run
) -> None:
    """A signal at any moment leaves an OUT that can be continued."""
    at_stub.reply = lambda request: Reply(scored(request).body, delay=0.15)
    command = [sys.executable, "-m", "regolo_rerank", "bulk", *map(str, files)]
    chance = random.Random(0)  # noqa: S311 - a test
    for _ in range(2):
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:  # noqa: S603
            size = files.out.stat().st_size if files.out.exists() else 0
            while not files.out.exists() or files.out.stat().st_size == size:
                assert process.poll() is None  # a line is in the file before the run ends
                time.sleep(0.005)
            time.sleep(chance.uniform(0, 0.05))
            process.send_signal(how)
            assert process.stderr is not None
            words = process.stderr.read()
        if how is signal.SIGINT:
            assert process.returncode == 130
            assert "interrupted. Repeat the same command to resume at line" in words
    assert run("bulk", *files).status == 0
    assert files.rankings() == [ranking(number) for number in range(COUNT)]


def test_a_killed_retry_leaves_out_as_it_was(files: Files, at_stub: Stub, run: Run) -> None:
    """OUT is replaced at the end, in one step."""
    at_stub.reply = failing(3)
    run("bulk", *files)
    content = files.out.read_bytes()
    at_stub.reply = lambda request: Reply(scored(request).body, delay=60)
    command = [sys.executable, "-m", "regolo_rerank", "bulk", *map(str, files), "--retry-errors"]
    before = len(at_stub.received)
    with subprocess.Popen(command) as process:  # noqa: S603
        while len(at_stub.received) == before:
            time.sleep(0.005)
        process.kill()
    assert files.out.read_bytes() == content


def test_progress_is_shown_on_a_terminal_only(
    files: Files, at_stub: Stub, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A log gets no progress bar."""
    assert run("bulk", *files).err.count("ranked") == 1
    files.out.unlink()
    monkeypatch.setenv("FORCE_COLOR", "1")
    err = run("bulk", *files).err
    assert "12 ranked, 0 failed" in err
    assert "100%" in err
    assert json.loads(files.out.read_text().splitlines()[0])["id"] == "q0"
    assert at_stub.received
