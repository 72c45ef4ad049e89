import logging
import threading
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests.conftest import KEY
from tests.support.bulk import COUNT, Files, failing, hang_up, number_of, numbers, probes, query, ranking, read
from tests.support.inside import hide_word_vectors, watch_bulk_files
from tests.support.stub import Received, Reply, Stub, error, results, scored

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
        assert failure == {"line": number + 1, "input": query(number)}
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


def test_the_summary_has_the_commonest_reasons(at_stub: Stub, files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    """Three of them stand behind the first line with how often, where numbers and requests tell none apart."""
    replies = {
        1: Reply(error("7 tokens too many", 400).body, 400, {"x-litellm-call-id": "call-a"}),
        2: Reply(error("12 tokens too many", 400).body, 400, {"x-litellm-call-id": "call-b"}),
        3: error("broken", 500),
    }
    at_stub.reply = lambda request: replies.get(number_of(request) or 0) or scored(request)
    bad = [{"query": "q", "documents": [*["a"] * number, 7]} for number in range(3)]
    files.write(*map(query, range(4)), *bad, b"nonsense", b"nonsense", {"query": "q"})
    assert files.run() == 1
    summary, *reasons = capsys.readouterr().err.splitlines()
    assert " 9 failed (see " in summary
    text = 'documents[0]: must be a string, or an object with a string in its field "text"'
    assert reasons == [
        f"regolo-rerank: 3 failed like this: {text}",
        "regolo-rerank: 2 failed like this: 7 tokens too many [HTTP 400, request call-a]",
        "regolo-rerank: 2 failed like this: not a JSON object in UTF-8",
    ]


def test_failures_stay_in_the_order_of_the_input(at_stub: Stub, files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever has to wait until the service's state is known, what comes behind it waits too."""
    kinds = [b"nonsense", {**query(90), "documents": []}, {**query(91), "documents": [" "]}, query(50), query(51)]
    order = [(number * 7 + number // 5) % 5 for number in range(60)]
    files.write(*(kinds[kind] for kind in order))
    written = watch_bulk_files(monkeypatch)
    at_stub.reply = failing(lambda number: number == 50, error("broken", 500))
    assert files.run() == 1
    assert written[0] == files.state  # the options
    assert written[1::2] == [files.state] * len(order)
    assert written[2::2] == [files.errors if kind in {0, 3} else files.out for kind in order]
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


def test_an_answer_without_a_request_says_nothing_of_the_service(at_stub: Stub, files: Files) -> None:
    """In an outage, queries with nothing to rank are no sign that it is over."""
    files.write(*[query(number) | ({"documents": []} if number % 2 else {}) for number in range(COUNT)])
    at_stub.always(error("broken", 503))
    assert files.run() == 1
    assert files.contents() == (b"", b"")


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
                lost.stop()
            raise ConnectionAbortedError

        lost.reply = failing(lambda number: number is None or number >= 10, vanish)
        assert files.run("--base-url", lost.url, "--max-concurrency", "1") == 1
    assert "run again, it goes on at line 11 of" in capsys.readouterr().err
    assert read(files.out) == [ranking(number) for number in range(10)]
    with Stub() as found:
        assert files.run("--base-url", found.url, "--allow-changed-options") == 0
        assert numbers(found) == list(range(10, COUNT))
    assert read(files.out) == [ranking(number) for number in range(COUNT)]


def test_a_missing_package_is_no_querys_fault(
    files: Files, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without WordLlama, `--local` is wrong use, and no query is blamed."""
    hide_word_vectors(monkeypatch)
    assert files.run("--local") == 2
    assert "regolo_rerank[local]" in capsys.readouterr().err
    assert files.contents() == (b"", b"")
