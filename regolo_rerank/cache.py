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
from asyncio import AbstractEventLoop
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Any, Final, NamedTuple
from weakref import ref

from regolo_rerank.errors import RerankCacheWarning

__all__ = ["KnownScores", "identity"]

_log = logging.getLogger("regolo_rerank")


class _Claim(NamedTuple):
    """What a call has taken it on to ask for: when the call has ended, and the event loop that it needs for that."""

    ended: Future[None]
    loop: AbstractEventLoop | None


class _Claims:
    """The pairs that calls of this process are just asking for, by cache."""

    def __init__(self) -> None:
        # Mappings such as cachetools' are not made for threads.
        self.lock = threading.RLock()
        self.held: dict[tuple[int, str], _Claim] = {}


_claims = _Claims()
_scorers: Final[dict[int, tuple[ref[Any], str]]] = {}


def identity(scorer: Callable[..., Any] | None) -> str:
    """Return a name for a scorer that no other has: two functions of one name may score differently."""
    if scorer is None:
        return ""
    known, name = _scorers.get(id(scorer), (None, ""))
    if known is None or known() is not scorer:
        name = uuid.uuid4().hex
        with suppress(TypeError):  # what cannot be referred to weakly is a new one each time
            _scorers[id(scorer)] = ref(scorer, partial(_forget, id(scorer))), name
    return name


def _forget(scorer: int, _: ref[Any]) -> None:
    _scorers.pop(scorer, None)


class KnownScores:
    """The scores of one query's documents in the caller's mapping.

    Args:
        mapping: The caller's mapping.
        *parts: What a score depends on besides the document, as JSON; keys hold a digest of it and no text.
    """

    def __init__(self, mapping: MutableMapping[str, float], *parts: Any) -> None:
        self._mapping = mapping
        # Twice, because sorting wants all keys to be strings, as JSON makes them.
        sent = json.dumps(json.loads(json.dumps(parts)), sort_keys=True)
        self._digest = hashlib.blake2b(sent.encode(), digest_size=32)
        self._claim: _Claim | None = None
        self._claimed: set[tuple[int, str]] = set()
        self._awaited: set[tuple[int, str]] = set()
        self._works = True

    def look_up(self, texts: Iterable[str]) -> dict[str, float]:
        """Return the known scores; whatever is no finite number is unknown."""
        known: dict[str, float] = {}

        def read() -> None:
            for text in texts:
                score = _finite(self._mapping.get(self._key(text)))
                if score is not None:
                    known[text] = score

        self._try(read, "read")
        return known

    def keep(self, scores: Mapping[str, float]) -> None:
        """Keep scores for later calls."""

        def write() -> None:
            for text, score in scores.items():
                self._mapping[self._key(text)] = score

        self._try(write, "written")

    def claim(self, texts: Iterable[str], loop: AbstractEventLoop | None, *, blocking: bool) -> Future[None] | None:
        """Take it on to ask for texts, or return what is done when another call that asks for one of them has ended.

        Args:
            texts: The texts whose scores are not known.
            loop: The event loop that runs in this thread.
            blocking: Whether waiting blocks the thread, and with it every call that needs the loop.
        """
        wanted = {(id(self._mapping), self._key(text)) for text in texts}
        with _claims.lock:
            # Where a call that was awaited has learnt nothing, nobody waits for the next one to fail too.
            if self._awaited.isdisjoint(wanted):
                for pair in wanted:
                    other = _claims.held.get(pair)
                    if other is not None and not (blocking and loop is not None and other.loop is loop):
                        self._awaited = {pair for pair in wanted if _claims.held.get(pair) is other}
                        return other.ended
            self._claim = _Claim(Future(), None if blocking else loop)
            self._claimed = wanted - _claims.held.keys()
            _claims.held.update(dict.fromkeys(self._claimed, self._claim))
        return None

    def release(self) -> None:
        """Let other calls ask for what was claimed."""
        with _claims.lock:
            claim, self._claim = self._claim, None
            for pair in self._claimed:
                _claims.held.pop(pair, None)
            self._claimed = set()
        if claim is not None:
            claim.ended.set_result(None)

    def _key(self, text: str) -> str:
        digest = self._digest.copy()
        digest.update(text.encode("utf-8", "surrogatepass"))
        return digest.hexdigest()

    def _try(self, use: Callable[[], None], what: str) -> None:
        """Use the mapping, or do without it for the rest of the call where it fails."""
        with _claims.lock:
            if not self._works:
                return
            try:
                use()
            except Exception as error:  # noqa: BLE001 - it is the caller's mapping, and may raise anything
                self._works = False
                words = f"the cache cannot be {what}, so this call goes on without it: {type(error).__name__}: {error}"
            else:
                return
        _log.warning(words)
        warnings.warn(words, RerankCacheWarning, stacklevel=2)


def _finite(value: object) -> float | None:
    """Return a score, or None for whatever else a mapping may hold."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        score = float(value)
    except OverflowError:
        return None
    return score if math.isfinite(score) else None


def _forked() -> None:
    # Calls of the parent's other threads do not go on here.
    _claims.__init__()  # type: ignore[misc]  # in place, since others hold it


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
