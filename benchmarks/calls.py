"""CPU of the client for one call."""

import time
from collections.abc import Iterator, Mapping
from functools import partial

from benchmarks.measured import Measured, Warm, in_rounds, warm
from benchmarks.server import Behaviour, Server
from benchmarks.subjects import FLOORS, OURS, PEERS, Job, Subject
from benchmarks.texts import documents

__all__ = ["all_results", "top5"]

_CALLS_A_TURN = 20


def top5(server: Server, *, rounds: int = 41, peers: bool = True) -> Iterator[Measured]:
    """100 documents of 500 characters, the five best wanted."""
    server.behave(Behaviour())
    subjects = FLOORS | OURS | (PEERS if peers else {})
    yield _cpu("top5", "100 documents of 500 characters, top 5", subjects, Job(server.url, documents(), 5), rounds)


def all_results(server: Server, *, rounds: int = 21, peers: bool = True) -> Iterator[Measured]:
    """The same documents, all of them wanted, in a reply that repeats their texts."""
    server.behave(Behaviour(echo=True))
    subjects = FLOORS | OURS | (PEERS if peers else {})
    yield _cpu(
        "all",
        "the same, all 100 results wanted, texts in the reply",
        subjects,
        Job(server.url, documents(), 100),
        rounds,
    )


def _cpu(name: str, title: str, subjects: Mapping[str, Subject], job: Job, rounds: int) -> Measured:
    with warm(subjects, job) as opened:
        turns = in_rounds({subject: partial(_cpu_of_a_call, opened, subject) for subject in opened.calls}, rounds)
        return Measured(name, f"CPU a call: {title}", "ms", "http.client", turns, opened.missing)


def _cpu_of_a_call(opened: Warm, subject: str) -> float:
    started = time.process_time()
    opened.repeat(subject, _CALLS_A_TURN)
    return (time.process_time() - started) / _CALLS_A_TURN * 1_000
