"""A fast server in a process of its own, a fifth of whose replies are faulty at random, from a seed."""

import asyncio
import json
import random
import sys
from typing import Any

from tests.support.faults import http, ranking

FAULTS = ["500", "503", "429", "hang up", "truncated", "index", "nan", "foreign"]


def faulty(kind: str, reply: dict[str, Any], number: int) -> bytes:
    """Return the bytes of a faulty reply; empty ones hang up."""
    if kind in {"500", "503", "429"}:
        return http(b'{"error": {"message": "no"}}', int(kind), retry_after_ms="1")
    if kind == "hang up":
        return b""
    if kind == "truncated":
        return http(json.dumps(reply).encode())[:-9]
    if kind == "index":
        reply["results"][0]["index"] = random.choice([-1, 99])  # noqa: S311 - repeatable faults, no secrets
    elif kind == "nan":
        reply["results"][0]["relevance_score"] = float("nan")
    else:
        reply["results"] = [
            {**result, "document": {"text": f"another {number}"}, "relevance_score": 0.5} for result in reply["results"]
        ]
    return http(json.dumps(reply).encode())


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, rng: random.Random) -> None:
    """Answer the requests of one connection."""
    try:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = next(int(line[15:]) for line in head.split(b"\r\n") if line.startswith(b"content-length:"))
            reply = ranking(json.loads(await reader.readexactly(length)))
            if rng.random() < 0.2:
                writer.write(faulty(rng.choice(FAULTS), reply, rng.randrange(10**9)))
                break
            writer.write(http(json.dumps(reply).encode(), connection="keep-alive"))
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    writer.close()


async def main() -> None:
    """Print the port, and serve until standard input ends."""
    rng = random.Random(7)  # noqa: S311 - repeatable faults, no secrets
    server = await asyncio.start_server(lambda reader, writer: serve(reader, writer, rng), "127.0.0.1", 0, backlog=512)
    print(server.sockets[0].getsockname()[1], flush=True)  # noqa: T201 - how the test learns the port
    await asyncio.to_thread(sys.stdin.read)
    server.close()


if __name__ == "__main__":
    asyncio.run(main())
