import asyncio
import copy
import gc
import multiprocessing
import ssl
import subprocess
import sys
import time
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import Any

import pytest

from regolo_rerank import APIResponseError, APITimeoutError, RegoloClient, RerankResponse
from tests.conftest import KEY, Rank
from tests.support.entries import Entry, aranked
from tests.support.faults import FaultServer, endless
from tests.support.inside import (
    allow_replies_of,
    close_pool_of,
    connections_of,
    keep_idle_for,
    loops_of,
    pools_of,
    ssl_context_of,
    workers,
)
from tests.support.observed import sockets, soon
from tests.support.stub import Reply, Stub, pairs, scored, texts, together

EXPECTED = [(1, 0.9), (0, 0.1)]
DOCUMENTS = ["a score=0.1", "b score=0.9"]


async def ranked(client: RegoloClient) -> list[tuple[int, float]]:
    """Rank the two documents."""
    return pairs((await client.arerank("q", DOCUMENTS)).results)


@pytest.mark.parametrize("runs", [3, 20])
def test_a_client_works_in_one_event_loop_after_another(client: RegoloClient, stub: Stub, runs: int) -> None:
    """Each asyncio.run has its own pool, which is gone with its loop, sockets included."""
    before = sockets()
    for _ in range(runs):
        assert asyncio.run(ranked(client)) == EXPECTED
        assert len(loops_of(client)) <= 1  # the last one, until there is another
    gc.collect()
    assert soon(lambda: sockets() <= before)  # the stub closes its side a moment later
    assert stub.connections == runs


def test_a_loop_that_was_closed_without_its_generators_is_forgotten(client: RegoloClient) -> None:
    """A loop whose owner skipped shutdown_asyncgens does not stay for ever."""
    loop = asyncio.new_event_loop()
    loop.run_until_complete(ranked(client))
    loop.run_until_complete(close_pool_of(client, loop))
    loop.close()
    asyncio.run(ranked(client))
    assert loop not in loops_of(client)


def test_two_loops_in_two_threads_at_once(client: RegoloClient) -> None:
    """Two event loops use one client at the same time."""

    async def many() -> list[list[tuple[int, float]]]:
        return await asyncio.gather(*(ranked(client) for _ in range(20)))

    with ThreadPoolExecutor(2) as threads:
        for answers in threads.map(lambda _: asyncio.run(many()), range(2)):
            assert answers == [EXPECTED] * 20


def test_many_threads_share_one_client(client: RegoloClient) -> None:
    """32 threads get the right ranking from one client."""
    with ThreadPoolExecutor(32) as threads:
        answers = list(threads.map(lambda _: pairs(client.rerank("q", DOCUMENTS).results), range(64)))
    assert answers == [EXPECTED] * 64


def test_a_cancelled_call_leaves_nothing_behind(stub: Stub) -> None:
    """wait_for ends a call at once, with no task left and nothing more sent."""
    stub.reply = lambda request: Reply(scored(request).body, delay=3)

    async def cancelled(client: RegoloClient) -> tuple[float, set[Any]]:
        started = time.monotonic()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(client.arerank("q", [f"{index}" for index in range(9)]), 0.1)
        took = time.monotonic() - started
        await asyncio.sleep(0)
        return took, asyncio.all_tasks() - {asyncio.current_task()}

    with RegoloClient(KEY, base_url=stub.url, batch_size=1) as client:
        took, tasks = asyncio.run(cancelled(client))
    assert took < 2
    assert not tasks
    assert len(stub.received) == 4


@pytest.mark.parametrize("cyclic", [False, True])
def test_a_forgotten_client_closes_without_a_warning(stub: Stub, *, cyclic: bool) -> None:
    """A client that nobody closes leaves no socket and no ResourceWarning, also as part of a reference cycle."""

    async def forget() -> None:
        before = sockets()
        client = RegoloClient(KEY, base_url=stub.url)
        await ranked(client)
        client.rerank("q", DOCUMENTS)
        gone = weakref.ref(client)
        if cyclic:
            cycle: list[Any] = [client]
            cycle.append(cycle)
            del cycle
        del client
        if cyclic:
            gc.collect()
        assert gone() is None
        await asyncio.sleep(0.05)  # the loop closes the pool as soon as it runs
        assert sockets() <= before + 2  # the stub's ends of both connections

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        asyncio.run(forget())
        gc.collect()
    assert not [str(warning.message) for warning in caught]


def test_a_forked_process_opens_its_own_connections(stub: Stub) -> None:
    """After fork the child ranks over a connection of its own, and the parent's stays usable."""
    with RegoloClient(KEY, base_url=stub.url) as client:
        client.rerank("q", DOCUMENTS)
        context = multiprocessing.get_context("fork")
        answers = context.SimpleQueue()

        def child() -> None:
            answers.put((pairs(client.rerank("q", DOCUMENTS).results), asyncio.run(ranked(client))))

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # fork beside the stub's threads
            process = context.Process(target=child)
            process.start()
        process.join(20)
        assert process.exitcode == 0
        assert answers.get() == (EXPECTED, EXPECTED)
        assert pairs(client.rerank("q", DOCUMENTS).results) == EXPECTED
        assert stub.connections == 3


def test_closing_waits_for_calls_in_other_threads(stub: Stub) -> None:
    """A sync call that is under way when the client is closed comes to its end, and its connection closes after it."""
    stub.reply = lambda request: Reply(scored(request).body, delay=0.2)
    before = sockets()
    client = RegoloClient(KEY, base_url=stub.url, max_retries=0)
    with ThreadPoolExecutor(1) as threads:
        call = threads.submit(client.rerank, "q", DOCUMENTS)
        time.sleep(0.1)
        client.close()
        assert pairs(call.result().results) == EXPECTED
    assert sockets() <= before + 1  # the stub's end


def test_a_deep_copy_has_connections_of_its_own(client: RegoloClient) -> None:
    """Closing a copy does not close the original's connections."""
    client.rerank("q", DOCUMENTS)
    with copy.deepcopy(client) as copied:
        copied.rerank("q", DOCUMENTS)
        assert connections_of(copied) is not connections_of(client)
    assert pools_of(client)


def test_sync_threads_are_daemons_in_the_callers_context(stub: Stub) -> None:
    """Ctrl-C must not wait for a batch in flight: its threads end with the process."""
    stub.reply = lambda request: Reply(scored(request).body, delay=0.3)
    client = RegoloClient(KEY, base_url=stub.url, batch_size=1, timeout=0.1, max_retries=0)
    with pytest.raises(APITimeoutError):
        client.rerank("q", DOCUMENTS)
    threads = workers()
    assert all(thread.daemon for thread in threads)
    for thread in threads:
        thread.join(2)
    client.close()


def test_every_request_runs_in_the_callers_context(rank: Rank) -> None:
    """What a caller keeps in context variables, such as the current trace, is there for each of a call's requests."""
    variable: ContextVar[str] = ContextVar("variable", default="lost")
    seen: list[str] = []

    def scorer(_query: str, documents: list[str]) -> list[float]:
        seen.append(variable.get())
        return [0.0] * len(documents)

    token = variable.set("kept")
    rank(RegoloClient(base_url="local://", scorer=scorer, batch_size=1), "q", ["a", "b", "c"])
    variable.reset(token)
    assert seen == ["kept"] * 3


NESTED = """
import asyncio, sys
import nest_asyncio2
nest_asyncio2.apply()
from regolo_rerank import RegoloClient

client = RegoloClient(base_url=sys.argv[1], batch_size=1)

async def cell():
    call = lambda: client.arerank("q", ["a score=0.1", "b score=0.9"])
    outer, inner = await call(), asyncio.get_running_loop().run_until_complete(call())
    return [response.results[0].index for response in (outer, inner, asyncio.run(call()))]

print(asyncio.run(cell()), asyncio.run(cell()))
"""


def test_a_notebooks_nested_loop(stub: Stub) -> None:
    """Where nest_asyncio2 lets a loop run inside a loop, as LlamaIndex has it in notebooks, calls work in both."""
    done = subprocess.run(  # noqa: S603 - our own interpreter, since nest_asyncio2 changes asyncio for a whole process
        [sys.executable, "-c", NESTED, stub.url],
        capture_output=True,
        text=True,
        check=False,
        timeout=50,
    )
    assert (done.stdout, done.stderr) == ("[1, 1, 1] [1, 1, 1]\n", "")


def test_no_cookie_is_kept(mode: str, stub: Stub) -> None:
    """What a gateway sets is not sent back: requests share nothing but the connection."""
    stub.reply = lambda request: Reply(scored(request).body, headers={"set-cookie": "who=me; Path=/"})
    entry = Entry(RegoloClient, mode, stub.url.replace("127.0.0.1", "localhost"))  # some jars leave addresses out

    async def twice(client: Any) -> None:
        for _ in range(2):
            await aranked(client, DOCUMENTS)

    with entry.opened() as client:
        if mode == "sync":
            entry.rank(client, DOCUMENTS)
            entry.rank(client, DOCUMENTS)
        else:
            asyncio.run(twice(client))
    assert stub.connections == 1
    assert [request.headers.get("cookie") for request in stub.received] == [None, None]


def test_200_calls_at_once_wait_together(client: RegoloClient, stub: Stub) -> None:
    """No limit of the transport's own makes one call wait for another, and what comes later opens no connection."""
    stub.reply = together(200)

    async def many() -> int:
        assert await asyncio.gather(*(ranked(client) for _ in range(200))) == [EXPECTED] * 200
        opened = stub.connections
        stub.reply = scored
        assert await ranked(client) == EXPECTED
        return stub.connections - opened

    assert asyncio.run(many()) == 0


def test_a_reply_that_is_not_read_to_its_end_takes_its_connection_along(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a reply is refused half-way, its connection is closed at once, and not with the client."""
    allow_replies_of(1_000, monkeypatch)

    async def refused(client: Any) -> int:
        with pytest.raises(APIResponseError, match="larger than 1000 bytes"):
            await aranked(client, DOCUMENTS)
        await asyncio.sleep(0.05)  # for the server to see it
        return sockets()

    with FaultServer(usual=endless) as server:
        entry = Entry(RegoloClient, mode, server.url)
        with entry.opened(max_retries=0) as client:
            before = sockets()
            if mode == "sync":
                with pytest.raises(APIResponseError, match="larger than 1000 bytes"):
                    entry.rank(client, DOCUMENTS)
                time.sleep(0.05)
                assert sockets() <= before
            else:
                assert asyncio.run(refused(client)) <= before + 2  # the loop's own pair


@pytest.mark.parametrize("host", ["https://127.0.0.1", "https://api.regolo.ai"])
def test_https_verifies_certificates(mode: str, host: str) -> None:
    """Whoever holds the connection, https goes by the shared context."""
    context = ssl_context_of(RegoloClient(KEY, base_url=host), mode)
    assert context is ssl_context_of(RegoloClient(KEY, base_url=host), mode)
    assert (context.verify_mode, context.check_hostname) == (ssl.CERT_REQUIRED, True)
    assert context.get_ca_certs()


def test_what_was_idle_for_too_long_is_not_used_again(mode: str, stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next call closes the connections that were idle for too long, and opens one of its own."""
    stub.reply = together(3)
    client = RegoloClient(KEY, base_url=stub.url, batch_size=1)

    async def rank(documents: list[str]) -> None:
        if mode == "async":
            await client.arerank("q", documents)
        else:
            client.rerank("q", documents)

    async def three_requests_and_one() -> None:
        before = sockets()
        await rank(["a", "b", "c"])
        keep_idle_for(0.0, monkeypatch)
        stub.reply = scored
        await rank(["a"])
        assert stub.connections == 4
        assert soon(lambda: sockets() == before + 2)  # both ends of one connection

    asyncio.run(three_requests_and_one())


def test_a_cancelled_call_loses_no_connection(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever connections a call was about to close when it was cancelled, a later one closes."""
    stub.reply = together(3)

    async def run() -> None:
        before = sockets()
        async with RegoloClient(KEY, base_url=stub.url, batch_size=1) as client:
            await client.arerank("q", ["a", "b", "c"])
            keep_idle_for(0.0, monkeypatch)
            call = asyncio.create_task(client.arerank("q", ["a"]))
            await asyncio.sleep(0)
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)
            assert call.cancelled()
            assert stub.connections == 3
        assert soon(lambda: sockets() == before)

    asyncio.run(run())


def test_connections_are_kept_across_calls(mode: str, client: RegoloClient, stub: Stub) -> None:
    """Calls in a row share one connection, and a closed client opens a new one."""

    async def twice() -> None:
        await client.arerank("q", ["a"])
        await client.arerank("q", ["a"])
        await client.aclose()
        await client.arerank("q", ["a"])

    if mode == "async":
        asyncio.run(twice())
    else:
        client.rerank("q", ["a"])
        client.rerank("q", ["a"])
        client.close()
        client.rerank("q", ["a"])
    assert stub.connections == 2


def test_sync_calls_work_inside_a_running_loop(stub: Stub) -> None:
    """A sync call starts no event loop, so it works where one is running, as in a notebook."""

    async def inside() -> RerankResponse:
        with RegoloClient(KEY, base_url=stub.url, batch_size=1) as client:
            return client.rerank("q", texts(3))

    assert len(asyncio.run(inside()).results) == 3


def test_the_client_is_an_async_context_manager(stub: Stub) -> None:
    """Leaving the block closes the loop's connections."""

    async def inside() -> int:
        async with RegoloClient(KEY, base_url=stub.url) as client:
            await client.arerank("q", ["a"])
            client.rerank("q", ["a"])
        return pools_of(client)

    assert asyncio.run(inside()) == 0


def test_closing_waits_for_async_calls_under_way(stub: Stub) -> None:
    """A call that is under way when its client is closed comes to its end; later ones share a new connection."""
    stub.reply = lambda request: Reply(scored(request).body, delay=0.2)
    before = sockets()

    async def main() -> list[RerankResponse]:
        client = RegoloClient(KEY, base_url=stub.url, batch_size=1, max_concurrency=1, max_retries=0)
        call = asyncio.create_task(client.arerank("q", texts(2)))
        await asyncio.sleep(0.1)
        await client.aclose()
        later = await client.arerank("q", texts(1))
        first = await call
        last = await client.arerank("q", texts(1))
        await client.aclose()
        return [first, later, last]

    assert [len(response.results) for response in asyncio.run(main())] == [2, 1, 1]
    assert stub.connections == 3  # the first call's second request is not kept waiting for, nor is its connection
    assert soon(lambda: sockets() <= before)
