import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import safetensors.numpy

from regolo_rerank import InvalidInputError, RegoloClient
from regolo_rerank._transports.local import answer
from regolo_rerank._transports.scorer import embedded_scores
from tests.conftest import Rank
from tests.support.inside import forget_word_vectors
from tests.support.stub import Reply, Stub, pairs

QUERY = "capital of China"
DOCUMENTS = ["Rome is the capital of Italy.", "Beijing is the capital of China.", "", "pizza"]


def test_the_embedded_endpoint_ranks_without_key_and_network(rank: Rank) -> None:
    """local:// needs nothing and ranks by meaning, in words that query and document share or not."""
    response = rank(RegoloClient(base_url="local://"), QUERY, DOCUMENTS)
    assert [result.index for result in response.results] == [1, 0, 3, 2]
    response = rank(RegoloClient(base_url="local://"), "cheese and tomato on dough", DOCUMENTS)
    assert response.results[0].document == "pizza"


def test_the_environment_may_choose_it(rank: Rank, monkeypatch: pytest.MonkeyPatch) -> None:
    """REGOLO_BASE_URL=local:// does the same, and a key that is there is of no use."""
    monkeypatch.setenv("REGOLO_BASE_URL", "local://")
    monkeypatch.setenv("REGOLO_API_KEY", "bad\nkey")
    assert rank(RegoloClient(), QUERY, DOCUMENTS, top_n=1).results[0].index == 1


def test_it_answers_alike_behind_a_socket(rank: Rank, stub: Stub) -> None:
    """The endpoint in this process and the same one behind a real socket give the same ranking."""
    stub.reply = lambda request: Reply(answer(request.body)[1])
    words = ["capital", "of", "some China", "in", "Italy of", "capital China", "China", "of capital"]
    texts = [f"{word} {index}" for index, word in enumerate(words)]
    local = rank(RegoloClient(base_url="local://", batch_size=4), QUERY, texts, top_n=6)
    remote = rank(RegoloClient(base_url=stub.url, batch_size=4, prompt_format="plain"), QUERY, texts, top_n=6)
    assert pairs(local.results) == pairs(remote.results)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b"[]",
        b'{"model": "m", "query": null, "documents": []}',
        b'{"model": "m", "query": "q", "documents": [1]}',
    ],
)
def test_a_malformed_request_is_answered_as_by_the_service(body: bytes) -> None:
    """Whatever is no request gets a 422 with the place of what is wrong."""
    status, reply = answer(body)
    assert status == 422
    assert json.loads(reply)["detail"][0]["msg"]


@pytest.mark.parametrize(("top_n", "kept"), [(None, 4), (0, 4), (2, 2), (9, 4)])
def test_top_n_counts_as_at_the_service(top_n: int | None, kept: int) -> None:
    """Null and 0 mean all, and more than there are means all."""
    request = {"model": "m", "query": QUERY, "documents": DOCUMENTS, "top_n": top_n}
    status, reply = answer(json.dumps(request).encode())
    results = json.loads(reply)["results"]
    assert (status, len(results)) == (200, kept)
    assert results == sorted(results, key=lambda result: -float(result["relevance_score"]))
    assert all(result["document"]["text"] == DOCUMENTS[result["index"]] for result in results)


def fails(_query: str, _documents: list[str]) -> Sequence[float]:
    """Fail as a scorer with a bug does."""
    raise KeyError("weights")


async def is_async(_query: str, documents: list[str]) -> list[float]:
    """Score as no scorer can."""
    return [0.0] * len(documents)


@pytest.mark.parametrize("option", [{"scorer": is_async}])
def test_an_async_scorer_is_refused(rank: Rank, option: dict[str, Any]) -> None:
    """A scorer that would only make coroutines is named."""
    with pytest.raises(InvalidInputError, match="scorer: must be an ordinary function"):
        rank(RegoloClient(base_url="local://", **option), QUERY, DOCUMENTS)


def test_a_scorer_takes_the_time_it_takes(rank: Rank) -> None:
    """`timeout` is for servers: a slow scorer is neither cut off nor called again."""
    calls: list[str] = []

    def slow(query: str, documents: list[str]) -> list[float]:
        calls.append(query)
        time.sleep(0.1)
        return [0.0] * len(documents)

    assert len(rank(RegoloClient(base_url="local://", scorer=slow, timeout=0.01), QUERY, DOCUMENTS).results) == 4
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("scorer", "message"),
    [
        (lambda _query, _documents: [1.0], "one finite number a document, gave 1 scores for 3"),
        (
            lambda _query, _documents: [1.0, float("nan"), 2.0],
            r"document, gave nan for documents\[1\] of the request",
        ),
        (lambda _query, documents: ["x" for _ in documents], "it raised ValueError"),
        (lambda _query, _documents: None, "it raised TypeError"),
        (fails, "it raised KeyError: 'weights'"),
    ],
)
def test_a_scorer_that_fails_is_named_and_called_once(rank: Rank, scorer: Any, message: str) -> None:
    """A wrong scorer is the caller's mistake: an InvalidInputError at once, with the cause."""
    calls = []

    def counted(query: str, documents: list[str]) -> Any:
        calls.append(query)
        return scorer(query, documents)

    with pytest.raises(InvalidInputError, match=f"scorer: .*{message}"):
        rank(RegoloClient(base_url="local://", scorer=counted), QUERY, DOCUMENTS)
    assert len(calls) == 1


def test_a_scorer_sees_the_plain_texts(rank: Rank) -> None:
    """The embedded endpoint gets query and documents without a prompt around them."""
    seen: list[Any] = []

    def scorer(query: str, documents: list[str]) -> list[float]:
        seen.append((query, documents))
        return [0.0] * len(documents)

    rank(RegoloClient(base_url="local://", scorer=scorer), QUERY, DOCUMENTS)
    assert seen == [(QUERY, [DOCUMENTS[0], DOCUMENTS[1], DOCUMENTS[3]])]


def test_a_scorer_may_do_with_its_list_what_it_wants(rank: Rank) -> None:
    """The scores belong to the documents in their own order, also where a scorer has sorted or emptied the list."""

    def scorer(_: str, documents: list[str]) -> list[float]:
        scores = [float(text[-1]) for text in documents]
        documents.sort()
        documents.pop()
        return scores

    response = rank(RegoloClient(base_url="local://", scorer=scorer), QUERY, ["c 9", "a 1", "b 5"])
    assert [(result.document, result.relevance_score) for result in response.results] == [
        ("c 9", 9.0),
        ("b 5", 5.0),
        ("a 1", 1.0),
    ]


def test_a_scorer_that_computes_does_not_block_the_event_loop() -> None:
    """While a scorer works, the loop goes on."""

    def slow(_query: str, documents: list[str]) -> list[float]:
        time.sleep(0.2)
        return [0.0] * len(documents)

    async def main() -> int:
        call = asyncio.create_task(RegoloClient(base_url="local://", scorer=slow).arerank(QUERY, DOCUMENTS))
        beats = 0
        while not call.done():
            await asyncio.sleep(0.01)
            beats += 1
        return beats

    assert asyncio.run(main()) > 5


def test_sync_calls_score_in_the_callers_thread() -> None:
    """A single request on local:// starts no thread, so that a scorer may keep what belongs to its thread."""
    threads = []

    def scorer(_query: str, documents: list[str]) -> list[float]:
        threads.append(threading.current_thread())
        return [0.0] * len(documents)

    RegoloClient(base_url="local://", scorer=scorer).rerank(QUERY, DOCUMENTS)
    assert threads == [threading.current_thread()]


@pytest.mark.parametrize(
    ("query", "documents"),
    [
        (QUERY, ["Beijing is the capital of China.", "Rome is the capital of Italy.", "pizza", ""]),
        (
            "Qual è la capitale della Cina?",
            ["Pechino è la capitale della Cina.", "Roma è la capitale d'Italia.", "gatto"],
        ),
        ("my car won't start", ["The battery of a vehicle may be flat.", "Sugar turns amber at 170 degrees."]),
    ],
)
def test_meaning_orders_the_scores(query: str, documents: list[str]) -> None:
    """The nearer in meaning, the higher the score, in English and in Italian."""
    scores = embedded_scores(query, documents)
    assert scores == sorted(set(scores), reverse=True)


def test_scores_lie_between_0_and_1_and_a_half_is_the_middle() -> None:
    """A repeated query scores next to 1, an answer above 0.5, what is about something else below, and nothing 0."""
    same, answers, other, nothing = embedded_scores(QUERY, [QUERY, DOCUMENTS[1], "how to train a puppy", ""])
    assert 0.9999 < same <= 1
    assert nothing == 0 < other < 0.5 < answers < same


def test_what_has_no_vector_scores_lowest() -> None:
    """A text without a token gives no NaN but 0, whichever side it is on."""
    assert embedded_scores("", DOCUMENTS) == [0.0] * len(DOCUMENTS)
    assert embedded_scores(QUERY, ["", "\n\n"]) == [0.0, 0.0]
    assert min(embedded_scores(QUERY, ["pizza", "\x00", "\U0001f937", "x" * 10_000])) > 0


def test_a_score_is_of_its_pair_alone() -> None:
    """As the service's, a score is the same alone, among others and in another order."""
    together = embedded_scores(QUERY, DOCUMENTS)
    assert together == [embedded_scores(QUERY, [document])[0] for document in DOCUMENTS]
    assert together[::-1] == embedded_scores(QUERY, DOCUMENTS[::-1])


def test_a_sentence_of_a_long_document_is_found() -> None:
    """What answers in one sentence of many scores higher than what answers in none."""
    filling = "The weather was fine and nobody had anything to do. " * 20
    found, missed = embedded_scores(QUERY, [f"{filling}Beijing is the capital of China. {filling}", filling * 2])
    assert found > missed + 0.2


def test_the_vectors_are_read_once_by_threads_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that score at the same time for the first time wait for one reading."""
    real, reads = safetensors.numpy.load_file, []

    def load_file(path: Path) -> Any:
        reads.append(path)
        return real(path)

    monkeypatch.setattr(safetensors.numpy, "load_file", load_file)
    forget_word_vectors()
    with ThreadPoolExecutor(8) as threads:
        scores = list(threads.map(lambda _: tuple(embedded_scores(QUERY, DOCUMENTS)), range(8)))
    assert len(reads) == 1
    assert len(set(scores)) == 1


NOTHING_IS_FETCHED = """
import logging, os, socket, sys
class Refused(BaseException): "Nobody catches it."
def refuse(*_, **__): raise Refused
socket.socket.connect = socket.getaddrinfo = refuse
before = logging.getLogger().level, list(logging.getLogger().handlers)
from regolo_rerank import RegoloClient
assert not {"numpy", "safetensors", "tokenizers"} & sys.modules.keys()
results = RegoloClient(base_url="local://").rerank("capital of China", ["Rome", "Beijing, capital of China"]).results
assert [result.index for result in results] == [1, 0]
assert (logging.getLogger().level, logging.getLogger().handlers) == before
print(*(name for name in os.listdir(os.environ["HOME"])))
"""


def test_nothing_is_fetched_or_left_behind(tmp_path: Path) -> None:
    """In a fresh process with an empty home, scoring opens no connection, writes no file and sets up no logging."""
    environment = {**os.environ, "HOME": str(tmp_path), "USERPROFILE": str(tmp_path)}
    arguments = [sys.executable, "-W", "error", "-c", NOTHING_IS_FETCHED]
    ran = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)  # noqa: S603 - our own command
    assert (ran.returncode, ran.stdout.strip(), ran.stderr) == (0, "", "")


@pytest.mark.parametrize("missing", ["tokenizers", "safetensors.numpy"])
def test_without_its_packages_the_error_says_what_to_install(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedded scorer names the extra that brings it, and the way round it."""
    forget_word_vectors()
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(InvalidInputError, match=r"regolo_rerank\[local\].*scorer"):
        embedded_scores(QUERY, DOCUMENTS)
