import errno
import fcntl
import io
import itertools
import os
import pty
import re
import sys
import termios
from collections.abc import Callable
from contextlib import suppress
from types import SimpleNamespace

import pytest

from regolo_rerank import RegoloClient
from regolo_rerank._cli import bulk
from regolo_rerank._cli.main import main
from tests.conftest import KEY
from tests.support.bulk import COUNT, Files, content, failing, number_of, query, ranking, read
from tests.support.stub import Received, Reply, Stub, error, results, score, scored


@pytest.mark.parametrize(
    ("options", "at_once"), [([], 4), (["--max-concurrency", "1"], 1), (["--max-concurrency", "16"], 16)]
)
def test_each_query_has_its_ranking_in_the_order_of_the_input(
    options: list[str], at_once: int, at_stub: Stub, files: Files
) -> None:
    """One line of OUT a line of IN, ids and no texts in it, in order even where replies come in another one."""

    def answer(request: Received) -> Reply:
        reply = scored(request)
        return Reply(reply.body, reply.status, delay=0.01 * ((number_of(request) or 0) % 3 == 0))

    at_stub.reply = answer
    assert files.run(*options) == 0
    assert read(files.out) == [ranking(number) for number in range(COUNT)]
    assert not files.errors.exists()
    assert at_stub.most_at_once <= at_once
    assert at_stub.received[0].headers["authorization"] == f"Bearer {KEY}"


def test_options_reach_the_service(at_stub: Stub, files: Files) -> None:
    """Each option has its effect, wherever it stands."""
    options = ["--model", "Qwen3-Reranker-8B", "--threshold", "0.6", "--instruction", "Be strict"]
    arguments = [str(files.given), "--top-n", "1", str(files.out), "--max-concurrency", "2"]
    at_stub.reply = lambda request: Reply(scored(request).body, delay=0.01)
    assert main(["bulk", *options, *arguments]) == 0
    request = at_stub.received[0].json
    assert (request["model"], request["top_n"]) == ("Qwen3-Reranker-8B", 1)
    assert "Be strict" in request["query"]
    assert at_stub.most_at_once == 2
    kept = [len(line["results"]) for line in read(files.out)]
    assert kept == [0] * 10 + [1] * (COUNT - 10)


def test_what_is_left_out_is_the_clients_default(at_stub: Stub, files: Files) -> None:
    """Without options the request is, byte for byte, the one that the client sends."""
    files.write(query(7))
    assert files.run() == 0
    RegoloClient().rerank("q7", [f"low score={7 / 100}", f"high score={7 / 100 + 0.5}"])
    assert at_stub.received[0].body == at_stub.received[1].body


def test_the_rate_is_that_of_the_run(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind the bar stand the queries, the failures, and the queries a second since the run began."""
    files.write(query(0), b"nonsense", *map(query, range(2, COUNT)))
    seconds = itertools.count(0, 0.5)
    monkeypatch.setattr(bulk, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    notes: list[str] = []
    client = RegoloClient(base_url="local://")
    with files.given.open("rb") as source, bulk.resume(client, source, "IN", files.out) as run:
        run.rank(client, lambda _count=1, note="": notes.append(note))
    assert notes == [f"{number} queries, {int(number > 1)} failed, 2.0/s" for number in range(1, COUNT + 1)]


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_a_filesystem_without_locks_is_written_all_the_same(
    code: int, at_stub: Stub, files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a file cannot be locked, as on some network drives, a run goes on without."""

    def flock(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    assert files.run() == 0
    assert len(at_stub.received) == len(read(files.out)) == COUNT


def test_without_a_terminal_a_line_a_minute_tells_how_far_it_is(
    files: Files, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A log has the share of IN, and what stands behind a bar, and no more than one such line a minute."""
    seconds = itertools.count(0, 7)
    monkeypatch.setattr(bulk, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    assert files.run("--local") == 0
    told = capsys.readouterr().err.splitlines()
    minutes = len(told) - 1
    assert 3 <= minutes <= next(seconds) / 60
    for line in told[:-1]:
        assert re.fullmatch(r"regolo-rerank: \d+% of IN, \d+ queries, 0 failed, 0\.\d/s", line)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(files.given.read_bytes())))
    files.out.unlink()
    assert main(["bulk", "-", str(files.out), "--local"]) == 0
    assert capsys.readouterr().err.startswith("regolo-rerank: 5 queries, 0 failed, 0.1/s\n")


def folder(files: Files) -> list[str]:
    """Name a folder as OUT."""
    return [str(files.given), str(files.given.parent)]


def link(files: Files) -> list[str]:
    """Name IN as OUT by another name."""
    files.out.symlink_to(files.given)
    return [str(files.given), str(files.out)]


def errors_of(files: Files) -> list[str]:
    """Name the OUT.errors of OUT as IN."""
    files.errors.write_bytes(files.given.read_bytes())
    return [str(files.errors), str(files.out)]


def state_of(files: Files) -> list[str]:
    """Name the OUT.state of OUT as IN."""
    files.state.write_bytes(files.given.read_bytes())
    return [str(files.state), str(files.out)]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (lambda files: [str(files.given)], "required: OUT"),
        (lambda files: [str(files.given), "-"], "OUT must be a file"),
        (lambda _: ["no such", "out"], "no such: No such file or directory"),
        (lambda files: [str(files.given.parent), str(files.out)], "Is a directory"),
        (lambda files: [str(files.given), str(files.given.parent / "no" / "out")], "No such file or directory"),
        (lambda files: [str(files.given), str(files.given)], "is the input too"),
        (folder, "OUT must be a file"),
        (link, "is the input too"),
        (errors_of, "rankings.jsonl.errors: is the input too"),
        (state_of, "rankings.jsonl.state: is the input too"),
        (lambda files: [f"{files.given}.zst", str(files.out)], "zstd -dc FILE | regolo-rerank bulk - OUT"),
        (lambda files: [f"{files.given}.gz", str(files.out)], "No such file or directory"),
        (lambda files: [str(files.given), str(files.out), "--json"], "unknown argument --json"),
        (lambda files: [str(files.given), str(files.out), f"--key={KEY}"], "unknown argument --key "),
        (lambda files: [str(files.given), str(files.out), "--api-key", KEY], "REGOLO_API_KEY only"),
        (lambda files: [str(files.given), str(files.out), "--top-n", "0"], "top_n: "),
        (lambda files: [str(files.given), str(files.out), "--max-concurrency", "0"], "max_concurrency: "),
        (lambda files: [str(files.given), str(files.out), "--base-url", "https://api.regolo.ai"], "no API key"),
        (lambda files: [str(files.given), str(files.out), "--local", "--base-url", "http://x"], "not allowed with"),
    ],
)
def test_wrong_use_is_status_2(
    arguments: Callable[[Files], list[str]],
    said: str,
    files: Files,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is told in one line, without the key, and no file is made or changed."""
    monkeypatch.setenv("REGOLO_BASE_URL", "local://")
    named = arguments(files)
    before = {path: content(path) for path in files.given.parent.iterdir()}
    assert main(["bulk", *named]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert said in printed.err
    assert printed.err.count("\n") == 1
    assert KEY not in printed.err
    assert {path: content(path) for path in files.given.parent.iterdir()} == before


def test_the_key_is_in_no_file(at_stub: Stub, files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    """Where the server quotes it in errors and replies, neither OUT nor OUT.errors nor the terminal shows it."""
    at_stub.reply = failing(lambda number: number in {2, 3}, error(f"key {KEY} has a problem", 400, type=KEY))
    assert files.run() == 1
    assert [line["error"]["message"] for line in read(files.errors)] == ["key *** has a problem [HTTP 400]"] * 2
    shown = b"".join(files.contents()).decode() + "".join(capsys.readouterr())
    assert KEY not in shown


def on_a_terminal(monkeypatch: pytest.MonkeyPatch, run: Callable[[], int]) -> str:
    """Return what a run prints where standard error is a terminal."""
    reader, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 120))
    with open(terminal, "w", encoding="utf-8") as stderr:  # noqa: PTH123 - a descriptor has no path
        monkeypatch.setattr(sys, "stderr", stderr)
        assert run() == 0
        stderr.flush()
        os.set_blocking(reader, False)
        printed = b""
        with suppress(BlockingIOError):
            while True:
                printed += os.read(reader, 65_536)
    os.close(reader)
    return printed.decode()


def test_a_terminal_shows_how_far_it_is(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bar has the share of IN that is finished, the time left and the rate of queries, and goes on with the run."""
    lines = files.given.read_bytes()
    files.given.write_bytes(lines[: lines.index(b"\n", len(lines) // 2) + 1])
    assert files.run("--local") == 0
    files.given.write_bytes(lines)
    printed = on_a_terminal(monkeypatch, lambda: files.run("--local"))
    assert re.search(r"\r +5\d%\|", printed)
    assert re.search(r"100%\|.*\| [\d.]+k/[\d.]+k \[00:\d\d<00:\d\d.*, 24 queries, 0 failed, [\d,.]+/s\]", printed)
    assert f"{COUNT // 2 - 1} ranked with " in printed.splitlines()[-1]


def test_without_tqdm_there_is_no_bar(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal is told in one line how to get one, and the run works."""
    monkeypatch.setitem(sys.modules, "tqdm", None)
    printed = on_a_terminal(monkeypatch, lambda: files.run("--local")).splitlines()
    assert printed[0] == 'regolo-rerank: for a progress bar: pip install "regolo_rerank[progress]"'
    assert len(printed) == 2
    assert len(read(files.out)) == COUNT


def test_tokens_and_cost_are_counted(at_stub: Stub, files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    """The last line has tokens and US dollars where the service counts them, and the requests with their retries."""

    def answer(request: Received) -> Reply:
        ranked = [(index, score(text)) for index, text in enumerate(request.documents)]
        return Reply(results(*ranked, usage={"total_tokens": 100}), headers={"x-litellm-response-cost": "2e-05"})

    at_stub.script(error("busy", 503))
    at_stub.reply = answer
    assert files.run() == 0
    said = capsys.readouterr().err
    assert re.fullmatch(
        rf"regolo-rerank: {COUNT} ranked with {COUNT + 1} requests, 2,400 tokens, "
        r"0\.000480 US dollars, 0 failed; \d+\.\d s\n",
        said,
    )
