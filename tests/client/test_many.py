"""`rerank_many` and `arerank_many`: lazy, ordered, bounded, with errors in their places."""

import asyncio
import itertools
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from typing import Any

import pytest

from regolo_rerank import BadRequestError, InvalidInputError, MissingAPIKeyError, RegoloClient, RegoloError
from tests.conftest import KEY
from tests.support.modes import Many, awaited
from tests.support.observed import asoon, slowly, soon
from tests.support.stub import Received, Reply, Stub, error, pairs, scored, together

Pair = tuple[str, list[str]]


@pytest.fixture(params=["sync", "async", "async source"])
def many(request: pytest.FixtureRequest) -> Many:
    """All ways to rank many."""
    return Many(request.param)


def small(index: int) -> Pair:
    """Return a query of two documents."""
    return f"query {index}", [f"{index} a score={index % 7 / 7}", f"{index} b score=0.5"]


def smalls(count: int) -> list[Pair]:
    """Return some queries."""
    return [small(index) for index in range(count)]


class Endless:
    """Pairs without end, which count how far they are read ahead of the outcomes.

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


def fails_on(word: str, delay: float = 0.0) -> Any:
    """Return a function that rejects queries with a word at once, and answers the others after some seconds."""

    def reply(request: Received) -> Reply:
        if word in request.json["query"]:
            return error("bad query", 400)
        return Reply(scored(request).body, delay=delay)

    return reply


@pytest.mark.parametrize("max_concurrency", [1, 2, 4])
@pytest.mark.parametrize("batch_size", [1, 100])
def test_rankings_come_in_input_order(many: Many, stub: Stub, max_concurrency: int, batch_size: int) -> None:
    """However late a reply is, and each as `rerank` would give it; requests overlap, within the limit."""
    stub.reply = lambda request: Reply(scored(request).body, delay=0.03 if "query 0" in request.json["query"] else 0)
    source = [*smalls(20), ("empty", []), ("blank", [" "])]
    with RegoloClient(KEY, base_url=stub.url, batch_size=batch_size) as client:
        got = many(client, source, max_concurrency=max_concurrency)
        assert stub.most_at_once <= max_concurrency
        assert [pairs(response) for response in got] == [pairs(client.rerank(*pair)) for pair in source]
    assert sum(response.usage.requests for response in got) == (40 if batch_size == 1 else 20)


def test_queries_overlap(many: Many, stub: Stub) -> None:
    """The workers send requests of different queries at the same time, also while the last ones remain."""
    stub.reply = together(3)
    with RegoloClient(KEY, base_url=stub.url) as client:
        assert len(many(client, [(f"query {index}", ["a"]) for index in range(9)], max_concurrency=3)) == 9


@pytest.mark.parametrize(("max_concurrency", "delay"), [(1, 0.0), (4, 0.0), (3, 0.01)])
def test_an_endless_source_is_read_a_little_ahead(many: Many, stub: Stub, max_concurrency: int, delay: float) -> None:
    """At most 4 x `max_concurrency` pairs; leaving the loop sends nothing more."""
    stub.reply = slowly(delay)
    source = Endless()
    with RegoloClient(KEY, base_url=stub.url) as client:
        many(client, iter(source), into=source.got, stop=20, max_concurrency=max_concurrency)
        sent = len(stub.received)
        assert soon(lambda: stub.at_once == 0)
        time.sleep(0.05)
    assert len(source.got) == 20
    assert source.ahead <= 4 * max_concurrency
    assert len(stub.received) <= sent + max_concurrency  # those on their way into the server


def test_a_slow_consumer_idles_nobody(many: Many, stub: Stub) -> None:
    """While the consumer is busy, all that was read is sent."""
    source = Endless()

    class Slow(list[Any]):
        def append(self, outcome: Any) -> None:
            super().append(outcome)
            if many.mode == "sync":  # a sync call reads on when it is asked for more
                assert soon(lambda: len(stub.received) >= min(8, source.ahead))

    source.got = Slow()
    with RegoloClient(KEY, base_url=stub.url, max_concurrency=2) as client:
        many(client, iter(source), into=source.got, stop=6)
    assert 2 <= source.ahead <= 8


def test_nothing_is_read_before_the_first_ranking_is_asked_for(many: Many, client: RegoloClient, stub: Stub) -> None:
    """A generator that is never started, or dropped at once, sends nothing."""
    source = iter(smalls(3))
    ranked: Any = client.rerank_many(source) if many.mode == "sync" else client.arerank_many(source)
    del ranked
    assert len(list(source)) == 3
    assert not stub.received


def test_a_slow_source_holds_no_ranking_back(client: RegoloClient, stub: Stub) -> None:
    """A ranking that is ready is yielded before another pair is read."""
    got: list[Any] = []
    behind: list[int] = []

    def source() -> Iterator[Pair]:
        for index in range(8):
            behind.append(index - len(got))
            assert soon(lambda: len(stub.received) == index and not stub.at_once)  # noqa: B023 - called at once
            time.sleep(0.05)
            yield small(index)

    Many("sync")(client, source(), into=got)
    assert (len(got), max(behind) <= 2) == (8, True)


def test_an_async_source_may_wait_for_the_rankings(client: RegoloClient) -> None:
    """A ranking is yielded as soon as it is ready, although the source waits for it."""
    got: list[Any] = []

    async def source() -> AsyncIterator[Pair]:
        for index in range(8):
            assert await asoon(lambda: len(got) == index)  # noqa: B023 - awaited before the next turn
            yield small(index)

    async def consume() -> None:
        async for response in client.arerank_many(source()):
            got.append(response)  # noqa: PERF401 - the source watches the list
        await client.aclose()

    asyncio.run(consume())
    assert len(got) == 8


BAD_PAIRS: dict[str, tuple[Any, str]] = {
    "a number": (1, r"pairs\[2\]: must be \(query, documents\), got int"),
    "a triple": (("a", ["b"], ["c"]), r"pairs\[2\]: must be \(query, documents\), got tuple of 3"),
    "a blank query": ((" ", ["b"]), r"pairs\[2\]: query: must not be blank"),
    "a document of bytes": (("a", ["b", b"c"]), r"pairs\[2\]: documents\[1\]: must be a string, got bytes"),
    "a query that fills a request": (("a" * 999, ["b"]), r"pairs\[2\]: query: .* max_request_bytes=900"),
}


@pytest.mark.parametrize(("pair", "words"), BAD_PAIRS.values(), ids=BAD_PAIRS.keys())
def test_a_wrong_pair_is_named_in_its_place(many: Many, stub: Stub, pair: Any, words: str) -> None:
    """Its error is raised or returned, has the index, and stops no other pair."""
    with RegoloClient(KEY, base_url=stub.url, max_request_bytes=900) as client:
        got = many(client, [small(0), small(1), pair, small(3)], return_exceptions=True)
        assert [isinstance(outcome, RegoloError) for outcome in got] == [False, False, True, False]
        assert got[2].index == 2
        with pytest.raises(InvalidInputError, match=words):
            raise got[2]
        del got[:]
        with pytest.raises(InvalidInputError, match=words) as caught:
            many(client, [small(0), small(1), pair, small(3)], into=got)
        assert (len(got), caught.value.index) == (2, 2)


@pytest.mark.parametrize("max_concurrency", [1, 4])
def test_returned_errors_stop_no_other_query(many: Many, stub: Stub, max_concurrency: int) -> None:
    """Each failed query has its error in its place, with its index."""
    stub.reply = fails_on("5", delay=0.002)
    with RegoloClient(KEY, base_url=stub.url, batch_size=1) as client:
        got = many(client, smalls(60), return_exceptions=True, max_concurrency=max_concurrency)
    failed = [index for index, outcome in enumerate(got) if isinstance(outcome, BadRequestError)]
    assert failed == [index for index in range(60) if "5" in str(index)]
    assert [got[index].index for index in failed] == failed
    assert len(got) == 60


@pytest.mark.parametrize("max_concurrency", [1, 3])
def test_a_raised_error_comes_after_the_earlier_rankings(many: Many, stub: Stub, max_concurrency: int) -> None:
    """The pairs that were read ahead are dropped, and nothing more is sent."""
    stub.reply = fails_on("query 7", delay=0.02)
    source = Endless()
    with RegoloClient(KEY, base_url=stub.url) as client:
        with pytest.raises(BadRequestError, match="bad query") as caught:
            many(client, iter(source), into=source.got, max_concurrency=max_concurrency)
        sent = len(stub.received)
        time.sleep(0.1)
    assert (len(source.got), caught.value.index) == (7, 7)
    assert len(stub.received) <= sent + max_concurrency


@pytest.mark.parametrize("where", ["source", "documents"])
@pytest.mark.parametrize("failure", [LookupError("lost"), KeyboardInterrupt("lost")], ids=repr)
@pytest.mark.parametrize("return_exceptions", [False, True])
def test_an_error_of_the_source_is_the_callers(
    many: Many, stub: Stub, failure: BaseException, where: str, *, return_exceptions: bool
) -> None:
    """It is raised as it is, after the rankings of the pairs that were read before it."""
    if many.mode != "sync" and isinstance(failure, KeyboardInterrupt):
        pytest.skip("asyncio raises a KeyboardInterrupt of a task out of its loop")

    def broken() -> Iterator[str]:
        yield "a"
        raise failure

    def source() -> Iterator[Any]:
        yield from smalls(4)
        if where == "documents":
            yield "query", broken()
        raise failure

    stub.reply = slowly(0.01)
    got: list[Any] = []
    with RegoloClient(KEY, base_url=stub.url) as client, pytest.raises(type(failure), match="lost"):
        many(client, source(), into=got, return_exceptions=return_exceptions, max_concurrency=2)
    assert len(got) == (4 if isinstance(failure, Exception) else 0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"max_concurrency": 0}, "max_concurrency"),
        ({"top_n": 0}, "top_n"),
        ({"foo": 1}, "foo: unknown option"),
        ({"extra_body": {"query": "mine"}}, "extra_body"),
        *(({"pairs": source}, "pairs: must be an iterable of") for source in ("ab", {"a": ["b"]}, {1}, 1, None)),
    ],
    ids=str,
)
def test_a_wrong_argument_is_rejected_at_once(
    many: Many, client: RegoloClient, stub: Stub, arguments: dict[str, Any], words: str
) -> None:
    """At the call, not at the first ranking."""
    call: Any = client.rerank_many if many.mode == "sync" else client.arerank_many
    with pytest.raises(InvalidInputError, match=words):
        call(**{"pairs": smalls(1), **arguments})
    with pytest.raises(MissingAPIKeyError):
        call.__func__(client.with_options(api_key=None, base_url=None), smalls(1))
    assert not stub.received


def test_arguments_apply_to_all_pairs(many: Many, client: RegoloClient, stub: Stub) -> None:
    """`text`, `top_n` and the others."""
    rows = [(query, [{"body": text} for text in documents]) for query, documents in smalls(3)]
    got = many(
        client.with_options(prompt_format="tagged"),
        rows,
        text="body",
        top_n=1,
        model="m",
        instruction="Find",
        extra_body={"x": 1},
    )
    assert [len(response) for response in got] == [1, 1, 1]
    assert all(response[0].document in rows[index][1] for index, response in enumerate(got))
    assert {(request.json["model"], request.json["x"], request.json["top_n"]) for request in stub.received} == {
        ("m", 1, 1)
    }


def test_closing_early_ends_what_is_in_flight(stub: Stub) -> None:
    """`close`, and dropping the generator, do not wait for requests, and their workers send nothing more."""
    read, released = threading.Event(), threading.Event()

    def source() -> Iterator[Pair]:
        yield from smalls(9)
        read.set()

    def reply(request: Received) -> Reply:
        (read if "query 0" in request.json["query"] else released).wait(20)
        return scored(request)

    stub.reply = reply
    with RegoloClient(KEY, base_url=stub.url, batch_size=1) as client:
        for way in ("close", "drop"):
            read.clear()
            stub.received.clear()
            ranked = client.rerank_many(source(), max_concurrency=3)
            next(ranked)
            assert soon(lambda: stub.at_once == 3)
            started = time.monotonic()
            if way == "close":
                ranked.close()
            del ranked
            assert time.monotonic() - started < 5
            sent = len(stub.received)
            released.set()
            assert soon(lambda: stub.at_once == 0)
            time.sleep(0.05)
            assert len(stub.received) == sent
            released.clear()


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "dropped"])
@pytest.mark.parametrize("asynchronous", [True, False], ids=["async source", "list"])
def test_break_without_aclosing_ends_with_the_loop(
    client: RegoloClient, stub: Stub, caplog: pytest.LogCaptureFixture, *, kept: bool, asynchronous: bool
) -> None:
    """Nothing is logged, also not by asyncio."""
    stub.reply = slowly(0.02)
    keeping: list[Any] = []

    async def leave() -> None:
        ranked = client.arerank_many(awaited(smalls(20)) if asynchronous else smalls(20))
        if kept:
            keeping.append(ranked)
        async for _ in ranked:
            break
        del ranked

    asyncio.run(leave())
    assert [record.getMessage() for record in caplog.records if record.levelname in {"WARNING", "ERROR"}] == []


@pytest.mark.parametrize("max_concurrency", [1, 3])
@pytest.mark.parametrize("source", ["async", "async source"])
def test_a_consumer_can_be_cancelled_at_any_point(stub: Stub, source: str, max_concurrency: int) -> None:
    """It ends as cancelled, and leaves no task."""
    sources: list[Any] = []

    async def consume(client: RegoloClient) -> None:
        endless: Any = iter(Endless()) if source == "async" else awaited(Endless())
        sources.append(endless)  # garbage collection would close an async one in a task
        async with aclosing(client.arerank_many(endless, max_concurrency=max_concurrency)) as ranked:
            async for _ in ranked:
                pass

    async def cancel_everywhere() -> None:
        async with RegoloClient(KEY, base_url=stub.url) as client:
            for turns in [*range(25), *range(30, 200, 25)]:
                consumer = asyncio.create_task(consume(client))
                for _ in range(turns):
                    await asyncio.sleep(0)
                consumer.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await asyncio.wait_for(consumer, 10)
                assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(cancel_everywhere())


def test_a_task_that_somebody_else_cancels_hangs_nobody(stub: Stub) -> None:
    """Whichever task of ours a host cancels, the consumer ends as cancelled."""
    stub.reply = slowly(0.05)

    async def consume(client: RegoloClient, got: list[Any]) -> None:
        async with aclosing(client.arerank_many(iter(Endless()), max_concurrency=3)) as ranked:
            async for outcome in ranked:
                got.append(outcome)  # noqa: PERF401 - the test watches the list

    async def cancel_each() -> None:
        async with RegoloClient(KEY, base_url=stub.url) as client:
            for number in (0, 3, 6, 9):
                got: list[Any] = []
                consumer = asyncio.create_task(consume(client, got))
                assert await asoon(lambda: len(got) >= 2)  # noqa: B023 - awaited before the next turn
                ours = asyncio.all_tasks() - {asyncio.current_task(), consumer}
                assert 10 <= len(ours) <= 13  # the reader, and a task for each pair that is read ahead
                sorted(ours, key=lambda task: task.get_name())[number].cancel()
                with pytest.raises(asyncio.CancelledError):
                    await asyncio.wait_for(consumer, 10)
                assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(cancel_each())


def test_documents_are_read_with_their_pair(many: Many, client: RegoloClient) -> None:
    """A source may use one iterator for all pairs, as `itertools.groupby` does."""
    numbers = itertools.groupby(range(6), key=lambda number: number // 2)
    source = ((f"q{key}", (f"document {number}" for number in group)) for key, group in numbers)
    assert [{result.document for result in response} for response in many(client, source)] == [
        {f"document {first}", f"document {first + 1}"} for first in (0, 2, 4)
    ]


def test_requests_are_sent_in_the_order_of_the_pairs(many: Many, stub: Stub) -> None:
    """A pair with many requests does not wait for later pairs with one."""
    stub.reply = slowly(0.02)
    source = [("long", ["a", "b", "c", "d", "e"]), *smalls(6)]
    with RegoloClient(KEY, base_url=stub.url, batch_size=1) as client:
        many(client, source, max_concurrency=2)
    # The fifth request and that of the next pair are in flight together, so they may arrive in any order.
    assert all("long" in request.json["query"] for request in stub.received[:4])
