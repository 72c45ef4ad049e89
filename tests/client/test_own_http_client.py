import asyncio
import traceback
from typing import Any

import httpx
import pytest

from regolo_rerank import APIConnectionError, APITimeoutError, InvalidInputError, RegoloClient, RerankResponse
from tests.conftest import KEY, Rank
from tests.support.stub import Reply, Stub, results

Kinds = tuple[type[httpx.Client], type[httpx.AsyncClient]]


def ranked_over(
    mode: str, settings: dict[str, Any], kinds: Kinds = (httpx.Client, httpx.AsyncClient), **options: Any
) -> RerankResponse:
    """Rank over an httpx client of the caller's own, made with certain settings; see that it is left open."""
    options = {"api_key": KEY, **options}

    def called() -> RerankResponse:
        with kinds[0](**settings) as own:
            try:
                with RegoloClient(http_client=own, **options) as client:
                    return client.rerank("q", ["a"])
            finally:
                assert not own.is_closed

    async def acalled() -> RerankResponse:
        async with kinds[1](**settings) as own:
            try:
                async with RegoloClient(async_http_client=own, **options) as client:
                    return await client.arerank("q", ["a"])
            finally:
                assert not own.is_closed

    return called() if mode == "sync" else asyncio.run(acalled())


def test_the_callers_own_http_client_counts(mode: str, stub: Stub) -> None:
    """The caller's client is used with its own timeout, and is left open."""
    stub.always(Reply(results((0, 1.0)), delay=0.3))
    settings: dict[str, Any] = {"timeout": 5.0, "headers": {"x-mine": "1"}}
    options: dict[str, Any] = {"base_url": stub.url, "max_retries": 0, "timeout": 0.01}
    assert len(ranked_over(mode, settings, **options).results) == 1
    with pytest.raises(APITimeoutError):
        ranked_over(mode, settings | {"timeout": 0.1}, **options)
    assert [request.headers["x-mine"] for request in stub.received] == ["1", "1"]


@pytest.mark.parametrize(("key", "sent"), [(KEY, f"Bearer {KEY}"), ("", "Basic dXNlcjp3b3Jk")], ids=["key", "none"])
def test_the_key_goes_before_the_authentication_of_the_callers_client(
    mode: str, key: str, sent: str, stub: Stub
) -> None:
    """A caller's client that has an `auth` of its own does not put it in the key's place; without a key it counts."""
    ranked_over(mode, {"auth": ("user", "word")}, base_url=stub.url, api_key=key)
    assert [request.headers["authorization"] for request in stub.received] == [sent]


class Insisting:
    """Puts a key of its own on each request that it builds, and then fails where it is told to."""

    fails = False

    def build_request(self, *arguments: Any, **settings: Any) -> httpx.Request:
        """Build a request."""
        request: httpx.Request = super().build_request(*arguments, **settings)  # type: ignore[misc]  # of an httpx client
        request.headers["Authorization"] = "Bearer other"
        if self.fails:
            raise ValueError("not like this")
        return request


class InsistingClient(Insisting, httpx.Client):
    """The sync one."""


class AsyncInsistingClient(Insisting, httpx.AsyncClient):
    """The async one."""


INSISTING: Kinds = (InsistingClient, AsyncInsistingClient)


def test_the_key_goes_before_one_that_the_callers_client_puts_on_a_request(mode: str, stub: Stub) -> None:
    """The key is put on a request last."""
    ranked_over(mode, {}, INSISTING, base_url=stub.url)
    assert [request.headers["authorization"] for request in stub.received] == [f"Bearer {KEY}"]


def test_a_callers_client_that_fails_to_build_a_request_has_not_seen_the_key(
    mode: str, stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the caller's client raises comes as it is, and no frame that it came through holds the key."""
    monkeypatch.setattr(Insisting, "fails", True)
    with pytest.raises(ValueError, match="not like this") as caught:
        ranked_over(mode, {}, INSISTING, base_url=stub.url)
    frames = traceback.TracebackException.from_exception(caught.value, capture_locals=True).stack
    of_the_package = [frame for frame in frames if "regolo_rerank/" in frame.filename or "httpx/" in frame.filename]
    assert of_the_package
    assert not [frame for frame in of_the_package if KEY in str(frame.locals)]


@pytest.mark.parametrize("own", [True, False], ids=["own client", "caller's client"])
def test_a_host_of_the_callers_is_sent(mode: str, rank: Rank, stub: Stub, *, own: bool) -> None:
    """A `Host` in `default_headers`, for a server behind a proxy, takes the place of the address's."""
    options: dict[str, Any] = {"base_url": stub.url, "default_headers": {"Host": "rerank.internal"}}
    if own:
        rank(RegoloClient(KEY, **options), "q", ["a"])
    else:
        ranked_over(mode, {}, **options)
    assert [request.headers["host"] for request in stub.received] == ["rerank.internal"]


def test_a_request_that_cannot_be_sent_is_not_tried_again(mode: str, stub: Stub) -> None:
    """A header of the caller's own http client that HTTP does not allow fails at once."""
    with pytest.raises(APIConnectionError, match="Illegal header"):
        ranked_over(mode, {"headers": {"x-mine": "a\nb"}}, base_url=stub.url, max_retries=10**9)
    assert not stub.received


def test_a_reply_that_a_hook_has_closed_is_not_asked_for_again(mode: str, stub: Stub) -> None:
    """Where a hook of the caller's client closes a reply unread, the error says so, and it is sent once."""

    async def close(response: httpx.Response) -> None:
        await response.aclose()

    hook = httpx.Response.close if mode == "sync" else close
    with pytest.raises(APIConnectionError, match="the stream has been closed"):
        ranked_over(mode, {"event_hooks": {"response": [hook]}}, base_url=stub.url)
    assert len(stub.received) == 1


def test_a_closed_http_client_is_an_error_that_says_so(rank: Rank, stub: Stub) -> None:
    """A caller's client that is closed is named, and not tried again."""
    closed, aclosed = httpx.Client(), httpx.AsyncClient()
    closed.close()
    asyncio.run(aclosed.aclose())
    client = RegoloClient(KEY, base_url=stub.url, http_client=closed, async_http_client=aclosed)
    with pytest.raises(APIConnectionError, match="closed"):
        rank(client, "q", ["a"])


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
