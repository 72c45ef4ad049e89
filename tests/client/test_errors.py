import asyncio
import itertools
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from regolo_rerank import (
    APIConnectionError,
    APIResponseError,
    APIStatusError,
    APITimeoutError,
    BadRequestError,
    NotFoundError,
    RegoloClient,
    RegoloError,
    RerankResponse,
)
from tests.conftest import KEY, Rank
from tests.support.faults import FaultServer, stalls
from tests.support.inside import allow_replies_of, is_worker
from tests.support.stub import Reply, Stub, error, pairs, results, scored, texts


def test_nothing_at_the_address_names_the_address(rank: Rank, client: RegoloClient, stub: Stub) -> None:
    """A 404 says which URL was asked, and which option names it."""
    stub.always(Reply({"detail": "Not Found"}, 404))
    with pytest.raises(NotFoundError, match=rf"Not Found \[HTTP 404\]; .* {stub.url}/rerank: see base_url"):
        rank(client, "q", ["a"])


def test_a_slow_server_is_a_timeout(rank: Rank, stub: Stub) -> None:
    """An attempt that takes longer than timeout is an APITimeoutError."""
    stub.always(Reply(results((0, 1.0)), delay=0.5))
    with pytest.raises(APITimeoutError, match="within the timeout"):
        rank(RegoloClient(KEY, base_url=stub.url, timeout=0.1, max_retries=0), "q", ["a"])


def test_nobody_there_is_a_connection_error(rank: Rank) -> None:
    """A refused connection is retried and then an APIConnectionError that names the host."""
    with Stub() as gone:
        client = RegoloClient(KEY, base_url=gone.url)
    with pytest.raises(APIConnectionError, match=r"127\.0\.0\.1:\d+"):
        rank(client, "q", ["a"])


def test_an_endless_reply_is_refused(
    rank: Rank, client: RegoloClient, stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reply over the limit of bytes is refused while it is read."""
    allow_replies_of(10_000, monkeypatch)
    client.max_retries = 0
    stub.always(Reply(results((0, 1.0), filler="x" * 20_000)))
    with pytest.raises(APIResponseError, match="larger than 10000 bytes"):
        rank(client, "q", ["a"])


def test_a_body_that_cannot_be_decompressed_is_refused(rank: Rank, client: RegoloClient, stub: Stub) -> None:
    """Broken gzip is an untrustworthy reply, tried again and then refused."""
    stub.script(Reply(b"not gzip", headers={"content-encoding": "gzip"}))
    assert rank(client, "q", ["a"]).results
    stub.always(Reply(b"not gzip", headers={"content-encoding": "gzip"}))
    with pytest.raises(APIResponseError, match="cannot be decompressed"):
        rank(client, "q", ["a"])


def test_redirects_are_not_followed(rank: Rank, client: RegoloClient, stub: Stub) -> None:
    """A redirect is an error that says where the server points, and the key stays here."""
    with Stub() as elsewhere:
        stub.always(Reply(b"", 307, {"location": f"{elsewhere.url}/rerank"}))
        with pytest.raises(APIStatusError, match="redirects are not followed: set base_url"):
            rank(client, "q", ["a"])
        assert not elsewhere.received


def test_every_error_is_one_of_ours(rank: Rank, client: RegoloClient, stub: Stub) -> None:
    """Whatever a server says, a RegoloError comes out."""
    client.max_retries = 0
    for status, body in itertools.product(
        (200, 302, 418, 599), (b"", b"\xff\xfe", b"[1]", b"<html>", b'{"a":' * 9_999)
    ):
        stub.always(Reply(body, status))
        with pytest.raises(RegoloError):
            rank(client, "q", ["a"])


def test_the_callers_own_exceptions_are_left_alone(rank: Rank) -> None:
    """An error inside an `except` block forgets its own frames, not those of what the caller is handling."""

    def fail() -> None:
        precious = "kept"
        problem = ValueError(precious)
        raise problem from problem

    client = RegoloClient(base_url="http://127.0.0.1:9", max_retries=0)
    try:
        fail()
    except ValueError as handled:
        with pytest.raises(APIConnectionError):
            rank(client, "q", ["a"])
        traceback = handled.__traceback__
        assert traceback is not None
        assert traceback.tb_next is not None
        assert traceback.tb_next.tb_frame.f_locals["precious"] == "kept"


@pytest.mark.parametrize("left", [0, 2])
@pytest.mark.parametrize("return_exceptions", [True, False])
def test_where_no_thread_starts_the_callers_own_does_the_work(
    client: RegoloClient, monkeypatch: pytest.MonkeyPatch, left: int, *, return_exceptions: bool
) -> None:
    """On a machine that has a few threads left, or none, a call takes longer, and nothing fails."""
    real, started = threading.Thread.start, itertools.count()

    def start(thread: threading.Thread) -> None:
        if is_worker(thread) and next(started) >= left:
            raise RuntimeError("can't start new thread")
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    client.batch_size = 1
    expected = pairs(client.rerank("q", texts(9)).results)
    assert [index for index, _ in expected] == list(range(8, -1, -1))
    source = [("q", texts(9))] * 9
    ranked: Any = client.rerank_many(source, return_exceptions=return_exceptions)
    assert [pairs(response.results) for response in ranked] == [expected] * 9


def test_a_call_that_fails_in_the_callers_own_thread_stops_there(
    client: RegoloClient, stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without threads too, a pair that fails is an error in its place, and the first error of a call is the last."""
    real = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        if is_worker(thread):
            raise RuntimeError("can't start new thread")
        real(thread)

    stub.reply = lambda request: error("no", 400) if "document 1" in request.documents[0] else scored(request)
    client.batch_size = 1
    with monkeypatch.context() as context:
        context.setattr(threading.Thread, "start", start)
        with pytest.raises(BadRequestError):
            client.rerank("q", texts(9))
        assert len(stub.received) == 2
        ranked: Any = client.rerank_many([("q", ["a"]), ("q", texts(2)), ("q", ["b"])], return_exceptions=True)
        kinds = [type(outcome) for outcome in ranked]
    assert kinds == [RerankResponse, BadRequestError, RerankResponse]


@contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Raise a TimeoutError in the main thread after some seconds, as callers do to bound what they call."""

    def handler(*_: object) -> None:
        raise TimeoutError("mine")

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("reply", [b"", b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n{"], ids=["head", "body"])
def test_a_timeout_of_the_callers_own_is_the_callers(size: int, reply: bytes) -> None:
    """What a signal handler raises while a call waits comes out at once, and is not taken for a slow reply."""
    with FaultServer(usual=stalls(reply, 5)) as server, RegoloClient(KEY, base_url=server.url, batch_size=1) as client:
        with pytest.raises(TimeoutError, match="mine"), alarm(0.2):
            client.rerank("q", texts(size))
        assert len(server.received) == size


def test_a_worker_that_somebody_cancels_cancels_the_call(stub: Stub) -> None:
    """A call never comes back without one of its batches."""
    stub.reply = lambda request: Reply(scored(request).body, delay=0.2)

    async def main() -> None:
        async with RegoloClient(KEY, base_url=stub.url, batch_size=1) as client:
            before = asyncio.all_tasks()
            call = asyncio.create_task(client.arerank("q", texts(3)))
            await asyncio.sleep(0.1)
            next(iter(asyncio.all_tasks() - before - {call})).cancel()
            await call

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(main())
