import asyncio
import json
import multiprocessing
import random
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, closing, suppress
from pathlib import Path
from typing import Any

import pytest
from cachetools import LRUCache

from regolo_rerank import BadRequestError, RegoloClient, RerankCacheWarning
from tests.conftest import KEY, Rank
from tests.support.caches import TEXTS, Failing, Mapping, expected, opened, sent
from tests.support.inside import workers
from tests.support.many import Many
from tests.support.notebooks import fresh_kernels, ran
from tests.support.observed import soon
from tests.support.stores import SQLITE_SCORES, opened_sqlite
from tests.support.stub import Received, Reply, Stub, error, pairs, scored


class Door:
    """Keeps requests waiting in the server until it is opened."""

    def __init__(self, stub: Stub, reply: Callable[[Received], Reply] = scored) -> None:
        self._stub = stub
        self._open = threading.Event()
        self._reply = reply
        stub.reply = self._answer

    def _answer(self, request: Received) -> Reply:
        self._open.wait(20)
        return self._reply(request)

    def open(self) -> None:
        self._open.set()

    def open_when_reached(self) -> None:
        """Open once a request has come, and all other calls had time to come too."""
        assert soon(lambda: self._stub.received)
        time.sleep(0.02)
        self._open.set()


HOW = pytest.mark.parametrize("how", ["threads", "tasks", "threads and loops"])


def at_once(how: str, client: RegoloClient, asked: list[list[str]], meanwhile: Callable[[], object]) -> list[Any]:
    """Rank lists of texts at the same time; return what each comes to, errors too.

    Args:
        how: In threads, in tasks of one event loop, or in threads of which every second has a loop of its own.
        client: Who ranks.
        asked: The lists of texts.
        meanwhile: Called in a thread of its own once all are under way.
    """

    async def tasks() -> list[Any]:
        under_way = [asyncio.create_task(client.arerank("q", texts)) for texts in asked]
        await asyncio.to_thread(meanwhile)
        return await asyncio.gather(*under_way, return_exceptions=True)

    if how == "tasks":
        return asyncio.run(tasks())
    with ThreadPoolExecutor(len(asked) + 1) as threads:
        futures = [
            threads.submit(asyncio.run, client.arerank("q", texts))
            if number % 2 and how == "threads and loops"
            else threads.submit(client.rerank, "q", texts)
            for number, texts in enumerate(asked)
        ]
        threads.submit(meanwhile).result()
        return [future.exception() or future.result() for future in futures]


@HOW
@pytest.mark.parametrize("kind", ["dict", "LRUCache(1)", "failing"])
def test_calls_at_once_rank_right(how: str, stub: Stub, kind: str) -> None:
    """Calls that go on at once and share some of their pairs rank right, whatever the mapping keeps."""
    random_ = random.Random(how)  # noqa: S311 - cases, not secrets
    texts = [f"text {number}" for number in range(20)]
    asked = [random_.sample(texts, 8) for _ in range(12)]
    kinds: dict[str, Callable[[], Mapping]] = {
        "dict": dict,
        "LRUCache(1)": lambda: LRUCache(1),
        "failing": lambda: Failing("get", OSError()),
    }
    door = Door(stub)
    with opened(stub, kinds[kind](), batch_size=3) as client, warnings.catch_warnings():
        warnings.simplefilter("ignore", RerankCacheWarning)
        responses = at_once(how, client, asked, door.open_when_reached)
    assert [pairs(response.results) for response in responses] == list(map(expected, asked))


MANY = pytest.mark.parametrize("mode", ["sync", "async", "sync in a loop"])


@MANY
@pytest.mark.parametrize("max_concurrency", [1, 3])
def test_repeated_queries_are_sent_once(mode: str, stub: Stub, max_concurrency: int) -> None:
    """A file of queries with repetitions, farther apart than is read ahead, costs each pair once."""
    ahead = [("q", [f"text {number}"]) for number in range(4 * max_concurrency)]
    source = [("q", TEXTS), ("other", TEXTS), *ahead, ("q", TEXTS[1:]), ("other", TEXTS[::-1]), *ahead]
    stub.reply = lambda request: Reply(scored(request).body, delay=0.005)
    with opened(stub, {}) as client:
        responses = Many(mode)(client, source, max_concurrency=max_concurrency)
    assert [pairs(response.results) for response in responses] == [expected(texts) for _, texts in source]
    assert len(stub.received) == 2 + len(ahead)
    assert sent(stub) == {**dict.fromkeys(TEXTS, 2), **{text: 1 for _, (text,) in ahead}}


@MANY
def test_many_queries_that_fail_leave_the_rest_known(mode: str, stub: Stub) -> None:
    """With return_exceptions, a query that fails is asked again by its repetition, and all others are known."""
    failures = iter([error("no", 400)])
    stub.reply = lambda request: (next(failures, None) if "b" in request.documents else None) or scored(request)
    with opened(stub, {}) as client:
        source = [("q", ["a"]), ("q", ["b"]), ("q", ["c"]), ("q", ["b"]), ("q", ["a"])]
        outcomes = Many(mode)(client, source, return_exceptions=True, max_concurrency=1)
        assert [type(outcome).__name__ == "RerankResponse" for outcome in outcomes] == [True, False, True, True, True]
        assert all(response.usage.requests == 0 for response in Many(mode)(client, source))
    assert sent(stub) == {"a": 1, "b": 2, "c": 1}


@pytest.mark.parametrize("end", [None, ZeroDivisionError])
def test_what_was_read_ahead_is_given_up(mode: str, stub: Stub, end: type[Exception] | None) -> None:
    """Of a loop over many queries that ends early, what came back by then is known, and the rest can be asked for."""
    source = [("q", [f"text {number}"]) for number in range(40)]

    def leave() -> None:
        if end is not None:
            raise end

    def run() -> None:
        with closing(client.rerank_many(source)) as ranked:
            next(ranked)
            leave()

    async def arun() -> None:
        async with aclosing(client.arerank_many(source)) as ranked:
            await anext(ranked)
            leave()

    with opened(stub, {}) as client:
        with suppress(ZeroDivisionError):
            run() if mode == "sync" else asyncio.run(arun())
        requests = [response.usage.requests for response in Many(mode)(client, source)]
    assert requests[0] == 0
    assert requests[20:] == [1] * 20  # at most 16 are read ahead


@pytest.mark.parametrize("first", ["known", "empty"])
def test_a_single_worker_outlasts_what_sends_nothing(mode: str, stub: Stub, first: str) -> None:
    """A query without requests does not count as a worker's end: the next one may be refused as one too many."""
    with opened(stub, {}) as client:
        client.rerank("q", ["a"])
        stub.script(error("Limit type: max_parallel_requests", 429))
        source = [("q", ["a"] if first == "known" else []), ("q", ["b"])]
        responses = Many(mode)(client, source, max_concurrency=1)
    assert [response.usage.requests for response in responses] == [0, 2]


@pytest.mark.parametrize("workers", [1, 3])
def test_a_failed_call_keeps_what_it_has_learnt(rank: Rank, stub: Stub, workers: int) -> None:
    """Batches that came back good before another failed are not paid for again."""
    refused = Reply(error("no", 400).body, 400, delay=0.2)
    stub.reply = lambda request: refused if "c" in request.documents else scored(request)
    with opened(stub, {}, batch_size=1, max_concurrency=workers) as client:
        with pytest.raises(BadRequestError):
            rank(client, "q", ["a", "b", "c"])
        stub.reply = scored
        assert rank(client, "q", ["a", "b", "c"]).usage.requests == 1


def test_a_mapping_is_used_in_the_callers_thread_only(stub: Stub) -> None:
    """What a thread of a failed call receives late is not written behind the caller's back."""
    users: set[threading.Thread] = set()
    answered = threading.Event()

    class Watched(dict[str, float]):
        def get(self, key: str, default: Any = None) -> Any:
            users.add(threading.current_thread())
            return super().get(key, default)

        def __setitem__(self, key: str, score: float) -> None:
            users.add(threading.current_thread())
            super().__setitem__(key, score)

    def answer(request: Received) -> Reply:
        assert soon(lambda: len(stub.received) == 3)
        if "b" in request.documents:
            answered.wait(10)
        return error("no", 400) if "a" in request.documents else scored(request)

    stub.reply = answer
    known = Watched()
    with opened(stub, known, batch_size=1) as client:
        with pytest.raises(BadRequestError):
            client.rerank("q", ["a", "b", "c"])
        before = len(known)
        answered.set()
        assert soon(lambda: not workers())
    assert users == {threading.current_thread()}
    assert len(known) == before


def test_a_forked_process_waits_for_nobody(stub: Stub) -> None:
    """A child ranks at once, whatever its parent's threads were doing with the same pairs and the same mapping."""
    door = Door(stub)
    locked, unlock = threading.Event(), threading.Event()

    class Held(dict[str, float]):
        def get(self, key: str, default: Any = None) -> Any:
            if threading.current_thread().name == "holds":
                locked.set()
                unlock.wait(10)
            return super().get(key, default)

    with opened(stub, Held(), max_retry_seconds=60.0) as client:
        asks = threading.Thread(target=client.rerank, args=("q", TEXTS))
        asks.start()
        assert soon(lambda: stub.received)
        holds = threading.Thread(target=client.rerank, args=("q", ["other"]), name="holds")
        holds.start()
        assert locked.wait(5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # fork beside threads is what this is about
            child = multiprocessing.get_context("fork").Process(target=client.rerank, args=("q", TEXTS))
            child.start()
        came = soon(lambda: len(stub.received) == 2)
        door.open()
        unlock.set()
        child.join(10)
        child.kill()
        assert came
        assert child.exitcode == 0
        asks.join()
        holds.join()


SCRIPT = f"""
{SQLITE_SCORES}
import sys
from contextlib import closing

path, url = sys.argv[1:]
with closing(SQLiteScores(path)) as known, RegoloClient(base_url=url, cache=known, batch_size=5) as client:
    response = client.rerank("q", [f"text {{number}}" for number in range(40)])
    print([(result.index, result.relevance_score) for result in response.results])
"""


def test_processes_share_a_cache_on_disk(stub: Stub, tmp_path: Path) -> None:
    """Two processes at once use one table in SQLite, and each has the same ranking as without."""
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "scores"), stub.url]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]  # noqa: S603 - our own
    printed = [process.communicate(timeout=30)[0] for process in running]
    with RegoloClient(KEY, base_url=stub.url) as client:
        ranking = pairs(client.rerank("q", [f"text {number}" for number in range(40)]).results)
    assert [json.loads(text.replace("(", "[").replace(")", "]")) for text in printed] == [
        [list(pair) for pair in ranking]
    ] * 2
    with opened_sqlite(tmp_path / "scores") as known:
        assert len(known) == 40


CELLS = [
    f"""{SQLITE_SCORES}
texts = [f"text {{number}}" for number in range(5)]
client = RegoloClient(cache=SQLiteScores("scores"))""",
    'client.rerank("q", texts).results',
    '(await client.arerank("r", texts)).results',
    '[response.results for response in client.rerank_many([("s", texts), ("t", texts)])]',
]


def test_a_notebook_that_runs_twice_sends_nothing_the_second_time(
    stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In two kernels, one after the other, every cell shows the same, and only the first kernel sends anything."""
    fresh_kernels(tmp_path, monkeypatch)
    monkeypatch.setenv("REGOLO_API_KEY", KEY)
    monkeypatch.setenv("REGOLO_BASE_URL", stub.url)
    shown, received = [], []
    for _ in range(2):
        shown.append([cell.outputs for cell in ran(CELLS, tmp_path)])
        received.append(len(stub.received))
    assert received == [4, 4]
    assert shown[0] == shown[1]
    assert all(shown[0][1:])


def test_a_call_in_an_event_loop_that_stands_still_holds_up_no_other(stub: Stub) -> None:
    """A pair that an async call has asked for is asked for again while its loop does not run."""
    stub.reply = lambda request: Reply(scored(request).body, delay=0.1)
    loop = asyncio.new_event_loop()
    client = opened(stub, {}, max_retry_seconds=30.0)
    paused = loop.create_task(client.arerank("q", ["a"]))
    loop.run_until_complete(asyncio.sleep(0.05))
    started = time.monotonic()
    ranked = client.rerank("q", ["a"])
    assert time.monotonic() - started < 5
    assert len(stub.received) == 2
    assert loop.run_until_complete(paused).results == ranked.results
    loop.run_until_complete(client.aclose())
    loop.close()
