"""Replies on the wire: too large, compressed, broken in the middle, twice, or from another model."""

import asyncio
import gzip
import json
import time
from typing import Any

import pytest

from regolo_rerank import APIConnectionError, APIResponseError, BadRequestError, RegoloClient, ServerError
from tests.conftest import KEY
from tests.support.faults import FaultServer, endless, http, sends
from tests.support.modes import Call
from tests.support.observed import slowly
from tests.support.stub import Received, Reply, Stub, pairs, ranking
from tests.support.stub import score as stub_score

TEXTS = ["a score=0.25", "b score=0.75", "c score=0.5"]
RANKED = [(1, 0.75), (2, 0.5), (0, 0.25)]
SENT = {"documents": [f"<Document>: {text}" for text in TEXTS]}
GOOD = http(json.dumps(ranking(SENT)).encode())
BODY = GOOD.partition(b"\r\n\r\n")[2]


@pytest.mark.parametrize("status", [200, 500])
def test_64_mebibytes_are_the_limit(call: Call, status: int) -> None:
    """An endless reply is rejected while it is read, and only once."""
    with FaultServer(usual=endless(status)) as server, RegoloClient(KEY, base_url=server.url) as client:
        with pytest.raises(APIResponseError, match="larger than 67108864 bytes"):
            call(client.rerank, "q", TEXTS)
        assert len(server.received) == 1


@pytest.mark.parametrize("coding", ["gzip", "br", "zstd", "gzip, identity"])
def test_a_compressed_reply_is_rejected(call: Call, coding: str) -> None:
    """Requests ask for `identity`; a bomb must not be unpacked."""
    with FaultServer(usual=sends(http(gzip.compress(BODY), content_encoding=coding))) as server:
        with pytest.raises(APIResponseError, match=f"it is compressed \\({coding}\\)"):
            call(RegoloClient(KEY, base_url=server.url).rerank, "q", TEXTS)
        assert len(server.received) == 1


def test_a_compressed_error_has_its_status(call: Call) -> None:
    """The body of an error is not needed."""
    fault = sends(http(gzip.compress(b"{}"), 422, content_encoding="gzip"))
    with FaultServer(usual=fault) as server, pytest.raises(BadRequestError, match="422"):
        call(RegoloClient(KEY, base_url=server.url).rerank, "q", TEXTS)


@pytest.mark.parametrize(
    "good",
    [
        http(BODY, content_encoding="Identity"),
        b"HTTP/1.1 100 Continue\r\n\r\n" + GOOD,
        b"HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n" + GOOD,
        GOOD.replace(b"HTTP/1.1", b"HTTP/1.0"),
    ],
    ids=["identity", "100", "103", "1.0"],
)
def test_unusual_replies_are_read(call: Call, good: bytes) -> None:
    """One request each."""
    with FaultServer(usual=sends(good)) as server:
        assert pairs(call(RegoloClient(KEY, base_url=server.url).rerank, "q", TEXTS)) == RANKED
        assert len(server.received) == 1


BROKEN = {
    "nothing": b"",
    "no http": b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
    "closed in headers": GOOD[:30],
    "closed in the body": GOOD[:-20],
    "content-length too long": http(BODY, content_length=str(len(BODY) + 9)),
    "content-length no number": GOOD.replace(b"content-length: ", b"content-length: x"),
    "101": b"HTTP/1.1 101 Switching Protocols\r\n\r\n",
    "no chunk": b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
}


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN.keys())
def test_a_reply_that_breaks_is_asked_for_again(call: Call, broken: bytes, *, reset: bool) -> None:
    """Once, it costs an attempt; always, it is an error of the connection."""
    with FaultServer(sends(broken, then_reset=reset)) as server:
        assert pairs(call(RegoloClient(KEY, base_url=server.url, max_retries=1).rerank, "q", TEXTS)) == RANKED
        assert len(server.received) == 2
    with FaultServer(usual=sends(broken, then_reset=reset)) as server:
        with pytest.raises(APIConnectionError, match=f"no complete reply from {server.url[7:]}"):
            call(RegoloClient(KEY, base_url=server.url, max_retries=1).rerank, "q", TEXTS)
        assert len(server.received) == 2


@pytest.mark.parametrize("header", ["x-litellm-call-id", "x-request-id"])
def test_a_second_reply_to_one_request_is_not_the_next_ones(call: Call, stub: Stub, header: str) -> None:
    """If the server returns request ids, a reply to another request is recognised, and the request sent again."""
    wrong = json.dumps({"results": [{"index": index, "relevance_score": index} for index in range(3)]}).encode()

    def reply(request: Received) -> Reply:
        ranked = [{"index": index, "relevance_score": stub_score(text)} for index, text in enumerate(request.documents)]
        named = {header: request.headers[header]}
        surplus = http(wrong, 200, connection="keep-alive", **named) if len(stub.received) == 1 else b""
        return Reply({"results": ranked}, headers=named, surplus=surplus)

    stub.reply = reply

    async def arank(client: RegoloClient) -> list[list[tuple[int, float]]]:
        return [pairs(await client.arerank("q", TEXTS)) for _ in range(3)]

    with RegoloClient(KEY, base_url=stub.url, max_retries=1) as client:
        run = arank(client)
        if call.mode == "async":
            assert asyncio.run(run) == [RANKED] * 3
        else:
            assert [pairs(client.rerank("q", TEXTS)) for _ in range(3)] == [RANKED] * 3
        run.close()
    assert (len(stub.received), stub.connections) == (4, 2)
    assert len({request.headers[header] for request in stub.received}) == 4


def test_an_error_before_the_request_was_read(call: Call) -> None:
    """A server that refuses a large request early, and keeps it short, is heard."""

    def early(connection: Any, _request: dict[str, Any]) -> None:
        connection.sendall(http(b'{"error": {"message": "busy"}}', 503, retry_after_ms="1"))
        time.sleep(0.05)

    with FaultServer(usual=early) as server, pytest.raises(ServerError, match="busy"):
        call(RegoloClient(KEY, base_url=server.url, max_retries=1).rerank, "q", ["x" * 900_000])


def test_the_time_of_a_reply_is_logged(
    call: Call, client: RegoloClient, stub: Stub, caplog: pytest.LogCaptureFixture
) -> None:
    """In seconds, from the start of the request."""
    stub.reply = slowly(0.1)
    with caplog.at_level("DEBUG", "regolo_rerank"):
        call(client.rerank, "q", ["a"])
    (seconds,) = [vars(record)["seconds"] for record in caplog.records if record.name == "regolo_rerank"]
    assert 0.1 <= seconds < 20
