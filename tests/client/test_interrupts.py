"""Calls that end early: cancelled tasks, Ctrl-C, and what is left of them; context variables of the caller."""

import asyncio
import contextvars
import gc
import logging
import signal
import subprocess
import threading
import time
import weakref
from typing import Any

import pytest

from regolo_rerank import RegoloClient
from tests.conftest import KEY
from tests.support.faults import FaultServer, good, http, sends, stalls
from tests.support.modes import Call
from tests.support.observed import asoon, own_process, slowly, sockets, soon
from tests.support.stub import Reply, Stub, error, pairs, scored, texts

REFUSED = sends(http(b"{}", 429, retry_after="20"))


@pytest.mark.anyio
@pytest.mark.parametrize("batch_size", [1, 100])
@pytest.mark.parametrize("fault", [stalls(b"", 30), REFUSED], ids=["in a request", "in a pause"])
async def test_a_cancelled_call_leaves_nothing(fault: Any, batch_size: int) -> None:
    """`wait_for` ends a call at once: no task, no connection, nothing more is sent, and the client stays usable."""
    before, tasks = sockets(), asyncio.all_tasks()
    with FaultServer(*[fault] * (4 if batch_size == 1 else 1)) as server:
        async with RegoloClient(KEY, base_url=server.url, batch_size=batch_size) as client:
            started = time.monotonic()
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(client.arerank("q", texts(4)), 0.5)
            assert time.monotonic() - started < 6
            assert asyncio.all_tasks() <= tasks
            assert await asoon(lambda: not server.connections)
            sent = len(server.received)
            assert sent <= 4
            other = client.with_options(api_key="sk-another-key")
            assert len(await other.arerank("q", texts(1))) == 1
            assert len(server.received) == sent + 1
    gc.collect()
    assert await asoon(lambda: sockets() <= before + 1)  # the listener


@pytest.mark.anyio
@pytest.mark.parametrize("many", [False, True])
async def test_a_cancelled_call_keeps_the_scores_that_are_paid(stub: Stub, *, many: bool) -> None:
    """The cache has the scores of the requests that were answered."""
    stub.reply = lambda request: Reply(scored(request).body, delay=20 if "slow" in request.documents[0] else 0)
    cache: dict[str, float] = {}
    documents = ["a score=0.1", "b score=0.2", "slow"]
    async with RegoloClient(KEY, base_url=stub.url, batch_size=1, cache=cache) as client:

        async def consume() -> None:
            async for _ in client.arerank_many([("q", documents)]):
                pass

        call = asyncio.create_task(consume() if many else client.arerank("q", documents))
        assert await asoon(lambda: len(stub.received) == 3 and stub.at_once == 1)
        await asyncio.sleep(0.1)  # let the client read the replies
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
    assert sorted(cache.values()) == [0.1, 0.2]


@pytest.mark.anyio
async def test_a_call_can_be_cancelled_at_any_point(client: RegoloClient, stub: Stub) -> None:
    """Wherever it is, it ends as cancelled, and later calls are right."""
    tasks = asyncio.all_tasks()
    for batch_size in (1, 100):
        for turns in range(40):
            call = asyncio.create_task(client.with_options(batch_size=batch_size).arerank("q", texts(3)))
            for _ in range(turns):
                await asyncio.sleep(0)
            call.cancel()
            await asyncio.gather(call, return_exceptions=True)
            assert asyncio.all_tasks() <= tasks
    assert [result.index for result in await client.arerank("q", texts(3))] == [2, 1, 0]
    assert stub.received
    await client.aclose()


@pytest.mark.anyio
async def test_a_worker_that_somebody_else_cancels(stub: Stub) -> None:
    """Whichever task of a call a host cancels, the call ends as cancelled and does not hang."""
    stub.reply = slowly(5)
    tasks = asyncio.all_tasks()
    async with RegoloClient(KEY, base_url=stub.url, batch_size=1, total_timeout=None) as client:
        call = asyncio.create_task(client.arerank("q", texts(3)))
        assert await asoon(lambda: stub.at_once == 3)
        workers = asyncio.all_tasks() - tasks - {call}
        workers.pop().cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(call, 4)
        assert asyncio.all_tasks() <= tasks


@pytest.mark.anyio
async def test_async_calls_start_no_thread(client: RegoloClient, stub: Stub) -> None:
    """Async is native: requests run in tasks of the loop."""
    stub.reply = slowly(0.3)
    before = {thread for thread in threading.enumerate() if "process_request" not in thread.name}
    calls = asyncio.gather(*(client.with_options(batch_size=1).arerank("q", texts(3)) for _ in range(4)))
    assert await asoon(lambda: stub.at_once >= 8)
    assert {thread for thread in threading.enumerate() if "process_request" not in thread.name} <= before
    await calls
    await client.aclose()


INTERRUPTED = """
import signal, sys, threading, time
from regolo_rerank import RegoloClient

client = RegoloClient("k", base_url=sys.argv[1], batch_size=int(sys.argv[2]))
pairs = (("q", ["a", "b", "c"]) for _ in range(100))
try:
    if sys.argv[3] == "many":
        for _ in client.rerank_many(pairs):
            pass
    else:
        client.rerank("q", ["a", "b", "c"])
except KeyboardInterrupt:
    print("interrupted", flush=True)
sys.stdin.readline()
other = client.with_options(api_key="other")
print([result.index for result in other.rerank("q", ["a score=0.1", "b score=0.2"])], flush=True)
"""


@pytest.mark.parametrize("way", ["one", "many"])
@pytest.mark.parametrize(
    ("fault", "batch_size"),
    [
        (stalls(b"", 60), 1),
        (stalls(b"", 60), 100),
        (stalls(b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n{", 60), 100),
        (sends(http(b"{}", 503, retry_after="20")), 1),
        (REFUSED, 100),
    ],
    ids=["in several requests", "in a request", "in a body", "before the next attempt", "in a pause"],
)
def test_ctrl_c_ends_a_call_and_leaves_the_client_usable(fault: Any, batch_size: int, way: str) -> None:
    """The call ends at once, nothing more is sent, the next call is right, and the process ends at once."""
    silent = threading.Event()
    silent.set()

    def answer(connection: Any, request: dict[str, Any]) -> Any:
        return (fault if silent.is_set() else good)(connection, request)

    with FaultServer(usual=answer) as server:
        process = own_process(
            INTERRUPTED, server.url, str(batch_size), way, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=-1
        )
        assert soon(lambda: server.received)
        time.sleep(0.3)  # let it come to the wait
        process.send_signal(signal.SIGINT)
        assert process.stdout is not None
        started = time.monotonic()
        assert process.stdout.readline() == "interrupted\n"
        assert time.monotonic() - started < 8
        sent = len(server.received)
        silent.clear()
        printed, errors = process.communicate("\n", timeout=20)
        assert (printed, "Traceback" in errors) == ("[1, 0]\n", False)
        assert len(server.received) == sent + (2 if batch_size == 1 else 1)


def test_after_ctrl_c_nothing_more_is_sent() -> None:
    """Workers that are busy at the interrupt finish their requests, and take no others."""
    caught = threading.Event()
    called: list[str] = []

    def scorer(_query: str, documents: list[str]) -> list[float]:
        called.extend(documents)
        if len(called) == 1:
            time.sleep(0.3)  # let the caller come to the wait: just before it, Python can miss a signal
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        caught.wait(20)
        return [0.0]

    client = RegoloClient(base_url="local://", scorer=scorer, batch_size=1, max_concurrency=2)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            client.rerank("q", texts(9))
    finally:
        signal.signal(signal.SIGINT, before)
    caught.set()
    time.sleep(0.2)
    assert len(called) <= 2


INTERRUPTED_LOOP = """
import asyncio, sys
from regolo_rerank import RegoloClient
client = RegoloClient("k", base_url=sys.argv[1])
async def consume():
    async for response in client.arerank_many(("q", ["a", "b"]) for _ in range(10_000_000)):
        pass
asyncio.run(consume())
"""


def test_ctrl_c_in_an_event_loop() -> None:
    """Asyncio cancels the main task; the process ends with nothing but KeyboardInterrupt."""
    with FaultServer(usual=stalls(b"", 60)) as server:
        process = own_process(INTERRUPTED_LOOP, server.url, stderr=subprocess.PIPE)
        assert soon(lambda: len(server.received) >= 4)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    assert process.returncode == -signal.SIGINT
    assert errors.rstrip().endswith("KeyboardInterrupt")
    assert "never retrieved" not in errors


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_in_a_scorer_is_raised_in_the_callers_thread(error: type[BaseException]) -> None:
    """Also if errors are returned, and in its place."""

    def scorer(query: str, documents: list[str]) -> list[float]:
        if query == "3":
            raise error
        return [0.0] * len(documents)

    client = RegoloClient(base_url="local://", scorer=scorer)
    with pytest.raises(error):
        client.rerank("3", ["a"])
    ranked = client.rerank_many([(str(number), ["a"]) for number in range(9)], return_exceptions=True)
    assert len([next(ranked) for _ in range(3)]) == 3
    with pytest.raises(error):
        next(ranked)


variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="lost")


@pytest.mark.parametrize("count", [1, 9])
def test_every_request_runs_in_the_callers_context(call: Call, count: int) -> None:
    """Context variables, such as the current trace, are visible to all requests."""
    seen: list[str] = []

    def scorer(_query: str, documents: list[str]) -> list[float]:
        seen.append(variable.get())
        return [0.0] * len(documents)

    client = RegoloClient(base_url="local://", scorer=scorer, batch_size=1, max_concurrency=count)
    token = variable.set("mine")
    try:
        for value in ("one", "two"):
            variable.set(value)
            call(client.rerank, "q", texts(count))
            assert variable.get() == value
    finally:
        variable.reset(token)
    assert seen == ["one"] * count + ["two"] * count


def test_without_threads_the_callers_own_does_the_work(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the system allows no further thread."""
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if thread.name == "regolo_rerank":
            raise RuntimeError("can't start new thread")
        start(thread)  # of the server

    with RegoloClient(KEY, base_url=stub.url, batch_size=1) as client:
        monkeypatch.setattr(threading.Thread, "start", refuse)
        assert [result.index for result in client.rerank("q", texts(5))] == [4, 3, 2, 1, 0]
        assert [pairs(response) for response in client.rerank_many([("q", texts(1))] * 3)] == [[(0, 0.0)]] * 3


@pytest.mark.parametrize("refusals", [0, 2])
def test_documents_are_freed_with_their_call(
    call: Call, stub: Stub, refusals: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No idle thread, connection or pause refers to the documents of a call that has ended."""

    class Document:
        """Can be watched."""

    # pytest keeps log records, which refer to errors, and so to the frames of the call.
    monkeypatch.setattr(logging.getLogger("regolo_rerank"), "disabled", True)
    stub.script(*[error("slow down", 429)] * refusals)
    documents = [Document() for _ in range(6)]
    seen = [weakref.ref(document) for document in documents]
    with RegoloClient(KEY, base_url=stub.url, batch_size=1) as client:
        call(client.rerank, "q", documents, text=lambda document: f"{id(document)} score=0.5")
        del documents
        gc.collect()
        assert soon(lambda: not any(reference() for reference in seen))
