"""What a call had in its hands is freed with it, without help of the garbage collector."""

import asyncio
import gc
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import httpx
import pytest

from regolo_rerank import RegoloClient, RegoloError
from tests.conftest import KEY
from tests.support.faults import Fault, FaultServer, good, http, sends, stalls
from tests.support.inside import workers
from tests.support.observed import soon

FAULTS: dict[str, list[Fault]] = {
    "at once": [],
    "retried": [sends(http(b"{}", 503, retry_after_ms="0"))],
    "lost and retried": [sends(b"")],
    "refused": [sends(http(b"{}", 400))] * 9,
    "failed": [sends(http(b"{}", 500))] * 9,
    "untrustworthy": [sends(http(b"{}"))] * 9,
    "too slow": [stalls(b"", 5)] * 9,
    "no http": [sends(b"SSH-2.0\r\n\r\n")] * 9,
}
"""What the first requests of a call meet, by what becomes of it."""


class Text(str):
    """A string that can be watched."""

    __slots__ = ("__weakref__",)


@contextmanager
def without_collector() -> Iterator[None]:
    """Leave reference cycles where they are."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.mark.parametrize("faults", FAULTS.values(), ids=FAULTS.keys())
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("callers", [False, True])
def test_a_call_frees_its_documents(mode: str, faults: list[Fault], size: int, *, callers: bool) -> None:
    """Ranked at once, after a retry or not at all: with its end the documents of a call are gone."""
    options: dict[str, Any] = {"batch_size": 1, "max_retries": 1, "timeout": 0.2}

    def watched() -> tuple[list[str], list[weakref.ref[Text]]]:
        texts = [Text(f"{index} score=0.5") for index in range(size)]
        return list(texts), list(map(weakref.ref, texts))

    def called(url: str) -> list[weakref.ref[Text]]:
        texts, seen = watched()
        with httpx.Client(timeout=0.2) as own, suppress(RegoloError):
            RegoloClient(KEY, base_url=url, http_client=own if callers else None, **options).rerank("q", texts)
        return seen

    async def acalled(url: str) -> list[weakref.ref[Text]]:
        texts, seen = watched()
        async with (
            httpx.AsyncClient(timeout=0.2) as own,
            RegoloClient(KEY, base_url=url, async_http_client=own if callers else None, **options) as client,
        ):
            with suppress(RegoloError):
                await client.arerank("q", texts)
        return seen

    with FaultServer(*faults, usual=good) as server, without_collector():
        seen = called(server.url) if mode == "sync" else asyncio.run(acalled(server.url))
        assert soon(lambda: not workers())
        if size > 1 and sys.version_info >= (3, 12):
            gc.collect()  # there an error that httpcore passes over, when it cannot write, holds its own frames
        assert not [text() for text in seen if text() is not None]


@pytest.mark.parametrize("fault", [good, stalls(http(b"x" * 9, content_length="99"), 5)], ids=["whole", "half"])
def test_a_call_frees_its_requests(mode: str, fault: Fault) -> None:
    """Requests and replies, whose bodies hold all documents once more, are gone with their call too."""
    seen: list[weakref.ref[Any]] = []

    def watch(response: httpx.Response) -> None:
        seen.extend((weakref.ref(response.request), weakref.ref(response)))

    async def awatch(response: httpx.Response) -> None:
        watch(response)

    def called(url: str) -> None:
        with httpx.Client(event_hooks={"response": [watch]}, timeout=0.2) as own, suppress(RegoloError):
            RegoloClient(KEY, base_url=url, http_client=own, max_retries=0).rerank("q", ["a score=0.5"])

    async def acalled(url: str) -> None:
        async with httpx.AsyncClient(event_hooks={"response": [awatch]}, timeout=0.2) as own:
            with suppress(RegoloError):
                await RegoloClient(KEY, base_url=url, async_http_client=own, max_retries=0).arerank(
                    "q", ["a score=0.5"]
                )

    with FaultServer(usual=fault) as server, without_collector():
        called(server.url) if mode == "sync" else asyncio.run(acalled(server.url))
        assert [each() for each in seen] == [None, None]
