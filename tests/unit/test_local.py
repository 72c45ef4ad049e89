import asyncio
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from regolo_rerank import InvalidInputError, RegoloClient, RerankResponse
from regolo_rerank.local import LocalTransport, local_scores
from tests.support.modes import Call

QUERY = "capital of China"
DOCUMENTS = ["Rome is the capital of Italy.", "Beijing is the capital of China.", "", "pizza"]


def order(response: RerankResponse[Any]) -> list[int]:
    """Return the indices of a ranking."""
    return [result.index for result in response]


# --- the endpoint -----------------------------------------------------------------------------------------------------


def test_it_ranks_without_key_and_network(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """`local://` needs nothing, also if the environment chooses it, and does not look at a key."""
    assert order(call(RegoloClient(base_url="local://").rerank, QUERY, DOCUMENTS)) == [1, 0, 3, 2]
    monkeypatch.setenv("REGOLO_BASE_URL", "local://")
    monkeypatch.setenv("REGOLO_API_KEY", "bad\nkey")
    response = call(RegoloClient(batch_size=1, top_n=2).rerank, QUERY, DOCUMENTS)
    assert order(response) == [1, 0]
    assert (response.usage.requests, response.usage.total_tokens, response.usage.cost) == (3, None, None)


@pytest.mark.parametrize(("top_n", "kept"), [(None, 4), (2, 2), (9, 4)])
def test_it_answers_as_the_service_does(top_n: int | None, kept: int) -> None:
    """The reply is sorted, cut to `top_n`, and has the texts."""
    request = {"model": "m", "query": QUERY, "documents": DOCUMENTS, "top_n": top_n}
    with httpx.Client(transport=LocalTransport()) as client:
        reply = client.post("local://embedded/rerank", json=request).json()
    results = reply["results"]
    assert len(results) == kept
    assert results == sorted(results, key=lambda result: -result["relevance_score"])
    assert all(result["document"]["text"] == DOCUMENTS[result["index"]] for result in results)
    assert reply["id"].startswith("local-")


def test_a_scorer_replaces_the_offline_one(call: Call) -> None:
    """It gets the plain texts, and may sort or empty its list."""
    seen: list[Any] = []

    def scorer(query: str, documents: list[str]) -> list[float]:
        seen.append((query, list(documents)))
        scores = [float(text[-1]) for text in documents]
        documents.sort()
        documents.pop()
        return scores

    response = call(RegoloClient(base_url="local://", scorer=scorer).rerank, QUERY, ["c 9", "a <|1", " ", "b 5"])
    ranked = [("c 9", 9.0), ("b 5", 5.0), ("a <|1", 1.0), (" ", 0.0)]
    assert [(result.document, result.relevance_score) for result in response] == ranked
    assert seen == [(QUERY, ["c 9", "a <|1", "b 5"])]


def fails(_query: str, _documents: list[str]) -> list[float]:
    """Fail as a scorer with a bug does."""
    raise KeyError("weights")


async def is_async(_query: str, documents: list[str]) -> list[float]:
    """Score as no scorer can."""
    return [0.0] * len(documents)


@pytest.mark.parametrize(
    ("scorer", "message"),
    [
        (lambda _query, _documents: [1.0], "must return one score per document, got 1 for 3"),
        (
            lambda _query, _documents: [1.0, float("nan"), 2.0],
            r"must return finite numbers, got nan for documents\[1\]",
        ),
        (lambda _query, documents: ["x" for _ in documents], "raised ValueError"),
        (lambda _query, _documents: None, "raised TypeError"),
        (fails, "raised KeyError: 'weights'"),
        (is_async, "must be an ordinary function, not an async one"),
    ],
)
def test_a_scorer_that_fails_is_named_and_not_retried(call: Call, scorer: Any, message: str) -> None:
    """A wrong scorer is the caller's mistake: an InvalidInputError at once."""
    calls: list[str] = []

    def counted(query: str, documents: list[str]) -> Any:
        calls.append(query)
        return scorer(query, documents)

    used: Any = scorer if scorer is is_async else counted
    with pytest.raises(InvalidInputError, match=f"^scorer: {message}"):
        call(RegoloClient(base_url="local://", scorer=used).rerank, QUERY, DOCUMENTS)
    assert len(calls) == (scorer is not is_async)


def test_a_scorer_may_take_longer_than_timeout() -> None:
    """`timeout` is for servers; the event loop goes on meanwhile."""
    goes_on = threading.Event()

    def slow(_query: str, documents: list[str]) -> list[float]:
        assert goes_on.wait(20)
        return [0.0] * len(documents)

    async def main() -> int:
        client = RegoloClient(base_url="local://", scorer=slow, timeout=0.001)
        ranking = asyncio.create_task(client.arerank(QUERY, DOCUMENTS))
        await asyncio.sleep(0.05)
        goes_on.set()
        return len(await ranking)

    assert asyncio.run(main()) == 4


# --- the offline scorer -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "documents"),
    [
        (QUERY, ["Beijing is the capital of China.", "Rome is the capital of Italy.", "pizza", ""]),
        ("cheese and tomato on dough", ["pizza", "Rome is the capital of Italy."]),
        ("La capitale della Cina?", ["Pechino è la capitale della Cina.", "Roma è la capitale d'Italia.", "gatto"]),
        ("my car won't start", ["The battery of a vehicle may be flat.", "Sugar turns amber at 170 degrees."]),
    ],
)
def test_meaning_orders_the_scores(query: str, documents: list[str]) -> None:
    """The nearer in meaning, the higher the score, in shared words or in others."""
    scores = local_scores(query, documents)
    assert scores == sorted(set(scores), reverse=True)


def test_scores_are_from_0_to_1_and_a_half_is_the_middle() -> None:
    """A repeated query scores next to 1, an answer above 0.5, another topic below, and a text without a token 0."""
    same, answers, other, nothing = local_scores(QUERY, [QUERY, DOCUMENTS[1], "how to train a puppy", ""])
    assert nothing == 0 < other < 0.5 < answers < same
    assert 0.9999 < same <= 1
    assert local_scores("", DOCUMENTS) == [0.0] * 4
    assert local_scores(QUERY, ["\n\n"]) == [0.0]
    assert min(local_scores(QUERY, ["pizza", "\x00", "\U0001f937", "x" * 10_000])) > 0


def test_a_score_is_of_its_pair_alone() -> None:
    """As the service's, a score is the same alone, among others and in another order."""
    together = local_scores(QUERY, DOCUMENTS)
    assert together == [local_scores(QUERY, [document])[0] for document in DOCUMENTS]
    assert together[::-1] == local_scores(QUERY, DOCUMENTS[::-1])


def test_a_sentence_of_a_long_document_is_found() -> None:
    """A document with the answer in one of many sentences scores higher than one without, and repetition is no help."""
    filling = "The weather was fine and nobody had anything to do. " * 20
    found, missed = local_scores(QUERY, [f"{filling}Beijing is the capital of China. {filling}", filling * 2])
    assert found > missed + 0.2
    once, often = local_scores(QUERY, ["China has many towns.", "China China China China China has many towns."])
    assert abs(often - once) < 0.2


def test_a_long_text_without_sentences_is_cut_first() -> None:
    """The tokenizer keeps other threads waiting for a text of any length, so long ones are cut."""
    (score,) = local_scores(QUERY, [f"{'word ' * 999} capital of China {'word ' * 50_000}"])
    assert 0 < score < 1
    pieces = ["word " * 1_000, "capital of China"]
    assert local_scores(QUERY, ["".join(pieces)]) == local_scores(QUERY, [f"{pieces[0]}\n\n{pieces[1]}"])


IN_A_FRESH_PROCESS = """
import logging, os, socket, sys, threading
class Refused(BaseException): "Nobody catches it."
def refuse(*_, **__): raise Refused
socket.socket.connect = socket.getaddrinfo = refuse
before = logging.getLogger().level, list(logging.getLogger().handlers)
from regolo_rerank import RegoloClient
from regolo_rerank.local import local_scores
assert not {"numpy", "safetensors", "tokenizers"} & sys.modules.keys()
import safetensors.numpy
load_file, loads = safetensors.numpy.load_file, []
safetensors.numpy.load_file = lambda path: loads.append(path) or load_file(path)
threads = [threading.Thread(target=local_scores, args=("q", ["a"])) for _ in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert len(loads) == 1
results = RegoloClient(base_url="local://").rerank("capital of China", ["Rome", "Beijing, capital of China"]).results
assert [result.index for result in results] == [1, 0]
assert (logging.getLogger().level, logging.getLogger().handlers) == before
print(*os.listdir(os.environ["HOME"]))
"""

WITHOUT_ITS_PACKAGES = """
import sys
sys.modules["tokenizers"] = None
from regolo_rerank import InvalidInputError
from regolo_rerank.local import local_scores
try: local_scores("q", ["a"])
except InvalidInputError as error: print(error)
"""


def run(code: str, home: Path) -> str:
    """Run code in a fresh process with an empty home, and return what it prints."""
    environment = {**os.environ, "HOME": str(home), "USERPROFILE": str(home)}
    command = [sys.executable, "-W", "error", "-c", code]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)  # noqa: S603 - our own command
    assert (ran.returncode, ran.stderr) == (0, "")
    return ran.stdout.strip()


def test_nothing_is_fetched_or_left_behind(tmp_path: Path) -> None:
    """Scoring opens no connection, writes no file and configures no logging; the vectors are read once."""
    assert run(IN_A_FRESH_PROCESS, tmp_path) == ""


def test_without_its_packages_the_error_says_what_to_install(tmp_path: Path) -> None:
    """It names the extra, and the option that needs none."""
    message = run(WITHOUT_ITS_PACKAGES, tmp_path)
    assert message.startswith("base_url: local:// needs WordLlama: ")
    assert "[local]" in message
    assert message.endswith(". Or pass a scorer")
