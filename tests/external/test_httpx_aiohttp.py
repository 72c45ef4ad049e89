"""Async calls over aiohttp, by the client of httpx_aiohttp as the caller's own client."""

import asyncio
import socket
from collections.abc import AsyncIterator

import pytest

from regolo_rerank import APIConnectionError, APITimeoutError, AuthenticationError, RegoloClient
from tests.conftest import KEY
from tests.support.stub import Received, Reply, Stub, error, pairs, results, scored, texts, together

httpx_aiohttp = pytest.importorskip("httpx_aiohttp")

pytestmark = pytest.mark.anyio

DOCUMENTS = ["a score=0.1", "b score=0.9"]
EXPECTED = [(1, 0.9), (0, 0.1)]


@pytest.fixture
async def client(stub: Stub) -> AsyncIterator[RegoloClient]:
    """A client over aiohttp, which must still be open when the calls have ended."""
    async with httpx_aiohttp.HttpxAiohttpClient(timeout=60) as own:
        async with RegoloClient(KEY, base_url=stub.url, async_http_client=own) as client:
            yield client
        assert not own.is_closed


async def test_batches_are_ranked_as_one(client: RegoloClient, stub: Stub) -> None:
    """Several concurrent requests add up to one ranking, over kept connections."""
    stub.reply = together(4)
    batched = client.with_options(batch_size=10)
    first, second = [await batched.arerank("q", texts(40)) for _ in range(2)]
    assert first.results == second.results
    assert [result.index for result in first] == list(range(39, -1, -1))
    assert (len(stub.received), stub.connections) == (8, 4)


async def test_requests_are_those_of_httpx(client: RegoloClient, stub: Stub) -> None:
    """The server sees the same request as from a client of this package."""
    async with RegoloClient(KEY, base_url=stub.url) as plain:
        await plain.arerank("q", DOCUMENTS)
    assert pairs(await client.arerank("q", DOCUMENTS)) == EXPECTED
    first, second = stub.received
    assert (second.path, second.json) == (first.path, first.json)
    for name in ("authorization", "content-type", "accept", "accept-encoding", "user-agent"):
        assert second.headers[name] == first.headers[name]


async def test_100_calls_run_concurrently(client: RegoloClient, stub: Stub) -> None:
    """The client adds no limit of its own to aiohttp's 100 connections."""
    stub.reply = together(100)
    rankings = await asyncio.gather(*(client.arerank("q", DOCUMENTS) for _ in range(100)))
    assert [pairs(ranking) for ranking in rankings] == [EXPECTED] * 100


async def test_errors_are_ours(client: RegoloClient, stub: Stub) -> None:
    """A wrong key, a refused connection and a slow server raise this package's errors, without the key."""
    stub.script(error(f"no such key {KEY}", 401))
    with pytest.raises(AuthenticationError, match=r"no such key \*\*\* \[HTTP 401\]"):
        await client.arerank("q", DOCUMENTS)
    stub.script(Reply(results((0, 0.1), (1, 0.9)), delay=0.5))
    with pytest.raises(APITimeoutError):
        await client.with_options(timeout=0.1, max_retries=0).arerank("q", DOCUMENTS)
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{bound.getsockname()[1]}"
        with pytest.raises(APIConnectionError, match=address):
            await client.with_options(base_url=f"http://{address}", max_retries=1).arerank("q", DOCUMENTS)


async def test_a_lost_connection_is_retried(client: RegoloClient, stub: Stub) -> None:
    """If the server hangs up before its reply, the next attempt returns the ranking."""

    def reply(request: Received) -> Reply:
        if len(stub.received) == 1:
            raise ConnectionAbortedError
        return scored(request)

    stub.reply = reply
    assert pairs(await client.arerank("q", DOCUMENTS)) == EXPECTED
    assert len(stub.received) == 2


async def test_a_cancelled_call_leaves_no_task(client: RegoloClient, stub: Stub) -> None:
    """Cancelling ends a call at once, and later calls work."""
    stub.script(Reply(b"{}", delay=0.5))
    tasks = asyncio.all_tasks()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(client.arerank("q", DOCUMENTS), 0.1)
    assert asyncio.all_tasks() == tasks
    assert pairs(await client.arerank("q", DOCUMENTS)) == EXPECTED
