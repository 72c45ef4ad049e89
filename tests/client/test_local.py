"""`local://`: the offline scorer, or the caller's own, without a key and without a network."""

import asyncio
import time
from typing import Any

import pytest

from regolo_rerank import InvalidInputError, RegoloClient
from tests.conftest import KEY
from tests.support.modes import Call
from tests.support.stub import pairs

DOCUMENTS = ["Rome is in Italy.", "Beijing is the capital of China.", "", "Rome is in Italy."]


def test_the_offline_scorer_ranks_by_meaning(call: Call) -> None:
    """Blank documents last, equal ones with equal scores; a key and an instruction change nothing."""
    pytest.importorskip("safetensors")
    response = call(RegoloClient(base_url="local://").rerank, "capital of China", DOCUMENTS)
    assert [result.index for result in response] == [1, 0, 3, 2]
    assert all(0 <= result.relevance_score <= 1 for result in response)
    other = RegoloClient(KEY, base_url="local://", batch_size=1)
    assert pairs(call(other.rerank, "capital of China", DOCUMENTS)) == pairs(response)


def test_long_texts_do_not_stop_the_loop() -> None:
    """A text of 1 MB without sentence ends is scored in a thread, in pieces."""
    pytest.importorskip("safetensors")

    async def longest_gap() -> float:
        client = RegoloClient(base_url="local://")
        await client.arerank("warm up", ["a"])
        call = asyncio.create_task(client.arerank("q", ["word " * 200_000]))
        gaps = []
        while not call.done():
            before = time.monotonic()
            await asyncio.sleep(0.001)
            gaps.append(time.monotonic() - before)
        await client.aclose()
        return sorted(gaps)[len(gaps) // 2]

    assert asyncio.run(longest_gap()) < 0.1


def by_length(_query: str, documents: list[str]) -> list[float]:
    """Prefer long documents."""
    return [float(len(document)) for document in documents]


def test_the_callers_scorer(call: Call) -> None:
    """Batches, blanks and duplicates as with a server; numpy arrays are sequences too."""
    client = RegoloClient(base_url="local://", scorer=by_length, batch_size=1)
    assert pairs(call(client.rerank, "q", ["aa", "", "a", "aaa", "aa"])) == [
        (3, 3.0),
        (0, 2.0),
        (4, 2.0),
        (2, 1.0),
        (1, 0.0),
    ]
    assert call(client.score, "q", ["aa", "a"]) == [2.0, 1.0]


def broken(_query: str, _documents: list[str]) -> list[float]:
    """Fail."""
    raise LookupError("mine")


async def asynchronous(_query: str, documents: list[str]) -> list[float]:
    """Must not be async."""
    return [0.0] * len(documents)


@pytest.mark.parametrize(
    ("scorer", "words"),
    [
        (broken, "scorer: raised LookupError: mine"),
        (asynchronous, "scorer: must be an ordinary function"),
        (lambda _query, _documents: [1.0], "scorer: must return one score per document, got 1 for 2"),
        (
            lambda _query, _documents: [1.0, float("nan")],
            r"scorer: must return finite numbers, got nan for documents\[1\]",
        ),
        (lambda _query, _documents: None, "scorer: raised TypeError"),
    ],
)
def test_a_scorer_that_fails_is_named_and_called_once(call: Call, scorer: Any, words: str) -> None:
    """Nothing is retried."""
    called: list[str] = []

    def counted(query: str, documents: list[str]) -> Any:
        called.append(query)
        return scorer(query, documents)

    wrapped: Any = scorer if scorer is asynchronous else counted
    with pytest.raises(InvalidInputError, match=words):
        call(RegoloClient(base_url="local://", scorer=wrapped).rerank, "q", ["a", "b"])
    assert len(called) <= 1
