import json
import random
import socket
from typing import Any

import pytest

from regolo_rerank import RegoloClient, RegoloError, RerankResponse
from tests.conftest import KEY
from tests.support.faults import FaultServer, http, ranking
from tests.support.many import Many
from tests.support.mutations import mutate, send
from tests.support.observed import sockets, soon
from tests.support.stub import pairs, score

AT_ONCE = 40
"""Queries on one client, between which connections are shared."""


def documents_of(number: int) -> list[str]:
    """Return the documents of a query: distinct words, and scores with ties."""
    chosen = random.Random(f"documents {number}")  # noqa: S311 - chooses a case
    count = chosen.randint(1, 6)
    return [f"{number} {index} {chosen.randbytes(6).hex()} score={chosen.randrange(8) / 8}" for index in range(count)]


def right(documents: list[str]) -> list[tuple[int, float]]:
    """Rank documents in the plainest way."""
    return sorted(((index, score(text)) for index, text in enumerate(documents)), key=lambda pair: (-pair[1], pair[0]))


def mutated(connection: socket.socket, request: dict[str, Any]) -> bool:
    """Answer a query by a reply that was changed as its number says, and perhaps by another one's ranking after it."""
    query = request["query"]
    if query == "another":
        connection.sendall(http(json.dumps(ranking(request)).encode(), connection="keep-alive"))
        return True
    chosen = random.Random(query)  # noqa: S311 - chooses a case
    other = http(json.dumps(ranking({"documents": documents_of(-1)})).encode(), connection="keep-alive")
    data = mutate(chosen, ranking(request), lambda reply: json.dumps(reply).encode())
    return send(chosen, connection, data, chosen.choice([other, b"\r\n", b"x", http(b"", 408)]))


@pytest.mark.parametrize("count", [80, pytest.param(8_000, marks=[pytest.mark.long, pytest.mark.timeout(900)])])
def test_no_reply_on_the_wire_gives_a_wrong_ranking(mode: str, count: int) -> None:
    """Whatever is changed in a reply, the ranking is right or an error of ours comes, and the next one is right."""
    many, ranked = Many(mode), 0
    before = sockets()
    with FaultServer(usual=mutated) as server:
        for first in range(0, count, AT_ONCE):
            numbers = range(first, first + AT_ONCE)
            queries = [(str(number), documents_of(number)) for number in numbers]
            with RegoloClient(KEY, base_url=server.url, prompt_format="plain", timeout=0.4, max_retries=0) as client:
                outcomes = many(client, queries, return_exceptions=True, max_concurrency=16)
                for number, outcome in zip(numbers, outcomes, strict=True):
                    if isinstance(outcome, RerankResponse):
                        assert pairs(outcome.results) == right(documents_of(number)), number
                        ranked += 1
                    else:
                        assert isinstance(outcome, RegoloError), number
                        assert KEY not in f"{outcome} {outcome!r} {outcome.__cause__!r}", number
                client.timeout, client.max_retries = 30.0, 3
                again = many(client, [("another", documents_of(number)) for number in numbers], max_concurrency=16)
                assert [pairs(response.results) for response in again] == [right(documents_of(n)) for n in numbers]
        assert count / 10 < ranked < count * 0.9
    assert soon(lambda: sockets() <= before)
    print(f"{ranked} of {count} ranked")  # noqa: T201 - of a long run
