import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks import __main__ as command
from benchmarks import subjects
from benchmarks.bounds import BOUNDS, Bound, Result, judged
from benchmarks.footprint import memory
from benchmarks.measured import Measured, in_rounds, warm
from benchmarks.server import ROOT, Behaviour, Server
from benchmarks.subjects import Call, Job
from benchmarks.waiting import idle, sustained


@pytest.fixture(scope="module")
def shared_server() -> Iterator[Server]:
    """One server's process for all tests."""
    with Server() as opened:
        yield opened


@pytest.fixture
def server(shared_server: Server) -> Server:
    """The server, as it is when it starts."""
    shared_server.behave(Behaviour())
    return shared_server


@pytest.fixture
def job(server: Server) -> Job:
    """A small job."""
    return Job(server.url, [f"document {number}" for number in range(10)], 3)


def measured(*, better: list[float], worse: list[float]) -> Measured:
    """Return a measure of a baseline and a subject."""
    return Measured("m", "a measure", "ms", "base", {"base": better, "ours": worse}, {"theirs": "not installed"})


def verdict(results: list[Result], subject: str = "ours", against: str | None = "base") -> str:
    """Return what was made of a subject."""
    return next(result.verdict for result in results if (result.subject, result.against) == (subject, against))


def test_a_ratio_is_taken_within_each_round() -> None:
    """A machine that slows down by ten between two rounds changes no ratio."""
    drifting = measured(better=[1.0, 10.0, 100.0], worse=[2.0, 20.0, 200.0])
    ours = list(judged(drifting, []))[1]
    assert (ours.ratio, ours.quartiles, ours.value) == (2.0, (2.0, 2.0), 20.0)


@pytest.mark.parametrize(
    ("limit", "at_least", "margin", "expected"),
    [
        (2.0, False, 1.0, "ok"),
        (1.9, False, 1.0, "MISSED"),
        (1.9, False, 1.25, "ok"),
        (2.0, True, 1.0, "ok"),
        (2.1, True, 1.0, "MISSED"),
        (2.1, True, 1.25, "ok"),
    ],
)
def test_a_bound_is_reached_or_missed(limit: float, at_least: bool, margin: float, expected: str) -> None:
    """A ratio on the wrong side of its bound, beyond the margin, is MISSED."""
    rounds = measured(better=[1.0, 1.0, 1.0], worse=[9.0, 2.0, 1.0])
    results = list(judged(rounds, [Bound("m", "ours", limit, at_least=at_least)], margin))
    assert verdict(results) == expected


def test_a_bound_against_a_missing_subject_is_not_measured() -> None:
    """A peer that is not installed is named, and the bound against it does not pass."""
    results = list(judged(measured(better=[1.0], worse=[1.0]), [Bound("m", "ours", 5.0, "theirs")]))
    assert verdict(results, against="theirs") == "NOT MEASURED"
    assert [result.note for result in results if result.subject == "theirs"] == ["theirs: not installed"]


@pytest.mark.parametrize(("limit", "status"), [(0.0, 1), (1e9, 0)], ids=["out of reach", "within reach"])
def test_the_exit_status_says_whether_bounds_are_reached(
    limit: float, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A bound that is missed is printed as MISSED, written as such, and makes the exit status 1."""
    monkeypatch.setattr(command, "BOUNDS", [Bound("top5", "RegoloClient", limit, short=True)])
    file = tmp_path / "deeper" / "report.json"
    assert command.main(["--short", "top5", "--rounds", "1", "--json", str(file)]) == status
    assert ("MISSED" in capsys.readouterr().out) == bool(status)
    verdicts = [line["verdict"] for line in json.loads(file.read_text())["results"] if line["limit"] is not None]
    assert verdicts == ["MISSED" if status else "ok"]


def test_the_json_has_every_row(tmp_path: Path) -> None:
    """The short form writes each of its bounds, each subject, and what they were measured with."""
    file = tmp_path / "report.json"
    command.main(["--short", "--rounds", "1", "--json", str(file)])
    report = json.loads(file.read_text())
    rows = {(line["measure"], line["subject"]): line for line in report["results"]}
    assert rows.keys() >= {(bound.measure, bound.subject) for bound in BOUNDS if bound.short}
    assert rows.keys() >= {("top5", name) for name in subjects.FLOORS | subjects.OURS}
    assert all(line["ratio"] is not None and line["quartiles"] for line in rows.values())
    assert report["environment"]["packages"]["httpx"] == httpx.__version__


def test_every_bound_names_subjects_that_are_measured() -> None:
    """No bound of the calls rests on a name that nothing is measured under."""
    named = {bound.subject for bound in BOUNDS} | {bound.against for bound in BOUNDS if bound.against}
    known = subjects.FLOORS | subjects.OURS | subjects.PEERS | subjects.ASYNC_OURS | subjects.at_once(8)
    assert named - known.keys() == {"regolo_rerank", "LangChain RegoloRerank and its first request"}


def test_the_help_names_every_measure(capsys: pytest.CaptureFixture[str]) -> None:
    """What can be measured is in the help."""
    with pytest.raises(SystemExit) as ended:
        command.main(["--help"])
    assert ended.value.code == 0
    assert command.MEASURES.keys() <= set(re.findall(r"\w+", capsys.readouterr().out))


def test_an_unknown_measure_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """A measure that does not exist is named, and nothing runs."""
    with pytest.raises(SystemExit):
        command.main(["top6"])
    assert "no such measure: top6" in capsys.readouterr().err


def test_subjects_do_their_job(job: Job) -> None:
    """Whatever can be measured without peers opens, and gives the results that were asked for."""
    everything = subjects.FLOORS | subjects.OURS | subjects.ASYNC_OURS | subjects.at_once(8)
    with warm(everything, job) as opened:
        assert opened.missing == {}
        assert {name: len(opened.repeat(name, 1)) for name in opened.calls} == dict.fromkeys(everything, 3)


def test_a_subject_that_fails_costs_its_own_line(job: Job) -> None:
    """A subject that is not installed, fails, or gives another number of results is missing, with the reason."""

    @contextmanager
    def absent(_job: Job) -> Iterator[Call]:
        raise ImportError
        yield

    @contextmanager
    def broken(_job: Job) -> Iterator[Call]:
        yield lambda: 1 / 0

    @contextmanager
    def idler(_job: Job) -> Iterator[Call]:
        yield list

    with warm(
        {"absent": absent, "broken": broken, "idler": idler, "RegoloClient": subjects.OURS["RegoloClient"]}, job
    ) as opened:
        assert opened.calls.keys() == {"RegoloClient"}
        assert opened.missing == {
            "absent": "not installed",
            "broken": "ZeroDivisionError: division by zero",
            "idler": "0 results in place of 3",
        }


def test_rounds_are_interleaved() -> None:
    """Each round has a turn of each subject, and begins with another one."""
    turns: list[str] = []
    in_rounds({name: lambda name=name: turns.append(name) for name in "abc"}, 3)  # type: ignore[misc] # a default binds
    assert turns == [*"abc", *"bca", *"cab"]


def test_the_server_counts_connections(server: Server) -> None:
    """A connection is kept for further requests, and counted once."""
    before = server.connections
    with httpx.Client(base_url=server.url) as client:
        client.post("/rerank", json={"documents": ["a"]})
        client.post("/rerank", json={"documents": ["a"]})
        assert server.connections - before == 1
    httpx.post(f"{server.url}/rerank", json={"documents": ["a"]})
    assert server.connections - before == 2


def test_the_server_works_in_slots(server: Server) -> None:
    """Requests beyond the slots wait for those before them, each for its delay and its documents."""
    server.behave(Behaviour(delay=0.05, delay_a_document=0.025, slots=1))

    def seconds(_: int) -> float:
        started = time.perf_counter()
        httpx.post(f"{server.url}/rerank", json={"documents": ["a", "b"]}).raise_for_status()
        return time.perf_counter() - started

    with ThreadPoolExecutor() as threads:
        first, second, third = sorted(threads.map(seconds, range(3)))
    assert (first >= 0.1, second >= 0.2, third >= 0.3) == (True, True, True)


@pytest.mark.parametrize(
    ("path", "body", "results", "score"),
    [
        ("/v2/rerank", {"documents": ["a", "b"], "top_n": 1}, "results", "relevance_score"),
        ("/voyage/rerank", {"documents": ["a", "b"], "top_k": 1}, "data", "relevance_score"),
        ("/v1/ranking", {"passages": [{"text": "a"}], "query": {"text": "q"}}, "rankings", "logit"),
    ],
)
def test_the_server_speaks_its_peers_formats(
    path: str, body: dict[str, Any], results: str, score: str, server: Server
) -> None:
    """Each service's path takes its request and gives its reply, cut to the number that was asked for."""
    (result,) = httpx.post(server.url + path, json=body).json()[results]
    assert result.keys() == {"index", score}


def test_the_server_ends_with_its_parent() -> None:
    """A parent that dies without a word leaves no server behind."""
    program = (
        "import os; from benchmarks.server import Server; print(Server().__enter__().url, flush=True); os._exit(1)"
    )
    parent = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False, stdout=subprocess.PIPE, text=True)  # noqa: S603 - our own interpreter
    address = httpx.URL(parent.stdout.strip())
    deadline = time.monotonic() + 10
    with pytest.raises(ConnectionRefusedError):  # noqa: PT012 - until it is refused
        while time.monotonic() < deadline:
            connection = HTTPConnection(address.host, address.port)
            try:
                connection.connect()
            finally:
                connection.close()
            time.sleep(0.02)


def test_idle_counts_the_connections_of_the_second_call(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that opens a connection a call is told from one that keeps its own."""

    @contextmanager
    def forgetful(job: Job) -> Iterator[Call]:
        yield lambda: httpx.post(f"{job.url}/rerank", json=job.body).json()["results"]

    monkeypatch.setitem(subjects.FLOORS, "httpx", forgetful)
    (result,) = idle(server, peers=False, seconds=0.01)
    assert result.rounds["httpx"] == [1]
    assert result.rounds["RegoloClient"] == [0]


def test_a_load_is_counted(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rate of many calls at once is that of the requests that the server saw."""
    monkeypatch.setattr("benchmarks.waiting._SECONDS", 0.2)
    monkeypatch.setattr("benchmarks.waiting.ASYNC_FLOORS", {})
    monkeypatch.setattr("benchmarks.waiting.ASYNC_OURS", {"aiohttp": subjects.ASYNC_FLOORS["aiohttp"]})
    before, started = server.requests, time.perf_counter()
    _, rate = sustained(server, rounds=1, peers=False)
    seen, seconds = server.requests - before, time.perf_counter() - started
    # Two calls and 64 come before the load, which took less than all of the time.
    assert 64 < seen - 66 <= rate.rounds["aiohttp"][0] * seconds
    assert rate.rounds["aiohttp"][0] <= rate.rounds["the ideal"][0]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
def test_memory_grows_with_what_a_call_holds(server: Server) -> None:
    """A call that keeps all results holds more at its peak than one that keeps five."""
    best, everything = memory(server, rounds=1, count=20_000)
    assert 0 < best.rounds["RegoloClient"][0] < everything.rounds["RegoloClient"][0]
