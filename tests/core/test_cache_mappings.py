import copy
import logging
import math
import pickle
import shelve
import sqlite3
import types
from collections import UserDict
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from typing import Any

import pytest
from cachetools import LRUCache, TTLCache

from regolo_rerank import RegoloClient, RerankCacheWarning
from tests.conftest import KEY, Rank
from tests.support.caches import EXPECTED, TEXTS, Failing, Mapping, expected, opened, sent
from tests.support.stores import opened_redis, opened_sqlite
from tests.support.stub import Stub, pairs

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


MAPPINGS: dict[str, Callable[[Path], AbstractContextManager[Any]]] = {
    "dict": lambda _: nullcontext({}),
    "UserDict": lambda _: nullcontext(UserDict()),
    "LRUCache": lambda _: nullcontext(LRUCache(100)),
    "TTLCache": lambda _: nullcontext(TTLCache(100, 60)),
    "shelve": lambda folder: shelve.open(str(folder / "scores")),  # noqa: S301, SIM115 - our own file, which is closed below
    "one thread": lambda _: closing(Table()),
    "SQLite": lambda folder: opened_sqlite(folder / "scores"),
    "RedisDict": lambda _: opened_redis("fakeredis"),
    "RedisDict on redis-server": lambda _: opened_redis("redis-server"),
}


@pytest.mark.parametrize("kind", MAPPINGS)
def test_any_mapping_will_do(rank: Rank, stub: Stub, tmp_path: Path, kind: str) -> None:
    """In memory, on disk, in Redis, or in the caller's thread only: all pairs of several batches are kept."""
    with MAPPINGS[kind](tmp_path) as known, opened(stub, known, batch_size=1) as client:
        for requests in (4, 0):
            response = rank(client, "q", TEXTS)
            assert (pairs(response.results), response.usage.requests) == (EXPECTED, requests)
        assert len(known) == 4


@pytest.mark.parametrize("kind", ["SQLite", "RedisDict", "RedisDict on redis-server"])
@pytest.mark.parametrize("score", [0.1, 1 / 3, 1e-300, 5e-324, 1.7976931348623157e308, 0.0, -1.0], ids=repr)
def test_a_recommended_store_keeps_floats_as_they_are(tmp_path: Path, kind: str, score: float) -> None:
    """What comes back is the same float to the last bit, and nothing where nothing was kept or it was deleted."""
    with MAPPINGS[kind](tmp_path) as known:
        known["a"] = 0.5
        known["a"] = score
        assert (known["a"], type(known["a"])) == (score, float)
        assert known.get("b") is None
        assert list(known) == ["a"]
        del known["a"]
        assert (len(known), "a" in known) == (0, False)


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
            assert caplog.messages == [f"regolo_rerank: {said}"] * count
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
