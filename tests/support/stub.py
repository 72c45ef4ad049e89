"""A real HTTP server on loopback that answers as a test tells it to."""

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self


@dataclass(frozen=True)
class Received:
    """One request, as it arrived."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    at: float
    """Monotonic seconds."""

    @property
    def json(self) -> dict[str, Any]:
        loaded: dict[str, Any] = json.loads(self.body)
        return loaded

    @property
    def documents(self) -> list[str]:
        documents: list[str] = self.json["documents"]
        return documents


@dataclass(frozen=True)
class Reply:
    """One reply: a body of bytes as it is, anything else as JSON."""

    body: Any = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    """Seconds before the reply is sent."""
    surplus: bytes = b""
    """Bytes sent after the reply, together with its end."""

    def encoded(self) -> bytes:
        return self.body if isinstance(self.body, bytes) else json.dumps(self.body).encode()


def score(text: str) -> float:
    """Give a text the score that it names behind "score=", else one that depends on nothing but the text."""
    if "score=" in text:
        return float(text.rpartition("score=")[2].split()[0])
    return sum(text.encode("utf-8", "replace")) % 997 / 997


def texts(count: int) -> list[str]:
    """Return distinct documents, the later ones better."""
    return [f"document {index} score={index / count}" for index in range(count)]


def ranking(request: dict[str, Any]) -> dict[str, Any]:
    """Return the JSON of the right reply, with `score` as the model."""
    ranked: list[dict[str, Any]] = [
        {"index": index, "relevance_score": score(text), "document": {"text": text}}
        for index, text in enumerate(request["documents"])
    ]
    ranked.sort(key=lambda result: -result["relevance_score"])
    return {"id": "stub-1", "results": ranked[: request.get("top_n")], "meta": None}


def scored(request: Received) -> Reply:
    """Answer as the service does."""
    return Reply(ranking(request.json))


def together(count: int) -> Callable[[Received], Reply]:
    """Return a function that answers `count` requests once all of them are in flight."""
    arrived = threading.Barrier(count, timeout=20)

    def reply(request: Received) -> Reply:
        arrived.wait()
        return scored(request)

    return reply


def results(*pairs: tuple[Any, Any], **fields: Any) -> dict[str, Any]:
    """Return the JSON of a reply with these (index, score) pairs."""
    ranked = [{"index": index, "relevance_score": value, "document": None} for index, value in pairs]
    return {"id": "stub-1", "results": ranked, "meta": None, **fields}


def error(message: str, status: int, retry_after_ms: int | None = 1, **fields: Any) -> Reply:
    """Return an error in the gateway's shape; it asks for a retry at once unless told otherwise."""
    body = {"error": {"message": message, "type": "None", "param": "None", "code": str(status), **fields}}
    return Reply(body, status, {} if retry_after_ms is None else {"retry-after-ms": str(retry_after_ms)})


class Stub:
    """The server; a context manager.

    Attributes:
        url: Its base URL.
        received: The requests so far, in the order of their arrival.
        reply: What answers a request when no scripted reply is left.
        at_once: How many requests are in flight.
        most_at_once: The largest number of requests that were in flight at the same time.
        connections: How many connections were opened.
    """

    def __init__(self, reply: Callable[[Received], Reply] = scored) -> None:
        self.reply = reply
        self.received: list[Received] = []
        self.most_at_once = 0
        self.connections = 0
        self.at_once = 0
        self._script: deque[Reply] = deque()
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def script(self, *replies: Reply) -> None:
        """Give these replies to the next requests, in order."""
        self._script.extend(replies)

    def always(self, reply: Reply) -> None:
        """Give this reply to every request."""
        self.reply = lambda _: reply

    @property
    def documents(self) -> list[list[str]]:
        """The documents of each request."""
        return [request.documents for request in self.received]

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.001,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop the server."""
        self._server.shutdown()
        self._server.server_close()

    def _take(self, request: Received) -> Reply:
        with self._lock:
            self.received.append(request)
            if self._script:
                return self._script.popleft()
        return self.reply(request)

    def _entered(self, change: int) -> None:
        with self._lock:
            self.at_once += change
            self.most_at_once = max(self.most_at_once, self.at_once)

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True
            wbufsize = -1

            def setup(self) -> None:
                super().setup()
                with stub._lock:
                    stub.connections += 1

            def do_POST(self) -> None:
                length = int(self.headers.get("content-length", 0))
                body = self.rfile.read(length)
                if len(body) < length:  # the call has ended meanwhile
                    self.close_connection = True
                    return
                headers = {name.lower(): value for name, value in self.headers.items()}
                stub._entered(1)
                try:
                    reply = stub._take(Received("POST", self.path, headers, body, time.monotonic()))
                    time.sleep(reply.delay)
                finally:
                    stub._entered(-1)
                content = reply.encoded()
                self.send_response_only(reply.status)
                for name, value in ({"content-type": "application/json"} | reply.headers).items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content + reply.surplus)

            def log_message(self, *_: Any) -> None:
                pass

        return Handler


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def handle_error(self, *_: Any) -> None:
        """A client that hangs up is part of some tests."""


def pairs(ranking: Iterable[Any]) -> list[tuple[int, float]]:
    """Return a ranking's (index, score) pairs."""
    return [(result.index, result.relevance_score) for result in ranking]
