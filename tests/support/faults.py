"""A raw server on loopback that misbehaves in every way a test asks for."""

import json
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from io import BufferedReader
from itertools import takewhile
from types import TracebackType
from typing import Any, Self

from tests.support.stub import ranking

Fault = Callable[[socket.socket, dict[str, Any]], object]
"""Answers one request (its connection, its JSON) in a wrong way; then it is closed, unless that gives True."""


def http(body: bytes, status: int = 200, **headers: str) -> bytes:
    """Return the bytes of a reply, the last one of its connection."""
    fields = {"content_length": str(len(body)), "connection": "close", **headers}
    lines = [f"HTTP/1.1 {status} Status", *(f"{name.replace('_', '-')}: {value}" for name, value in fields.items())]
    return "\r\n".join([*lines, "", ""]).encode() + body


def good(connection: socket.socket, request: dict[str, Any]) -> bool:
    """Answer as the service does, and keep the connection."""
    connection.sendall(http(json.dumps(ranking(request)).encode(), connection="keep-alive"))
    return True


def sends(data: bytes, *, then_reset: bool = False) -> Fault:
    """Send these bytes and close, or reset, the connection."""

    def fault(connection: socket.socket, _request: dict[str, Any]) -> None:
        connection.sendall(data)
        if then_reset:
            time.sleep(0.01)  # let the client read what it can
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    return fault


def stalls(data: bytes, seconds: float) -> Fault:
    """Send these bytes and then nothing for some seconds, or until the client hangs up."""

    def fault(connection: socket.socket, _request: dict[str, Any]) -> None:
        connection.sendall(data)
        connection.settimeout(seconds)
        connection.recv(1)

    return fault


def trickles(head: bytes, body: bytes, pause: float) -> Fault:
    """Send the head at once and the body a byte at a time."""

    def fault(connection: socket.socket, _request: dict[str, Any]) -> None:
        connection.sendall(head)
        for byte in body:
            connection.sendall(bytes([byte]))
            time.sleep(pause)

    return fault


def endless(status: int) -> Fault:
    """Send a body that never ends, until the client hangs up."""

    def fault(connection: socket.socket, _request: dict[str, Any]) -> None:
        connection.sendall(http(b"", status, transfer_encoding="chunked").replace(b"content-length: 0\r\n", b""))
        chunk = b"%x\r\n" % 65_536 + b" " * 65_536 + b"\r\n"
        while True:
            connection.sendall(chunk)

    return fault


class FaultServer:
    """The server; a context manager. The scripted faults answer the first requests, and `usual` all others.

    Attributes:
        url: Its base URL.
        received: The JSON of each request.
        at_once: How many requests are being answered.
    """

    def __init__(self, *script: Fault, usual: Fault = good, listening: bool = True) -> None:
        self.received: list[dict[str, Any]] = []
        self.at_once = 0
        self._script = deque(script)
        self._usual = usual
        self._lock = threading.Lock()
        self._listener = socket.socket()
        self._listener.bind(("127.0.0.1", 0))
        self._listening = listening
        self._open: set[socket.socket] = set()
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    @property
    def connections(self) -> int:
        """How many connections are open."""
        return len(self._open)

    def listen(self) -> None:
        """Accept connections from now on."""
        self._listener.listen(256)
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Self:
        if self._listening:
            self.listen()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in list(self._open):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        self._open.add(connection)
        with suppress(OSError), connection, connection.makefile("rb") as incoming:
            while (request := _read(incoming)) is not None:
                with self._lock:
                    self.received.append(request)
                    self.at_once += 1
                    fault = self._script.popleft() if self._script else self._usual
                try:
                    keeps = fault(connection, request)
                finally:
                    with self._lock:
                        self.at_once -= 1
                if keeps is not True:
                    connection.shutdown(socket.SHUT_WR)
                    break
        self._open.discard(connection)


def _read(incoming: BufferedReader) -> dict[str, Any] | None:
    """Read one request; None where the client has hung up."""
    head = [line.lower() for line in takewhile(bytes.strip, incoming)]
    length = next((int(line[15:]) for line in head if line.startswith(b"content-length:")), None)
    body = incoming.read(length or 0)
    return json.loads(body) if len(body) == length else None
