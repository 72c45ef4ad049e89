import gc
import random
from collections import Counter
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from regolo_rerank import MissingAPIKeyError, PromptFormat, RegoloClient, RerankResponse
from tests.conftest import KEY, Rank
from tests.support.caches import EXPECTED, TEXTS, Mapping, expected, opened, sent
from tests.support.entries import KINDS, Entry
from tests.support.inside import answer
from tests.support.stub import Stub, pairs

# What a cache changes: nothing but what is sent.


def test_a_ranking_is_the_same_with_a_cache(entry: Entry, stub: Stub) -> None:
    """Blanks, duplicates, ties, cuts and batches: with nothing, some or all of it known, the ranking is the same."""
    random_ = random.Random(f"{entry.kind} {entry.mode}")  # noqa: S311 - cases, not secrets
    known: Mapping = {}
    for _ in range(12):
        texts = [
            random_.choice(["", " ", "a score=0.5", "b score=0.5", *(f"{number} words" for number in range(20))])
            for _ in range(random_.randrange(30))
        ]
        options: dict[str, Any] = {
            "top_n": random_.choice([None, 1, 3, 50]),
            "score_threshold": random_.choice([None, 0.3, 0.5]),
            "batch_size": random_.choice([1, 4, 100]),
            "max_document_chars": random_.choice([None, 3, 11]),
        }
        ranking = entry(texts, **options)
        assert entry(texts, cache=known, **options) == ranking
        before = len(stub.received)
        assert entry(texts, cache=known, **options) == ranking
        assert len(stub.received) == before


def test_only_unknown_pairs_are_sent(rank: Rank, stub: Stub) -> None:
    """What is not known goes out in even batches and without top_n, so that its scores are learnt whatever is kept."""
    texts = [f"text {number}" for number in range(10)]
    with opened(stub, {}, batch_size=4, top_n=1) as client:
        rank(client, "q", texts[2:5])
        stub.received.clear()
        response = rank(client, "q", texts)
        assert pairs(response.results) == expected(texts)[:1]
        assert sorted(map(len, stub.documents)) == [3, 4]
        assert sent(stub) == Counter(texts[:2] + texts[5:])
        assert all("top_n" not in request.json for request in stub.received)
        assert response.usage.requests == 2
        assert rank(client, "q", texts, top_n=10).usage.requests == 0


def test_what_is_known_takes_no_request_and_no_key(rank: Rank, mode: str) -> None:
    """Known pairs need neither connection nor key, and the response says that nothing was sent."""
    known: Mapping = {}
    service = httpx.MockTransport(lambda request: httpx.Response(200, content=answer(request.content)[1]))
    client = {"sync": httpx.Client, "async": httpx.AsyncClient}[mode](transport=service)
    option = {"sync": "http_client", "async": "async_http_client"}[mode]
    with RegoloClient(KEY, cache=known, **{option: client}) as warm:
        ranking = rank(warm, "q", ["a", "q"]).results
    with RegoloClient(cache=known) as without_key:
        response = rank(without_key, "q", ["a", "q"])
        assert response == RerankResponse(results=ranking)
        assert response.usage.requests == 0
        with pytest.raises(MissingAPIKeyError):
            rank(without_key, "q", ["a", "q", "unknown"])


def test_client_and_adapters_share_a_cache(mode: str, stub: Stub) -> None:
    """A pair that one of them has scored is known to the others."""
    known: Mapping = {}
    for kind in KINDS.values():
        assert Entry(kind, mode, stub.url)(TEXTS, cache=known) == EXPECTED
    assert len(stub.received) == 1


# What a score depends on.


@pytest.mark.parametrize(
    "changed",
    [
        {"base_url": "/v1"},
        {"model": "other"},
        {"instruction": "other"},
        {"extra_body": {"truncate": 5}},
        {"prompt_format": "documented"},
        {"prompt_format": PromptFormat(query="<Instruct>: {instruction}\n<Query>: {query}", document="{document}")},
        {
            "prompt_format": PromptFormat(
                query="<Instruct>: {instruction}\n<Query>: {query}", document="<Document>: {document}", escape=False
            )
        },
        {"query": "other"},
    ],
    ids=str,
)
def test_a_score_is_for_what_the_model_sees(rank: Rank, stub: Stub, changed: dict[str, Any]) -> None:
    """Another server, model, query string or document string is another pair; the first one stays known."""
    with opened(stub, {}, prompt_format="tagged") as client:
        rank(client, "q", TEXTS)
        query = changed.get("query", "q")
        options = {name: value for name, value in changed.items() if name != "query"}
        if "base_url" in options:
            options["base_url"] = stub.url + options["base_url"]
        with client.model_copy(update=options) as other:
            assert rank(other, query, TEXTS).usage.requests == 1
            assert rank(other, query, TEXTS).usage.requests == 0
        assert rank(client, "q", TEXTS).usage.requests == 0


@pytest.mark.parametrize(
    "changed",
    [
        {"api_key": "sk-other"},
        {"top_n": 1},
        {"score_threshold": 0.5},
        {"batch_size": 1},
        {"timeout": 5.0},
        {"default_headers": {"x-tag": "a"}},
        {"instruction": "plain has no place for it"},
    ],
    ids=str,
)
def test_a_score_does_not_depend_on_the_rest(rank: Rank, stub: Stub, changed: dict[str, Any]) -> None:
    """Whose key, how many, how fast: the pair stays the same."""
    known: Mapping = {}
    with opened(stub, known) as client, opened(stub, known, **changed) as other:
        rank(client, "q", TEXTS)
        assert rank(other, "q", TEXTS).usage.requests == 0


def test_a_cut_document_is_the_text_that_was_scored(rank: Rank, stub: Stub) -> None:
    """A document that is cut shares the score of its beginning, and not that of the whole."""
    with opened(stub, {}, max_document_chars=3) as client:
        rank(client, "q", ["abcdef"])
        assert rank(client, "q", ["abc", "abcxyz"]).usage.requests == 0
        client.max_document_chars = None
        assert rank(client, "q", ["abcdef"]).usage.requests == 1


def test_no_two_pairs_are_mixed_up(rank: Rank, stub: Stub) -> None:
    """Characters that move from the query to the document, or quotes and brackets in them, make another pair."""
    with opened(stub, {}) as client:
        for count, (query, text) in enumerate([("ab", "c"), ("a", "bc"), ('a"', "]c"), ('a"]', "c"), ("a", '"]c')], 1):
            assert rank(client, query, [text]).usage.requests == 1
            assert len(client.cache or ()) == count


def test_half_a_surrogate_pair_is_a_text_too(rank: Rank, stub: Stub) -> None:
    """Text that UTF-8 cannot hold is known like any other."""
    with opened(stub, {}) as client:
        for requests in (1, 0):
            assert rank(client, "q \ud800", ["a \udfff", "b"]).usage.requests == requests


@pytest.mark.parametrize("extra", [{"a": {1: 2, "b": 3}}, {"z": [1], "a": None}], ids=str)
def test_any_extra_body_goes_with_a_cache(rank: Rank, stub: Stub, extra: dict[str, Any]) -> None:
    """Whatever may be sent as extra fields may be part of what is known, in any order."""
    with opened(stub, {}, extra_body=extra) as client:
        rank(client, "q", TEXTS)
        client.extra_body = dict(reversed(extra.items()))
        assert rank(client, "q", TEXTS).usage.requests == 0


def test_keys_tell_nothing(rank: Rank, stub: Stub) -> None:
    """Keys are digests of one length, without text or API key, and values are floats."""
    known: dict[str, float] = {}
    with opened(stub, known, instruction="secret task") as client:
        rank(client, "secret query", ["secret document", "secret " * 1_000])
    assert len(known) == 2
    assert {len(key) for key in known} == {64}
    assert all(set(key) <= set("0123456789abcdef") for key in known)
    assert set(map(type, known.values())) == {float}


class Scorer:
    """Scores by length and counts what it was asked."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, _query: str, documents: list[str]) -> list[float]:
        self.asked += len(documents)
        return [float(len(document)) for document in documents]


@dataclass
class SameAsAnother(Scorer):
    """Is equal to all of its kind, and cannot be hashed."""

    def __post_init__(self) -> None:
        super().__init__()


@pytest.mark.parametrize("kind", [Scorer, SameAsAnother])
def test_a_scorer_is_asked_once_for_a_pair(rank: Rank, kind: type[Scorer]) -> None:
    """On local:// a scorer is recognised by what it is, not by its name; another one has scores of its own."""
    known: Mapping = {}
    scorer, other = kind(), kind()
    for _ in range(2):
        for each in (scorer, other, None):
            with RegoloClient(base_url="local://", scorer=each, cache=known) as client:
                rank(client, "q", ["a", "bb"])
    assert (scorer.asked, other.asked, len(known)) == (2, 2, 6)


def test_two_lambdas_are_two_scorers(rank: Rank) -> None:
    """Functions of one name do not take each other's scores, even where one is gone and the other has its address."""
    known: Mapping = {}

    def address(value: float) -> int:
        scorer: Any = lambda _, texts: [value] * len(texts)  # noqa: E731 - it lives no longer than this call
        with RegoloClient(base_url="local://", scorer=scorer, cache=known) as client:
            assert pairs(rank(client, "q", ["a"]).results) == [(0, value)]
        return id(scorer)

    addresses = []
    for number in range(50):
        addresses.append(address(number / 50))
        gc.collect()
    assert len(set(addresses)) < 50
