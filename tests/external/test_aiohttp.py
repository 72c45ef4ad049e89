import asyncio
import gc
import socket
import ssl
import sys
import warnings

import httpx
import pytest

from regolo_rerank import APIConnectionError, APIStatusError, APITimeoutError, InvalidInputError, RegoloClient
from regolo_rerank._transports.aiohttp_transport import AiohttpTransport
from regolo_rerank._transports.lines import is_proxied
from tests.conftest import KEY
from tests.support.faults import FaultServer, http, sends
from tests.support.observed import sockets, soon
from tests.support.stub import Reply, Stub, pairs, scored

DOCUMENTS = ["a score=0.1", "b score=0.9"]
EXPECTED = [(1, 0.9), (0, 0.1)]


@pytest.fixture
def client(stub: Stub) -> RegoloClient:
    """A client of the stub server whose async calls go over aiohttp."""
    return RegoloClient(KEY, base_url=stub.url, async_transport="aiohttp")


async def ranked(client: RegoloClient) -> list[tuple[int, float]]:
    """Rank the two documents."""
    return pairs((await client.arerank("q", DOCUMENTS)).results)


def test_requests_are_those_of_httpx(client: RegoloClient, stub: Stub) -> None:
    """Over either transport the server sees the same request: method, path, body, key and headers."""
    client.rerank("q", DOCUMENTS)
    assert asyncio.run(ranked(client)) == EXPECTED
    over_httpx, over_aiohttp = stub.received
    assert over_aiohttp.path == over_httpx.path
    assert over_aiohttp.json == over_httpx.json
    assert dict(over_aiohttp.headers) == dict(over_httpx.headers)


def test_each_event_loop_has_its_own_connections(client: RegoloClient, stub: Stub) -> None:
    """One asyncio.run after another works, keeps its connection while it lasts, and leaves no socket behind."""

    async def twice() -> None:
        assert [await ranked(client), await ranked(client)] == [EXPECTED] * 2

    before = sockets()
    for _ in range(3):
        asyncio.run(twice())
    assert not client._pools._loops
    assert soon(lambda: sockets() <= before)  # the stub closes its side a moment later
    assert stub.connections == 3


def test_a_forgotten_client_closes_without_a_warning(stub: Stub) -> None:
    """A client that nobody closes leaves no socket and no ResourceWarning."""

    async def forget() -> None:
        await ranked(RegoloClient(KEY, base_url=stub.url, async_transport="aiohttp"))
        gc.collect()
        await asyncio.sleep(0.05)  # the loop closes the pool as soon as it runs

    before = sockets()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        asyncio.run(forget())
        gc.collect()
    assert not [str(warning.message) for warning in caught]
    assert sockets() <= before + 1  # the stub's end


def test_200_calls_at_once_wait_together(client: RegoloClient, stub: Stub) -> None:
    """No limit of the transport's own makes one call wait for another."""
    stub.reply = lambda request: Reply(scored(request).body, delay=0.5)

    async def many() -> list[list[tuple[int, float]]]:
        return await asyncio.gather(*(ranked(client) for _ in range(200)))

    assert asyncio.run(many()) == [EXPECTED] * 200
    assert stub.most_at_once > 150


def test_a_cancelled_call_leaves_nothing_behind(client: RegoloClient, stub: Stub) -> None:
    """Cancelling ends a call at once, its connection is not used again, and later calls are right."""
    stub.script(Reply(b"{}", delay=0.5))

    async def cancelled() -> list[tuple[int, float]]:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(ranked(client), 0.1)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return await ranked(client)

    assert asyncio.run(cancelled()) == EXPECTED
    assert stub.connections == 2


def test_timeout_bounds_an_attempt(client: RegoloClient, stub: Stub) -> None:
    """A reply that comes too late is an APITimeoutError, as over httpx."""
    stub.always(Reply(b"{}", delay=0.5))
    client.timeout, client.max_retries = 0.1, 0
    with pytest.raises(APITimeoutError):
        asyncio.run(ranked(client))


def test_redirects_are_not_followed(client: RegoloClient, stub: Stub) -> None:
    """The key goes nowhere but to base_url."""
    stub.always(Reply({}, 307, {"location": f"{stub.url}/elsewhere"}))
    with pytest.raises(APIStatusError, match="redirects are not followed"):
        asyncio.run(ranked(client))
    assert len(stub.received) == 1


def test_the_environments_proxy_is_used_but_not_for_loopback(
    client: RegoloClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A remote host is reached through the environment's proxy, this machine without it."""
    with Stub() as proxy:
        for name in ("HTTP_PROXY", "http_proxy"):
            monkeypatch.setenv(name, proxy.url)
        assert asyncio.run(ranked(client)) == EXPECTED
        assert not proxy.received
        remote = client.model_copy(update={"base_url": "http://rerank.invalid/v1", "api_key": ""})
        assert asyncio.run(ranked(remote)) == EXPECTED
        assert proxy.received[0].path == "http://rerank.invalid/v1/rerank"


def test_no_error_quotes_a_reply_that_is_no_http() -> None:
    """What aiohttp says of a malformed reply quotes it, and so perhaps the key: nothing within reach repeats it."""
    fault = sends(b"HTTP/1.1 200 OK\r\n" + f"{KEY}\r\n\r\n".encode() + http(b"{}"))
    with FaultServer(usual=fault) as server:
        client = RegoloClient(KEY, base_url=server.url, async_transport="aiohttp", max_retries=0)
        with pytest.raises(APIConnectionError, match="its reply is not HTTP") as caught:
            asyncio.run(ranked(client))
    links: list[BaseException | None] = [caught.value]
    for link in links:
        if link is not None:
            assert type(link).__module__.partition(".")[0] in {"regolo_rerank", "httpx"}
            assert KEY not in f"{link!r} {vars(link)}"
            links += [link.__cause__, link.__context__]


@pytest.mark.parametrize("kind", ["http", "https"])
def test_a_host_that_cannot_be_reached_is_a_connection_error(kind: str) -> None:
    """A refused connection, and a proxy that refuses, are errors of ours, without the words of aiohttp."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        url = f"{kind}://127.0.0.1:{bound.getsockname()[1]}"
        client = RegoloClient(KEY, base_url=url, async_transport="aiohttp", max_retries=0)
        with pytest.raises(APIConnectionError, match="onnect") as caught:
            asyncio.run(ranked(client))
    assert type(caught.value.__cause__) is httpx.ConnectError


def test_a_client_that_never_called_closes(client: RegoloClient) -> None:
    """Closing without a call, and twice, does nothing."""

    async def closed() -> None:
        await client.aclose()
        await AiohttpTransport(ssl.create_default_context(), 1.0, trust_env=False).aclose()

    asyncio.run(closed())


def test_without_aiohttp_the_error_names_the_extra(client: RegoloClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where aiohttp is not installed, the first async call says what to install."""
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    monkeypatch.delitem(sys.modules, "regolo_rerank._transports.aiohttp_transport", raising=False)
    with pytest.raises(InvalidInputError, match=r"regolo_rerank\[aiohttp\]"):
        asyncio.run(ranked(client))
    assert pairs(client.rerank("q", DOCUMENTS).results) == EXPECTED


def test_the_callers_client_goes_before_the_transport(stub: Stub) -> None:
    """With async_http_client the caller's own client is used, whatever async_transport says."""

    async def own() -> list[tuple[int, float]]:
        async with httpx.AsyncClient(headers={"x-mine": "1"}) as mine:
            assert not is_proxied(mine, httpx.URL(stub.url))
            client = RegoloClient(KEY, base_url=stub.url, async_transport="aiohttp", async_http_client=mine)
            return await ranked(client)

    assert asyncio.run(own()) == EXPECTED
    assert stub.received[0].headers["x-mine"] == "1"
