import asyncio
import copy
import gc
import itertools
import logging
import os
import pickle
import pty
import random
import signal
import subprocess
import sys
import termios
import threading
import time
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, closing, suppress
from contextvars import ContextVar
from pathlib import Path
from traceback import walk_tb
from typing import Any

import httpx
import nbformat
import pytest
from ipykernel.kernelspec import write_kernel_spec
from nbclient import NotebookClient

from regolo_rerank import (
    BadRequestError,
    InvalidInputError,
    MissingAPIKeyError,
    RegoloClient,
    RegoloError,
    RerankResponse,
)
from regolo_rerank._core import calls
from tests.conftest import KEY
from tests.support.observed import asoon, sockets, soon
from tests.support.stub import Received, Reply, Stub, crowded, error, scored

Pair = tuple[str, list[str]]

ROOT = Path(__file__).parents[2]


class Many:
    """Runs `rerank_many` or `arerank_many`, and sees to it that no task outlives the loop over it.

    Args:
        mode: "sync", "async", or "async source", where the pairs come from an async generator too.
    """

    def __init__(self, mode: str) -> None:
        self.mode = mode

    def __call__(
        self,
        client: RegoloClient,
        source: Any,
        *,
        into: list[Any] | None = None,
        stop: int | None = None,
        until: Callable[[], bool] = lambda: True,
        **arguments: Any,
    ) -> list[Any]:
        """Return the outcomes, put `into` a list one by one; leave after `stop`, and go on only when `until` holds."""
        outcomes = [] if into is None else into
        if self.mode != "sync":
            asyncio.run(self.consumed(client, source, outcomes, stop, until, **arguments))
            return outcomes
        ranked: Any = client.rerank_many(source, **arguments)
        with closing(ranked):
            for outcome in ranked:
                outcomes.append(outcome)
                if len(outcomes) == stop:
                    break
                assert soon(until)
        return outcomes

    async def consumed(
        self,
        client: RegoloClient,
        source: Any,
        outcomes: list[Any],
        stop: int | None = None,
        until: Callable[[], bool] = lambda: True,
        **arguments: Any,
    ) -> None:
        """Do the same in a running event loop."""
        before = asyncio.all_tasks()
        if self.mode == "async source" and not isinstance(source, AsyncIterator):
            source = awaited(source)
        ranked: Any = client.arerank_many(source, **arguments)
        try:
            async with aclosing(ranked):
                async for outcome in ranked:
                    outcomes.append(outcome)
                    if len(outcomes) == stop:
                        break
                    assert await asoon(until)
        finally:
            await asyncio.sleep(0)
            assert asyncio.all_tasks() <= before
            await client.aclose()


async def awaited(items: Iterable[Any]) -> AsyncIterator[Any]:
    """Give items as an async generator that lets others run before each of them."""
    for item in items:
        await asyncio.sleep(0)
        yield item


def workers() -> list[threading.Thread]:
    """Return the threads of ours that are alive."""
    return [thread for thread in threading.enumerate() if thread.name == "regolo_rerank"]


def small(index: int) -> Pair:
    """Return a query of one request."""
    return f"query {index}", [f"{index} a score={index % 7 / 7}", f"{index} b score=0.5"]


def large(index: int, size: int) -> Pair:
    """Return a query of as many documents."""
    return f"query {index}", [f"{index} {number} score={number / size}" for number in range(size)]


def smalls(count: int) -> list[Pair]:
    """Return so many small queries."""
    return [small(index) for index in range(count)]


def queries(stub: Stub) -> list[str]:
    """Return the query of each request so far."""
    return [request.json["query"].rpartition(": ")[2] for request in stub.received]


def essence(outcome: Any) -> Any:
    """Return what of a response is the same each time."""
    assert isinstance(outcome, RerankResponse)
    return outcome.results, outcome.usage


def slowly(delay: float) -> Callable[[Received], Reply]:
    """Return what answers as the service does, after so many seconds."""
    return lambda request: Reply(scored(request).body, delay=delay)


def fails_on(word: str, delay: float = 0.0) -> Callable[[Received], Reply]:
    """Return what refuses a query that has the word, at once, and answers the others after so many seconds."""

    def reply(request: Received) -> Reply:
        if word in request.json["query"]:
            return error("bad query", 400)
        return Reply(scored(request).body, delay=delay)

    return reply


any_source = pytest.mark.parametrize("mode", ["sync", "async", "async source"])


@pytest.fixture
def many(mode: str) -> Many:
    """Call a client in every way."""
    return Many(mode)


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    """After each test, the threads of ours end by themselves."""
    yield
    assert soon(lambda: not workers())


# --- what comes out ---------------------------------------------------------------------------------------------------


@any_source
@pytest.mark.parametrize(
    ("max_concurrency", "arguments"), [(1, {}), (3, {"top_n": 3}), (2, {"top_n": 40, "score_threshold": 0.5})]
)
def test_it_gives_what_one_call_after_another_gives(
    many: Many, stub: Stub, max_concurrency: int, arguments: dict[str, Any]
) -> None:
    """Random queries, whatever their sizes and the order of the replies, give what `rerank` gives for each."""
    chance = random.Random(f"{max_concurrency} {arguments}")  # noqa: S311 - a test's inputs
    words = [*map(str, range(30)), "", "  ", "again", "again"]
    source = [
        (f"query {index}", [chance.choice(words) for _ in range(chance.choice([0, 1, 2, 5, 30]))])
        for index in range(20)
    ]
    stub.reply = lambda request: Reply(scored(request).body, delay=chance.choice([0, 0, 0.001, 0.01]))
    with RegoloClient(KEY, base_url=stub.url, batch_size=8) as client:
        got = many(client, iter(source), max_concurrency=max_concurrency, **arguments)
        sent = len(stub.received)
        assert list(map(essence, got)) == [essence(client.rerank(*pair, **arguments)) for pair in source]
    assert len(stub.received) == 2 * sent


def test_order_is_kept_while_later_queries_overtake(many: Many, client: RegoloClient, stub: Stub) -> None:
    """A slow query holds later ones back, but neither their sending nor their order."""
    stub.reply = lambda request: Reply(scored(request).body, delay=0.3 if "query 1" in request.json["query"] else 0)
    got = many(client, smalls(6))
    assert [response.results[0].document[0] for response in got] == list("012345")
    arrived = dict(zip(queries(stub), (request.at for request in stub.received), strict=True))
    assert max(arrived.values()) - arrived["query 1"] < 0.3


def test_every_argument_reaches_every_request(many: Many, client: RegoloClient, stub: Stub) -> None:
    """The arguments that `rerank` takes hold for all pairs."""
    many(client, smalls(3), top_n=1, model="m", instruction="Find it.", extra_body={"user": "u"})
    for request in stub.received:
        assert {**request.json, "documents": [], "query": ""} == {
            "model": "m",
            "query": "",
            "documents": [],
            "top_n": 1,
            "user": "u",
        }


SOURCES: dict[str, Callable[[list[Pair]], Any]] = {
    "list": list,
    "tuple": tuple,
    "deque": deque,
    "iterator": iter,
    "items of a dict": lambda pairs: dict(pairs).items(),
    "columns": lambda pairs: zip((query for query, _ in pairs), (documents for _, documents in pairs), strict=True),
}


@any_source
@pytest.mark.parametrize("count", [0, 3])
@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES.keys())
def test_pairs_come_in_any_iterable_with_an_order(
    many: Many, client: RegoloClient, stub: Stub, source: Callable[[list[Pair]], Any], count: int
) -> None:
    """One ranking comes out for each pair; no pairs give none, and send nothing."""
    assert len(many(client, source(smalls(count)))) == count
    assert len(stub.received) == count


def test_local_needs_no_server(many: Many) -> None:
    """The embedded endpoint answers many queries too, with the caller's scorer."""
    client = RegoloClient(base_url="local://", scorer=lambda query, texts: [len(query) - len(text) for text in texts])
    got = many(client, (("a" * length, ["bb", "b", ""]) for length in range(1, 40)))
    assert [[result.relevance_score for result in response.results[:2]] for response in got] == [
        [length - 1, length - 2] for length in range(1, 40)
    ]


def test_with_a_cache_equal_queries_are_sent_once(many: Many, stub: Stub) -> None:
    """Queries that repeat within the window, whatever becomes of the first of them, neither hang nor are sent twice."""
    stub.reply = fails_on("query 1", delay=0.005)
    source = [small(index % 3) for index in range(30)]
    with RegoloClient(KEY, base_url=stub.url, cache={}) as client:
        got = many(client, source, return_exceptions=True)
    assert [isinstance(outcome, BadRequestError) for outcome in got] == [False, True, False] * 10
    assert sorted(queries(stub)) == ["query 0"] + ["query 1"] * 10 + ["query 2"]


def test_with_a_cache_what_was_given_up_can_be_asked_for_again(many: Many, stub: Stub) -> None:
    """Leaving the loop lets go of the pairs that were under way: the next call does not wait for them."""
    stub.reply = slowly(0.005)
    with RegoloClient(KEY, base_url=stub.url, cache={}, max_retry_seconds=9) as client:
        many(client, smalls(12), stop=1)
        started = time.monotonic()
        assert len(many(client, smalls(12))) == 12
        assert time.monotonic() - started < 5


# --- in flight --------------------------------------------------------------------------------------------------------

SHAPES: dict[str, list[Pair]] = {
    "many small ones": smalls(20),
    "a large one last": [*smalls(4), large(4, 12)],
    "large ones only": [large(index, 10) for index in range(2)],
}


@pytest.mark.parametrize("max_concurrency", [1, 4])
@pytest.mark.parametrize("source", SHAPES.values(), ids=SHAPES.keys())
def test_as_many_requests_are_in_flight_as_allowed(
    many: Many, stub: Stub, source: list[Pair], max_concurrency: int
) -> None:
    """All workers are busy, never more than `max_concurrency`, and the whole takes far less than one after another."""
    delay = 0.005 if max_concurrency == 1 else 0.06
    stub.reply = slowly(delay)
    with RegoloClient(KEY, base_url=stub.url, batch_size=1 if source != SHAPES["many small ones"] else 9) as client:
        started = time.monotonic()
        got = many(client, source, max_concurrency=max_concurrency)
        took = time.monotonic() - started
    assert len(got) == len(source)
    assert stub.most_at_once == max_concurrency
    assert took < 0.75 * len(stub.received) * delay or max_concurrency == 1


def test_one_at_a_time_needs_no_thread() -> None:
    """With `max_concurrency=1` a sync call sends in the caller's own thread, and reads a pair when it is its turn."""
    threads: set[threading.Thread] = set()
    behind: list[int] = []

    def source() -> Iterator[Pair]:
        for index in range(5):
            behind.append(index - len(got))
            yield small(index)

    def scorer(_: str, documents: list[str]) -> list[float]:
        threads.add(threading.current_thread())
        return [0.0] * len(documents)

    got: list[RerankResponse] = []
    Many("sync")(RegoloClient(base_url="local://", scorer=scorer), source(), into=got, max_concurrency=1)
    assert threads == {threading.current_thread()}
    assert behind == [0] * 5


def test_a_limit_on_parallel_requests_is_kept_to(many: Many, stub: Stub) -> None:
    """Refused for too many requests in flight, it goes on with fewer over all queries, and loses nothing."""
    stub.allow(2, delay=0.01)
    with RegoloClient(KEY, base_url=stub.url, batch_size=2, max_concurrency=6) as client:
        got = many(client, [*smalls(20), large(20, 20), *smalls(20)])
    assert [len(response.results) for response in got] == [2] * 20 + [20] + [2] * 20
    assert len(stub.received) <= 50 + 8


def test_a_limit_that_is_lifted_is_found_out(many: Many, stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some time after a refusal one more request is tried at once, and then another, up to `max_concurrency`."""
    monkeypatch.setattr(calls, "_FORGETS_AFTER", 0.05)
    limit = 1
    refused: list[int] = []
    busy: list[int] = []

    def limited(request: Received) -> Reply:
        busy.append(stub.at_once)
        if stub.at_once > limit:
            refused.append(len(stub.received))
            return crowded(limit)
        return Reply(scored(request).body, delay=0.02)

    got: list[Any] = []

    def lifted() -> bool:
        nonlocal limit
        if len(got) == 8:
            limit = 4
            busy.clear()
        return True

    stub.reply = limited
    with RegoloClient(KEY, base_url=stub.url, max_concurrency=4) as client:
        many(client, smalls(70), into=got, until=lifted)
    assert len(got) == 70
    assert refused
    assert 3 <= max(busy) <= 4


def test_a_rate_limit_holds_all_queries_back(many: Many, client: RegoloClient, stub: Stub) -> None:
    """After a 429 that names a time no query of the call is sent until then, and none is lost."""
    stub.reply = slowly(0.02)
    stub.script(Reply({"error": "slow down"}, 429, {"retry-after": "0.3"}))
    assert len(many(client, smalls(12))) == 12
    refused = stub.received[0].at
    assert len(stub.received) == 13
    assert sum(request.at - refused < 0.3 for request in stub.received) <= 8  # in flight, or sent before it was read


# --- the window -------------------------------------------------------------------------------------------------------


class Endless:
    """Pairs without end, which knows how far it was read ahead of the outcomes.

    Attributes:
        got: The outcomes.
        ahead: How many pairs had been read without an outcome, at most.
    """

    def __init__(self) -> None:
        self.got: list[Any] = []
        self.ahead = 0

    def __iter__(self) -> Iterator[Pair]:
        for index in itertools.count():
            self.ahead = max(self.ahead, index + 1 - len(self.got))
            yield small(index)


@any_source
@pytest.mark.parametrize(("max_concurrency", "delay"), [(1, 0), (4, 0), (3, 0.01)])
def test_an_endless_source_is_read_a_window_ahead(many: Many, stub: Stub, max_concurrency: int, delay: float) -> None:
    """No more than 4 x `max_concurrency` pairs are read ahead; leaving the loop ends all, and sends nothing more."""
    stub.reply = slowly(delay)
    source = Endless()
    with RegoloClient(KEY, base_url=stub.url) as client:
        many(client, iter(source), into=source.got, stop=20, max_concurrency=max_concurrency)
        sent = len(stub.received)
        time.sleep(0.05)
    assert len(source.got) == 20
    assert source.ahead <= 4 * max_concurrency
    assert source.ahead >= (max_concurrency if delay else 1)  # a server that takes no time may keep up with the reading
    assert len(stub.received) <= sent + max_concurrency  # those on their way into the server
    assert soon(lambda: stub.at_once == 0)


def test_a_slow_consumer_idles_nobody(many: Many, stub: Stub) -> None:
    """While the consumer is busy, all that was read is sent, and no more than the window is read."""
    source = Endless()

    def reply(request: Received) -> Reply:
        assert soon(lambda: source.ahead >= 8)  # a sync call gives a ranking that is there before it reads on
        return Reply(scored(request).body, delay=0.01)

    stub.reply = reply
    with RegoloClient(KEY, base_url=stub.url, max_concurrency=2) as client:
        many(
            client,
            iter(source),
            into=source.got,
            stop=4,
            until=lambda: len(stub.received) >= len(source.got) + 7 and not stub.at_once,
        )
    assert source.ahead == 8


def test_a_slow_source_holds_no_ranking_back(client: RegoloClient) -> None:
    """In a sync call a ranking that is there is given before more pairs are asked for."""
    got: list[RerankResponse] = []
    behind: list[int] = []

    def source() -> Iterator[Pair]:
        for index in range(10):
            behind.append(index - len(got))
            assert soon(lambda: not workers())
            yield small(index)

    Many("sync")(client, source(), into=got)
    assert len(got) == 10
    assert max(behind) == 1


def test_an_async_source_may_wait_for_the_rankings(client: RegoloClient) -> None:
    """In an async call a ranking is given as soon as it is there, even while the source waits for it to be."""
    got: list[RerankResponse] = []

    async def source() -> AsyncIterator[Pair]:
        for index in range(10):
            assert await asoon(lambda: len(got) == index)  # noqa: B023 - awaited before the next turn
            yield small(index)

    Many("async source")(client, source(), into=got)
    assert len(got) == 10


# --- nothing left behind ----------------------------------------------------------------------------------------------


class Text(str):
    """A string that can be watched."""

    __slots__ = ("__weakref__",)


class Watched:
    """Pairs whose documents are watched.

    Attributes:
        texts: What tells whether each document is alive.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.texts: list[weakref.ref[Text]] = []

    def __iter__(self) -> Iterator[Pair]:
        for index in range(self.count):
            query, documents = small(index)
            texts = [Text(document) for document in documents]
            self.texts += map(weakref.ref, texts)
            yield query, list[str](texts)
            del texts

    @property
    def alive(self) -> int:
        """How many documents are alive."""
        return sum(text() is not None for text in self.texts)


@any_source
def test_a_ranking_that_was_given_is_forgotten(many: Many) -> None:
    """Only the documents in the window, and those just given, are in memory, without help of the garbage collector."""
    source = Watched(200)
    got: list[Any] = []
    most = 0

    def forgotten() -> bool:
        nonlocal most
        got[:-1] = [None] * (len(got) - 1)
        most = max(most, source.alive)
        return True

    client = RegoloClient(base_url="local://", scorer=lambda _, texts: [0.5] * len(texts), max_concurrency=2)
    gc.collect()
    gc.disable()
    try:
        many(client, iter(source), into=got, until=forgotten)
        assert len(source.texts) == 400
        got.clear()
        assert soon(lambda: source.alive == 0)
    finally:
        gc.enable()
    assert most <= 2 * (8 + 2 + 3)  # the window, the workers' last ones, and what is being read and given


@pytest.mark.parametrize("max_concurrency", [1, 2])
def test_an_error_that_is_kept_keeps_no_document(many: Many, stub: Stub, max_concurrency: int) -> None:
    """The errors of a long run can be collected: the documents of their queries, and of others, are freed."""
    stub.reply = fails_on("5")
    source = Watched(40)
    with RegoloClient(KEY, base_url=stub.url) as client:
        got = many(client, iter(source), return_exceptions=True, max_concurrency=max_concurrency)
    failed = [outcome for outcome in got if isinstance(outcome, RegoloError)]
    del got[:]
    assert len(failed) == 4
    assert soon(lambda: not workers())
    gc.collect()
    assert source.alive == 0


@pytest.mark.parametrize("return_exceptions", [True, False])
def test_no_frame_of_an_error_holds_a_reply(many: Many, stub: Stub, *, return_exceptions: bool) -> None:
    """What a server says, perhaps with the key in it, is in no variable behind an error, as with one query."""
    stub.always(Reply({"detail": f"no {KEY}"}, 400))

    def failed() -> RegoloError:
        with RegoloClient(KEY, base_url=stub.url) as client:
            try:
                error: RegoloError = many(client, smalls(3), return_exceptions=return_exceptions)[0]
            except RegoloError as raised:
                error = raised
        return error

    link: BaseException | None = failed()
    while link is not None:
        for frame, _ in walk_tb(link.__traceback__):
            if "regolo_rerank" in frame.f_code.co_filename:
                assert not [name for name, value in frame.f_locals.items() if isinstance(value, bytes | bytearray)]
        link = link.__cause__ or link.__context__


def test_no_socket_is_left(many: Many, stub: Stub) -> None:
    """Left early or not, a call leaves no connection open once its client is closed."""
    before = sockets()
    for stop in (None, 1, 5):
        with RegoloClient(KEY, base_url=stub.url) as client:
            many(client, smalls(20), stop=stop)
    assert soon(lambda: sockets() <= before)


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "dropped"])
@pytest.mark.parametrize("asynchronous", [True, False], ids=["async source", "list"])
def test_a_loop_left_by_break_alone_makes_no_noise(
    stub: Stub, caplog: pytest.LogCaptureFixture, *, kept: bool, asynchronous: bool
) -> None:
    """Without `aclosing`, what is under way ends with the event loop, and nothing is logged."""
    stub.reply = slowly(0.02)
    keeping: list[Any] = []

    async def left(client: RegoloClient) -> None:
        ranked = client.arerank_many(awaited(smalls(20)) if asynchronous else smalls(20))
        if kept:
            keeping.append(ranked)
        async for _ in ranked:
            break
        del ranked

    with RegoloClient(KEY, base_url=stub.url) as client:
        asyncio.run(left(client))
    gc.collect()
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert len(stub.received) <= 20


def test_an_iterator_that_is_dropped_ends_all(client: RegoloClient, stub: Stub) -> None:
    """A sync iterator that nobody holds any more sends nothing more, whether or not it was begun."""
    stub.reply = slowly(0.02)
    client.rerank_many(smalls(20))
    assert not stub.received
    next(client.rerank_many(smalls(20)))
    sent = len(stub.received)
    time.sleep(0.1)
    assert len(stub.received) <= sent + 4


# --- errors -----------------------------------------------------------------------------------------------------------

BAD_PAIRS: dict[str, tuple[Any, str]] = {
    "a number": (1, r"pairs\[2\]: must be \(query, documents\), got int"),
    "a string of two": ("ab", r"pairs\[2\]: must be \(query, documents\), got str"),
    "a triple": (("a", ["b"], ["c"]), r"pairs\[2\]: must be \(query, documents\), got "),
    "nothing": (None, r"pairs\[2\]: must be \(query, documents\), got NoneType"),
    "a dict": ({"query": "a", "documents": ["b"]}, r"pairs\[2\]: must be \(query, documents\), got dict"),
    "a blank query": ((" ", ["b"]), r"pairs\[2\]: query: must not be blank"),
    "a query of bytes": ((b"a", ["b"]), r"pairs\[2\]: query: must be a string, got bytes"),
    "a single document": (("a", "b"), r"pairs\[2\]: documents: must be a list of str, got str"),
    "documents without order": (("a", {"b"}), r"pairs\[2\]: documents: must be a list of str, got set"),
    "a document of bytes": (("a", ["b", b"c"]), r"pairs\[2\]: documents\[1\]: must be str, got bytes"),
    "a query that fills a request": (("a" * 999, ["b"]), r"pairs\[2\]: query: .* max_request_bytes=900"),
}


@pytest.mark.parametrize(("pair", "words"), BAD_PAIRS.values(), ids=BAD_PAIRS.keys())
def test_a_bad_pair_is_named_in_its_place(many: Many, stub: Stub, pair: Any, words: str) -> None:
    """A pair that is wrong gives its error in its place, raised or returned, and stops no other one."""
    with RegoloClient(KEY, base_url=stub.url, max_request_bytes=900) as client:
        got = many(client, [small(0), small(1), pair, small(3)], return_exceptions=True)
        with pytest.raises(InvalidInputError, match=words):
            raise got.pop(2)
        assert list(map(essence, got)) == [essence(client.rerank(*small(index))) for index in (0, 1, 3)]
        del got[:]
        with pytest.raises(InvalidInputError, match=words):
            many(client, [small(0), small(1), pair, small(3)], into=got)
        assert len(got) == 2


@pytest.mark.parametrize("max_concurrency", [1, 2, 4])
def test_returned_errors_stop_no_other_query(many: Many, stub: Stub, max_concurrency: int) -> None:
    """Each query that the service refuses gives its error in its place; all others are ranked."""
    stub.reply = fails_on("5", delay=0.002)
    source = [large(index, index % 4) for index in range(60)]
    with RegoloClient(KEY, base_url=stub.url, batch_size=2) as client:
        got = many(client, source, return_exceptions=True, max_concurrency=max_concurrency)
    assert len(got) == 60
    for (query, documents), outcome in zip(source, got, strict=True):
        if "5" in query and documents:
            assert isinstance(outcome, BadRequestError)
        else:
            assert len(outcome.results) == len(documents)


@pytest.mark.parametrize("max_concurrency", [1, 3])
def test_a_raised_error_comes_after_the_earlier_rankings(many: Many, stub: Stub, max_concurrency: int) -> None:
    """However late the earlier replies are, they come first; after the error the iterator is over, and nothing sent."""
    stub.reply = fails_on("query 7", delay=0.02)
    source = Endless()
    with RegoloClient(KEY, base_url=stub.url) as client:
        with pytest.raises(BadRequestError, match="bad query"):
            many(client, iter(source), into=source.got, max_concurrency=max_concurrency)
        sent = len(stub.received)
        time.sleep(0.1)
    assert len(source.got) == 7
    assert len(stub.received) <= sent + max_concurrency
    assert source.ahead <= 4 * max_concurrency


def test_an_iterator_that_has_raised_is_over(many: Many, client: RegoloClient, stub: Stub) -> None:
    """After its error an iterator gives nothing more, as any generator."""
    stub.reply = fails_on("query 0")

    async def run() -> None:
        ranked = client.arerank_many(smalls(3))
        with pytest.raises(BadRequestError):
            await anext(ranked)
        with pytest.raises(StopAsyncIteration):
            await anext(ranked)

    if many.mode == "sync":
        ranked = client.rerank_many(smalls(3))
        with pytest.raises(BadRequestError):
            next(ranked)
        with pytest.raises(StopIteration):
            next(ranked)
    else:
        asyncio.run(run())


@any_source
@pytest.mark.parametrize("where", ["source", "documents"])
@pytest.mark.parametrize(("max_concurrency", "return_exceptions"), [(1, False), (3, True)])
@pytest.mark.parametrize("failure", [LookupError("lost"), RegoloError("lost")], ids=repr)
def test_an_error_of_the_source_comes_after_the_earlier_rankings(
    many: Many, stub: Stub, failure: Exception, max_concurrency: int, where: str, *, return_exceptions: bool
) -> None:
    """What the caller's own iterables raise is raised as it is, once all that was read before has been given."""

    def broken() -> Iterator[str]:
        yield "a"
        raise failure

    def source() -> Iterator[Any]:
        yield from smalls(4)
        if where == "documents":
            yield "query", broken()
        raise failure

    stub.reply = slowly(0.01)
    got: list[RerankResponse] = []
    with RegoloClient(KEY, base_url=stub.url) as client, pytest.raises(type(failure), match="lost"):
        many(client, source(), into=got, return_exceptions=return_exceptions, max_concurrency=max_concurrency)
    assert len(got) == 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"max_concurrency": 0}, "max_concurrency"),
        ({"max_concurrency": "x"}, "max_concurrency"),
        ({"top_n": 0}, "top_n"),
        ({"score_threshold": float("nan")}, "score_threshold"),
        ({"extra_body": {"query": "mine"}}, "extra_body"),
        *(({"pairs": pairs}, "pairs: must be an iterable of") for pairs in ("ab", b"ab", {"a": ["b"]}, {1}, 1, None)),
    ],
    ids=str,
)
def test_a_wrong_argument_is_refused_at_once(
    many: Many, client: RegoloClient, stub: Stub, arguments: dict[str, Any], words: str
) -> None:
    """A wrong argument is an error at the call, not at the first ranking."""
    call = client.rerank_many if many.mode == "sync" else client.arerank_many
    with pytest.raises(InvalidInputError, match=words):
        call(**{"pairs": smalls(1), **arguments})
    assert not stub.received


def test_a_missing_key_is_told_at_once(many: Many) -> None:
    """Without a key nothing is read from the source."""
    client = RegoloClient()
    source = iter(smalls(3))
    call = client.rerank_many if many.mode == "sync" else client.arerank_many
    with pytest.raises(MissingAPIKeyError):
        call(source)
    assert len(list(source)) == 3


@pytest.mark.parametrize("own", [True, False], ids=["own client", "caller's client"])
def test_options_are_those_of_the_call(many: Many, stub: Stub, *, own: bool) -> None:
    """What is assigned to the client between the call and its first ranking counts for later calls only."""
    headers = {"x-mine": "1"}

    async def run(client: RegoloClient) -> list[Any]:
        async with httpx.AsyncClient(headers=headers) as mine, client:
            client.async_http_client = None if own else mine
            ranked = client.arerank_many(smalls(3))
            client.async_http_client, client.model = mine if own else None, "other"
            return [response async for response in ranked]

    def run_sync(client: RegoloClient) -> list[Any]:
        with httpx.Client(headers=headers) as mine, client:
            client.http_client = None if own else mine
            ranked = client.rerank_many(smalls(3))
            client.http_client, client.model = mine if own else None, "other"
            return list(ranked)

    client = RegoloClient(KEY, base_url=stub.url)
    assert len(run_sync(client) if many.mode == "sync" else asyncio.run(run(client))) == 3
    assert {request.json["model"] for request in stub.received} == {"Qwen3-Reranker-4B"}
    assert {"x-mine" in request.headers for request in stub.received} == {not own}


# --- interrupted ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_concurrency", [1, 2])
def test_an_interrupt_in_the_loop_sends_nothing_more(client: RegoloClient, stub: Stub, max_concurrency: int) -> None:
    """KeyboardInterrupt in the consumer's own code ends what is under way."""
    stub.reply = slowly(0.02)

    def consume() -> None:
        for _ in client.rerank_many(iter(Endless()), max_concurrency=max_concurrency):
            raise KeyboardInterrupt

    with suppress(KeyboardInterrupt):
        consume()
    sent = len(stub.received)
    assert soon(lambda: not workers())
    time.sleep(0.05)
    assert len(stub.received) <= sent + max_concurrency


@pytest.mark.parametrize("max_concurrency", [1, 2])
def test_an_interrupt_in_a_scorer_is_the_callers(max_concurrency: int) -> None:
    """KeyboardInterrupt in the caller's scorer comes out in its place, also where errors are returned."""

    def scorer(query: str, documents: list[str]) -> list[float]:
        if query == "query 3":
            raise KeyboardInterrupt
        return [0.0] * len(documents)

    got: list[Any] = []
    client = RegoloClient(base_url="local://", scorer=scorer)
    with pytest.raises(KeyboardInterrupt):
        Many("sync")(client, smalls(9), into=got, return_exceptions=True, max_concurrency=max_concurrency)
    assert len(got) == 3


INTERRUPTED = """
import asyncio, itertools, sys
from regolo_rerank import RegoloClient
client = RegoloClient("k", base_url=sys.argv[1], max_concurrency=int(sys.argv[3]))
pairs = ((str(index), ["a", "b"]) for index in itertools.count())
async def consume():
    async for response in client.arerank_many(pairs):
        pass
if sys.argv[2] == "sync":
    for response in client.rerank_many(pairs):
        pass
else:
    asyncio.run(consume())
"""


def own_process(code: str, *arguments: str, **options: Any) -> subprocess.Popen[str]:
    """Run code in a process of its own."""
    return subprocess.Popen(  # noqa: S603 - our own interpreter
        [sys.executable, "-c", code, *arguments],
        text=True,
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if not name.startswith("COV")},
        **options,
    )


@pytest.mark.parametrize(("way", "max_concurrency"), [("sync", "1"), ("sync", "3"), ("async", "3")])
def test_ctrl_c_ends_the_process_at_once(stub: Stub, way: str, max_concurrency: str) -> None:
    """Ctrl-C ends the process at once, whatever is in flight, with nothing but KeyboardInterrupt."""
    stub.reply = slowly(9)
    stub.script(*[Reply({}, 503, {"retry-after-ms": "1"})] * 3)
    process = own_process(INTERRUPTED, stub.url, way, max_concurrency, stderr=subprocess.PIPE)
    assert soon(lambda: len(stub.received) > 3)
    process.send_signal(signal.SIGINT)
    started = time.monotonic()
    _, errors = process.communicate(timeout=10)
    assert time.monotonic() - started < 3
    assert process.returncode == -signal.SIGINT
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert "never retrieved" not in errors


@pytest.mark.parametrize("max_concurrency", [1, 3])
@pytest.mark.parametrize("source", ["async", "async source"])
def test_a_consumer_can_be_cancelled_at_any_point(stub: Stub, source: str, max_concurrency: int) -> None:
    """Wherever the consuming task is cancelled, it ends as cancelled and leaves no task that could send."""
    stub.reply = slowly(0.001)

    async def cancelled(client: RegoloClient, turns: int) -> None:
        endless = Endless()
        consumer = asyncio.create_task(
            Many(source).consumed(client, iter(endless), endless.got, max_concurrency=max_concurrency)
        )
        for _ in range(turns):
            await asyncio.sleep(0)
        consumer.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(consumer, 5)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    async def run() -> None:
        for turns in [*range(25), *range(30, 200, 25)]:
            await cancelled(RegoloClient(KEY, base_url=stub.url), turns)

    asyncio.run(run())


@pytest.mark.parametrize("source", ["async", "async source"])
def test_a_task_that_somebody_else_cancels_hangs_nobody(stub: Stub, source: str) -> None:
    """Whichever task of ours a host cancels, the consumer ends as cancelled, and leaves no task."""
    stub.reply = slowly(0.05)

    async def run() -> None:
        for number in itertools.count():
            endless = Endless()
            before = asyncio.all_tasks()
            consumer = asyncio.create_task(
                Many(source).consumed(
                    RegoloClient(KEY, base_url=stub.url, max_concurrency=3), iter(endless), endless.got
                )
            )
            assert await asoon(lambda: len(endless.got) >= 2)  # noqa: B023 - awaited before the next turn
            ours = sorted(asyncio.all_tasks() - before - {consumer}, key=lambda task: task.get_name())
            if number >= len(ours):
                consumer.cancel()
                await asyncio.gather(consumer, return_exceptions=True)
                break
            ours[number].cancel()
            with pytest.raises(asyncio.CancelledError):
                await asyncio.wait_for(consumer, 5)
            assert asyncio.all_tasks() == before
        assert number >= 3

    asyncio.run(run())


# --- side by side -----------------------------------------------------------------------------------------------------


def test_two_iterators_go_side_by_side(many: Many, client: RegoloClient, stub: Stub) -> None:
    """Two calls on one client, taken in turns, keep apart."""
    stub.reply = slowly(0.002)
    sources = smalls(20), [large(index, 3) for index in range(20)]

    async def run() -> list[Any]:
        iterators: Any = [client.arerank_many(source) for source in sources]
        async with client, aclosing(iterators[0]) as first, aclosing(iterators[1]) as second:
            return [(await anext(first), await anext(second)) for _ in range(20)]

    taken = zip(*map(client.rerank_many, sources), strict=True)
    got = list(taken) if many.mode == "sync" else asyncio.run(run())
    for index, pair in enumerate(got):
        for source, response in zip(sources, pair, strict=True):
            assert sorted(result.document for result in response.results) == sorted(source[index][1])


def test_a_sync_call_works_inside_a_running_loop(client: RegoloClient) -> None:
    """Called by a coroutine, the sync form blocks it and works."""

    async def run() -> list[Any]:
        return list(client.rerank_many(smalls(9)))

    assert len(asyncio.run(run())) == 9


def test_several_threads_share_a_client(many: Many, client: RegoloClient) -> None:
    """Calls from several threads, each with an event loop of its own where there is one, keep apart."""
    with ThreadPoolExecutor(4) as threads:
        for size, got in enumerate(threads.map(lambda size: many(client, [large(0, size)] * 20), range(1, 5)), 1):
            assert [len(response.results) for response in got] == [size] * 20


def test_one_event_loop_after_another(client: RegoloClient) -> None:
    """A client's async calls work in each event loop anew."""
    for _ in range(3):
        assert len(Many("async")(client, smalls(9))) == 9


def pickled(client: RegoloClient) -> RegoloClient:
    """Return a client that went through a pickle."""
    loaded: RegoloClient = pickle.loads(pickle.dumps(client))  # noqa: S301 - our own
    return loaded


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_of_a_client_ranks_too(
    many: Many, client: RegoloClient, stub: Stub, copied: Callable[[RegoloClient], RegoloClient]
) -> None:
    """A copied client, even of one in the middle of a call, has connections of its own and works."""
    under_way = client.rerank_many(smalls(20))
    next(under_way)
    with copied(client.model_copy(update={"default_headers": {"x-copy": "1"}})) as other:
        other.api_key = client.api_key
        assert len(many(other, smalls(5))) == 5
    assert len(list(under_way)) == 19
    assert sum("x-copy" in request.headers for request in stub.received) == 5


def test_a_callers_own_http_client_serves_all_queries(many: Many, stub: Stub) -> None:
    """With a client of the caller's, all queries go over it, and it stays open."""
    options: dict[str, Any] = {"api_key": KEY, "base_url": stub.url, "max_concurrency": 3}

    async def run() -> list[Any]:
        async with httpx.AsyncClient(headers={"x-mine": "1"}) as mine:
            client = RegoloClient(async_http_client=mine, **options)
            got: list[Any] = []
            await many.consumed(client, smalls(20), got)
            assert not mine.is_closed
            return got

    if many.mode == "sync":
        with httpx.Client(headers={"x-mine": "1"}) as mine:
            got = many(RegoloClient(http_client=mine, **options), smalls(20))
            assert not mine.is_closed
    else:
        got = asyncio.run(run())
    assert len(got) == 20
    assert {request.headers.get("x-mine") for request in stub.received} == {"1"}
    assert stub.connections <= 3


WHO: ContextVar[str] = ContextVar("who", default="nobody")


@pytest.mark.parametrize("max_concurrency", [1, 3])
def test_a_scorer_sees_the_callers_context(many: Many, max_concurrency: int) -> None:
    """Context variables of whoever iterates are there in a scorer on this machine, so that traces nest."""
    seen: set[str] = set()

    def scorer(_: str, documents: list[str]) -> list[float]:
        seen.add(WHO.get())
        return [0.0] * len(documents)

    token = WHO.set("me")
    try:
        many(RegoloClient(base_url="local://", scorer=scorer), smalls(12), max_concurrency=max_concurrency)
    finally:
        WHO.reset(token)
    assert seen == {"me"}


# --- progress ---------------------------------------------------------------------------------------------------------

SHOWS = """
import asyncio, sys
from regolo_rerank import RegoloClient
client = RegoloClient(base_url="local://", scorer=lambda query, documents: [0.5] * len(documents))
pairs = [("q", ["a"])] * 3
way, stop, sized = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "sized"
def source():
    return pairs if sized else iter(pairs)
async def consume():
    ranked, number = client.arerank_many(source(), show_progress=True), 0
    async for response in ranked:
        number += 1
        if number == stop:
            break
    await ranked.aclose()
if way == "sync":
    for number, response in enumerate(client.rerank_many(source(), show_progress=True), 1):
        if number == stop:
            break
else:
    asyncio.run(consume())
"""


def screen(way: str, stop: int, sized: str) -> str:
    """Return what a terminal gets to see."""
    reader, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 100))
    with own_process(SHOWS, way, str(stop), sized, stderr=terminal) as process:
        os.close(terminal)
        shown = b""
        with suppress(OSError):  # how Linux tells that the other side is closed
            while chunk := os.read(reader, 65_536):
                shown += chunk
    os.close(reader)
    assert process.returncode == 0, shown
    return shown.decode()


@pytest.mark.parametrize(
    ("way", "stop", "sized", "words"),
    [
        ("sync", 9, "sized", "3/3 ["),
        ("sync", 1, "sized", "1/3 ["),
        ("async", 1, "sized", "1/3 ["),
        ("async", 9, "", "3query ["),
    ],
)
def test_a_terminal_shows_a_bar(way: str, stop: int, sized: str, words: str) -> None:
    """On a terminal a bar counts the rankings, of a total where there is one, and is closed when the loop ends."""
    shown = screen(way, stop, sized)
    assert words in shown.splitlines()[-1]
    assert shown.endswith("\n")
    assert "Error" not in shown


@pytest.mark.parametrize("way", ["sync", "async"])
def test_a_file_gets_no_bar(way: str) -> None:
    """Where standard error is no terminal, as in a log, nothing is written."""
    with own_process(SHOWS, way, "9", "sized", stderr=subprocess.PIPE) as process:
        assert process.communicate(timeout=20)[1] == ""
    assert process.returncode == 0


def test_a_notebook_shows_a_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a Jupyter kernel a bar counts the rankings to the end."""
    write_kernel_spec(tmp_path / "kernels" / "python3")
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    prelude = (
        'from regolo_rerank import RegoloClient\nclient = RegoloClient(base_url="local://")\npairs = [("q", ["a"])] * 3'
    )
    cells = [
        prelude,
        "for response in client.rerank_many(pairs, show_progress=True): pass",
        "async for response in client.arerank_many(pairs, show_progress=True): pass",
    ]
    new: Any = nbformat.v4
    notebook = new.new_notebook(cells=[new.new_code_cell(cell) for cell in cells])
    ran = NotebookClient(notebook, resources={"metadata": {"path": str(ROOT)}}).execute()
    for cell in ran.cells[1:]:
        assert "3/3" in str(cell.outputs)


def test_a_bar_without_tqdm_says_what_to_install(
    many: Many, client: RegoloClient, stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without tqdm the error names the argument and the extra, and nothing is sent; without a bar nobody needs it."""
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(InvalidInputError, match=r"show_progress: .* pip install \"regolo_rerank\[progress\]\""):
        many(client, smalls(3), show_progress=True)
    assert not stub.received
    assert len(many(client, smalls(3))) == 3


# --- LangChain --------------------------------------------------------------------------------------------------------
