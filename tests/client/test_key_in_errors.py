"""What servers do at the level of connections shows the key in no error, cause or log, whichever client sends."""

import asyncio
import logging
import pickle
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from httpx_aiohttp import HttpxAiohttpClient

from regolo_rerank import APIConnectionError, RegoloClient
from tests.conftest import KEY
from tests.support.faults import FaultServer, sends

REPLIES = {
    "no http": f"-ERR unknown command: Bearer {KEY}\r\n\r\n",
    "no header": f"HTTP/1.1 200 OK\r\n{KEY}\r\n\r\n",
    "no chunk": f"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n{KEY}\r\n",
    "nothing": "",
    "half a reply": "HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n{}",
}
CLIENTS = [("sync", None), ("async", None), ("sync", httpx.Client), ("async", httpx.AsyncClient)]


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """Give an error and all that is told with it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def rank(mode: str, url: str, kind: Any) -> None:
    """Rank over a client of the caller's own, or over the package's."""

    async def arank() -> None:
        async with kind() if kind else httpx.AsyncClient() as own:
            client = RegoloClient(KEY, base_url=url, max_retries=1, async_http_client=own if kind else None)
            await client.arerank("q", ["a"])

    if mode == "async":
        asyncio.run(arank())
        return
    with kind() if kind else httpx.Client() as own:
        RegoloClient(KEY, base_url=url, max_retries=1, http_client=own if kind else None).rerank("q", ["a"])


@pytest.mark.parametrize("reply", REPLIES.values(), ids=REPLIES.keys())
@pytest.mark.parametrize(("mode", "kind"), [*CLIENTS, ("async", HttpxAiohttpClient)])
def test_an_error_of_a_connection_can_be_logged(
    mode: str, kind: Any, reply: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A reply that is no HTTP, or none, is an APIConnectionError that holds the key nowhere, and is tried again."""
    caplog.set_level(logging.DEBUG, "regolo_rerank")
    with FaultServer(usual=sends(reply.encode())) as server, pytest.raises(APIConnectionError) as caught:
        rank(mode, server.url, kind)
    assert len(server.received) == 2
    for error in chain(caught.value):
        assert KEY not in f"{error} {error!r} {error.args} {vars(error)}"
        assert KEY.encode() not in pickle.dumps(error)
    assert KEY not in caplog.text


def test_an_error_of_the_callers_own_hook_is_the_callers(mode: str) -> None:
    """What code of the caller's raises inside its client comes out as it is, and nothing is tried again."""

    def hook(_: httpx.Request) -> None:
        raise LookupError("mine")

    async def ahook(_: httpx.Request) -> None:
        raise LookupError("mine")

    hooked = {
        "sync": lambda: httpx.Client(event_hooks={"request": [hook]}),
        "async": lambda: httpx.AsyncClient(event_hooks={"request": [ahook]}),
    }
    with FaultServer() as server, pytest.raises(LookupError, match="mine"):
        rank(mode, server.url, hooked[mode])
    assert not server.received
