"""The server that all subjects talk to, in a separate process: it answers at once, or as slowly as configured.

It speaks the wire formats of several rerank services, by path, and costs so little that the measure shows the client.
Its scores depend on nothing but the number of documents, because a benchmark never looks at them.
"""

import asyncio
import functools
import re
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, Self

from pydantic_core import from_json, to_json

__all__ = ["MODEL", "ROOT", "Behaviour", "Server"]

MODEL = "stub"
ROOT = Path(__file__).parents[1]

_LENGTH = re.compile(rb"(?i)\r\ncontent-length: *(\d+)")


@dataclass(frozen=True)
class Behaviour:
    """How the server answers.

    Attributes:
        delay: Seconds that each request takes.
        delay_a_document: Seconds that each of its documents takes in addition.
        slots: Maximum number of requests in work, or None. Others wait.
        echo: Whether replies repeat the documents' texts.
    """

    delay: float = 0.0
    delay_a_document: float = 0.0
    slots: int | None = None
    echo: bool = False


@dataclass
class _Service:
    """State that all connections share."""

    behaviour: Behaviour = field(default_factory=Behaviour)
    connections: int = 0
    requests: int = 0
    busy: int = 0
    waiting: deque[tuple[float, Callable[[], None]]] = field(default_factory=deque)

    def take(self, path: str, body: bytes, send: Callable[[bytes], None]) -> None:
        """Answer a request, after the time that it takes."""
        if path == "/control":
            if body:
                self.behaviour = Behaviour(**from_json(body))
            send(to_json({"connections": self.connections, "requests": self.requests}))
        elif path.endswith("/models"):
            send(to_json({"object": "list", "data": [{"id": MODEL, "object": "model"}]}))
        else:
            self.requests += 1
            request = from_json(body)
            documents = request.get("documents") or request["passages"]
            seconds = self.behaviour.delay + self.behaviour.delay_a_document * len(documents)
            self._work(seconds, lambda: send(_reply(path, request, documents, echo=self.behaviour.echo)))

    def _work(self, seconds: float, answer: Callable[[], None]) -> None:
        if self.behaviour.slots is not None and self.busy >= self.behaviour.slots:
            self.waiting.append((seconds, answer))
        elif seconds:
            self.busy += 1
            asyncio.get_running_loop().call_later(seconds, self._finish, answer)
        else:
            answer()

    def _finish(self, answer: Callable[[], None]) -> None:
        self.busy -= 1
        answer()
        if self.waiting:
            self._work(*self.waiting.popleft())


def _reply(path: str, request: dict[str, Any], documents: list[Any], *, echo: bool) -> bytes:
    kept = min(request.get("top_n") or request.get("top_k") or len(documents), len(documents))
    if path.endswith("/ranking"):
        return _shared_reply("rankings", "logit", len(documents), kept)
    if path.startswith("/voyage/"):
        return _shared_reply("data", "relevance_score", len(documents), kept)
    if not echo:
        return _shared_reply("results", "relevance_score", len(documents), kept)
    return to_json(
        {
            "id": "stub",
            "results": [
                {"index": index, "relevance_score": score, "document": {"text": documents[index]}}
                for index, score in _ranking(len(documents), kept)
            ],
            "meta": None,
        }
    )


@functools.cache
def _shared_reply(results: str, score: str, count: int, kept: int) -> bytes:
    """Return a reply without texts, which is the same for all requests of a size."""
    ranked = [{"index": index, score: value} for index, value in _ranking(count, kept)]
    return to_json({"id": "stub", results: ranked, "meta": None, "usage": {"total_tokens": 100 * count}})


@functools.cache
def _ranking(count: int, kept: int) -> list[tuple[int, float]]:
    """Return (index, score) pairs by falling score, in an order far from the documents' own."""
    shuffled = sorted(range(count), key=lambda index: index * 7919 % 10_007)
    return [(index, 1 - (rank + 0.123456789) / count) for rank, index in enumerate(shuffled[:kept])]


class _Connection(asyncio.Protocol):
    """One connection, kept open until the client closes it, with one request at a time."""

    def __init__(self, service: _Service) -> None:
        self._service = service
        self._buffer = bytearray()
        self._body: range | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._service.connections += 1

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if self._body is None and (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            length = _LENGTH.search(self._buffer, 0, end)
            self._body = range(end + 4, end + 4 + (int(length[1]) if length else 0))
        if self._body is not None and len(self._buffer) >= self._body.stop:
            path = self._buffer.split(b" ", 2)[1].decode()
            body = bytes(self._buffer[self._body.start : self._body.stop])
            self._buffer, self._body = bytearray(), None
            self._service.take(path, body, self._send)

    def _send(self, body: bytes) -> None:
        if not self._transport.is_closing() and isinstance(self._transport, asyncio.WriteTransport):
            head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
            self._transport.write(head + body)


async def _serve() -> None:
    """Serve on a free port, which is printed, until standard input ends with the parent process."""
    service, loop = _Service(), asyncio.get_running_loop()
    server = await loop.create_server(lambda: _Connection(service), "127.0.0.1", 0, backlog=1_024)
    print(server.sockets[0].getsockname()[1], flush=True)
    parent = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(parent), sys.stdin)
    await parent.read()


class Server:
    """The server's process, a context manager for its parent.

    Attributes:
        url: Its base URL.
    """

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.server"], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._process.stdout is not None  # noqa: S101 - for the type checker; a pipe was asked for
        port = int(self._process.stdout.readline())
        self.url = f"http://127.0.0.1:{port}"
        self._control = HTTPConnection("127.0.0.1", port)
        self.behave(Behaviour())
        return self

    def __exit__(self, *_: object) -> None:
        self._control.close()
        self._process.communicate(timeout=10)

    def behave(self, behaviour: Behaviour) -> None:
        """Answer like this from now on."""
        self._counts(to_json(asdict(behaviour)))

    @property
    def connections(self) -> int:
        """How many connections were opened so far, the one that asks included."""
        return self._counts()["connections"]

    @property
    def requests(self) -> int:
        """How many requests for a ranking came so far."""
        return self._counts()["requests"]

    def _counts(self, body: bytes = b"") -> dict[str, int]:
        self._control.request("POST", "/control", body)
        counts: dict[str, int] = from_json(self._control.getresponse().read())
        return counts


if __name__ == "__main__":
    asyncio.run(_serve())
