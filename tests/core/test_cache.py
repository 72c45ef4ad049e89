import asyncio
import copy
import gc
import json
import logging
import math
import multiprocessing
import pickle
import random
import shelve
import sqlite3
import subprocess
import sys
import threading
import time
import types
import warnings
from collections import Counter, UserDict
from collections.abc import Callable, Iterator, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, closing, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import httpx
import nbformat
import pytest
from cachetools import LRUCache, TTLCache
from diskcache import Cache  # type: ignore[import-untyped]  # it has no types
from ipykernel.kernelspec import write_kernel_spec
from nbclient import NotebookClient

from regolo_rerank import (
    BadRequestError,
    InvalidInputError,
    MissingAPIKeyError,
    PromptFormat,
    RegoloClient,
    RerankCacheWarning,
    RerankResponse,
    ServerError,
)
from regolo_rerank._core import cache
from regolo_rerank._transports.local import EmbeddedTransport
from tests.conftest import KEY, Rank
from tests.support.entries import KINDS, Entry
from tests.support.observed import soon
from tests.support.stub import Received, Reply, Stub, error, pairs, score, scored

Mapping = MutableMapping[str, float]

TEXTS = ["a score=0.2", "b score=0.9", "c score=0.5", "d score=0.9"]

EXPECTED = [(1, 0.9), (3, 0.9), (2, 0.5), (0, 0.2)]


@pytest.fixture(autouse=True)
def _nothing_is_claimed() -> Iterator[None]:
    """Whatever happens to a call, no later one waits for it."""
    yield
    assert not cache._claims.held


def opened(stub: Stub, known: Mapping | None, **options: Any) -> RegoloClient:
    """Return a client with a cache, which sends texts as they are."""
    return RegoloClient(**{"api_key": KEY, "base_url": stub.url, "prompt_format": "plain", "cache": known, **options})


def sent(stub: Stub) -> Counter[str]:
    """Return how often each text was sent."""
    return Counter(chain(*stub.documents))


def expected(texts: list[str]) -> list[tuple[int, float]]:
    """Return the ranking of distinct texts."""
    return sorted(((index, score(text)) for index, text in enumerate(texts)), key=lambda pair: -pair[1])


class Door:
    """Keeps requests waiting in the server until it is opened."""

    def __init__(self, stub: Stub, reply: Callable[[Received], Reply] = scored) -> None:
        self._stub = stub
        self._open = threading.Event()
        self._reply = reply
        stub.reply = self._answer

    def _answer(self, request: Received) -> Reply:
        self._open.wait(20)
        return self._reply(request)

    def open(self) -> None:
        self._open.set()

    def open_when_reached(self) -> None:
        """Open once a request has come, and all other calls had time to come too."""
        assert soon(lambda: self._stub.received)
        time.sleep(0.02)
        self._open.set()


HOW = pytest.mark.parametrize("how", ["threads", "tasks", "threads and loops"])


def at_once(how: str, client: RegoloClient, asked: list[list[str]], meanwhile: Callable[[], object]) -> list[Any]:
    """Rank lists of texts at the same time; return what each comes to, errors too.

    Args:
        how: In threads, in tasks of one event loop, or in threads of which every second has a loop of its own.
        client: Who ranks.
        asked: The lists of texts.
        meanwhile: Called in a thread of its own once all are under way.
    """

    async def tasks() -> list[Any]:
        under_way = [asyncio.create_task(client.arerank("q", texts)) for texts in asked]
        await asyncio.to_thread(meanwhile)
        return await asyncio.gather(*under_way, return_exceptions=True)

    if how == "tasks":
        return asyncio.run(tasks())
    with ThreadPoolExecutor(len(asked) + 1) as threads:
        futures = [
            threads.submit(asyncio.run, client.arerank("q", texts))
            if number % 2 and how == "threads and loops"
            else threads.submit(client.rerank, "q", texts)
            for number, texts in enumerate(asked)
        ]
        threads.submit(meanwhile).result()
        return [future.exception() or future.result() for future in futures]


# What a cache changes: nothing but what is sent.


@pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))
def test_a_ranking_is_the_same_with_a_cache(kind: Any, mode: str, stub: Stub) -> None:
    """Blanks, duplicates, ties, cuts and batches: with nothing, some or all of it known, the ranking is the same."""
    random_ = random.Random(f"{kind} {mode}")  # noqa: S311 - cases, not secrets
    known: Mapping = {}
    entry = Entry(kind, mode, stub.url)
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
    client = {"sync": httpx.Client, "async": httpx.AsyncClient}[mode](transport=EmbeddedTransport())
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
    for number in range(5):
        addresses.append(address(number / 5))
        gc.collect()
    assert len(set(addresses)) < 5


def test_a_scorer_may_ask_for_its_own_pair(rank: Rank) -> None:
    """A scorer that ranks the very pair that it is scoring does not wait for itself without end."""
    depth: list[int] = []

    def scorer(query: str, documents: list[str]) -> list[float]:
        depth.append(1)
        if len(depth) < 3:
            client.rerank(query, documents)
        return [0.5] * len(documents)

    client = RegoloClient(base_url="local://", scorer=scorer, cache={}, max_retry_seconds=0.05)
    assert pairs(rank(client, "q", ["a"]).results) == [(0, 0.5)]


# The caller's mapping.


class Table(MutableMapping[str, float]):
    """A table in SQLite, which may be used in one thread only."""

    def __init__(self) -> None:
        self._table = sqlite3.connect(":memory:")
        self._table.execute("CREATE TABLE scores (key PRIMARY KEY, score)")

    def __getitem__(self, key: str) -> float:
        found: tuple[float] | None = self._table.execute("SELECT score FROM scores WHERE key = ?", (key,)).fetchone()
        if found is None:
            raise KeyError(key)
        return found[0]

    def __setitem__(self, key: str, value: float) -> None:
        self._table.execute("INSERT OR REPLACE INTO scores VALUES (?, ?)", (key, value))

    def __delitem__(self, key: str) -> None:
        self._table.execute("DELETE FROM scores WHERE key = ?", (key,))

    def __iter__(self) -> Iterator[str]:
        return (key for (key,) in self._table.execute("SELECT key FROM scores"))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def close(self) -> None:
        self._table.close()


MAPPINGS: dict[str, Callable[[Path], Any]] = {
    "dict": lambda _: {},
    "UserDict": lambda _: UserDict(),
    "LRUCache": lambda _: LRUCache(100),
    "TTLCache": lambda _: TTLCache(100, 60),
    "diskcache": lambda folder: Cache(str(folder)),
    "shelve": lambda folder: shelve.open(str(folder / "scores")),  # noqa: S301, SIM115 - our own file; closed below
    "one thread": lambda _: Table(),
}


@pytest.mark.parametrize("kind", MAPPINGS)
def test_any_mapping_will_do(rank: Rank, stub: Stub, tmp_path: Path, kind: str) -> None:
    """In memory, on disk, or in the caller's thread only: all pairs of several batches are kept."""
    known = MAPPINGS[kind](tmp_path)
    with opened(stub, known, batch_size=1) as client:
        for requests in (4, 0):
            response = rank(client, "q", TEXTS)
            assert (pairs(response.results), response.usage.requests) == (EXPECTED, requests)
    assert len(known) == 4
    if hasattr(known, "close"):
        known.close()


@pytest.mark.parametrize("forgetful", [lambda: LRUCache(2), lambda: TTLCache(100, ttl=0)], ids=["LRU", "TTL"])
def test_a_mapping_that_forgets_loses_nothing(rank: Rank, stub: Stub, forgetful: Callable[[], Mapping]) -> None:
    """Scores that are evicted or expire while the call is under way are in its ranking all the same."""
    texts = [f"text {number}" for number in range(10)]
    known = forgetful()
    with opened(stub, known, batch_size=3) as client:
        for _ in range(3):
            assert pairs(rank(client, "q", texts).results) == expected(texts)
    assert len(known) <= 2


@pytest.mark.parametrize(
    "entry", [None, "x", math.nan, math.inf, -math.inf, True, [0.5], 10**400], ids=lambda entry: repr(entry)[:10]
)
def test_a_broken_entry_is_a_miss(rank: Rank, stub: Stub, entry: Any) -> None:
    """Whatever is no finite number is unknown, and is written over."""
    known: dict[str, Any] = {}
    with opened(stub, known) as client:
        rank(client, "q", TEXTS)
        good = dict(known)
        key = next(iter(known))
        known[key] = entry
        response = rank(client, "q", TEXTS)
        assert (pairs(response.results), response.usage.requests) == (EXPECTED, 1)
        assert known == good
        assert len(stub.documents[-1]) == 1


def test_a_whole_number_is_a_score(rank: Rank, stub: Stub) -> None:
    """A store may give 1 for the 1.0 that it was given."""
    known: dict[str, Any] = {}
    with opened(stub, known) as client:
        rank(client, "q", ["a"])
        known[next(iter(known))] = 1
        result = rank(client, "q", ["a"]).results[0]
        assert (result.relevance_score, type(result.relevance_score)) == (1.0, float)


class Failing(dict[str, float]):
    """Fails in one of its methods or in any, not at once."""

    def __init__(self, method: str, error: Exception) -> None:
        super().__init__()
        self._method = method
        self._error = error

    def _fail(self, method: str) -> None:
        if self._method in {method, "any"}:
            time.sleep(0.005)
            raise self._error

    def get(self, key: str, default: Any = None) -> Any:
        self._fail("get")
        return super().get(key, default)

    def __setitem__(self, key: str, value: float) -> None:
        self._fail("__setitem__")
        super().__setitem__(key, value)


@pytest.mark.parametrize("failure", [OSError("disk full"), KeyError("k"), TypeError("unhashable")], ids=repr)
@pytest.mark.parametrize(("method", "words"), [("get", "read"), ("__setitem__", "written"), ("any", "read")])
def test_a_mapping_that_fails_is_a_warning(
    rank: Rank, stub: Stub, caplog: pytest.LogCaptureFixture, method: str, words: str, failure: Exception
) -> None:
    """A cache that cannot be read or written costs a warning and a log line a call, and never the ranking."""
    said = f"the cache cannot be {words}, so this call goes on without it: {type(failure).__name__}: {failure}"
    with opened(stub, Failing(method, failure), batch_size=1) as client:
        for count in (1, 2):
            with pytest.warns(RerankCacheWarning) as caught:
                assert pairs(rank(client, "q", TEXTS).results) == EXPECTED
            assert [str(warning.message) for warning in caught] == [said]
            assert caplog.messages == [said] * count
            assert {record.levelno for record in caplog.records} == {logging.WARNING}
    assert sent(stub) == dict.fromkeys(TEXTS, 2)


def test_a_warning_that_is_an_error_leaves_nothing_behind(rank: Rank, stub: Stub) -> None:
    """Where the user makes warnings errors, that is what the call raises, and the next one goes on."""
    with opened(stub, Failing("__setitem__", OSError("disk full"))) as client:
        with pytest.raises(RerankCacheWarning, match="disk full"):
            rank(client, "q", TEXTS)
        client.cache = {}
        assert pairs(rank(client, "q", TEXTS).results) == EXPECTED


# The option.


@pytest.mark.parametrize(
    "refused",
    [5, {"a"}, types.MappingProxyType({}), [("a", 0.5)], "scores.db", Path("scores.db"), dict, True],
    ids=repr,
)
def test_what_cannot_be_written_is_refused(refused: Any) -> None:
    """No mapping, or none that can be written, is refused by the option's name, at construction and assignment."""
    with pytest.raises(ValueError, match=r"(?s)cache\n.*must be a mapping that can be written, such as a dict"):
        RegoloClient(cache=refused)
    client = RegoloClient()
    with pytest.raises(ValueError, match=r"(?s)cache\n.*got "):
        client.cache = refused


@pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))
def test_copies_share_the_cache_and_dumps_have_none(kind: Any, stub: Stub) -> None:
    """Copies use the very same mapping; a pickle, a dump, a schema and a repr know nothing of it."""
    known: dict[str, float] = {"canary": 0.5}
    reranker = kind(KEY, base_url=stub.url, cache=known)
    for copied in (copy.copy(reranker), copy.deepcopy(reranker), reranker.model_copy(deep=True)):
        assert copied.cache is known
    assert reranker.model_copy(update={"top_n": 1}).cache is known
    assert pickle.loads(pickle.dumps(reranker)).cache is None  # noqa: S301 - our own pickle
    assert reranker.cache is known
    for shown in (repr(reranker), str(reranker), repr(reranker.model_dump()), reranker.model_dump_json()):
        assert "canary" not in shown
        assert "cache" not in shown
    assert "cache" not in kind.model_json_schema()["properties"]


def test_an_assigned_cache_counts_from_the_next_call(rank: Rank, stub: Stub) -> None:
    """A cache can be given, exchanged and taken away at any time."""
    first: Mapping = {}
    with opened(stub, None) as client:
        for known, requests in [(None, 1), (first, 1), (first, 0), ({}, 1), (None, 1), (first, 0)]:
            client.cache = known
            assert rank(client, "q", TEXTS).usage.requests == requests


# Calls at the same time.


@HOW
def test_calls_at_once_send_a_pair_once(how: str, stub: Stub) -> None:
    """Of calls that ask for the same pairs at once, one sends them, and all have its scores."""
    door = Door(stub)
    with opened(stub, {}) as client:
        responses = at_once(how, client, [TEXTS] * 12, door.open_when_reached)
    assert [pairs(response.results) for response in responses] == [EXPECTED] * 12
    assert sum(response.usage.requests for response in responses) == 1
    assert sent(stub) == dict.fromkeys(TEXTS, 1)


@HOW
@pytest.mark.parametrize("kind", ["dict", "LRUCache(1)", "failing"])
def test_overlapping_calls_share_what_they_learn(how: str, stub: Stub, kind: str) -> None:
    """Calls that share some of their pairs rank right, and send each of them once where the mapping keeps them."""
    random_ = random.Random(how)  # noqa: S311 - cases, not secrets
    texts = [f"text {number}" for number in range(20)]
    asked = [random_.sample(texts, 8) for _ in range(12)]
    kinds: dict[str, Callable[[], Mapping]] = {
        "dict": dict,
        "LRUCache(1)": lambda: LRUCache(1),
        "failing": lambda: Failing("get", OSError()),
    }
    door = Door(stub)
    with opened(stub, kinds[kind](), batch_size=3) as client, warnings.catch_warnings():
        warnings.simplefilter("ignore", RerankCacheWarning)
        responses = at_once(how, client, asked, door.open_when_reached)
    assert [pairs(response.results) for response in responses] == list(map(expected, asked))
    assert max(sent(stub).values()) <= (1 if kind == "dict" else 12)


@pytest.fixture
def _eager_threads() -> Iterator[None]:
    """Let threads take turns as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("_eager_threads")
def test_no_score_is_learnt_between_a_look_and_a_claim(stub: Stub) -> None:
    """A call that looks for a score while another is about to learn it does not send the pair again."""
    door, looked = Door(stub), threading.Event()

    class Slow(dict[str, float]):
        def get(self, key: str, default: Any = None) -> Any:
            found = super().get(key, default)
            if looked.is_set():
                looked.clear()
                door.open()
                time.sleep(0.05)  # the other call's reply arrives
            return found

    with opened(stub, Slow(), batch_size=5_000) as client, ThreadPoolExecutor(1) as threads:
        first = threads.submit(client.rerank, "q", ["a"])
        assert soon(lambda: stub.received)
        looked.set()
        texts = ["a", *(f"text {number}" for number in range(3_000))]
        assert pairs(client.rerank("q", texts).results) == expected(texts)
        first.result()
    assert set(sent(stub).values()) == {1}


@HOW
def test_after_a_failure_the_others_go_on(how: str, stub: Stub) -> None:
    """When the call that asks for a pair fails, the calls that wait for it ask by themselves."""
    script = iter([error("no", 500)])
    door = Door(stub, lambda request: next(script, None) or scored(request))
    with opened(stub, {}, max_retries=0) as client:
        outcomes = at_once(how, client, [TEXTS] * 6, door.open_when_reached)
    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["RerankResponse"] * 5 + ["ServerError"]
    assert {str(pairs(outcome.results)) for outcome in outcomes if isinstance(outcome, RerankResponse)} == {
        str(EXPECTED)
    }


@HOW
def test_failing_calls_do_not_queue(how: str, stub: Stub) -> None:
    """While the service fails, calls that have waited for another fail side by side, not one after the other."""
    door = Door(stub, lambda _: Reply(error("no", 500).body, 500, delay=0.1))
    with opened(stub, {}, max_retries=0) as client:
        outcomes = at_once(how, client, [TEXTS] * 6, door.open_when_reached)
    assert set(map(type, outcomes)) == {ServerError}
    assert len(stub.received) == 6
    assert stub.most_at_once >= 4


def test_after_a_cancelled_call_the_others_go_on(stub: Stub) -> None:
    """A cancelled task takes its claim with it, and a cancelled waiter takes nothing from anybody."""
    door = Door(stub)

    async def run(client: RegoloClient) -> list[Any]:
        first, second, third = (asyncio.create_task(client.arerank("q", TEXTS)) for _ in range(3))
        assert await asyncio.to_thread(soon, lambda: stub.received)
        second.cancel()
        await asyncio.wait([second])
        first.cancel()
        await asyncio.wait([first])
        door.open()
        return pairs((await third).results)

    with opened(stub, {}) as client:
        assert asyncio.run(run(client)) == EXPECTED
    assert sent(stub) == dict.fromkeys(TEXTS, 2)


def test_after_ctrl_c_the_others_go_on() -> None:
    """A call that Ctrl-C ends leaves its pairs to others."""
    asked, waiting = threading.Event(), threading.Event()

    def scorer(_: str, documents: list[str]) -> list[float]:
        if threading.current_thread() is threading.main_thread():
            asked.set()
            waiting.wait(5)
            time.sleep(0.02)
            raise KeyboardInterrupt
        return [0.5] * len(documents)

    def other() -> list[tuple[int, float]]:
        asked.wait(5)
        waiting.set()
        return pairs(client.rerank("q", ["a"]).results)

    client = RegoloClient(base_url="local://", scorer=scorer, cache={})
    with ThreadPoolExecutor(1) as threads:
        second = threads.submit(other)
        with pytest.raises(KeyboardInterrupt):
            client.rerank("q", ["a"])
        assert second.result(10) == [(0, 0.5)]


def test_a_sync_call_does_not_wait_for_its_own_event_loop(stub: Stub) -> None:
    """A sync call that blocks the loop whose task asks for the same pair asks by itself, at once."""
    door = Door(stub)

    async def run(client: RegoloClient) -> None:
        task = asyncio.create_task(client.arerank("q", TEXTS))
        assert await asyncio.to_thread(soon, lambda: stub.received)
        door.open()
        started = time.monotonic()
        assert pairs(client.rerank("q", TEXTS).results) == EXPECTED
        assert time.monotonic() - started < 30
        assert pairs((await task).results) == EXPECTED

    with opened(stub, {}, max_retry_seconds=60.0) as client:
        asyncio.run(run(client))
    assert sent(stub) == dict.fromkeys(TEXTS, 2)


def test_a_wait_is_bounded(rank: Rank, stub: Stub) -> None:
    """A call waits for others no longer than max_retry_seconds in all, however often other calls end meanwhile."""
    door, done = threading.Event(), threading.Event()

    def answer(request: Received) -> Reply:
        if "a" in request.documents and len(stub.received) == 1:
            door.wait(10)
        return scored(request)

    stub.reply = answer

    def others() -> None:
        for number in range(1_000):
            client.rerank("q", [f"text {number}"])
            if done.wait(0.02):
                return

    with opened(stub, {}, max_retry_seconds=0.2) as client, ThreadPoolExecutor(2) as threads:
        first = threads.submit(client.rerank, "q", ["a"])
        assert soon(lambda: stub.received)
        busy = threads.submit(others)
        try:
            with closing(opened(stub, client.cache, max_retry_seconds=0.2)) as second:
                assert pairs(rank(second, "q", ["a", "b"]).results) == expected(["a", "b"])
            assert not first.done()
        finally:
            door.set()
            done.set()
        first.result()
        busy.result()


# Many queries.


def many(mode: str, client: RegoloClient, source: list[tuple[str, list[str]]], **arguments: Any) -> list[Any]:
    """Return the outcomes of `rerank_many`, of `arerank_many`, or of the former in a running event loop."""
    if mode == "sync":
        return list(client.rerank_many(source, **arguments))

    async def run() -> list[Any]:
        if mode == "sync in a loop":
            return list(client.rerank_many(source, **arguments))
        return [outcome async for outcome in client.arerank_many(source, **arguments)]

    return asyncio.run(run())


MANY = pytest.mark.parametrize("mode", ["sync", "async", "sync in a loop"])


@MANY
@pytest.mark.parametrize("workers", [1, 3])
def test_repeated_queries_are_sent_once(mode: str, stub: Stub, workers: int) -> None:
    """A file of queries with repetitions, near and far, costs each pair once, with any number of workers."""
    source = [("q", TEXTS), ("q", TEXTS[1:]), ("other", TEXTS), ("q", TEXTS), ("other", TEXTS[::-1])] * 5
    stub.reply = lambda request: Reply(scored(request).body, delay=0.005)
    with opened(stub, {}) as client:
        responses = many(mode, client, source, max_concurrency=workers)
    assert [pairs(response.results) for response in responses] == [expected(texts) for _, texts in source]
    assert sent(stub) == dict.fromkeys(TEXTS, 2)
    assert len(stub.received) == 2


@MANY
def test_many_queries_that_fail_leave_the_rest_known(mode: str, stub: Stub) -> None:
    """With return_exceptions, a query that fails is asked again by its repetition, and all others are known."""
    failures = iter([error("no", 400)])
    stub.reply = lambda request: (next(failures, None) if "b" in request.documents else None) or scored(request)
    with opened(stub, {}) as client:
        source = [("q", ["a"]), ("q", ["b"]), ("q", ["c"]), ("q", ["b"]), ("q", ["a"])]
        outcomes = many(mode, client, source, return_exceptions=True)
        assert [type(outcome).__name__ == "RerankResponse" for outcome in outcomes] == [True, False, True, True, True]
        assert all(response.usage.requests == 0 for response in many(mode, client, source))
    assert sent(stub) == {"a": 1, "b": 2, "c": 1}


@pytest.mark.parametrize("end", [None, ZeroDivisionError])
def test_what_was_read_ahead_is_given_up(mode: str, stub: Stub, end: type[Exception] | None) -> None:
    """A loop over many queries that ends early holds no pair back, and what came back by then is known."""
    source = [("q", [f"text {number}"]) for number in range(40)]

    def leave() -> None:
        if end is not None:
            raise end

    def run() -> None:
        with closing(client.rerank_many(source)) as ranked:
            next(ranked)
            leave()

    async def arun() -> None:
        async with aclosing(client.arerank_many(source)) as ranked:
            await anext(ranked)
            leave()

    with opened(stub, {}) as client:
        with suppress(ZeroDivisionError):
            run() if mode == "sync" else asyncio.run(arun())
        assert not cache._claims.held
        requests = [response.usage.requests for response in many(mode, client, source)]
    assert requests[0] == 0
    assert requests[20:] == [1] * 20  # at most 16 are read ahead


@pytest.mark.parametrize("first", ["known", "empty"])
def test_a_single_worker_outlasts_what_sends_nothing(mode: str, stub: Stub, first: str) -> None:
    """A query without requests does not count as a worker's end: the next one may be refused as one too many."""
    with opened(stub, {}) as client:
        client.rerank("q", ["a"])
        stub.script(error("Limit type: max_parallel_requests", 429))
        source = [("q", ["a"] if first == "known" else []), ("q", ["b"])]
        responses = many(mode, client, source, max_concurrency=1)
    assert [response.usage.requests for response in responses] == [0, 2]


# What is left behind.


@pytest.mark.parametrize("workers", [1, 3])
def test_a_failed_call_keeps_what_it_has_learnt(rank: Rank, stub: Stub, workers: int) -> None:
    """Batches that came back good before another failed are not paid for again."""
    refused = Reply(error("no", 400).body, 400, delay=0.2)
    stub.reply = lambda request: refused if "c" in request.documents else scored(request)
    with opened(stub, {}, batch_size=1, max_concurrency=workers) as client:
        with pytest.raises(BadRequestError):
            rank(client, "q", ["a", "b", "c"])
        stub.reply = scored
        assert rank(client, "q", ["a", "b", "c"]).usage.requests == 1


def test_a_mapping_is_used_in_the_callers_thread_only(stub: Stub) -> None:
    """What a thread of a failed call receives late is not written behind the caller's back."""
    users: set[threading.Thread] = set()
    answered = threading.Event()

    class Watched(dict[str, float]):
        def get(self, key: str, default: Any = None) -> Any:
            users.add(threading.current_thread())
            return super().get(key, default)

        def __setitem__(self, key: str, score: float) -> None:
            users.add(threading.current_thread())
            super().__setitem__(key, score)

    def answer(request: Received) -> Reply:
        assert soon(lambda: len(stub.received) == 3)
        if "b" in request.documents:
            answered.wait(10)
        return error("no", 400) if "a" in request.documents else scored(request)

    stub.reply = answer
    known = Watched()
    with opened(stub, known, batch_size=1) as client:
        with pytest.raises(BadRequestError):
            client.rerank("q", ["a", "b", "c"])
        before = len(known)
        answered.set()
        assert soon(lambda: not [thread for thread in threading.enumerate() if thread.name == "regolo_rerank"])
    assert users == {threading.current_thread()}
    assert len(known) == before


def test_a_refused_call_claims_nothing(rank: Rank, stub: Stub) -> None:
    """A call that may not be sent holds its pairs from nobody."""
    with opened(stub, {}, base_url="http://example.com") as client:
        with pytest.raises(InvalidInputError, match="plain http"):
            rank(client, "q", TEXTS)
        assert not cache._claims.held


def test_a_forked_process_waits_for_nobody(stub: Stub) -> None:
    """A child inherits neither the claims nor the lock of its parent's threads."""
    door = Door(stub)
    locked, unlock = threading.Event(), threading.Event()

    class Held(dict[str, float]):
        def get(self, key: str, default: Any = None) -> Any:
            if threading.current_thread().name == "holds":
                locked.set()
                unlock.wait(10)
            return super().get(key, default)

    with opened(stub, Held(), max_retry_seconds=60.0) as client:
        claims = threading.Thread(target=client.rerank, args=("q", TEXTS))
        claims.start()
        assert soon(lambda: stub.received)
        holds = threading.Thread(target=client.rerank, args=("q", ["other"]), name="holds")
        holds.start()
        assert locked.wait(5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # fork beside threads is what this is about
            child = multiprocessing.get_context("fork").Process(target=client.rerank, args=("q", TEXTS))
            child.start()
        came = soon(lambda: len(stub.received) == 2)
        door.open()
        unlock.set()
        child.join(10)
        child.kill()
        assert came
        assert child.exitcode == 0
        claims.join()
        holds.join()


SCRIPT = """
import sys
from diskcache import Cache
from regolo_rerank import RegoloClient

with Cache(sys.argv[1]) as known, RegoloClient("k", base_url=sys.argv[2], cache=known, batch_size=5) as client:
    response = client.rerank("q", [f"text {number}" for number in range(40)])
    print([(result.index, result.relevance_score) for result in response.results])
"""


def test_processes_share_a_cache_on_disk(stub: Stub, tmp_path: Path) -> None:
    """Two processes at once use one diskcache, and each has the same ranking as without."""
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), stub.url]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]  # noqa: S603 - our own
    printed = [process.communicate(timeout=30)[0] for process in running]
    with RegoloClient(KEY, base_url=stub.url) as client:
        ranking = pairs(client.rerank("q", [f"text {number}" for number in range(40)]).results)
    assert [json.loads(text.replace("(", "[").replace(")", "]")) for text in printed] == [
        [list(pair) for pair in ranking]
    ] * 2
    with Cache(str(tmp_path)) as known:
        assert len(known) == 40


CELLS = [
    """from diskcache import Cache
from regolo_rerank import RegoloClient

texts = [f"text {number}" for number in range(5)]
client = RegoloClient(cache=Cache("scores"))""",
    'client.rerank("q", texts).results',
    '(await client.arerank("r", texts)).results',
    '[response.results for response in client.rerank_many([("s", texts), ("s", texts)])]',
]


def test_a_notebook_that_runs_twice_sends_nothing_the_second_time(
    stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In two kernels, one after the other, every cell shows the same, and only the first kernel sends anything."""
    write_kernel_spec(tmp_path / "kernels" / "python3")
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("REGOLO_API_KEY", KEY)
    monkeypatch.setenv("REGOLO_BASE_URL", stub.url)
    new: Any = nbformat.v4
    shown, received = [], []
    for _ in range(2):
        notebook = new.new_notebook(cells=[new.new_code_cell(cell) for cell in CELLS])
        NotebookClient(notebook, resources={"metadata": {"path": str(tmp_path)}}).execute()
        shown.append([cell.outputs for cell in notebook.cells])
        received.append(len(stub.received))
    assert received == [3, 3]
    assert shown[0] == shown[1]
    assert all(shown[0][1:])
