"""Scores that are known already, in the caller's own mapping.

A pair's score depends on nothing but the pair, so it can be kept: by endpoint, model, query and document. Calls that
are under way at the same time send a pair once: the later call waits for the earlier one, and finds its score.
"""

import hashlib
import json
import logging
import math
import os
import threading
import uuid
import warnings
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from concurrent.futures import Future
from typing import Any, Final
from weakref import WeakKeyDictionary

from regolo_rerank.errors import RerankCacheWarning

__all__ = ["KnownScores", "identity"]

_log = logging.getLogger("regolo_rerank")


class _Claims:
    """The pairs that calls of this process are just asking for, by cache."""

    def __init__(self) -> None:
        # Mappings such as cachetools' are not made for threads.
        self.lock = threading.RLock()
        self.held: set[tuple[int, str]] = set()
        self.changed: Future[None] = Future()


_claims = _Claims()
_scorers: Final[WeakKeyDictionary[Callable[..., Any], str]] = WeakKeyDictionary()


def identity(scorer: Callable[..., Any] | None) -> str:
    """Return a name for a scorer that no other has: two functions of one name may score differently."""
    if scorer is None:
        return ""
    try:
        return _scorers.setdefault(scorer, uuid.uuid4().hex)
    except TypeError:  # it cannot be hashed, so it cannot be recognised either
        return uuid.uuid4().hex


class KnownScores:
    """The scores of one query's documents in the caller's mapping.

    Args:
        mapping: The caller's mapping.
        *parts: What a score depends on besides the document, as JSON; keys hold a digest of it and no text.
    """

    def __init__(self, mapping: MutableMapping[str, float], *parts: Any) -> None:
        self._mapping = mapping
        self._digest = hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=32)
        self._claimed: set[tuple[int, str]] = set()
        self._works = True

    def look_up(self, texts: Iterable[str]) -> dict[str, float]:
        """Return the known scores; whatever is no finite number is unknown."""
        known: dict[str, float] = {}

        def read() -> None:
            for text in texts:
                score = self._mapping.get(self._key(text))
                if isinstance(score, int | float) and not isinstance(score, bool) and math.isfinite(score):
                    known[text] = float(score)

        self._try(read, "read")
        return known

    def keep(self, scores: Mapping[str, float]) -> None:
        """Keep scores for later calls."""

        def write() -> None:
            for text, score in scores.items():
                self._mapping[self._key(text)] = score

        self._try(write, "written")

    def claim(self, texts: Iterable[str]) -> Future[None] | None:
        """Take it on to ask for texts, or return what ends when another call that asks for one of them has ended."""
        wanted = {(id(self._mapping), self._key(text)) for text in texts}
        with _claims.lock:
            if not _claims.held.isdisjoint(wanted):
                return _claims.changed
            _claims.held |= wanted
            self._claimed = wanted
        return None

    def release(self) -> None:
        """Let other calls ask for what was claimed."""
        if not self._claimed:
            return
        with _claims.lock:
            _claims.held -= self._claimed
            self._claimed = set()
            changed, _claims.changed = _claims.changed, Future()
        changed.set_result(None)

    def _key(self, text: str) -> str:
        digest = self._digest.copy()
        digest.update(text.encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    def _try(self, use: Callable[[], None], what: str) -> None:
        """Use the mapping, or do without it for the rest of the call where it fails."""
        if not self._works:
            return
        try:
            with _claims.lock:
                use()
        except Exception as error:  # noqa: BLE001 - it is the caller's mapping, and may raise anything
            self._works = False
            words = f"the cache cannot be {what}, so this call goes on without it: {type(error).__name__}: {error}"
            _log.warning(words)
            warnings.warn(words, RerankCacheWarning, stacklevel=2)


def _forked() -> None:
    # Calls of the parent's other threads do not go on here.
    _claims.__init__()  # type: ignore[misc]  # in place, since others hold it


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
