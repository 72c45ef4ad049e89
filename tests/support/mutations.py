"""A right reply, changed at random in its JSON or in its HTTP, and sent in random pieces."""

import gzip
import random
import socket
import struct
import time
from collections.abc import Callable
from typing import Any, Final

from tests.support.faults import http

__all__ = ["mutate", "send"]

Results = list[dict[str, Any]]

# Of the JSON: what can be seen to be wrong, since the echoes tell it, or leaves the ranking as it is.

ODD: Final[list[Any]] = [None, True, "0", -1, 99, 0.5, 10**30, float("nan"), float("inf"), {}, []]
OTHERS: Final = ["", "foreign", "another document score=0.5", "0"]


def _exchange(chosen: random.Random, results: Results, key: str) -> None:
    """Exchange what two results have there; where there is one, write something else."""
    if len(results) < 2:
        results[0][key] = chosen.choice(ODD)
        return
    one, other = chosen.sample(results, 2)
    one[key], other[key] = other[key], one[key]


def _replace_echo(chosen: random.Random, results: Results) -> None:
    chosen.choice(results)["document"] = {"text": chosen.choice(OTHERS)}


def _take_echo(chosen: random.Random, results: Results) -> None:
    result = chosen.choice(results)
    result["document"] = chosen.choice([None, {"text": None}, result["document"]["text"]])


def _repeat(chosen: random.Random, results: Results) -> None:
    results.insert(chosen.randrange(len(results)), dict(chosen.choice(results)))


JSON: Final[list[Callable[[random.Random, Results], Any]]] = [
    lambda chosen, results: _exchange(chosen, results, "index"),
    lambda chosen, results: _exchange(chosen, results, "document"),
    _replace_echo,
    _take_echo,
    _repeat,
    lambda chosen, results: results.pop(chosen.randrange(len(results))),
    lambda chosen, results: chosen.shuffle(results),
    lambda chosen, results: chosen.choice(results).update(index=chosen.choice(ODD)),
    lambda chosen, results: chosen.choice(results).update(relevance_score=chosen.choice([None, True, "1", "x", {}])),
    lambda chosen, results: chosen.choice(results).pop(chosen.choice(["index", "relevance_score"])),
]

# Of the HTTP: the body is the same, and whole or not there at all.


def _chunked(chosen: random.Random, body: bytes) -> bytes:
    """Return a body in chunks, now and then with an extension, a trailer, a wrong size or no end."""
    parts = b""
    while body:
        size = chosen.randint(1, len(body))
        extension = chosen.choice([b"", b"", b";a=b", b" "])
        parts += b"%x" % max(0, size + (chosen.random() < 0.02)) + extension + b"\r\n" + body[:size] + b"\r\n"
        body = body[size:]
    return parts + chosen.choice(
        [b"0\r\n\r\n"] * 4 + [b"0\r\nx: y\r\n\r\n", b"", b"0\r\n", b"-1\r\n\r\n", b"g\r\n\r\n"]
    )


def _compressed(chosen: random.Random, body: bytes) -> bytes:
    """Return a body compressed, now and then in two parts, cut or damaged."""
    at = chosen.randrange(len(body))
    packed = chosen.choice([gzip.compress(body), gzip.compress(body[:at]) + gzip.compress(body[at:])])
    return chosen.choice([packed, packed, packed[: chosen.randrange(len(packed))], _flipped(chosen, packed)])


def _flipped(chosen: random.Random, data: bytes) -> bytes:
    at = chosen.randrange(len(data))
    return data[:at] + bytes([data[at] ^ chosen.randint(1, 255)]) + data[at + 1 :]


def _reframed(chosen: random.Random, body: bytes) -> bytes:
    """Return a reply that says in some way how long it is."""
    length = str(len(body) + chosen.choice([0, 0, 1, -1, 5, -5, 10**20]))
    form = chosen.choice(["{}", "+{}", " {} ", "{0}, {0}", "0x{}", "-{}", "{}.0", "", "{}\t", "00{}"])
    return http(body, content_length=form.format(length))


def _headed(chosen: random.Random, body: bytes) -> bytes:
    """Return a reply with a header more, or one that is there twice."""
    odd = [
        *(f"content-length: {len(body)}", "content-length: 3", "transfer-encoding: chunked", "transfer-encoding: gzip"),
        *("content-encoding: gzip", "content-encoding: br", "content-encoding: identity", "upgrade: h2c", ": x", "x"),
        *("x: " + "y" * 200_000, " folded", "x y: z", "x: \x00", "x: \xff", "connection: upgrade", "trailer: x"),
        *("set-cookie: a=b", "content-type: text/html; charset=nonsense", "content-type: application/json; charset=x"),
        *("retry-after: 0", "location: /elsewhere", "x-request-id: " + "z" * 9_000, "date: never"),
    ]
    head, _, rest = http(body).partition(b"\r\n")
    return head + b"\r\n" + chosen.choice(odd).encode("latin-1") + b"\r\n" + rest


def _begun(chosen: random.Random, body: bytes) -> bytes:
    """Return a reply with another first line, or with interim replies before it."""
    first = [
        *(
            f"HTTP/1.1 {status} OK"
            for status in [100, 101, 103, 199, 201, 204, 205, 206, 299, 304, 418, 500, 999, 1000]
        ),
        *("HTTP/1.0 200 OK", "HTTP/2.0 200 OK", "HTTP/0.9 200", "HTTP/1.1 200", "HTTP/1.1 2e2 OK", "ICY 200 OK", "200"),
        *(
            "HTTP/1.1 -200 OK",
            "HTTP/1.1  200 OK",
            "http/1.1 200 OK",
            "HTTP/1.1 200 \xff\x00",
            "",
            "HTTP/1.1 200 " + "k" * 9_000,
        ),
    ]
    _, _, rest = http(body).partition(b"\r\n")
    interim = b"HTTP/1.1 %d Wait\r\nx: y\r\n\r\n" % chosen.choice([100, 102, 103])
    line = chosen.choice([*first, *["HTTP/1.1 200 OK"] * 5]).encode("latin-1")
    return interim * chosen.choice([0, 0, 1, 3, 200]) + line + b"\r\n" + rest


def _damaged(chosen: random.Random, body: bytes) -> bytes:
    """Return a reply whose head has lost, got or changed a byte."""
    head, _, rest = http(body).partition(b"\r\n\r\n")
    at = chosen.randrange(len(head))
    byte = bytes([chosen.randrange(256)])
    head = chosen.choice([head[:at] + head[at + 1 :], head[:at] + byte + head[at:], _flipped(chosen, head)])
    return head + chosen.choice([b"\r\n\r\n", b"\r\n\r\n", b"\n\n", b"\r\r", b"\r\n"]) + rest


HTTP: Final[list[Callable[[random.Random, bytes], bytes]]] = [
    lambda _, body: http(body),
    lambda chosen, body: http(body)[: chosen.randrange(len(http(body)))],
    lambda chosen, body: http(_compressed(chosen, body), content_encoding=chosen.choice(["gzip", "x-gzip", "GZIP, "])),
    lambda chosen, body: _headless(http(_chunked(chosen, body), transfer_encoding="chunked")),
    lambda chosen, body: http(_chunked(chosen, body), transfer_encoding=chosen.choice(["chunked", "gzip, chunked"])),
    lambda _, body: _headless(http(body)),
    _reframed,
    _headed,
    _begun,
    _damaged,
]


def _headless(reply: bytes) -> bytes:
    """Return a reply without its content-length."""
    head, _, rest = reply.partition(b"\r\ncontent-length: ")
    return head + b"\r\n" + rest.partition(b"\r\n")[2]


def mutate(chosen: random.Random, reply: dict[str, Any], encode: Callable[[Any], bytes]) -> bytes:
    """Return the bytes of a reply, its JSON or its HTTP changed."""
    if chosen.random() < 0.3:
        chosen.choice(JSON)(chosen, reply["results"])
        return http(encode(reply))
    return chosen.choice(HTTP)(chosen, encode(reply))


def send(chosen: random.Random, connection: socket.socket, data: bytes, after: bytes) -> bool:
    """Send a reply in pieces; return whether the connection is kept, with what came `after` the reply on it."""
    if kept := chosen.random() < 0.3:
        data = data.replace(b"connection: close", b"connection: keep-alive", 1) + chosen.choice([b"", after])
    for _ in range(chosen.choice([0, 0, 1, 3])):
        at = chosen.randrange(len(data) + 1)
        connection.sendall(data[:at])
        data = data[at:]
        time.sleep(0.0005)
    connection.sendall(data)
    if not kept and chosen.random() < 0.2:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return kept
