import asyncio
from typing import Any

import httpx
import pytest

from regolo_rerank import APIConnectionError, APITimeoutError, InvalidInputError, RegoloClient, RerankResponse
from tests.conftest import KEY, Rank
from tests.support.stub import Reply, Stub, results


def test_a_request_that_cannot_be_sent_is_not_tried_again(mode: str, stub: Stub) -> None:
    """A header of the caller's own http client that HTTP does not allow fails at once."""
    illegal = {"x-mine": "a\nb"}
    options: dict[str, Any] = {"api_key": KEY, "base_url": stub.url, "max_retries": 10**9}

    def call() -> None:
        with httpx.Client(headers=illegal) as mine:
            RegoloClient(http_client=mine, **options).rerank("q", ["a"])

    async def acall() -> None:
        async with httpx.AsyncClient(headers=illegal) as mine:
            await RegoloClient(async_http_client=mine, **options).arerank("q", ["a"])

    with pytest.raises(APIConnectionError, match="Illegal header"):
        call() if mode == "sync" else asyncio.run(acall())
    assert not stub.received


@pytest.mark.parametrize("seconds", [0.1, 5.0])
def test_the_callers_own_http_client_counts(mode: str, stub: Stub, seconds: float) -> None:
    """The caller's client is used with its own timeout, and is left open."""
    stub.always(Reply(results((0, 1.0)), delay=0.3))
    options: dict[str, Any] = {"api_key": KEY, "base_url": stub.url, "max_retries": 0, "timeout": 0.01}

    def called() -> RerankResponse:
        with httpx.Client(timeout=seconds, headers={"x-mine": "1"}) as mine:
            with RegoloClient(http_client=mine, **options) as client:
                response = client.rerank("q", ["a"])
            assert not mine.is_closed
            return response

    async def acalled() -> RerankResponse:
        async with httpx.AsyncClient(timeout=seconds, headers={"x-mine": "1"}) as mine:
            async with RegoloClient(async_http_client=mine, **options) as client:
                response = await client.arerank("q", ["a"])
            assert not mine.is_closed
            return response

    def call() -> RerankResponse:
        return called() if mode == "sync" else asyncio.run(acalled())

    if seconds < 0.3:
        with pytest.raises(APITimeoutError):
            call()
    else:
        assert len(call().results) == 1
    assert stub.received[0].headers["x-mine"] == "1"


def test_a_closed_http_client_is_an_error_that_says_so(mode: str, stub: Stub) -> None:
    """A caller's client that is closed is named, and not tried again."""
    closed, aclosed = httpx.Client(), httpx.AsyncClient()
    closed.close()
    asyncio.run(aclosed.aclose())
    client = RegoloClient(KEY, base_url=stub.url, http_client=closed, async_http_client=aclosed)
    with pytest.raises(APIConnectionError, match="closed"):
        client.rerank("q", ["a"]) if mode == "sync" else asyncio.run(client.arerank("q", ["a"]))


def test_an_async_http_client_in_a_second_loop_is_an_error_that_says_so(stub: Stub) -> None:
    """A caller's async client with a connection of another event loop is named, and not tried again."""
    mine = httpx.AsyncClient()
    client = RegoloClient(KEY, base_url=stub.url, async_http_client=mine)
    loop = asyncio.new_event_loop()
    loop.run_until_complete(client.arerank("q", ["a"]))
    with pytest.raises(APIConnectionError, match="event loop"):
        asyncio.run(client.arerank("q", ["a"]))
    loop.run_until_complete(mine.aclose())
    loop.close()


@pytest.mark.parametrize("option", ["http_client", "async_http_client"])
def test_the_embedded_endpoint_takes_no_http_client(rank: Rank, option: str) -> None:
    """A client that could not be used is refused."""
    mine: dict[str, Any] = {option: httpx.Client() if option == "http_client" else httpx.AsyncClient()}
    with pytest.raises(InvalidInputError, match="http_client: not with base_url='local://'"):
        rank(RegoloClient(base_url="local://", **mine), "q", ["a"])


def test_a_clear_text_proxy_does_not_see_the_key(mode: str, stub: Stub) -> None:
    """The key goes over http to this machine, but not by way of a caller's proxy, except with allow_http."""

    def call(**options: Any) -> RerankResponse:
        with httpx.Client(proxy=stub.url) as mine:
            return RegoloClient(base_url="http://127.0.0.1:9", http_client=mine, **options).rerank("q", ["a"])

    async def acall(**options: Any) -> RerankResponse:
        async with httpx.AsyncClient(proxy=stub.url) as mine:
            return await RegoloClient(base_url="http://127.0.0.1:9", async_http_client=mine, **options).arerank(
                "q", ["a"]
            )

    def ranked(**options: Any) -> RerankResponse:
        return call(**options) if mode == "sync" else asyncio.run(acall(**options))

    with pytest.raises(InvalidInputError, match="proxy would see the API key"):
        ranked(api_key=KEY)
    assert not stub.received
    assert ranked(api_key=KEY, allow_http=True).results
    assert ranked(api_key="").results
