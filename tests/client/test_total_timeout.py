"""`total_timeout` limits everything that a call does, and `timeout` each attempt, whatever the server does."""

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from regolo_rerank import APITimeoutError, RateLimitError, RegoloClient, RegoloError
from tests.conftest import KEY
from tests.support.faults import Fault, FaultServer, good, http, sends, stalls, trickles
from tests.support.modes import Call, Many
from tests.support.observed import soon
from tests.support.stub import ranking

REPLY = http(json.dumps(ranking({"documents": ["a"]})).encode())
HEAD, _, BODY = REPLY.partition(b"\r\n\r\n")
FAULTS: dict[str, Fault] = {
    "never answers": stalls(b"", 30),
    "half a head": stalls(HEAD[:30], 30),
    "half a body": stalls(REPLY[:-9], 30),
    "a byte at a time": trickles(b"", REPLY, 0.2),
    "a body byte at a time": trickles(HEAD + b"\r\n\r\n", BODY, 0.2),
    "interim replies": trickles(b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 100 Continue\r\n\r\n" * 9, 0.2),
    "refuses": sends(http(b"{}", 503, retry_after="30")),
}


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Fail if the block takes longer."""
    started = time.monotonic()
    yield
    assert time.monotonic() - started < seconds


SLOW_HEADS = {"a byte at a time", "interim replies"}


@pytest.mark.parametrize("requests", [1, 2])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_call_ends_in_time(call: Call, fault: str, requests: int) -> None:
    """The limit of the client, and that of one call, end the call although `timeout` is far away."""
    if requests == 1 and call.mode == "sync" and fault in SLOW_HEADS:
        pytest.skip("the only request of a sync call may exceed the limit while the head of the reply trickles in")
    documents = ["a", "b"][:requests]
    with (
        FaultServer(usual=FAULTS[fault]) as server,
        RegoloClient(KEY, base_url=server.url, total_timeout=0.4, batch_size=1) as client,
    ):
        with within(6), pytest.raises(RegoloError, match=r"total_timeout=0\.4"):
            call(client.rerank, "q", documents)
        patient = client.with_options(total_timeout=None)
        with within(6), pytest.raises(RegoloError, match=r"total_timeout=0\.3"):
            call(patient.rerank, "q", documents, total_timeout=0.3)
        with within(6), pytest.raises(RegoloError, match=r"total_timeout=0\.2"):
            call(patient.score, "q", documents, total_timeout=0.2)


@pytest.mark.parametrize("batch_size", [1, 100])
@pytest.mark.parametrize("reply", ["never", "429"])
def test_16_concurrent_calls_end_in_time(call: Call, reply: str, batch_size: int) -> None:
    """No call waits for another one, neither for its threads nor for its connections."""
    fault = stalls(b"", 30) if reply == "never" else sends(http(b"{}", 429, retry_after="30"))
    documents = ["a", "b", "c"]

    async def all_at_once(client: RegoloClient) -> list[Any]:
        return await asyncio.gather(*(client.arerank("q", documents) for _ in range(16)), return_exceptions=True)

    def one(client: RegoloClient) -> Any:
        try:
            return client.rerank("q", documents)
        except RegoloError as error:
            return error

    with (
        FaultServer(usual=fault) as server,
        RegoloClient(
            KEY, base_url=server.url, total_timeout=1.5 if reply == "never" else 8.0, batch_size=batch_size
        ) as client,
        within(15),
    ):
        if call.mode == "async":
            outcomes = asyncio.run(all_at_once(client))
        else:
            with ThreadPoolExecutor(16) as pool:
                outcomes = list(pool.map(one, [client] * 16))
    assert {type(outcome) for outcome in outcomes} == {APITimeoutError if reply == "never" else RateLimitError}


def test_the_time_for_retries_counts(call: Call) -> None:
    """Attempts that time out are repeated until `total_timeout` ends them, not `max_retries` times."""
    with (
        FaultServer(usual=stalls(b"", 30)) as server,
        RegoloClient(KEY, base_url=server.url, timeout=0.1, max_retries=10_000) as client,
        within(10),
        pytest.raises(APITimeoutError),
    ):
        call(client.rerank, "q", ["a"], total_timeout=0.7)
    assert len(server.received) >= 2


@pytest.mark.parametrize("fault", [stalls(b"", 30), trickles(HEAD + b"\r\n\r\n", BODY, 0.05)], ids=["silent", "slow"])
def test_the_timeout_of_an_attempt_counts_without_a_total(call: Call, fault: Fault) -> None:
    """An attempt ends in time, and another one succeeds."""
    with (
        FaultServer(fault) as server,
        RegoloClient(KEY, base_url=server.url, timeout=0.3, total_timeout=None) as client,
        within(10),
    ):
        assert call(client.rerank, "q", ["a"])
        with FaultServer(usual=fault) as broken:
            failing = client.with_options(base_url=broken.url, max_retries=0)
            with pytest.raises(APITimeoutError, match=r"no complete reply from .* within 0\.3 s"):
                call(failing.rerank, "q", ["a"])


def test_a_local_scorer_that_never_returns(call: Call) -> None:
    """The call ends in time; later calls use other threads."""
    released = threading.Event()

    def scorer(query: str, documents: list[str]) -> list[float]:
        if query == "hang":
            released.wait(20)
        return [0.5] * len(documents)

    client = RegoloClient(base_url="local://", scorer=scorer, batch_size=1)

    async def hang_then_rank() -> int:
        with within(6), pytest.raises(APITimeoutError, match=r"no ranking from local:// within total_timeout=0\.3"):
            await client.arerank("hang", ["a"], total_timeout=0.3)
        ranked = await client.arerank("q", ["a", "b"])
        released.set()  # asyncio.run waits for the thread of the scorer
        return len(ranked)

    if call.mode == "async":
        assert asyncio.run(hang_then_rank()) == 2
        return
    with within(6), pytest.raises(APITimeoutError, match=r"no ranking from local:// within total_timeout=0\.3"):
        client.rerank("hang", ["a"], total_timeout=0.3)
    assert len(client.rerank("q", ["a", "b"])) == 2
    released.set()


def silent_if_asked(connection: Any, request: dict[str, Any]) -> Any:
    """Answer all requests but those with "silent" in the query."""
    return (stalls(b"", 30) if "silent" in request["query"] else good)(connection, request)


@pytest.mark.parametrize("max_concurrency", [1, 2])
def test_each_pair_of_many_has_its_own_time(call: Call, max_concurrency: int) -> None:
    """Silent pairs end one by one, in their places, and the stuck workers of theirs hold no other pair back."""
    pairs = [("silent 0", ["a"]), ("q", ["b"]), ("silent 1", ["c"]), ("q", ["d"]), ("q", ["e"])]
    with (
        FaultServer(usual=silent_if_asked) as server,
        RegoloClient(KEY, base_url=server.url, total_timeout=1.5) as client,
        within(20),
    ):
        outcomes = Many(call.mode)(client, pairs, max_concurrency=max_concurrency, return_exceptions=True)
    assert [type(outcome) is APITimeoutError for outcome in outcomes] == [True, False, True, False, False]
    assert [outcomes[0].index, outcomes[2].index] == [0, 2]


def test_the_clock_of_a_pair_starts_with_its_first_request(call: Call) -> None:
    """Pairs that wait for a worker longer than `total_timeout` are ranked all the same."""

    def slow(connection: Any, request: dict[str, Any]) -> bool:
        time.sleep(0.3)
        return good(connection, request)

    with FaultServer(usual=slow) as server, RegoloClient(KEY, base_url=server.url, total_timeout=2.0) as client:
        assert len(Many(call.mode)(client, [("q", ["a"])] * 8, max_concurrency=1)) == 8


def test_a_failed_pair_makes_room_for_the_others(call: Call) -> None:
    """After a pair has failed, its request that is still in flight takes no worker from other pairs."""
    both = threading.Barrier(2, timeout=10)

    def answer(connection: Any, request: dict[str, Any]) -> Any:
        if "slow" in request["documents"][0]:
            return stalls(b"", 30)(connection, request)
        if "BAD" in request["documents"][0]:
            assert soon(lambda: server.at_once == 2)
            return connection.sendall(http(b'{"error": "bad document"}', 400))
        both.wait()
        return good(connection, request)

    pairs = [("q", ["slow", "BAD"]), ("q", ["a", "b"]), ("q", ["c", "d"])]
    options: dict[str, Any] = {"batch_size": 1, "max_retries": 0}
    with FaultServer(usual=answer) as server, RegoloClient(KEY, base_url=server.url, **options) as client:
        outcomes = Many(call.mode)(client, pairs, max_concurrency=2, return_exceptions=True)
    assert [isinstance(outcome, RegoloError) for outcome in outcomes] == [True, False, False]


@pytest.mark.anyio
async def test_requests_that_time_out_together_are_closed() -> None:
    """The first one ends the call, but does not interrupt the others while they close their connections."""
    closed: list[str] = []

    class Transport(httpx.AsyncBaseTransport):
        """Never answers, and takes its time to close a connection."""

        async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
            """Answer after a long time."""
            (document,) = json.loads(request.content)["documents"]
            try:
                await asyncio.sleep(20)
            finally:
                await asyncio.sleep(float(document))
                closed.append(document)
            raise AssertionError

    async with httpx.AsyncClient(transport=Transport()) as own:
        client = RegoloClient(KEY, async_http_client=own, prompt_format="plain", batch_size=1, total_timeout=0.3)
        with pytest.raises(APITimeoutError):
            await client.arerank("q", ["0.01", "0.1", "0.2"])
    assert closed == ["0.01", "0.1", "0.2"]
