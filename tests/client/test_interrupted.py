"""Ctrl-C at any point of a sync call, and what is left of a call that has failed."""

import gc
import socket
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import pytest

from regolo_rerank import BadRequestError, RegoloClient, RerankResponse
from tests.conftest import KEY
from tests.support.faults import Fault, FaultServer, good, http, stalls
from tests.support.inside import workers
from tests.support.observed import soon
from tests.support.stub import Stub, pairs, texts

EXPECTED = [(1, 0.5), (0, 0.0)]

LEFT_OUT = ("/httpcore/_synchronization.py", __file__)
"""Files of which no call is interrupted: in httpcore's, a lock stays locked that httpcore takes again, and it takes a
second Ctrl-C."""


class Interrupt:
    """Raises KeyboardInterrupt, as Python does at a signal, at one of the calls of functions, or returns from them.

    Args:
        number: Which one, from 0, of those that count.
        event: What counts: "call", or "return" of the functions of a name in files that end so.
    """

    def __init__(self, number: int, event: str = "call", file: str = "", function: str = "") -> None:
        self._number = number
        self._event = event
        self._file = file
        self._function = function
        self._count = 0
        self.happened = False

    def __enter__(self) -> None:
        self._before = sys.gettrace()
        gc.disable()  # Python drops what is raised in a finalizer
        sys.settrace(self._trace)

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)
        gc.enable()

    def _trace(self, frame: FrameType, event: str, _: Any) -> Any:
        code = frame.f_code
        counts = code.co_filename.endswith(self._file or (".py", ">")) and self._function in code.co_name
        if event == self._event and counts and not (event == "call" and code.co_filename.endswith(LEFT_OUT)):
            self._count += 1
            if self._count > self._number and not self.happened:
                self.happened = True
                raise KeyboardInterrupt
        return self._trace


def interrupted(client: RegoloClient, interrupt: Interrupt) -> bool:
    """Return whether a call was interrupted."""
    with interrupt:
        try:
            client.rerank("q", texts(2))
        except KeyboardInterrupt:
            return True
    return False


@pytest.fixture
def closed_at_last(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Close what was interrupted just before it was to be closed, and would be freed with a warning, who knows when."""
    create, created = socket.create_connection, []

    def connect(*args: Any, **options: Any) -> socket.socket:
        created.append(create(*args, **options))
        return created[-1]

    monkeypatch.setattr(socket, "create_connection", connect)
    yield
    for each in created:
        each.close()


@pytest.mark.filterwarnings("ignore:Exception ignored in. <socket")  # interrupted before anybody has hold of it
@pytest.mark.usefixtures("closed_at_last")
def test_after_ctrl_c_at_any_point_a_client_can_be_used_again(client: RegoloClient, stub: Stub) -> None:
    """An interrupted call ends with KeyboardInterrupt and no other, and the next one is right."""
    client.rerank("q", ["a"])
    for number in range(10_000):
        interrupt = Interrupt(number)
        assert interrupted(client, interrupt) == interrupt.happened
        assert pairs(client.rerank("q", texts(2)).results) == EXPECTED
        if not interrupt.happened:
            break
    assert number > 300
    assert stub.connections > 10


def test_an_interrupt_in_a_lock_of_httpcore_locks_nobody_out(client: RegoloClient) -> None:
    """A lock that was taken when the interrupt came is never waited for again: neither by a call nor by `close`."""
    client.rerank("q", ["a"])
    assert interrupted(client, Interrupt(0, "return", "_synchronization.py", "__enter__"))
    ranked: list[int] = []

    def again() -> None:
        ranked.append(len(client.rerank("q", texts(2)).results))
        client.close()
        ranked.append(0)

    threading.Thread(target=again, daemon=True).start()
    assert soon(lambda: ranked == [2, 0])


def continued(connection: Any, _request: dict[str, Any]) -> None:
    """Send interim replies for as long as somebody reads them."""
    connection.settimeout(0.2)
    while True:
        connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n" * 100)


@pytest.mark.parametrize(
    "fault",
    [
        stalls(b"", 20),
        stalls(b"HTTP/1.1 200 OK\r\ncontent-", 20),
        stalls(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\n{", 20),
        continued,
    ],
    ids=["no reply", "in headers", "in the body", "100 Continue"],
)
def test_a_failed_call_leaves_no_thread_and_no_connection(fault: Fault) -> None:
    """Threads and connections that work for a call end with its failure, however long their replies would take."""

    def answer(connection: Any, request: dict[str, Any]) -> None:
        if "BAD" not in request["documents"][0]:
            fault(connection, request)
        elif soon(lambda: server.at_once == 4):
            connection.sendall(http(b'{"error": "bad document"}', 400))

    with (
        FaultServer(*[good] * 4, usual=answer) as server,
        RegoloClient(KEY, base_url=server.url, batch_size=1, max_retries=0) as client,
    ):
        client.rerank("q", ["a", "b", "c", "d"])  # over connections that are used again
        for _ in range(3):
            with pytest.raises(BadRequestError):
                client.rerank("q", ["BAD", "a", "b", "c"])
            assert soon(lambda: not workers() and server.connections == 0, within=1.0)


def test_a_failed_query_makes_room_for_the_next() -> None:
    """In a run of many queries, what a failed one had in flight takes no worker from the others."""

    def answer(connection: Any, request: dict[str, Any]) -> None:
        if "slow" in request["documents"][0]:
            stalls(b"", 20)(connection, request)
        elif "BAD" in request["documents"][0]:
            soon(lambda: server.at_once == 2)
            connection.sendall(http(b'{"error": "bad document"}', 400))
        else:
            both.wait()
            good(connection, request)

    both = threading.Barrier(2, timeout=10)
    with FaultServer(usual=answer) as server, RegoloClient(KEY, base_url=server.url, batch_size=1) as client:
        source = [("q", ["slow", "BAD"]), *[("q", texts(2))] * 4]
        failed, *ranked = client.rerank_many(source, max_concurrency=2, return_exceptions=True)
    assert isinstance(failed, BadRequestError)
    assert [pairs(response.results) for response in ranked if isinstance(response, RerankResponse)] == [EXPECTED] * 4
