import math
import multiprocessing
import sqlite3
import threading
import warnings
from collections import UserDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from cachetools import LRUCache

from regolo_rerank import RegoloClient, RerankCacheWarning, SQLiteCache
from regolo_rerank.cache import QueryCache

SCORES = {"a": 0.1, "b": -2.0, "": 0.0, "c\ud800": 1e-300}


def cache_of(mapping: Any, *parts: Any) -> QueryCache:
    """Return the scores of a query in a mapping."""
    return QueryCache(mapping, threading.Lock(), *parts)


@pytest.mark.parametrize("make", [dict, UserDict, lambda: LRUCache(100), lambda: SQLiteCache(":memory:")])
def test_any_mapping_keeps_scores(make: Callable[[], Any]) -> None:
    """What was written is read again to the last bit, and texts without a score are left out."""
    mapping = make()
    cache_of(mapping, "q").write(SCORES)
    assert cache_of(mapping, "q").read([*SCORES, "unknown"]) == SCORES
    assert cache_of(mapping, "other").read(SCORES) == {}
    assert len(mapping) == len(SCORES)


def test_keys_are_digests() -> None:
    """Keys have one length and contain neither texts nor the query; equal parts and texts have equal keys only."""
    mapping: dict[str, float] = {}
    for parts in [("ab",), ("a", "b"), ("a", ["b"]), ('a", "b',), ("",), ()]:
        for text in ("c", "bc", '"', "", "secret " * 1_000):
            cache_of(mapping, *parts).write({text: 0.5})
    assert len(mapping) == 6 * 5
    assert all(len(key) == 64 and set(key) <= set("0123456789abcdef") for key in mapping)


@pytest.mark.parametrize("entry", [None, "x", math.nan, math.inf, -math.inf, True, [0.5]], ids=repr)
def test_a_broken_entry_is_unknown(entry: Any) -> None:
    """Only finite numbers are scores."""
    mapping: dict[str, Any] = {}
    cache = cache_of(mapping, "q")
    cache.write({"a": 1.0, "b": 2.0})
    mapping[next(iter(mapping))] = entry
    assert cache.read(["a", "b"]) == {"b": 2.0}
    mapping[next(iter(mapping))] = 1  # a store may return 1 for 1.0
    assert list(map(type, cache.read(["a"]).values())) == [float]


class Failing(UserDict[str, float]):
    """Fails after some uses."""

    def __init__(self, uses: int) -> None:
        super().__init__()
        self.uses = uses

    def get(self, key: str, default: Any = None) -> Any:
        self._use()
        return super().get(key, default)

    def __setitem__(self, key: str, value: float) -> None:
        self._use()
        super().__setitem__(key, value)

    def _use(self) -> None:
        self.uses -= 1
        if self.uses < 0:
            raise OSError("disk full")


@pytest.mark.parametrize(
    ("uses", "known", "what"), [(0, {}, "read"), (1, {"a": 1.0}, "read"), (2, {"a": 1.0}, "written")]
)
def test_a_mapping_that_fails_is_a_warning(uses: int, known: dict[str, float], what: str) -> None:
    """It is not used again for this query, and the scores that were read before still count."""
    mapping = Failing(99)
    cache_of(mapping, "q").write({"a": 1.0})
    mapping.uses = uses
    cache = cache_of(mapping, "q")
    with warnings.catch_warnings(record=True, action="always", category=RerankCacheWarning) as caught:
        assert cache.read(["a", "b"]) == known
        cache.write({"c": 3.0})
        mapping.uses = 99
        cache.write({"d": 4.0})
        assert cache.read(["a"]) == {}
    assert [str(warning.message) for warning in caught] == [
        f"the cache cannot be {what}, and this call continues without it: OSError: disk full"
    ]
    assert len(mapping) == 1


def test_one_thread_at_a_time_uses_a_mapping() -> None:
    """Mappings such as cachetools' are not thread-safe, so a client's calls take turns."""
    inside: list[int] = []

    class Watched(UserDict[str, float]):
        def __setitem__(self, key: str, value: float) -> None:
            inside.append(1)
            assert len(inside) == 1
            super().__setitem__(key, value)
            inside.pop()

    mapping, lock = Watched(), threading.Lock()
    with warnings.catch_warnings(action="error"), ThreadPoolExecutor(8) as threads:
        caches = [QueryCache(mapping, lock, number) for number in range(8)]
        list(threads.map(lambda cache: cache.write(dict.fromkeys(map(str, range(50)), 0.5)), caches))
    assert len(mapping) == 400


# --- what a score depends on ------------------------------------------------------------------------------------------


def requests_for(client: RegoloClient, query: str = "q", text: str = "a b") -> int:
    """Return how many requests a call of a client sends."""
    return client.rerank(query, [text]).usage.requests


@pytest.mark.parametrize(
    ("changed", "requests"),
    [
        ({"model": "other"}, 1),
        ({"instruction": "other"}, 1),
        ({"extra_body": {"truncate": 5}}, 1),
        ({"prompt_format": "documented"}, 1),
        ({"prompt_format": "server_template"}, 1),
        ({"max_document_chars": 1}, 1),
        ({"api_key": "sk-other"}, 0),
        ({"top_n": 1}, 0),
        ({"score_threshold": 0.5}, 0),
        ({"batch_size": 1}, 0),
        ({"timeout": 5.0}, 0),
        ({"default_headers": {"x-tag": "a"}}, 0),
    ],
    ids=str,
)
def test_a_score_is_for_what_the_model_sees(changed: dict[str, Any], requests: int) -> None:
    """Another model, query or document string is another pair; whose key, how many and how fast is not."""
    client = RegoloClient(base_url="local://", prompt_format="tagged", cache={})
    assert [requests_for(client) for _ in range(2)] == [1, 0]
    assert requests_for(client, query="other") == 1
    other = client.with_options(**changed)
    assert [requests_for(other) for _ in range(2)] == [requests, 0]
    assert requests_for(client) == 0


# --- SQLite -----------------------------------------------------------------------------------------------------------


def test_sqlite_is_a_mapping(tmp_path: Path) -> None:
    """It keeps floats to the last bit, and what is written is there after it was opened again."""
    path = tmp_path / "scores.db"
    with closing(SQLiteCache(path)) as cache:
        for score in (0.1, 1 / 3, 5e-324, 1.7976931348623157e308, 0.0, -1.0):
            cache["a"] = score
            assert (cache["a"], type(cache["a"])) == (score, float)
        cache["b"] = 1
    with closing(SQLiteCache(str(path))) as cache:
        assert cache.path == str(path)
        assert dict(cache) == {"a": -1.0, "b": 1.0}
        assert ("a" in cache, "c" in cache, cache.get("c"), len(cache)) == (True, False, None, 2)
        del cache["a"]
        assert list(cache) == ["b"]
        for missing in (cache.__getitem__, cache.__delitem__):
            with pytest.raises(KeyError, match="a"):
                missing("a")
        cache.update(dict.fromkeys(map(str, range(2_000)), 0.5))
        for key in cache:  # deleting while iterating is safe
            del cache[key]
        assert len(cache) == 0


def test_sqlite_takes_no_other_file(tmp_path: Path) -> None:
    """A file that is not a database is an error, and stays as it is."""
    path = tmp_path / "notes.txt"
    path.write_text("not a database\n" * 100)
    with pytest.raises(sqlite3.Error):
        SQLiteCache(path)
    assert path.read_text() == "not a database\n" * 100


def test_threads_share_a_file(tmp_path: Path) -> None:
    """Threads may share one object, or open the file once each."""
    shared = SQLiteCache(tmp_path / "scores.db")

    def work(number: int) -> None:
        cache = SQLiteCache(shared.path) if number % 2 else shared
        for key in range(40):
            cache[f"{number}-{key}"] = number + key / 100
            assert cache[f"{number}-{key}"] == number + key / 100
        if cache is not shared:
            cache.close()

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(work, range(8)))
    assert len(shared) == 320
    shared.close()


def write_scores(path: Path, number: int) -> None:
    """Write scores in a process of its own."""
    with closing(SQLiteCache(path)) as cache:
        for key in range(100):
            cache[f"{number}-{key}"] = float(number)


def test_processes_share_a_file(tmp_path: Path) -> None:
    """Several processes open, create and write one file at the same time, and no score is lost."""
    path = tmp_path / "scores.db"
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=write_scores, args=(path, number)) for number in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    with closing(SQLiteCache(path)) as cache:
        assert sorted(cache.values()) == [0.0] * 100 + [1.0] * 100 + [2.0] * 100
