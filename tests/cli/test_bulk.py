import fcntl
import io
import itertools
import json
import logging
import os
import pty
import re
import resource
import signal
import subprocess
import sys
import termios
import threading
import time
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from regolo_rerank import RegoloClient
from regolo_rerank._cli import bulk
from regolo_rerank._cli.main import main
from regolo_rerank._transports.scorer import _model
from tests.conftest import KEY
from tests.support.stub import Received, Reply, Stub, error, results, score, scored

MEBIBYTE = 2**20
COUNT = 24


class Files:
    """IN, OUT and OUT.errors in a folder.

    Attributes:
        given: IN.
        out: OUT.
        errors: OUT.errors.
    """

    def __init__(self, folder: Path) -> None:
        self.given = folder / "queries.jsonl"
        self.out = folder / "rankings.jsonl"
        self.errors = folder / "rankings.jsonl.errors"

    def write(self, *lines: Any) -> None:
        """Write IN: bytes as they are, anything else as JSON."""
        encoded = (line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines)
        self.given.write_bytes(b"".join(line + b"\n" for line in encoded))

    def run(self, *options: str) -> int:
        """Run the command."""
        return main(["bulk", str(self.given), str(self.out), *options])

    def command(self, *options: str) -> list[str]:
        """Return the command as a process of its own."""
        return [sys.executable, "-m", "regolo_rerank", "bulk", str(self.given), str(self.out), *options]

    def contents(self) -> tuple[bytes, bytes]:
        """Return the bytes of OUT and OUT.errors; a file that is not there counts as empty."""
        return content(self.out), content(self.errors)


def content(file: Path) -> bytes:
    """Return the bytes of a file that may not be there."""
    return file.read_bytes() if file.exists() else b""


def read(file: Path) -> list[dict[str, Any]]:
    """Return the objects of a file's lines, each of which must be a whole one."""
    *lines, rest = content(file).split(b"\n")
    assert rest == b""
    return [json.loads(line) for line in lines]


def query(number: int) -> dict[str, Any]:
    """Return a line of IN; its documents' scores depend on its number, and some have ids."""
    texts = [f"low score={number / 100}", f"high score={number / 100 + 0.5}"]
    return {
        "id": f"id-{number}",
        "query": f"q{number}",
        "documents": [texts[0], {"id": f"d{number}", "text": texts[1], "other": [1]}],
    }


def ranking(number: int) -> dict[str, Any]:
    """Return the right line of OUT for it."""
    return {
        "id": f"id-{number}",
        "results": [
            {"index": 1, "relevance_score": number / 100 + 0.5, "id": f"d{number}"},
            {"index": 0, "relevance_score": number / 100},
        ],
    }


def number_of(request: Received) -> int | None:
    """Return the number of the query that a request is for; the probe has none."""
    found = re.search(r"<Query>: q(\d+)$", request.json["query"])
    return int(found[1]) if found else None


def probes(stub: Stub) -> int:
    """Return how many requests were for no query."""
    return sum(number_of(request) is None for request in stub.received)


def numbers(stub: Stub) -> list[int]:
    """Return the numbers of the queries that were sent, in their order."""
    return sorted({number for request in stub.received if (number := number_of(request)) is not None})


def failing(which: Callable[[int | None], bool], reply: Reply | Callable[[], Reply]) -> Callable[[Received], Reply]:
    """Answer as the service does, except for some queries."""

    def answer(request: Received) -> Reply:
        if not which(number_of(request)):
            return scored(request)
        return reply if isinstance(reply, Reply) else reply()

    return answer


def hang_up() -> Reply:
    """Close the connection without a reply."""
    raise ConnectionAbortedError


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """The files of a run over some queries."""
    files = Files(tmp_path)
    files.write(*map(query, range(COUNT)))
    return files


@pytest.fixture
def at_stub(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> Stub:
    """The stub server, set up in the environment as a user would, with a key."""
    monkeypatch.setenv("REGOLO_API_KEY", KEY)
    monkeypatch.setenv("REGOLO_BASE_URL", stub.url)
    return stub


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


def test_a_line_is_what_a_line_feed_ends(files: Files) -> None:
    """BOM, CRLF, blank lines and a missing last line feed are no part of a query; no other character ends a line."""
    strange = "one\u2028two\x85three\u2029\\nfour è \\ud800 \x7f"
    text = '\ufeff{"id": "%s", "query": "q", "documents": ["a %s"]}\r\n\r\n \t\n'
    last = '{"id": {"x": [1, NaN]}, "query": "q", "documents": []}'
    files.given.write_bytes((text.replace("%s", strange) + last).encode())
    assert files.run("--local") == 0
    lines = files.out.read_bytes()
    assert lines.isascii()
    assert len(lines.decode().splitlines()) == 2
    assert read(files.out)[0]["id"] == json.loads(f'"{strange}"')
    assert files.out.read_text().endswith('{"id": {"x": [1, NaN]}, "results": []}\n')
    finished = files.contents()
    assert files.run("--local") == 0
    assert files.contents() == finished


REFUSED: list[tuple[bytes, str]] = [
    (b"nonsense", "not JSON in UTF-8"),
    (b'{"id": 1, "query": "caf\xe9", "documents": []}', "not JSON in UTF-8"),
    (b"[" * 100_000, "not JSON in UTF-8"),
    (b'["id", "query", "documents"]', "not a JSON object"),
    (b'{"query": "q", "documents": []}', 'no field "id"'),
    (b'{"id": null, "query": "q", "documents": []}', 'no field "id"'),
    (b'{"id": 1, "documents": []}', 'no field "query"'),
    (b'{"id": 1, "query": "q"}', 'no field "documents"'),
    (b'{"id": 1, "query": " ", "documents": ["a"]}', "query: must not be blank"),
    (b'{"id": 1, "query": 7, "documents": ["a"]}', "query: must be a string, got int"),
    (b'{"id": 1, "query": "q", "documents": "a"}', "documents: must be a list of strings or objects"),
    (b'{"id": 1, "query": "q", "documents": ["a", {"id": 2}]}', "documents[1]: must be a string, or an object with"),
    (b'{"id": 1, "query": "q", "documents": [null]}', "documents[0]: must be a string, or an object with"),
]


@pytest.mark.parametrize(("line", "said"), REFUSED)
def test_a_line_that_is_no_query_is_a_line_of_errors(line: bytes, said: str, at_stub: Stub, files: Files) -> None:
    """It stands there whole with its number and what is wrong, nothing is sent for it, and all others are ranked."""
    files.write(query(0), b"", line, query(1))
    assert files.run() == 1
    assert read(files.out) == [ranking(0), ranking(1)]
    (failure,) = read(files.errors)
    assert (failure.pop("line"), failure["error"]["type"]) == (3, "InvalidInputError")
    assert failure.pop("error")["message"].startswith(said)
    shown = line.decode(errors="backslashreplace")
    assert failure in ({"input": shown}, json.loads(shown) if "not JSON" not in said else None)
    assert len(at_stub.received) == 2


def test_what_is_never_sent_needs_no_service(at_stub: Stub, files: Files) -> None:
    """Nothing is sent for an input of lines that are no queries, or have nothing to rank."""
    files.write(*[b"nonsense", {**query(0), "documents": []}, {**query(1), "query": " "}] * 9)
    assert files.run() == 1
    assert (len(read(files.out)), len(read(files.errors))) == (9, 18)
    assert at_stub.received == []


POISON: dict[str, tuple[Reply | Callable[[], Reply], dict[str, Any]]] = {
    "400": (
        Reply(error("pairs[3]: too long", 400).body, 400, {"x-litellm-call-id": "call-7"}),
        {"request_id": "call-7"},
    ),
    "403": (error("blocked", 403), {}),
    "418": (error("teapot", 418), {}),
    "500": (error("broken", 500), {}),
    "502": (Reply(b"<html>", 502, {"retry-after-ms": "1"}), {}),
    "foreign": (Reply(results((7, 0.5))), {}),
    "html": (Reply(b"<html>"), {}),
    "hang up": (hang_up, {}),
}


@pytest.mark.parametrize("kind", POISON)
def test_a_query_that_fails_alone_is_a_line_of_errors(
    kind: str, at_stub: Stub, files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    """It stands there whole with its number and error, wherever it stood; and OUT.errors can be run as IN."""
    reply, told = POISON[kind]
    bad = {0, 5, 6, COUNT - 1}
    at_stub.reply = failing(lambda number: number in bad, reply)
    assert files.run() == 1
    assert read(files.out) == [ranking(number) for number in range(COUNT) if number not in bad]
    failures = read(files.errors)
    for failure, number in zip(failures, sorted(bad), strict=True):
        said = failure.pop("error")
        assert failure == {"line": number + 1, **query(number)}
        status = {"status_code": int(kind)} if kind.isdigit() else {}
        assert {name: said[name] for name in said if name not in {"type", "message"}} == status | told
        assert ("pairs[3]: too long" in said["message"]) == (kind == "400")
    assert probes(at_stub) == 2
    said = capsys.readouterr().err
    assert f"{COUNT - 4} ranked with " in said
    assert f", 4 failed (see {files.errors}); " in said

    again = Files(files.given.parent)
    again.given, again.out = files.errors, files.out.with_name("again")
    assert again.run() == 1
    assert [line["line"] for line in read(files.out.with_name("again.errors"))] == [1, 2, 3, 4]
    at_stub.reply = scored
    again.given, again.out = files.out.with_name("again.errors"), files.out.with_name("third")
    assert again.run() == 0
    assert read(again.out) == [ranking(number) for number in sorted(bad)]


def test_failures_stay_in_the_order_of_the_input(at_stub: Stub, files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever has to wait until the service's state is known, what comes behind it waits too."""
    kinds = [b"nonsense", {**query(90), "documents": []}, {**query(91), "documents": [" "]}, query(50), query(51)]
    order = [(number * 7 + number // 5) % 5 for number in range(60)]
    files.write(*(kinds[kind] for kind in order))
    written: list[Path] = []
    add = bulk._Finished.add

    def recorded(file: bulk._Finished, line: bytes) -> None:
        written.append(file.path)
        add(file, line)

    monkeypatch.setattr(bulk._Finished, "add", recorded)
    at_stub.reply = failing(lambda number: number == 50, error("broken", 500))
    assert files.run() == 1
    assert written == [files.errors if kind in {0, 3} else files.out for kind in order]
    assert [line["line"] for line in read(files.errors)] == [n for n, kind in enumerate(order, 1) if kind in {0, 3}]
    names = {1: "id-90", 2: "id-91", 4: "id-51"}
    assert [line["id"] for line in read(files.out)] == [names[kind] for kind in order if kind in names]


def test_more_failures_in_a_row_than_are_held_back(at_stub: Stub, files: Files) -> None:
    """A service that answers another query is not down, so the queries that it fails are to blame."""
    at_stub.reply = failing(lambda number: number is not None, error("broken", 500))
    assert files.run() == 1
    assert [line["line"] for line in read(files.errors)] == list(range(1, COUNT + 1))
    assert files.out.read_bytes() == b""
    assert probes(at_stub) == COUNT / 8


def test_an_answer_from_before_an_outage_blames_nobody(
    at_stub: Stub, files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the first query meets an outage that begins after later ones were answered, it is not to blame."""
    down = threading.Event()

    def answer(request: Received) -> Reply:
        number = number_of(request)
        if number == 0:
            down.wait(20)
        elif number == 6:
            down.set()
            return scored(request)
        return error("broken", 503) if down.is_set() else scored(request)

    at_stub.reply = answer
    assert files.run() == 1
    assert f"run again, it goes on at line 1 of {files.given}\n" in capsys.readouterr().err
    assert files.contents() == (b"", b"")
    at_stub.reply = scored
    assert files.run() == 0
    assert read(files.out) == [ranking(number) for number in range(COUNT)]


@pytest.mark.parametrize("cause", [httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError])
def test_a_network_that_is_lost_stops_the_run(
    cause: type[Exception], files: Files, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """However the way to the server fails, the first query that meets it ends the run, and nobody is asked again."""
    sent: list[str] = []

    def unreachable(self: httpx.HTTPTransport, request: httpx.Request) -> httpx.Response:
        del self
        sent.append(request.url.host)
        raise cause("no way there")

    monkeypatch.setattr(httpx.HTTPTransport, "handle_request", unreachable)
    assert files.run("--base-url", "http://127.0.0.1:9", "--max-concurrency", "1") == 1
    assert f"run again, it goes on at line 1 of {files.given}\n" in capsys.readouterr().err
    assert files.contents() == (b"", b"")
    assert len(sent) == 4  # one query and its retries


def test_the_rate_is_that_of_the_run(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind the bar stand the queries a second since the run began."""
    seconds = itertools.count(0, 0.5)
    monkeypatch.setattr(bulk, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    notes: list[str] = []
    client = RegoloClient(base_url="local://")
    with files.given.open("rb") as source, bulk.resumed(client, source, "IN", files.out) as run:
        run.rank(client, lambda _count=1, note="": notes.append(note))
    assert notes == ["2.0 queries/s"] * COUNT


STOPS: dict[str, Reply | Callable[[], Reply]] = {
    "key": error(f"no such key {KEY}", 401),
    "forbidden": error("not this model", 403),
    "address": error("Not Found", 404),
    "limit": error("Limit type: requests", 429),
    "budget": error("ExceededBudget", 400, type="budget_exceeded"),
    "model": error("Invalid model name passed in model=x", 400),
    "redirect": Reply(b"", 307, {"location": "https://elsewhere.example/"}),
    "outage": error("broken", 503),
    "proxy": Reply(b"<html>at work</html>"),
    "hang up": hang_up,
}


@pytest.mark.parametrize("first", [0, 9, COUNT - 2])
@pytest.mark.parametrize("kind", STOPS)
def test_what_is_no_querys_fault_stops_the_run(
    kind: str, first: int, at_stub: Stub, files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    """No line is blamed, the status is 1, and another run goes on at the same line and sends nothing again."""
    at_stub.reply = failing(lambda number: number is None or number >= first, STOPS[kind])
    assert files.run() == 1
    said = capsys.readouterr().err
    assert f"run again, it goes on at line {first + 1} of {files.given}\n" in said
    assert said.startswith(f"regolo-rerank: {first} ranked with {first} requests, 0 failed; ")
    assert said.count("\n") == 2
    assert KEY not in said
    assert read(files.out) == [ranking(number) for number in range(first)]
    assert not files.errors.exists()

    at_stub.reply = scored
    at_stub.received.clear()
    assert files.run() == 0
    assert read(files.out) == [ranking(number) for number in range(COUNT)]
    assert numbers(at_stub) == list(range(first, COUNT))
    finished = f", {first} finished before" if first else ""
    assert f"{COUNT - first} ranked with {COUNT - first} requests, 0 failed{finished}; " in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["key", "address", "limit", "budget"])
def test_what_the_next_query_would_meet_too_stops_the_run_at_once(
    kind: str, at_stub: Stub, files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    """No other query is sent, and a failure just before it, which may have had the same reason, is not settled."""
    reply, before = STOPS[kind], error("broken", 500)
    assert isinstance(reply, Reply)
    at_stub.reply = lambda request: {8: before, 9: reply}.get(number_of(request) or 0) or scored(request)
    assert files.run("--max-concurrency", "1") == 1
    assert "run again, it goes on at line 9 of" in capsys.readouterr().err
    assert set(numbers(at_stub)) == set(range(10))
    assert probes(at_stub) == 0
    assert read(files.out) == [ranking(number) for number in range(8)]
    assert not files.errors.exists()


def test_an_answer_without_a_request_says_nothing_of_the_service(at_stub: Stub, files: Files) -> None:
    """In an outage, queries with nothing to rank are no sign that it is over."""
    files.write(*[query(number) | ({"documents": []} if number % 2 else {}) for number in range(COUNT)])
    at_stub.always(error("broken", 503))
    assert files.run() == 1
    assert files.contents() == (b"", b"")


def test_an_unreachable_server_stops_the_run_at_once(
    files: Files, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """One query is tried as often as any, and no other."""
    with caplog.at_level(logging.WARNING):
        assert files.run("--base-url", "http://127.0.0.1:1", "--max-concurrency", "1") == 1
    assert len(caplog.records) == 3
    assert "run again, it goes on at line 1 of" in capsys.readouterr().err


def test_a_lost_network_stops_the_run(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    """When the server accepts nobody any more, what is finished stays, and the next run goes on from there."""
    with Stub() as lost:

        def vanish() -> Reply:
            if threading.current_thread().name != "gone":
                threading.current_thread().name = "gone"
                lost._server.shutdown()
                lost._server.server_close()
            raise ConnectionAbortedError

        lost.reply = failing(lambda number: number is None or number >= 10, vanish)
        assert files.run("--base-url", lost.url, "--max-concurrency", "1") == 1
    assert "run again, it goes on at line 11 of" in capsys.readouterr().err
    assert read(files.out) == [ranking(number) for number in range(10)]
    with Stub() as found:
        assert files.run("--base-url", found.url) == 0
        assert numbers(found) == list(range(10, COUNT))
    assert read(files.out) == [ranking(number) for number in range(COUNT)]


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


@pytest.mark.parametrize("lines", [b"", b"\xef\xbb\xbf\r\n\n  "])
def test_an_input_without_queries_gives_an_empty_output(lines: bytes, files: Files) -> None:
    """That is no failure, and OUT is there."""
    files.given.write_bytes(lines)
    assert files.run("--local") == 0
    assert files.contents() == (b"", b"")
    assert files.out.exists()


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


def stdin(monkeypatch: pytest.MonkeyPatch, lines: bytes) -> None:
    """Put bytes on standard input."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines), encoding="ascii"))


def test_standard_input_is_an_input_too(at_stub: Stub, files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """`-` reads it, and goes on by it just the same."""
    lines = files.given.read_bytes()
    stdin(monkeypatch, b"".join(lines.splitlines(keepends=True)[:7]))
    arguments = ["bulk", "-", str(files.out)]
    assert main(arguments) == 0
    stdin(monkeypatch, lines)
    assert main(arguments) == 0
    assert read(files.out) == [ranking(number) for number in range(COUNT)]
    assert len(at_stub.received) == COUNT
    with files.out.open() as opened:
        monkeypatch.setattr(sys, "stdin", opened)
        assert main(arguments) == 2


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


def test_a_missing_package_is_no_querys_fault(
    files: Files, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without WordLlama, `--local` is wrong use, and no query is blamed."""
    _model.cache_clear()
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert files.run("--local") == 2
    assert "regolo_rerank[local]" in capsys.readouterr().err
    assert files.contents() == (b"", b"")


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
    assert re.search(r"100%\|.*\| [\d.]+k/[\d.]+k \[00:\d\d<00:\d\d.*, [\d,.]+ queries/s\]", printed)
    assert f"{COUNT // 2 - 1} ranked with " in printed.splitlines()[-1]


def test_without_tqdm_there_is_no_bar(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal is told in one line how to get one, and the run works."""
    monkeypatch.setitem(sys.modules, "tqdm", None)
    printed = on_a_terminal(monkeypatch, lambda: files.run("--local")).splitlines()
    assert printed[0] == 'regolo-rerank: for a progress bar: pip install "regolo_rerank[progress]"'
    assert len(printed) == 2
    assert len(read(files.out)) == COUNT


def test_tokens_are_counted(at_stub: Stub, files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    """The last line has the tokens where the service counts them, and the requests with their retries."""

    def answer(request: Received) -> Reply:
        ranked = [(index, score(text)) for index, text in enumerate(request.documents)]
        return Reply(results(*ranked, usage={"total_tokens": 100}))

    at_stub.script(error("busy", 503))
    at_stub.reply = answer
    assert files.run() == 0
    said = capsys.readouterr().err
    assert re.fullmatch(
        rf"regolo-rerank: {COUNT} ranked with {COUNT + 1} requests and 2,400 tokens, 0 failed; \d+\.\d s\n", said
    )


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
                with bulk.resumed(client, source, "IN", files.out) as run:
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
