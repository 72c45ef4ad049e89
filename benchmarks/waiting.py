"""Cost of waiting for a server: many concurrent calls, many requests in one call, idle connections."""

import asyncio
import time
from collections.abc import Callable, Iterator
from functools import partial
from math import ceil

from benchmarks.measured import Measured, Warm, in_rounds, warm
from benchmarks.server import Behaviour, Server
from benchmarks.subjects import ASYNC_FLOORS, ASYNC_OURS, ASYNC_PEERS, FLOORS, OURS, PEERS, Job, at_once
from benchmarks.texts import documents

__all__ = ["batches", "burst", "idle", "sustained"]

_AT_ONCE = 64
_SECONDS = 1.5


def burst(server: Server, *, rounds: int = 9, peers: bool = True) -> Iterator[Measured]:
    """64 concurrent async calls on a warm client. The server takes 100 ms for each."""
    delay = 0.1
    server.behave(Behaviour(delay=delay))
    subjects = ASYNC_FLOORS | ASYNC_OURS | (ASYNC_PEERS if peers else {})
    with warm(subjects, Job(server.url, documents(), 5)) as opened:
        for subject in opened.calls:
            opened.together(subject, _AT_ONCE)
        turns = in_rounds(
            {subject: partial(_seconds, partial(opened.together, subject, _AT_ONCE)) for subject in opened.calls},
            rounds,
        )
        title = "wall time of 64 async calls at once, the server takes 100 ms"
        yield Measured("burst", title, "s", "the delay", {"the delay": [delay] * rounds, **turns}, opened.missing)


def sustained(server: Server, *, rounds: int = 5, peers: bool = True) -> Iterator[Measured]:
    """64 async calls at any time, each followed by another. The server takes 50 ms for each."""
    delay = 0.05
    server.behave(Behaviour(delay=delay))
    subjects = ASYNC_FLOORS | ASYNC_OURS | (ASYNC_PEERS if peers else {})
    with warm(subjects, Job(server.url, documents(), 5)) as opened:
        for subject in opened.calls:
            opened.together(subject, _AT_ONCE)
        turns = in_rounds({subject: partial(_load, opened, subject) for subject in opened.calls}, rounds)
    title = "64 async calls in flight, the server takes 50 ms"
    cpu = {subject: [cpu for cpu, _ in values] for subject, values in turns.items()}
    rate = {subject: [rate for _, rate in values] for subject, values in turns.items()}
    yield Measured("sustained-cpu", f"CPU a call: {title}", "ms", "aiohttp", cpu, opened.missing)
    ideal = {"the ideal": [_AT_ONCE / delay] * rounds}
    yield Measured("sustained-rate", f"calls a second: {title}", "/s", "the ideal", ideal | rate, opened.missing)


def _load(opened: Warm, subject: str) -> tuple[float, float]:
    """Return the milliseconds of CPU a call, and the calls a second."""
    wall, cpu = time.perf_counter(), time.process_time()
    calls = opened.together(subject, _AT_ONCE, _SECONDS)
    return (time.process_time() - cpu) / calls * 1_000, calls / (time.perf_counter() - wall)


def batches(server: Server, *, rounds: int = 5, peers: bool = True) -> Iterator[Measured]:  # noqa: ARG001 - no peer sends batches at once
    """10,000 documents in one call, eight requests of it at once."""
    slots, count, size = 8, 10_000, 100
    behaviour = Behaviour(delay=0.02, delay_a_document=0.001, slots=slots)
    server.behave(behaviour)
    ideal = ceil(count / size / slots) * (behaviour.delay + behaviour.delay_a_document * size)
    with warm(at_once(slots), Job(server.url, documents(count), 5)) as opened:
        turns = in_rounds({name: partial(_seconds, partial(opened.repeat, name, 1)) for name in opened.calls}, rounds)
    title = "wall time of 10,000 documents, 8 requests at once, the server takes 20 ms + 1 ms a document, in 8 slots"
    yield Measured("batches", title, "s", "the ideal", {"the ideal": [ideal] * rounds, **turns}, opened.missing)


def idle(server: Server, *, rounds: int = 1, peers: bool = True, seconds: float = 10) -> Iterator[Measured]:
    """A second call after some idle seconds. The server keeps its connections."""
    server.behave(Behaviour())
    subjects = {name: (FLOORS | OURS)[name] for name in ("http.client", "httpx", "aiohttp", "RegoloClient")}
    subjects |= ASYNC_OURS | (PEERS if peers else {})
    with warm(subjects, Job(server.url, documents(), 5)) as opened:
        values: dict[str, list[float]] = {name: [] for name in opened.calls}
        for _ in range(rounds):
            opened.loop.run(asyncio.sleep(seconds))
            for name, counts in values.items():
                before = server.connections
                opened.repeat(name, 1)
                counts.append(server.connections - before)
    title = f"connections that a call opens after {seconds:g} s idle"
    yield Measured("idle", title, "connections", None, values, opened.missing)


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
