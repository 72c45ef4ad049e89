"""Cached scores: the caller's mapping as one query sees it, and a mapping in an SQLite file.

A score depends only on the query, the document and the model, so it can be kept. The client reads the mapping before it
sends a request and writes it when the call has ended, both in the caller's thread or event loop.
"""

import hashlib
import json
import math
import os
import sqlite3
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import Any

from regolo_rerank.errors import RerankCacheWarning, warn

__all__ = ["QueryCache", "SQLiteCache"]


class SQLiteCache(MutableMapping[str, float]):
    """A mapping from strings to floats in an SQLite file, for the option `cache`.

    Threads and processes of one machine may share the file. The last scores may be lost if the power fails. The file
    stays intact. Keep it on a local disk: SQLite's locks do not work on network drives.

    Args:
        path: The file. It is created if it does not exist.

    Raises:
        sqlite3.Error: The file cannot be opened, or is not an SQLite database.

    Examples:
        >>> cache = SQLiteCache(":memory:")
        >>> cache["key"] = 0.5
        >>> cache["key"], len(cache)
        (0.5, 1)
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._connect()

    def _connect(self) -> None:
        self._lock = threading.Lock()
        self._database = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
        self._pid = os.getpid()
        weakref.finalize(self, self._database.close)
        self._execute("PRAGMA journal_mode = WAL")
        self._execute("PRAGMA synchronous = NORMAL")
        self._execute("CREATE TABLE IF NOT EXISTS scores (key TEXT PRIMARY KEY, score REAL) WITHOUT ROWID")

    def _execute(self, statement: str, *values: Any) -> list[Any]:
        if self._pid != os.getpid():  # SQLite allows no use of a parent's connection after a fork
            self._connect()
        with self._lock:
            return self._database.execute(statement, values).fetchall()

    def __getitem__(self, key: str) -> float:
        for (score,) in self._execute("SELECT score FROM scores WHERE key = ?", key):
            return float(score)
        raise KeyError(key)

    def __setitem__(self, key: str, score: float) -> None:
        self._execute("REPLACE INTO scores VALUES (?, ?)", key, score)

    def __delitem__(self, key: str) -> None:
        if not self._execute("DELETE FROM scores WHERE key = ? RETURNING key", key):
            raise KeyError(key)

    def __iter__(self) -> Iterator[str]:
        return (key for (key,) in self._execute("SELECT key FROM scores"))

    def __len__(self) -> int:
        count: int = self._execute("SELECT count(*) FROM scores")[0][0]
        return count

    def close(self) -> None:
        """Close the file."""
        self._database.close()


class QueryCache:
    """The scores of one query in the caller's mapping. A mapping that fails is not used again for this query.

    Args:
        mapping: The caller's mapping.
        lock: Held while the mapping is used: mappings such as cachetools' are not thread-safe.
        *parts: Everything except the document that a score depends on, as JSON. Keys contain a digest of it, no text.
    """

    def __init__(self, mapping: MutableMapping[str, float], lock: threading.Lock, *parts: Any) -> None:
        self._mapping = mapping
        self._lock = lock
        self._digest = hashlib.blake2b(json.dumps(parts).encode(), digest_size=32)
        self._works = True

    def read(self, texts: Iterable[str]) -> dict[str, float]:
        """Return the known scores by text."""
        known: dict[str, float] = {}

        def read() -> None:
            for text in texts:
                score: Any = self._mapping.get(self._key(text))
                if isinstance(score, int | float) and not isinstance(score, bool) and math.isfinite(score):
                    known[text] = float(score)

        self._use(read, "read")
        return known

    def write(self, scores: Mapping[str, float]) -> None:
        """Keep scores by text."""

        def write() -> None:
            for text, score in scores.items():
                self._mapping[self._key(text)] = score

        self._use(write, "written")

    def _key(self, text: str) -> str:
        digest = self._digest.copy()
        digest.update(text.encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    def _use(self, action: Callable[[], None], what: str) -> None:
        if not self._works:
            return
        try:
            with self._lock:
                action()
        except Exception as error:  # noqa: BLE001 - the caller's mapping may raise anything
            self._works = False
            warn(
                f"the cache cannot be {what}, and this call continues without it: {type(error).__name__}: {error}",
                RerankCacheWarning,
            )
