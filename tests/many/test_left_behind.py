import asyncio
import gc
import logging
import time
import weakref
from collections.abc import Iterator
from traceback import walk_tb
from typing import Any

import pytest

from regolo_rerank import RegoloClient, RegoloError
from tests.conftest import KEY
from tests.support.inside import workers
from tests.support.many import Many, Pair, any_source, awaited, fails_on, slowly, small, smalls
from tests.support.observed import sockets, soon
from tests.support.stub import Reply, Stub


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
