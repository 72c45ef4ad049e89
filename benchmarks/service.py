"""A service with FastAPI: 100 concurrent users, each request reranks 50 candidates of 1,500 characters.

`python -m benchmarks.service NAME URL` runs the service for one subject, and prints its port. It ends with its standard
input.
"""

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from functools import partial

from benchmarks.measured import Measured, in_rounds
from benchmarks.server import Behaviour, Server
from benchmarks.subjects import ASYNC_FLOORS, ASYNC_PEERS, ASYNC_SERVICES, Job

__all__ = ["service"]

USERS = 100
SECONDS = 3.0
_SUBJECTS = ASYNC_FLOORS | ASYNC_SERVICES | ASYNC_PEERS


def service(server: Server, *, rounds: int = 5, peers: bool = True) -> Iterator[Measured]:
    """Requests per second of a service in a separate process. The rerank server takes 50 ms for each."""
    server.behave(Behaviour(delay=0.05))
    rounds_by_subject: dict[str, list[float]] = {}
    missing: dict[str, str] = {}
    with ExitStack() as stack:
        ports = {}
        for name in ASYNC_FLOORS | ASYNC_SERVICES | (ASYNC_PEERS if peers else {}):
            try:
                ports[name] = stack.enter_context(_running(name, server.url))
            except RuntimeError as error:
                missing[name] = str(error)
        for port in ports.values():
            asyncio.run(_requests_per_second(port, 0.5))
        turns = {name: partial(_measure, port) for name, port in ports.items()}
        rounds_by_subject = in_rounds(turns, rounds)
    title = f"requests per second of a FastAPI service, {USERS} users, 50 candidates of 1,500 characters"
    yield Measured("service", title, "/s", "LangChain VoyageAIRerank" if peers else None, rounds_by_subject, missing)


@contextmanager
def _running(name: str, url: str) -> Iterator[int]:
    """Run the service of a subject, and yield its port."""
    command = [sys.executable, "-m", "benchmarks.service", name, url]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline() if process.stdout else ""
            if not line:
                raise RuntimeError("not installed")
            yield int(line)
        finally:
            process.kill()


def _measure(port: int) -> float:
    return asyncio.run(_requests_per_second(port, SECONDS))


async def _requests_per_second(port: int, seconds: float) -> float:
    import aiohttp

    answered = 0
    ends_at = time.perf_counter() + seconds

    async def user(session: aiohttp.ClientSession) -> None:
        nonlocal answered
        while time.perf_counter() < ends_at:
            async with session.get(f"http://127.0.0.1:{port}/answer") as response:
                if response.status != 200 or await response.json() != 5:
                    raise RuntimeError(f"the service answered {response.status}: {await response.text()}")
            answered += 1

    started = time.perf_counter()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(*(user(session) for _ in range(USERS)))
    return answered / (time.perf_counter() - started)


def _serve(name: str, url: str) -> None:
    import socket

    import uvicorn
    from fastapi import FastAPI

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        documents = [f"{number}: {'candidate text ' * 100}"[:1_500] for number in range(50)]
        async with _SUBJECTS[name](Job(url, documents, 5)) as call:  # type: ignore[union-attr]  # all of them are async
            app.state.call = call
            yield

    app = FastAPI(lifespan=lifespan)

    @app.get("/answer")
    async def answer() -> int:
        return len(await app.state.call())

    threading.Thread(target=_end_with_standard_input, daemon=True).start()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        print(listener.getsockname()[1], flush=True)
        uvicorn.Server(uvicorn.Config(app, log_level="error", access_log=False)).run([listener])


def _end_with_standard_input() -> None:
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    _serve(*sys.argv[1:])
