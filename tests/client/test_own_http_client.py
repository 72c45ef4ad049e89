"""HTTP clients of the caller, of httpx and of httpx2."""

import asyncio
from typing import Any

import pytest

from regolo_rerank import APIConnectionError, APITimeoutError, InvalidInputError, RegoloClient
from tests.conftest import KEY
from tests.support.faults import FaultServer, http, sends
from tests.support.modes import Call
from tests.support.observed import slowly
from tests.support.stub import Reply, Stub, error, pairs, results, texts


@pytest.fixture(params=["httpx", "httpx2"])
def library(request: pytest.FixtureRequest) -> Any:
    """The module httpx or httpx2."""
    return pytest.importorskip(request.param)


def rank(call: Call, library: Any, settings: dict[str, Any], documents: Any = ("a",), **options: Any) -> Any:
    """Rank over a client of the caller with some settings, and check that it stays open."""
    options = {"api_key": KEY, **options}

    async def arank() -> Any:
        async with library.AsyncClient(**settings) as own:
            try:
                async with RegoloClient(async_http_client=own, **options) as client:
                    return await client.arerank("q", documents)
            finally:
                assert not own.is_closed

    if call.mode == "async":
        return asyncio.run(arank())
    with library.Client(**settings) as own:
        try:
            with RegoloClient(http_client=own, **options) as client:
                return client.rerank("q", documents)
        finally:
            assert not own.is_closed


def test_a_ranking_over_the_callers_client(call: Call, library: Any, stub: Stub) -> None:
    """Its headers are sent, errors are retried, and it is left open."""
    stub.script(error("down", 503), error("slow down", 429))
    response = rank(call, library, {"headers": {"x-mine": "1"}}, texts(3), base_url=stub.url, batch_size=2)
    assert [result.index for result in response] == [2, 1, 0]
    assert {request.headers["x-mine"] for request in stub.received} == {"1"}
    assert {request.headers["authorization"] for request in stub.received} == {f"Bearer {KEY}"}
    assert {request.headers["accept-encoding"] for request in stub.received} == {"identity"}
    assert len(stub.received) == 4


def test_its_timeouts_apply_unless_timeout_is_given(call: Call, library: Any, stub: Stub) -> None:
    """The default of the option `timeout` does not count, and its explicit value does."""
    stub.reply = slowly(0.5)
    options: dict[str, Any] = {"base_url": stub.url, "max_retries": 0}
    assert rank(call, library, {"timeout": 20.0}, **options)
    with pytest.raises(APITimeoutError, match="within the timeout of the http client"):
        rank(call, library, {"timeout": 0.1}, **options)
    assert rank(call, library, {"timeout": 0.1}, **options, timeout=20.0)
    with pytest.raises(APITimeoutError, match=r"within 0\.1 s"):
        rank(call, library, {"timeout": 20.0}, **options, timeout=0.1)
    with pytest.raises(APITimeoutError, match=r"total_timeout=0\.2"):
        rank(call, library, {"timeout": 20.0}, **options, total_timeout=0.2)


@pytest.mark.parametrize(("key", "sent"), [(KEY, f"Bearer {KEY}"), ("", "Basic dXNlcjp3b3Jk")], ids=["key", "none"])
def test_the_key_replaces_the_authentication_of_the_client(
    call: Call, library: Any, stub: Stub, key: str, sent: str
) -> None:
    """Without a key, the authentication of the client is used."""
    rank(call, library, {"auth": ("user", "word")}, base_url=stub.url, api_key=key)
    assert [request.headers["authorization"] for request in stub.received] == [sent]


def test_redirects_are_not_followed(call: Call, library: Any, stub: Stub) -> None:
    """Also if the client would follow them."""
    stub.always(Reply(b"", 307, headers={"location": "http://elsewhere.invalid/rerank"}))
    with pytest.raises(Exception, match=r"redirects to http://elsewhere\.invalid/rerank"):
        rank(call, library, {"follow_redirects": True}, base_url=stub.url)
    assert len(stub.received) == 1


def hooks(call: Call, kind: str, function: Any) -> dict[str, Any]:
    """Return the settings of a client with an event hook."""

    async def ahook(event: Any) -> None:
        outcome = function(event)
        if outcome is not None:
            await outcome

    return {"event_hooks": {kind: [ahook if call.mode == "async" else function]}}


def test_hooks_see_every_request_and_reply(call: Call, library: Any, stub: Stub) -> None:
    """A hook that reads the body does no harm."""
    seen: list[Any] = []
    read = (lambda reply: reply.aread()) if call.mode == "async" else (lambda reply: reply.read() and None)
    settings = {
        "event_hooks": {
            **hooks(call, "request", lambda request: seen.append(request.url))["event_hooks"],
            **hooks(call, "response", read)["event_hooks"],
        }
    }
    assert pairs(rank(call, library, settings, texts(2), base_url=stub.url, batch_size=1)) == [(1, 0.5), (0, 0.0)]
    assert [str(url) for url in seen] == [f"{stub.url}/rerank"] * 2


@pytest.mark.parametrize("options", [{}, {"timeout": 20.0}], ids=["in a thread", "in the caller's"])
@pytest.mark.parametrize("error", [LookupError, StopIteration])
def test_an_error_of_a_hook_is_the_callers(
    call: Call, library: Any, stub: Stub, error: type[Exception], options: dict[str, Any]
) -> None:
    """It comes out as it is, and nothing is retried."""

    def hook(_: Any) -> None:
        raise error("mine")

    if call.mode == "async" and error is StopIteration:
        pytest.skip("a coroutine cannot raise it")
    with pytest.raises(error):
        rank(call, library, hooks(call, "request", hook), base_url=stub.url, **options)
    assert not stub.received


def test_a_reply_that_a_hook_has_closed(call: Call, library: Any, stub: Stub) -> None:
    """It cannot be read; the error says so, and the request is sent once."""
    close = (lambda reply: reply.aclose()) if call.mode == "async" else (lambda reply: reply.close())
    with pytest.raises(APIConnectionError, match="stream has been closed"):
        rank(call, library, hooks(call, "response", close), base_url=stub.url)
    assert len(stub.received) == 1


def test_a_request_that_cannot_be_sent_is_not_retried(call: Call, library: Any, stub: Stub) -> None:
    """A header that HTTP does not allow."""
    with pytest.raises(APIConnectionError) as caught:
        rank(call, library, {"headers": {"x-mine": "a\nb"}}, base_url=stub.url, max_retries=10**9)
    assert not caught.value.retryable
    assert not stub.received


@pytest.mark.parametrize("fault", [sends(b""), sends(b"SSH-2.0\r\n\r\n"), sends(http(b"{}")[:-1])])
def test_a_lost_connection_is_retried(call: Call, library: Any, fault: Any) -> None:
    """Exceptions are recognised by their names, so httpx2 needs no code of its own."""
    with FaultServer(fault) as server:
        assert rank(call, library, {}, base_url=server.url, max_retries=1)
    with pytest.raises(APIConnectionError, match=server.url[7:]):
        rank(call, library, {}, base_url=server.url, max_retries=0)


def test_a_closed_client_is_named(call: Call, library: Any, stub: Stub) -> None:
    """It is not retried."""
    closed, aclosed = library.Client(), library.AsyncClient()
    closed.close()
    asyncio.run(aclosed.aclose())
    client = RegoloClient(KEY, base_url=stub.url, http_client=closed, async_http_client=aclosed)
    with pytest.raises(InvalidInputError, match=r"http_client: it cannot be used: .*closed"):
        call(client.rerank, "q", ["a"])


def test_an_async_client_in_a_second_loop_is_named(library: Any, stub: Stub) -> None:
    """A connection of another event loop, whether it is closed or not."""
    own = library.AsyncClient()
    client = RegoloClient(KEY, base_url=stub.url, async_http_client=own)
    loop = asyncio.new_event_loop()
    loop.run_until_complete(client.arerank("q", ["a"]))
    with pytest.raises(InvalidInputError, match="must belong to the running event loop"):
        asyncio.run(client.arerank("q", ["a"]))
    loop.run_until_complete(own.aclose())
    loop.close()


def test_mocks_of_httpx_are_read(call: Call, library: Any, stub: Stub) -> None:
    """A mock transport, as tests of applications use it."""
    transport = library.MockTransport(lambda _: library.Response(200, json=results((0, 1.0))))
    response = rank(call, library, {"transport": transport}, base_url=stub.url)
    assert pairs(response) == [(0, 1.0)]
    assert not stub.received
