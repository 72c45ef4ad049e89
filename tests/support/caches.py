"""Calls with a cache, and what is known of their pairs."""

import time
from collections import Counter
from collections.abc import MutableMapping
from itertools import chain
from typing import Any

from regolo_rerank import RegoloClient
from tests.conftest import KEY
from tests.support.stub import Stub, score

Mapping = MutableMapping[str, float]
TEXTS = ["a score=0.2", "b score=0.9", "c score=0.5", "d score=0.9"]
EXPECTED = [(1, 0.9), (3, 0.9), (2, 0.5), (0, 0.2)]


def opened(stub: Stub, known: Mapping | None, **options: Any) -> RegoloClient:
    """Return a client with a cache, which sends texts as they are."""
    return RegoloClient(**{"api_key": KEY, "base_url": stub.url, "prompt_format": "plain", "cache": known, **options})


def sent(stub: Stub) -> Counter[str]:
    """Return how often each text was sent."""
    return Counter(chain(*stub.documents))


def expected(texts: list[str]) -> list[tuple[int, float]]:
    """Return the ranking of distinct texts."""
    return sorted(((index, score(text)) for index, text in enumerate(texts)), key=lambda pair: -pair[1])


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
