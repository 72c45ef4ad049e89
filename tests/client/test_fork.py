"""A process that forks: the child opens connections and threads of its own, and never hangs."""

import asyncio
import os
import signal
import time
import warnings
from collections.abc import Callable

import pytest

from regolo_rerank import RegoloClient
from tests.conftest import KEY
from tests.support.observed import own_process
from tests.support.stub import Stub, pairs, texts

EXPECTED = [(2, 2 / 3), (1, 1 / 3), (0, 0.0)]


def fork(child: Callable[[], object]) -> int:
    """Return the exit status of a forked process: 0 if the function returns a true value in time."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork beside the threads of the server
        pid = os.fork()
    if pid == 0:
        status = 1
        try:
            signal.alarm(20)
            status = 0 if child() else 2
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("batch_size", [1, 100])
def test_a_forked_process_has_its_own_connections(stub: Stub, batch_size: int) -> None:
    """Parent and child rank over connections and with threads of their own, also if the parent's were in use."""
    with RegoloClient(KEY, base_url=stub.url, batch_size=batch_size) as client:

        def rank() -> bool:
            synchronous = pairs(client.rerank("q", texts(3)))
            return synchronous == pairs(asyncio.run(client.arerank("q", texts(3)))) == EXPECTED

        def rank_and_close() -> bool:
            ranked = rank()
            client.close()
            return ranked

        assert pairs(client.rerank("q", texts(3))) == EXPECTED
        before = stub.connections
        assert fork(rank_and_close) == 0
        assert stub.connections >= before + 2  # one for its sync call, one for its async call
        before = stub.connections
        assert pairs(client.rerank("q", texts(3))) == EXPECTED
        # Of three concurrent requests, more may be in progress at the same time than before.
        assert batch_size == 1 or stub.connections == before


def test_a_forked_process_leaves_the_parents_connections_alone(stub: Stub) -> None:
    """A child that only drops the client does not close the parent's connection for it."""
    holder = [RegoloClient(KEY, base_url=stub.url)]
    holder[0].rerank("q", texts(3))
    assert fork(lambda: holder.clear() is None) == 0  # type: ignore[func-returns-value]
    assert pairs(holder[0].rerank("q", texts(3))) == EXPECTED
    assert stub.connections == 1
    holder[0].close()


FORKS = """
import os, signal, sys, threading, time
from regolo_rerank import RegoloClient

client = RegoloClient("k", base_url=sys.argv[1])
thread = threading.Thread(target=lambda: client.rerank("question", ["one text", "another"]))
thread.start()
time.sleep(float(sys.argv[2]))
child = os.fork()
if child == 0:
    signal.alarm(20)
    client.rerank("question", ["one text", "another"])
    sys.exit(0)  # runs the exit handlers
thread.join()
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.parametrize("local", [True, False], ids=["local", "http"])
@pytest.mark.parametrize("delay", [0.02, 0.2])
def test_a_fork_while_another_thread_makes_its_first_call(stub: Stub, delay: float, *, local: bool) -> None:
    """The child does not wait for what the other thread was importing, loading or opening."""
    if local:
        pytest.importorskip("safetensors")
    process = own_process(FORKS, "local://" if local else stub.url, str(delay), stdout=-1, stderr=-1)
    started = time.monotonic()
    printed, errors = process.communicate(timeout=50)
    assert (printed, [line for line in errors.splitlines() if "Warning" not in line and "os.fork" not in line]) == (
        "0\n",
        [],
    )
    assert time.monotonic() - started < 20


CACHE = """
import os, signal, threading, time
from regolo_rerank import RegoloClient

reading = threading.Event()

class Slow(dict):
    def get(self, key):
        reading.set()
        time.sleep(0.3)

client = RegoloClient(base_url="local://", cache=Slow())
thread = threading.Thread(target=lambda: client.rerank("question", ["one text"]))
thread.start()
reading.wait(10)
child = os.fork()
if child == 0:
    signal.alarm(10)
    client.rerank("question", ["another text"])
    os._exit(0)
thread.join()
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_fork_while_another_thread_reads_the_cache() -> None:
    """The child does not wait for a lock that nobody in its process holds."""
    pytest.importorskip("safetensors")
    process = own_process(CACHE, stdout=-1, stderr=-1)
    assert process.communicate(timeout=30)[0] == "0\n"
