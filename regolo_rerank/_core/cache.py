"""Scores that are known already, in the caller's own mapping.

A document's score does not depend on the other documents, so it can be kept: by endpoint, model, query and document.
The mapping is read before a call sends and written when it has ended, ranked or not, in the caller's thread or event
loop.
"""

import hashlib
import json
import os
import sys
import threading
import uuid
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from contextlib import suppress
from typing import Any, Final
from weakref import finalize

from regolo_rerank.errors import RerankCacheWarning, warn

__all__ = ["ScoreCache", "name_scorer"]

_lock = threading.RLock()
_scorer_names: Final[dict[int, str]] = {}


def name_scorer(scorer: Callable[..., Any] | None) -> str:
    """Return a name for a scorer that no other has: two functions of one name may score differently."""
    if scorer is None:
        return ""
    name = _scorer_names.get(id(scorer))
    if name is None:
        name = uuid.uuid4().hex
        with suppress(TypeError):  # it takes no weak reference, so it cannot be recognised
            finalize(scorer, _scorer_names.pop, id(scorer), None)
            _scorer_names[id(scorer)] = name
    return name


class ScoreCache:
    """The scores of one query in the caller's mapping.

    Args:
        mapping: The caller's mapping.
        *parts: What a score depends on besides the document, as JSON; keys hold a digest of it and no text.
    """

    def __init__(self, mapping: MutableMapping[str, float], *parts: Any) -> None:
        self._mapping = mapping
        self._digest = hashlib.blake2b(json.dumps(parts).encode(), digest_size=32)
        self._keys: dict[str, str] = {}
        self._works = True

    def read(self, texts: Iterable[str]) -> dict[str, float]:
        """Return the scores that are known, by text."""
        self._keys = {text: self._key(text) for text in texts}
        known: dict[str, float] = {}

        def read() -> None:
            for text, key in self._keys.items():
                score: Any = self._mapping.get(key)
                # Whatever is no finite number is unknown.
                number = isinstance(score, int | float) and not isinstance(score, bool)
                if number and abs(score) <= sys.float_info.max:
                    known[text] = float(score)

        self._try(read, "read")
        return known

    def write(self, scores: Mapping[str, float]) -> None:
        """Keep scores by text, of those texts that were looked up."""

        def write() -> None:
            for text, score in scores.items():
                self._mapping[self._keys[text]] = score

        self._try(write, "written")

    def _key(self, text: str) -> str:
        digest = self._digest.copy()
        digest.update(text.encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    def _try(self, use: Callable[[], None], what: str) -> None:
        """Use the mapping, or do without it for the rest of the call where it fails.

        `use` is a function, and no block of a `with`: an interrupt in a context manager would leave the lock locked.
        """
        if not self._works:
            return
        try:
            with _lock:  # mappings such as cachetools' are not made for threads
                use()
        except Exception as error:  # noqa: BLE001 - it is the caller's mapping, and may raise anything
            self._works = False
            words = f"the cache cannot be {what}, so this call goes on without it: {type(error).__name__}: {error}"
            warn(words, RerankCacheWarning)


def _renew_lock() -> None:
    global _lock  # noqa: PLW0603 - another thread of the parent may have held it
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)
