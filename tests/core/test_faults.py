import asyncio
import gzip
import itertools
import json
import socket
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from regolo_rerank import (
    APIConnectionError,
    APIResponseError,
    APIStatusError,
    APITimeoutError,
    AuthenticationError,
    BadRequestError,
    NotFoundError,
    PermissionDeniedError,
    RateLimitError,
    RegoloClient,
    RegoloError,
    ServerError,
)
from tests.conftest import KEY
from tests.support.entries import KINDS, Entry
from tests.support.faults import (
    Fault,
    FaultServer,
    bomb,
    changed,
    endless,
    endless_after,
    http,
    ranking,
    sends,
    stalls,
    trickles,
)
from tests.support.inside import allow_replies_of, back_off_for
from tests.support.modes import Call
from tests.support.stub import Received, Reply, Stub, pairs
from tests.support.stub import score as stub_score

TEXTS = ["a score=0.25", "b score=0.75", "", "c score=0.5", "b score=0.75"]
RANKED = [(1, 0.75), (4, 0.75), (3, 0.5), (0, 0.25), (2, 0.0)]
SENT = {"documents": ["<Document>: a score=0.25", "<Document>: b score=0.75", "<Document>: c score=0.5"]}
GOOD = http(json.dumps(ranking(SENT)).encode())
HEAD, BODY = GOOD.split(b"\r\n\r\n")[0] + b"\r\n\r\n", GOOD.split(b"\r\n\r\n")[1]


@dataclass(frozen=True)
class Case:
    """A fault, what comes of it when it is the only one and when it goes on, and how often it is met."""

    fault: Fault
    always: type[RegoloError] | None
    """The error, None where the ranking comes out all the same."""
    passing: bool = True
    """Whether another attempt may help: then the fault met once is a good ranking."""
    timeout: float = 10.0
    """Seconds for an attempt."""


def response(always: type[RegoloError] | None, body: bytes | str, **headers: str) -> Case:
    """Return the case of a 200 with a certain body."""
    return Case(sends(http(body.encode() if isinstance(body, str) else body, 200, **headers)), always)


def replaced(always: type[RegoloError] | None, **fields: Any) -> Case:
    """Return the case of a right reply with some fields replaced."""
    return Case(changed(lambda reply: {**reply, **fields}), always)


def scored(value: str) -> Case:
    """Return the case of a score that is no number, by its JSON."""
    body = json.dumps(ranking(SENT)).replace("0.75", value)
    return response(APIResponseError, body)


def squeezed(mebibytes: int) -> bytes:
    """Return so many mebibytes, compressed twice to next to nothing."""
    return gzip.compress(gzip.compress(b" " * mebibytes * 1024 * 1024, 6), 9)


UNBOUNDED = {
    "gzip, gzip": squeezed(8),
    "zstd": b"\x28\xb5\x2f\xfd",
    "br": b"\x06",
    "deflate": zlib.compress(BODY),
    "gzip, identity": gzip.compress(BODY),
}
"""Codings that nobody asked for, each with a body."""

CASES: dict[str, Case] = {
    # the connection
    "closed before headers": Case(sends(b""), APIConnectionError),
    "reset before headers": Case(sends(b"", then_reset=True), APIConnectionError),
    "closed in headers": Case(sends(HEAD[:30]), APIConnectionError),
    "reset in headers": Case(sends(HEAD[:30], then_reset=True), APIConnectionError),
    "closed in body": Case(sends(GOOD[:-20]), APIConnectionError),
    "reset in body": Case(sends(GOOD[:-20], then_reset=True), APIConnectionError),
    "stalled before headers": Case(stalls(b"", 5), APITimeoutError, timeout=0.15),
    "stalled in headers": Case(stalls(HEAD[:30], 5), APITimeoutError, timeout=0.15),
    "stalled in body": Case(stalls(GOOD[:-20], 5), APITimeoutError, timeout=0.15),
    "a byte at a time": Case(trickles(HEAD, BODY, 0.01), APITimeoutError, timeout=0.15),
    "no http": Case(sends(b"SSH-2.0-OpenSSH_9.2\r\n\r\n"), APIConnectionError),
    # the body
    "truncated": response(APIResponseError, BODY[:-20]),
    "empty": response(APIResponseError, b""),
    "html": response(APIResponseError, "<html><h1>Welcome</h1></html>", content_type="text/html"),
    "not utf-8": response(APIResponseError, b'{"results": "\xff\xfe"}'),
    "gzip": response(None, gzip.compress(BODY), content_encoding="gzip"),
    "broken gzip": response(APIResponseError, b"\x1f\x8b broken", content_encoding="gzip"),
    "truncated gzip": response(APIResponseError, gzip.compress(BODY)[:-12], content_encoding="gzip"),
    "endless": Case(endless, APIResponseError),
    "endless behind gzip": Case(endless_after(gzip.compress(BODY), content_encoding="gzip"), APIResponseError),
    "endless in no gzip": Case(endless_after(b"", 500, content_encoding="zstd"), APIResponseError),
    "identity": response(None, BODY, content_encoding="Identity"),
    "x-gzip": response(None, gzip.compress(BODY), content_encoding="x-gzip"),
    "gzip bomb": Case(bomb(8), APIResponseError),
    **{
        f"compressed as {coding}": Case(
            sends(http(body, content_encoding=coding)), APIResponseError, passing=False, timeout=2.0
        )
        for coding, body in UNBOUNDED.items()
    },
    "content-length too long": response(APIConnectionError, BODY, content_length=str(len(BODY) + 9)),
    "content-length too short": response(APIResponseError, BODY, content_length=str(len(BODY) - 9)),
    "content-length no number": Case(
        sends(GOOD.replace(b"content-length: ", b"content-length: x")), APIConnectionError
    ),
    # interim replies and redirects
    "100": Case(sends(b"HTTP/1.1 100 Continue\r\n\r\n" + GOOD), None),
    "103": Case(sends(b"HTTP/1.1 103 Early Hints\r\nlink: </x>\r\n\r\n" + GOOD), None),
    "101": Case(sends(b"HTTP/1.1 101 Switching Protocols\r\n\r\n"), APIConnectionError),
    "301 to itself": Case(sends(http(b"", 301, location="/rerank")), APIStatusError, passing=False),
    "307 elsewhere": Case(
        sends(http(b"", 307, location="https://example.invalid/rerank")), APIStatusError, passing=False
    ),
    "308 to http": Case(sends(http(b"", 308, location="http://example.invalid/rerank")), APIStatusError, passing=False),
    "302 to nowhere": Case(sends(http(b"", 302, location="http://[")), APIStatusError, passing=False),
    # a 200 that cannot be trusted
    "error inside": response(APIResponseError, '{"error": {"message": "no backend", "code": "500"}}'),
    "error inside as text": response(APIResponseError, '{"error": "no backend", "results": []}'),
    "budget error inside": Case(
        sends(http(b'{"error": {"message": "no more", "code": "402"}}')), APIResponseError, passing=False
    ),
    "results null": replaced(APIResponseError, results=None),
    "results missing": Case(changed(lambda reply: {"id": reply["id"]}), APIResponseError),
    "results empty": replaced(APIResponseError, results=[]),
    "results short": Case(changed(lambda reply: reply["results"].pop()), APIResponseError),
    "results long": Case(
        changed(lambda reply: reply["results"].append({"index": 3, "relevance_score": 0.9})), APIResponseError
    ),
    "result repeated": Case(changed(lambda reply: reply["results"].append(reply["results"][0])), APIResponseError),
    "result in place of another": Case(
        changed(lambda reply: reply["results"].__setitem__(2, reply["results"][0])), APIResponseError
    ),
    "index -1": Case(changed(lambda reply: reply["results"][2].update(index=-1)), APIResponseError),
    "index out of range": Case(changed(lambda reply: reply["results"][2].update(index=3)), APIResponseError),
    "index huge": Case(changed(lambda reply: reply["results"][2].update(index=10**30)), APIResponseError),
    "index a string": Case(changed(lambda reply: reply["results"][2].update(index="0")), APIResponseError),
    "index a float": Case(changed(lambda reply: reply["results"][2].update(index=0.5)), APIResponseError),
    "index missing": Case(changed(lambda reply: reply["results"][2].pop("index")), APIResponseError),
    "unsorted": Case(changed(lambda reply: reply["results"].reverse()), None),
    "score null": scored("null"),
    "score NaN": scored("NaN"),
    "score Infinity": scored("-Infinity"),
    "score 1e400": scored("1e400"),
    "score a string": scored('"0.75"'),
    "score a bool": scored("true"),
    "score missing": Case(changed(lambda reply: reply["results"][0].pop("relevance_score")), APIResponseError),
    "another request's": Case(
        sends(http(json.dumps(ranking({"documents": ["x score=1", "y score=2", "z score=3"]})).encode())),
        APIResponseError,
    ),
    "one echo of another": Case(changed(lambda reply: reply["results"][2].update(document="x")), APIResponseError),
    "one echo empty": Case(changed(lambda reply: reply["results"][2].update(document={"text": ""})), APIResponseError),
    "one echo beside none": Case(changed(lambda reply: reply["results"][2].update(document=None)), None),
    "indices mixed up": Case(
        changed(lambda reply: [result.update(index=(result["index"] + 1) % 3) for result in reply["results"]] and None),
        APIResponseError,
    ),
    "a list": response(APIResponseError, "[1, 2]"),
    "deep": response(APIResponseError, "[" * 100_000),
    "documents as strings": Case(
        changed(
            lambda reply: [result.update(document=result["document"]["text"]) for result in reply["results"]] and None
        ),
        None,
    ),
    "documents null": Case(
        changed(lambda reply: [result.update(document=None) for result in reply["results"]] and None), None
    ),
}

STATUSES: dict[int, tuple[type[APIStatusError], bool]] = {
    400: (BadRequestError, False),
    401: (AuthenticationError, False),
    402: (APIStatusError, False),
    403: (PermissionDeniedError, False),
    404: (NotFoundError, False),
    405: (APIStatusError, False),
    408: (ServerError, True),
    413: (BadRequestError, False),
    422: (BadRequestError, False),
    429: (RateLimitError, True),
    500: (ServerError, True),
    502: (ServerError, True),
    503: (ServerError, True),
    504: (ServerError, True),
}
BODIES: dict[str, bytes] = {
    "error": b'{"error": {"message": "no", "type": "None", "param": "None", "code": "500"}}',
    "error with int code": b'{"error": {"message": "no", "type": null, "param": null, "code": 500}}',
    "detail": b'{"detail": "Method Not Allowed"}',
    "detail list": b'{"detail": [{"loc": ["body", "query"], "msg": "Field required", "type": "missing"}]}',
    "text": b"Internal Server Error",
    "html": b"<html><head><title>502</title></head><body><h1>Bad Gateway</h1></body></html>",
    "empty": b"",
    "not utf-8": b"\xff\xfe\x00",
    "gzip that is none": b"no gzip",
}
for status, (kind, passing) in STATUSES.items():
    for name, body in BODIES.items():
        coding = {"content_encoding": "gzip"} if name.startswith("gzip") else {}
        CASES[f"{status} {name}"] = Case(sends(http(body, status, **coding)), kind, passing)
for budget in (400, 422, 429):
    spent = b'{"error": {"message": "Budget has been exceeded!", "type": "budget_exceeded", "code": "400"}}'
    CASES[f"{budget} budget"] = Case(sends(http(spent, budget)), STATUSES[budget][0], passing=False)
DATE = "Mon, 23 Nov 2026 10:00:00 GMT"
for name, headers, in_time in (
    ("seconds", {"retry_after": "0"}, True),
    ("fraction", {"retry_after": "0.05"}, True),
    ("milliseconds", {"retry_after_ms": "50", "retry_after": "3600"}, True),
    ("date", {"retry_after": DATE, "date": DATE}, True),
    ("past date", {"retry_after": "Mon, 23 Nov 2020 10:00:00 GMT"}, True),
    ("negative", {"retry_after": "-5"}, True),
    ("nonsense", {"retry_after": "soon"}, True),
    ("infinite", {"retry_after": "inf"}, True),
    ("ten years", {"retry_after": "315360000"}, False),
    ("date in ten years", {"retry_after": "Mon, 23 Nov 2036 10:00:00 GMT", "date": DATE}, False),
):
    CASES[f"429 retry-after {name}"] = Case(sends(http(b"{}", 429, **headers)), RateLimitError, in_time)


@contextmanager
def bounded(seconds: float) -> Iterator[None]:
    """Fail where the block takes longer."""
    started = time.monotonic()
    yield
    assert time.monotonic() - started < seconds


@pytest.mark.parametrize("when", ["once", "always"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_fault_gives_the_right_ranking_or_an_error_of_ours(
    case: Case, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every entry point gives the whole ranking or a RegoloError, in time and in few attempts."""
    allow_replies_of(4 * 1024 * 1024, monkeypatch)
    expected = case.always if when == "always" or not case.passing else None
    for kind, mode in itertools.product(KINDS.values(), ("sync", "async")):
        server = FaultServer(case.fault) if when == "once" else FaultServer(usual=case.fault)
        with server, bounded(5):
            entry = Entry(kind, mode, server.url)
            if expected is None:
                assert entry(TEXTS, max_retries=1, timeout=case.timeout) == RANKED
            else:
                with pytest.raises(expected) as caught:
                    entry(TEXTS, max_retries=1, timeout=case.timeout)
                assert caught.type is expected
        attempts = 1 if case.always is None or not case.passing else 2
        assert [len(request["documents"]) for request in server.received] == [3] * attempts


def test_nobody_listens(kind: Any, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A refused connection is tried again, and is an error of ours if it stays refused."""
    back_off_for(0.2, monkeypatch)
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        with pytest.raises(APIConnectionError, match=url[7:]):
            Entry(kind, mode, url)(TEXTS, max_retries=1)
    with FaultServer(listening=False) as late:
        threading.Timer(0.1, late.listen).start()
        assert Entry(kind, mode, late.url)(TEXTS, max_retries=3) == RANKED


def test_64_mebibytes_are_the_limit(mode: str) -> None:
    """An endless reply is refused after 64 MiB, decompressed ones too, in bounded time."""
    for fault in (endless, bomb(100)):
        with (
            FaultServer(usual=fault) as server,
            bounded(10),
            pytest.raises(APIResponseError, match="larger than 67108864 bytes"),
        ):
            Entry(RegoloClient, mode, server.url)(TEXTS, max_retries=0)


def test_a_reply_left_over_on_a_connection_is_not_the_next_ones(mode: str) -> None:
    """What a server sends beyond its reply never becomes the ranking of the next request."""
    foreign = http(json.dumps(ranking({"documents": ["x score=1", "y score=2", "z score=3"]})).encode())
    with FaultServer(sends(GOOD.replace(b"close", b"keep-alive") + foreign)) as server:
        entry = Entry(RegoloClient, mode, server.url)
        with entry.opened() as client:
            assert entry.rank(client, TEXTS) == RANKED
            assert entry.rank(client, TEXTS) == RANKED


@pytest.mark.parametrize("header", ["x-litellm-call-id", "x-request-id"])
@pytest.mark.parametrize("callers", [False, True])
def test_a_reply_to_another_request_is_known_by_its_name(call: Call, stub: Stub, header: str, *, callers: bool) -> None:
    """Where a server gives back the names of requests, its second reply to one is not the next one's, echo or not."""
    wrong = json.dumps({"results": [{"index": index, "relevance_score": index} for index in range(3)]}).encode()

    def reply(request: Received) -> Reply:
        results = [
            {"index": index, "relevance_score": stub_score(text)} for index, text in enumerate(request.documents)
        ]
        named = {header: request.headers[header]}
        surplus = http(wrong, 200, connection="keep-alive", **named) if len(stub.received) == 1 else b""
        return Reply({"results": results}, headers=named, surplus=surplus)

    stub.reply = reply

    async def acalled() -> list[list[tuple[int, float]]]:
        async with (
            httpx.AsyncClient() as own,
            RegoloClient(KEY, base_url=stub.url, async_http_client=own if callers else None) as client,
        ):
            return [pairs((await client.arerank("q", TEXTS)).results) for _ in range(3)]

    def called() -> list[list[tuple[int, float]]]:
        with (
            httpx.Client() as own,
            RegoloClient(KEY, base_url=stub.url, http_client=own if callers else None) as client,
        ):
            return [pairs(client.rerank("q", TEXTS).results) for _ in range(3)]

    assert (called() if call.mode == "sync" else asyncio.run(acalled())) == [RANKED] * 3
    assert (len(stub.received), stub.connections) == (4, 2)
    assert len({request.headers[header] for request in stub.received}) == 4
