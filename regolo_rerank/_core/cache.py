"""Scores that are known already, in the caller's own mapping.

A pair's score depends on nothing but the pair, so it can be kept: by endpoint, model, query and document. Calls that
are under way at the same time send a pair once: the later call waits for the earlier one, and takes its score.
"""

import asyncio
import hashlib
import json
import logging
import os
import sys
import threading
import uuid
import warnings
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, Final
from weakref import WeakValueDictionary

from regolo_rerank.errors import RerankCacheWarning

__all__ = ["KnownScores", "identity"]

Name = tuple[int, str]
"""A pair in a mapping: the mapping's id and the key."""

_log = logging.getLogger("regolo_rerank")


class _Claims:
    """The pairs that calls of this process are just asking for, and who asks."""

    def __init__(self) -> None:
        # Mappings such as cachetools' are not made for threads.
        self.lock = threading.RLock()
        self.held: dict[Name, KnownScores] = {}


_claims = _Claims()
_scorers: Final[WeakValueDictionary[str, Callable[..., Any]]] = WeakValueDictionary()


def identity(scorer: Callable[..., Any] | None) -> str:
    """Return a name for a scorer that no other has: two functions of one name may score differently."""
    if scorer is None:
        return ""
    with _claims.lock:
        name = next((name for name, known in _scorers.items() if known is scorer), uuid.uuid4().hex)
        with suppress(TypeError):  # it takes no weak reference, so it cannot be recognised
            _scorers[name] = scorer
    return name


class KnownScores:
    """The scores of one call in the caller's mapping, which is used in the caller's thread or event loop only.

    Args:
        mapping: The caller's mapping.
        *parts: What a score depends on besides the document, as JSON; keys hold a digest of it and no text.

    Attributes:
        ended: Done when the call has learnt all that it will learn.
        learnt: The scores that the call has learnt, by pair.
        loop: The event loop of an async call.
    """

    def __init__(self, mapping: MutableMapping[str, float], *parts: Any) -> None:
        self.ended: Future[None] = Future()
        self.learnt: dict[Name, float] = {}
        self.loop: asyncio.AbstractEventLoop | None = None
        self._mapping = mapping
        self._digest = hashlib.blake2b(json.dumps(parts).encode(), digest_size=32)
        self._names: dict[str, Name] = {}
        self._claimed: set[Name] = set()
        self._awaited: dict[Name, KnownScores] = {}
        self._settled = False
        self._works = True

    def claim(
        self, texts: Iterable[str], loop: asyncio.AbstractEventLoop | None = None
    ) -> dict[str, float] | Future[None]:
        """Return the known scores, and take it on to ask for the others.

        Args:
            texts: The documents' texts.
            loop: The event loop of an async call.

        Returns:
            The scores by text; or else what ends when another call has ended, which asks for one of the texts: then
            this call should look again. No pair is waited for twice.
        """
        self.loop = loop
        with _claims.lock:  # between a look and a claim, another call could learn a score and end
            self._names = self._names or {text: self._name(text) for text in texts}
            known = self._look_up(self._names.values())
            unknown = set(self._names.values()) - known.keys()
            for name in unknown - self._awaited.keys():
                other = _claims.held.get(name)
                if other is not None and not self._blocks(other):
                    self._awaited |= {name: other for name in unknown if _claims.held.get(name) is other}
                    return other.ended
            self._claimed = unknown
            _claims.held.update(dict.fromkeys(unknown, self))
        return {text: known[name] for text, name in self._names.items() if name in known}

    def learn(self, scores: Mapping[str, float]) -> None:
        """Take in scores by text, for this and other calls."""
        with _claims.lock:
            self.learnt |= {self._names[text]: score for text, score in scores.items()}

    def end(self) -> None:
        """Let other calls go on, in any thread."""
        with _claims.lock:
            if not self.ended.done():
                self.ended.set_result(None)

    def settle(self) -> None:
        """Keep what was learnt for later calls, and let others ask for the rest."""
        with _claims.lock:
            if self._settled:
                return
            self._settled = True
            try:
                self._keep()
            finally:
                for name in self._claimed:
                    if _claims.held.get(name) is self:
                        del _claims.held[name]

    def _look_up(self, names: Iterable[Name]) -> dict[Name, float]:
        known: dict[Name, float] = {}

        def read() -> None:
            for name in names:
                score: Any = self._mapping.get(name[1])
                # Whatever is no finite number is unknown.
                number = isinstance(score, int | float) and not isinstance(score, bool)
                if number and abs(score) <= sys.float_info.max:
                    known[name] = float(score)

        self._try(read, "read")
        for name in names:
            other = self._awaited.get(name) or _claims.held.get(name)
            if name not in known and other is not None and name in other.learnt:
                known[name] = other.learnt[name]
        return known

    def _keep(self) -> None:
        def write() -> None:
            for (_, key), score in self.learnt.items():
                self._mapping[key] = score

        if self.learnt:
            self._try(write, "written")

    def _blocks(self, other: "KnownScores") -> bool:
        """Return whether another call cannot go on while this one waits: an async one, in the thread of a sync one."""
        if self.loop is not None:
            return False
        try:
            return asyncio.get_running_loop() is other.loop
        except RuntimeError:
            return False

    def _name(self, text: str) -> Name:
        digest = self._digest.copy()
        digest.update(text.encode("utf-8", "surrogatepass"))
        return id(self._mapping), digest.hexdigest()

    def _try(self, use: Callable[[], None], what: str) -> None:
        """Use the mapping, or do without it for the rest of the call where it fails."""
        if not self._works:
            return
        try:
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
