"""Connections: reused, spread over httpx clients, renewed after a failure, and closed with their client or loop."""

import asyncio
import gc
import socket
import subprocess
import sys
import threading
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest.mock import Mock

import httpx
import pytest

from regolo_rerank import APIConnectionError, APITimeoutError, RegoloClient
from tests.conftest import KEY
from tests.support.faults import Fault, FaultServer, good, stalls
from tests.support.modes import Call
from tests.support.observed import asoon, slowly, sockets, soon, threads
from tests.support.stub import Received, Reply, Stub, pairs, results, scored, texts, together

DOCUMENTS = ["a score=0.1", "b score=0.9"]
EXPECTED = [(1, 0.9), (0, 0.1)]


async def ranked(client: RegoloClient) -> list[tuple[int, float]]:
    """Rank the two documents."""
    return pairs(await client.arerank("q", DOCUMENTS))


def test_sync_calls_share_a_connection(client: RegoloClient, stub: Stub) -> None:
    """Calls in a row use one connection, also through copies; a closed client opens a new one."""
    for each in (client, client, client.with_options(model="m"), client.with_options(api_key="sk-another-key")):
        each.rerank("q", ["a"])
    assert stub.connections == 1
    client.close()
    client.rerank("q", ["a"])
    assert stub.connections == 2


@pytest.mark.anyio
async def test_async_calls_share_a_connection(client: RegoloClient, stub: Stub) -> None:
    """The same in an event loop; `aclose` closes the connections of sync calls too."""
    await client.arerank("q", ["a"])
    await client.with_options(model="m").arerank("q", ["a"])
    assert stub.connections == 1
    client.rerank("q", ["a"])
    await client.aclose()
    await client.arerank("q", ["a"])
    client.rerank("q", ["a"])
    assert stub.connections == 4
    await client.aclose()


def test_64_threads_wait_together(client: RegoloClient, stub: Stub) -> None:
    """No limit of a pool makes one call wait for another, and later calls open no connection."""
    stub.reply = together(64)
    with ThreadPoolExecutor(64) as pool:
        assert list(pool.map(lambda _: pairs(client.rerank("q", DOCUMENTS)), range(64))) == [EXPECTED] * 64
    assert stub.connections == 64
    stub.reply = scored
    client.rerank("q", ["a"])
    assert stub.connections == 64


@pytest.mark.anyio
async def test_200_tasks_wait_together(stub: Stub) -> None:
    """The same for tasks."""
    stub.reply = together(200)
    async with RegoloClient(KEY, base_url=stub.url) as client:
        assert await asyncio.gather(*(ranked(client) for _ in range(200))) == [EXPECTED] * 200
        stub.reply = scored
        assert await ranked(client) == EXPECTED
    assert stub.connections == 200


def test_requests_are_spread_over_httpx_clients(call: Call, stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    """One httpcore pool is slow with dozens of requests, so each httpx client has few."""
    kind = httpx.Client if call.mode == "sync" else httpx.AsyncClient
    opened = Mock(side_effect=kind)
    monkeypatch.setattr(httpx, kind.__name__, opened)
    stub.reply = together(8)
    with RegoloClient(KEY, base_url=stub.url, batch_size=1, max_concurrency=8) as client:
        call(client.rerank, "q", texts(8))
    assert opened.call_count == 4


def cut_off(count: int) -> Fault:
    """Return a fault that lets requests over the first connections wait for ever, as after a lost node."""
    old: list[socket.socket] = []
    all_here = threading.Barrier(count, timeout=20)

    def fault(connection: socket.socket, request: dict[str, Any]) -> Any:
        if "warm" in request["query"]:
            old.append(connection)
            all_here.wait()
            return good(connection, request)
        return (stalls(b"", 60) if connection in old else good)(connection, request)

    return fault


@pytest.mark.parametrize("connections", [4, 12])
def test_a_retry_opens_a_new_connection(call: Call, connections: int) -> None:
    """After a node has disappeared, with all its connections, one call succeeds at its second attempt."""
    with FaultServer(usual=cut_off(connections)) as server:
        options: dict[str, Any] = {"timeout": 1.0, "batch_size": 1, "max_concurrency": connections}

        async def warm_up_then_rank(client: RegoloClient) -> Any:
            await client.arerank("warm", texts(connections), total_timeout=30)
            response = await client.with_options(max_retries=1).arerank("q", ["a"])
            await client.aclose()
            return response

        with RegoloClient(KEY, base_url=server.url, **options) as client:
            if call.mode == "async":
                response = asyncio.run(warm_up_then_rank(client))
            else:
                client.rerank("warm", texts(connections), total_timeout=30)
                response = client.with_options(max_retries=1).rerank("q", ["a"])
            assert response.usage.requests == 2


def test_connections_that_the_server_has_closed_are_not_used(call: Call) -> None:
    """A server that restarts costs no failed call."""
    with Stub() as restarted, RegoloClient(KEY, base_url=restarted.url, max_retries=1) as client:
        restarted.script(Reply(results((0, 0.5)), headers={"connection": "close"}))

        async def twice() -> int:
            return len([await client.arerank("q", ["a"]) for _ in range(2)])

        if call.mode == "async":
            assert asyncio.run(twice()) == 2
        else:
            assert len([client.rerank("q", ["a"]) for _ in range(2)]) == 2
        assert restarted.connections == 2


def test_a_failure_closes_the_idle_connections(client: RegoloClient, stub: Stub) -> None:
    """Clients that get no new requests are closed: idle ones at once, busy ones after their last request."""
    before = sockets()
    stub.reply = together(4)
    client.with_options(batch_size=1).rerank("q", texts(4))
    slow = threading.Event()

    def reply(request: Any) -> Reply:
        if "slow" in request.documents[0]:
            slow.wait(20)
        return Reply(scored(request).body, delay=1.0 if "fail" in request.documents[0] else 0.0)

    stub.reply = reply
    with ThreadPoolExecutor(1) as pool:
        busy = pool.submit(client.rerank, "q", ["slow score=0.5"])
        assert soon(lambda: stub.at_once == 1)
        with pytest.raises(APIConnectionError):
            client.with_options(timeout=0.2, max_retries=0).rerank("q", ["fail"])
        assert soon(lambda: sockets() <= before + 4)  # both ends of the two connections of the busy httpx client
        client.rerank("q", ["a"])
        assert stub.connections == 5
        slow.set()
        assert pairs(busy.result()) == [(0, 0.5)]
        assert soon(lambda: sockets() <= before + 2)  # both ends of the new one
    client.rerank("q", ["a"])
    assert stub.connections == 5


def test_closing_waits_for_calls_in_other_threads(stub: Stub) -> None:
    """A call that is in progress when the client closes comes to its end, and its connection closes after it."""
    stub.reply = slowly(0.3)
    before = sockets()
    client = RegoloClient(KEY, base_url=stub.url, max_retries=0)
    with ThreadPoolExecutor(1) as pool:
        busy = pool.submit(client.rerank, "q", DOCUMENTS)
        assert soon(lambda: stub.at_once == 1)
        client.close()
        assert pairs(busy.result()) == EXPECTED
    assert soon(lambda: sockets() <= before)


@pytest.mark.anyio
async def test_closing_waits_for_tasks(stub: Stub) -> None:
    """The same for tasks."""
    stub.reply = slowly(0.3)
    before = sockets()
    client = RegoloClient(KEY, base_url=stub.url, max_retries=0)
    busy = asyncio.create_task(ranked(client))
    assert await asoon(lambda: stub.at_once == 1)
    await client.aclose()
    assert await busy == EXPECTED
    assert await asoon(lambda: sockets() <= before)


@pytest.mark.parametrize("runs", [3, 20])
def test_connections_close_with_their_event_loop(client: RegoloClient, stub: Stub, runs: int) -> None:
    """A client works in one event loop after the other, and leaves no socket."""
    before = sockets()
    for _ in range(runs):
        assert asyncio.run(ranked(client)) == EXPECTED
    assert soon(lambda: sockets() <= before)
    assert stub.connections == runs


def test_two_event_loops_at_once(client: RegoloClient) -> None:
    """Two threads with a loop each share one client."""

    async def many() -> list[list[tuple[int, float]]]:
        return await asyncio.gather(*(ranked(client) for _ in range(20)))

    with ThreadPoolExecutor(2) as pool:
        for outcome in pool.map(lambda _: asyncio.run(many()), range(2)):
            assert outcome == [EXPECTED] * 20


@pytest.mark.anyio
async def test_sync_calls_work_inside_a_running_loop(client: RegoloClient) -> None:
    """As in a notebook."""
    assert pairs(client.rerank("q", DOCUMENTS)) == EXPECTED
    assert [pairs(response) for response in client.rerank_many([("q", DOCUMENTS)] * 3)] == [EXPECTED] * 3


@pytest.mark.parametrize("cyclic", [False, True])
@pytest.mark.parametrize("way", ["forgotten", "closed", "block"])
def test_no_connection_is_left_and_no_warning(stub: Stub, way: str, *, cyclic: bool) -> None:
    """A client that is forgotten, closed or left leaves no socket, also as part of a reference cycle."""

    async def use_and_drop() -> None:
        before = sockets()
        client = RegoloClient(KEY, base_url=stub.url, batch_size=1)
        await ranked(client)
        client.rerank("q", DOCUMENTS)
        if way == "closed":
            await client.aclose()
        elif way == "block":
            async with client:
                await ranked(client)
        gone = weakref.ref(client)
        if cyclic:
            cycle: list[Any] = [client]
            cycle.append(cycle)
            del cycle
        del client
        gc.collect()
        assert gone() is None
        assert await asoon(lambda: sockets() <= before)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        asyncio.run(use_and_drop())
        gc.collect()
    assert not [str(warning.message) for warning in caught]


def test_a_sync_block_closes_its_connections(stub: Stub) -> None:
    """Leaving a `with` block closes them at once, often."""
    before = sockets()
    client = RegoloClient(KEY, base_url=stub.url)
    for _ in range(3):
        with client:
            client.rerank("q", DOCUMENTS)
        assert soon(lambda: sockets() <= before)
    assert stub.connections == 3


def test_nothing_is_printed_at_exit(stub: Stub) -> None:
    """A process that never closes its client, and leaves a loop open, ends without a word."""
    code = """
import asyncio, sys
from regolo_rerank import RegoloClient
client = RegoloClient("k", base_url=sys.argv[1], batch_size=1)
client.rerank("q", ["a", "b"])
asyncio.run(client.arerank("q", ["a", "b"]))
"""
    done = subprocess.run(  # noqa: S603 - our own interpreter
        [sys.executable, "-W", "always", "-c", code, stub.url], capture_output=True, text=True, check=False, timeout=50
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_no_cookie_is_kept(call: Call, stub: Stub) -> None:
    """Requests share nothing but the connection."""
    stub.reply = lambda request: Reply(scored(request).body, headers={"set-cookie": "who=me; Path=/"})
    with RegoloClient(
        KEY, base_url=stub.url.replace("127.0.0.1", "localhost"), batch_size=1, max_concurrency=1
    ) as client:
        call(client.rerank, "q", texts(2))
    assert [request.headers.get("cookie") for request in stub.received] == [None, None]


@pytest.mark.parametrize(("batch_size", "workers"), [(100, 0), (1, 2)])
def test_worker_threads(client: RegoloClient, stub: Stub, batch_size: int, workers: int) -> None:
    """A single request is sent in the caller's thread, several in daemon threads, which end with their call."""
    stuck = set(threads())  # in requests of other tests
    seen: set[threading.Thread] = set()
    both = threading.Barrier(max(1, workers), timeout=10)

    def reply(request: Received) -> Reply:
        both.wait()
        seen.update(threads())
        return scored(request)

    stub.reply = reply
    assert pairs(client.with_options(batch_size=batch_size).rerank("q", DOCUMENTS)) == EXPECTED
    assert len(seen - stuck) == workers
    assert all(thread.daemon for thread in seen)
    assert soon(lambda: not set(threads()) - stuck)


def test_a_host_that_accepts_no_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sync call spends only a part of an attempt on connecting, and the error tells so."""
    monkeypatch.setattr("regolo_rerank._http.CONNECT_SECONDS", 0.2)
    with socket.socket() as listener, socket.socket() as first, socket.socket() as second:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for waiting in (first, second):  # with these, the queue of the listener is full
            waiting.settimeout(0)
            waiting.connect_ex(listener.getsockname())
        client = RegoloClient(KEY, base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", max_retries=0)
        with client, pytest.raises(APITimeoutError, match=r"no connection to 127\.0\.0\.1:\d+ within 0\.2 s"):
            client.rerank("q", ["a"], total_timeout=20.0)
