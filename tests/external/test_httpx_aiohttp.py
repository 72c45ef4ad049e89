"""Async calls over aiohttp, by the client that httpx_aiohttp has for whoever wants that: one of the caller's own."""

import asyncio
import socket
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import pytest
from httpx_aiohttp import HttpxAiohttpClient

from regolo_rerank import APIConnectionError, APITimeoutError, AuthenticationError, RateLimitError, RegoloClient
from tests.conftest import KEY
from tests.support.observed import sockets, soon
from tests.support.stub import Received, Reply, Stub, error, pairs, results, scored, texts, together

T = TypeVar("T")

DOCUMENTS = ["a score=0.1", "b score=0.9"]
EXPECTED = [(1, 0.9), (0, 0.1)]


async def ranked(client: RegoloClient) -> list[tuple[int, float]]:
    """Rank the two documents."""
    return pairs((await client.arerank("q", DOCUMENTS)).results)


def over_aiohttp(url: str, use: Callable[[RegoloClient], Awaitable[T]], **options: Any) -> T:
    """Use a reranker with a client of the caller's own, which closes it; see that nobody has closed it before."""

    async def run() -> T:
        async with HttpxAiohttpClient(timeout=options.pop("timeout", 60)) as own:
            try:
                async with RegoloClient(KEY, base_url=url, async_http_client=own, **options) as client:
                    return await use(client)
            finally:
                assert not own.is_closed

    return asyncio.run(run())


def test_batches_are_ranked_as_one(stub: Stub) -> None:
    """Several requests go out at once over kept connections, and add up to one ranking, call after call."""
    stub.reply = together(4)

    async def twice(client: RegoloClient) -> list[int]:
        first, second = [(await client.arerank("q", texts(40))).results for _ in range(2)]
        assert first == second
        return [result.index for result in first]

    assert over_aiohttp(stub.url, twice, batch_size=10) == list(range(39, -1, -1))
    assert len(stub.received) == 8
    assert stub.connections == 4


def test_requests_are_those_of_httpx(stub: Stub) -> None:
    """The server sees the same request as from a client of this package: path, JSON, key and our own headers."""
    with RegoloClient(KEY, base_url=stub.url) as client:
        client.rerank("q", DOCUMENTS)
    assert over_aiohttp(stub.url, ranked) == EXPECTED
    first, second = stub.received
    assert (second.path, second.json) == (first.path, first.json)
    for name in ("authorization", "content-type", "accept", "user-agent"):
        assert second.headers[name] == first.headers[name]


def test_100_calls_at_once_wait_together(stub: Stub) -> None:
    """As many calls as aiohttp has connections by default are in flight together."""
    stub.reply = together(100)

    async def many(client: RegoloClient) -> list[list[tuple[int, float]]]:
        return await asyncio.gather(*(ranked(client) for _ in range(100)))

    assert over_aiohttp(stub.url, many) == [EXPECTED] * 100


def test_a_wrong_key_is_refused_at_once(stub: Stub) -> None:
    """A 401 is an AuthenticationError with the server's words and without the key that it quotes."""
    stub.always(error(f"no such key {KEY}", 401))
    with pytest.raises(AuthenticationError, match=r"no such key \*\*\* \[HTTP 401\]"):
        over_aiohttp(stub.url, ranked)
    assert len(stub.received) == 1


def test_a_rate_limit_is_waited_for(stub: Stub) -> None:
    """After a 429 a request is sent again when the server says; where it keeps saying so, that is the error."""
    stub.script(Reply({"error": "slow down"}, 429, {"retry-after": "0.3"}))
    assert over_aiohttp(stub.url, ranked) == EXPECTED
    first, second = stub.received
    assert second.at - first.at >= 0.3
    stub.always(error("slow down", 429))
    with pytest.raises(RateLimitError, match="slow down"):
        over_aiohttp(stub.url, ranked, max_retries=1)
    assert len(stub.received) == 4


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_nobody_there_is_a_connection_error(scheme: str) -> None:
    """A refused connection is an APIConnectionError that names the host."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{bound.getsockname()[1]}"
        with pytest.raises(APIConnectionError, match=address):
            over_aiohttp(f"{scheme}://{address}", ranked, max_retries=1)


def test_a_lost_connection_is_tried_again(stub: Stub) -> None:
    """Where the server hangs up before its reply, the next attempt gives the ranking."""

    def reply(request: Received) -> Reply:
        if len(stub.received) == 1:
            raise ConnectionAbortedError
        return scored(request)

    stub.reply = reply
    assert over_aiohttp(stub.url, ranked) == EXPECTED
    assert len(stub.received) == 2


def test_a_slow_server_is_a_timeout(stub: Stub) -> None:
    """The timeout is that of the caller's client, and past it is an APITimeoutError."""
    stub.always(Reply(results((0, 0.1), (1, 0.9)), delay=0.5))
    with pytest.raises(APITimeoutError):
        over_aiohttp(stub.url, ranked, timeout=0.1, max_retries=0)


def test_a_cancelled_call_leaves_nothing_behind(stub: Stub) -> None:
    """Cancelling ends a call at once, its connection is not used again, and later calls are right."""
    stub.script(Reply(b"{}", delay=0.5))

    async def cancelled(client: RegoloClient) -> list[tuple[int, float]]:
        tasks = asyncio.all_tasks()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(ranked(client), 0.1)
        assert asyncio.all_tasks() == tasks
        return await ranked(client)

    before = sockets()
    assert over_aiohttp(stub.url, cancelled) == EXPECTED
    assert stub.connections == 2
    assert soon(lambda: sockets() <= before)  # the stub closes its side a moment later


def test_many_queries_go_over_it(stub: Stub) -> None:
    """`arerank_many` uses the caller's client too."""

    async def many(client: RegoloClient) -> list[int]:
        source = [("q", texts(size)) for size in (3, 1, 2)]
        return [len(response.results) async for response in client.arerank_many(source)]

    assert over_aiohttp(stub.url, many) == [3, 1, 2]
