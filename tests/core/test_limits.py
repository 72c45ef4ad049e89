import asyncio
import json
import signal
import subprocess
import threading
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

from regolo_rerank import APITimeoutError, AuthenticationError, RateLimitError, RegoloClient
from tests.conftest import KEY, Rank
from tests.support.entries import Entry
from tests.support.faults import FaultServer, good, http, sends, stalls, trickles
from tests.support.inside import workers
from tests.support.observed import soon
from tests.support.processes import own_process
from tests.support.stub import Received, Reply, Stub, error, scored, texts, together


class Window:
    """Allows so many requests in each second, as a fixed window does, and refuses the rest."""

    def __init__(self, allowed: int, *, says_when: bool) -> None:
        self._allowed = allowed
        self._says_when = says_when
        self._lock = threading.Lock()
        self._counts: dict[int, int] = {}
        self.refused = 0

    def __call__(self, request: Received) -> Reply:
        now = time.time()
        with self._lock:
            count = self._counts[int(now)] = self._counts.get(int(now), 0) + 1
            if count <= self._allowed:
                return Reply(scored(request).body, delay=0.01)
            self.refused += 1
        headers = {"retry-after": f"{int(now) + 1 - now:.4f}"} if self._says_when else {}
        return Reply({"error": {"message": "Rate limit exceeded"}}, 429, headers)


# --- rate limits ------------------------------------------------------------------------------------------------------


@pytest.mark.real_backoff
@pytest.mark.parametrize(("says_when", "share"), [(True, 0.25), (False, 0.40)])
def test_a_rate_limit_slows_a_call_down_and_does_not_break_it(
    rank: Rank, stub: Stub, *, says_when: bool, share: float
) -> None:
    """500 documents in 50 requests come through a limit of 10 a second, and few requests are wasted on refusals."""
    stub.reply = window = Window(10, says_when=says_when)
    response = rank(RegoloClient(KEY, base_url=stub.url, batch_size=10), "q", texts(500), top_n=5)
    assert [result.index for result in response.results] == [499, 498, 497, 496, 495]
    assert window.refused <= share * len(stub.received)
    assert response.usage.requests == len(stub.received) == 50 + window.refused


@pytest.mark.real_backoff
def test_the_moment_that_the_gateway_names_in_words_is_waited_for(rank: Rank, client: RegoloClient, stub: Stub) -> None:
    """`Limit resets at` is a wait, by the server's own clock, and is waited for where it is within the bound."""
    reset = datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=2)
    words = (
        "litellm.RateLimitError: Rate limit exceeded for api_key: 57. Limit type: requests. Current limit: 5, "
        f"Remaining: 0. Limit resets at: {reset:%Y-%m-%d %H:%M:%S} UTC"
    )
    stub.script(error(words, 429, retry_after_ms=None, type="throttling_error"))
    rank(client, "q", ["a"])
    assert datetime.now(UTC) >= reset
    stub.script(error(words.replace(f"{reset:%Y}", "2036"), 429, retry_after_ms=None))
    started = time.monotonic()
    with pytest.raises(RateLimitError, match="Limit resets at: 2036") as caught:
        rank(client, "q", ["a"])
    assert time.monotonic() - started < 5
    assert caught.value.retry_after is not None
    assert caught.value.retry_after > 90


@pytest.mark.real_backoff
def test_a_limit_on_parallel_requests_is_waited_out_as_long_as_a_call_takes(mode: str, stub: Stub) -> None:
    """Refused for too many parallel requests, a call waits for one of them to end, not for the window's minute."""
    reset = datetime.now(UTC) + timedelta(seconds=60)
    words = f"Limit type: max_parallel_requests. Current limit: 1. Limit resets at: {reset:%Y-%m-%d %H:%M:%S} UTC"

    def one_at_once(request: Received) -> Reply:
        if stub.at_once > 1:
            return error(words, 429, retry_after_ms=None)
        return Reply(scored(request).body, delay=0.3)

    stub.reply = one_at_once
    client = RegoloClient(KEY, base_url=stub.url, batch_size=1)
    started = time.monotonic()
    if mode == "sync":
        other = threading.Thread(target=client.rerank, args=("q", ["other"]))
        other.start()
        time.sleep(0.1)
        ranked = client.rerank("q", texts(4))
        other.join()
    else:

        async def both() -> Any:
            other = asyncio.create_task(client.arerank("q", ["other"]))
            await asyncio.sleep(0.1)
            ranked = await client.arerank("q", texts(4))
            await other
            return ranked

        ranked = asyncio.run(both())
    assert [result.index for result in ranked.results] == [3, 2, 1, 0]
    assert time.monotonic() - started < 10


def test_64_default_calls_at_once_wait_for_none_of_them(mode: str, stub: Stub) -> None:
    """Calls share nothing but the wait after a 429: the requests of 64 calls are in flight together."""
    stub.reply = together(64)
    with RegoloClient(KEY, base_url=stub.url) as client:
        if mode == "sync":
            threads = [threading.Thread(target=client.rerank, args=("q", ["a"])) for _ in range(64)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        else:

            async def many() -> None:
                await asyncio.gather(*(client.arerank("q", ["a"]) for _ in range(64)))
                await client.aclose()

            asyncio.run(many())
    assert len(stub.received) == 64


def test_a_wrong_key_over_50_batches_sends_few_requests(entry: Entry, stub: Stub) -> None:
    """The first final failure stops the rest: at most max_concurrency requests are sent."""
    stub.always(Reply({"error": {"message": "wrong key"}}, 401, delay=0.02))
    with pytest.raises(AuthenticationError):
        entry(texts(50), batch_size=1)
    assert len(stub.received) <= 4


# --- deadlines --------------------------------------------------------------------------------------------------------


def test_a_cancelled_call_hangs_up(mode: str) -> None:
    """wait_for returns in time, and no task, thread or connection is left, on the server's side either."""
    if mode == "sync":
        pytest.skip("a sync call cannot be cancelled")

    async def cancelled(client: RegoloClient) -> float:
        started = time.monotonic()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(client.arerank("q", texts(9)), 0.3)
        took = time.monotonic() - started
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return took

    with FaultServer(usual=stalls(b"", 4)) as server, RegoloClient(KEY, base_url=server.url, batch_size=1) as client:
        threads = workers()
        assert asyncio.run(cancelled(client)) < 3
        assert workers() == threads
        assert soon(lambda: not server.connections)  # the server's threads see it a moment later
        assert len(server.received) == 4


def test_httpx_waits_no_shorter_than_the_timeout(
    rank: Rank, mode: str, stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each wait has the whole timeout, in async calls the one around all of them; httpx's own 5 seconds never count."""
    seen: list[httpx.Request] = []
    handle, ahandle = httpx.HTTPTransport.handle_request, httpx.AsyncHTTPTransport.handle_async_request

    def watch(transport: httpx.HTTPTransport, request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return handle(transport, request)

    async def awatch(transport: httpx.AsyncHTTPTransport, request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return await ahandle(transport, request)

    monkeypatch.setattr(httpx.HTTPTransport, "handle_request", watch)
    monkeypatch.setattr(httpx.AsyncHTTPTransport, "handle_async_request", awatch)
    rank(RegoloClient(KEY, base_url=stub.url, timeout=20), "q", ["a"])
    waits = set(seen[0].extensions.get("timeout", {}).values())
    assert waits == {20} if mode == "sync" else waits <= {None}
    assert json.loads(seen[0].content)["documents"]  # it may be looked at


@pytest.mark.parametrize("where", ["headers", "body"])
def test_the_timeout_bounds_a_whole_attempt(mode: str, where: str) -> None:
    """A server that sends a byte at a time, each in time, does not outlast `timeout`."""
    reply = http(b'{"results": [{"index": 0, "relevance_score": 0.5}]}')
    head, _, body = reply.partition(b"\r\n\r\n")
    if where == "headers":
        if mode == "sync":
            pytest.skip("in sync calls `timeout` bounds each read of the headers, as the README says")
        fault = trickles(b"", reply, 0.05)
    else:
        fault = trickles(head + b"\r\n\r\n", body, 0.05)
    with FaultServer(usual=fault) as server:
        started = time.monotonic()
        with pytest.raises(APITimeoutError):
            Entry(RegoloClient, mode, server.url)(["a"], timeout=0.3, max_retries=0)
        assert time.monotonic() - started < 2


# --- Ctrl-C -----------------------------------------------------------------------------------------------------------

INTERRUPTED = """
import sys
from regolo_rerank import RegoloClient
client = RegoloClient("k", base_url=sys.argv[1], batch_size=int(sys.argv[2]))
print("ready", flush=True)
client.rerank("q", [str(index) for index in range(20)])
"""


@pytest.mark.parametrize("batch_size", [1, 100], ids=["batches", "one request"])
@pytest.mark.parametrize("waits", ["in a read", "in a body", "for the next attempt", "at the gate"])
def test_ctrl_c_ends_the_process_at_once(waits: str, batch_size: int) -> None:
    """Ctrl-C in the middle of a read, of several batches or of a wait ends the process at once."""
    fault = {
        "in a read": stalls(b"", 20),
        "in a body": stalls(http(b"x" * 9, content_length="99"), 20),
        "for the next attempt": sends(http(b"{}", 503, retry_after="20")),
        "at the gate": sends(http(b"{}", 429, retry_after="20")),
    }[waits]
    with FaultServer(usual=fault) as server:
        process = own_process(INTERRUPTED, server.url, str(batch_size), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert soon(lambda: server.received)
        time.sleep(0.1)  # let it come to the wait
        process.send_signal(signal.SIGINT)
        started = time.monotonic()
        _, errors = process.communicate(timeout=10)
        assert time.monotonic() - started < 5
        assert process.returncode == -signal.SIGINT
        assert errors.rstrip().endswith("KeyboardInterrupt")


# --- nothing in vain --------------------------------------------------------------------------------------------------


def test_a_good_server_is_asked_once(mode: str) -> None:
    """Without faults each batch is one request."""
    with FaultServer(usual=good) as server:
        Entry(RegoloClient, mode, server.url)(texts(10), batch_size=3)
        assert sorted(len(request["documents"]) for request in server.received) == [2, 2, 3, 3]
