import asyncio
import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from contextvars import ContextVar
from typing import Any

import httpx
import pytest

from regolo_rerank import RegoloClient
from tests.conftest import KEY
from tests.support.many import Many, large, slowly, smalls
from tests.support.stub import Stub


def test_two_iterators_go_side_by_side(many: Many, client: RegoloClient, stub: Stub) -> None:
    """Two calls on one client, taken in turns, keep apart."""
    stub.reply = slowly(0.002)
    sources = smalls(20), [large(index, 3) for index in range(20)]

    async def run() -> list[Any]:
        iterators: Any = [client.arerank_many(source) for source in sources]
        async with client, aclosing(iterators[0]) as first, aclosing(iterators[1]) as second:
            return [(await anext(first), await anext(second)) for _ in range(20)]

    taken = zip(*map(client.rerank_many, sources), strict=True)
    got = list(taken) if many.mode == "sync" else asyncio.run(run())
    for index, pair in enumerate(got):
        for source, response in zip(sources, pair, strict=True):
            assert sorted(result.document for result in response.results) == sorted(source[index][1])


def test_a_sync_call_works_inside_a_running_loop(client: RegoloClient) -> None:
    """Called by a coroutine, the sync form blocks it and works."""

    async def run() -> list[Any]:
        return list(client.rerank_many(smalls(9)))

    assert len(asyncio.run(run())) == 9


def test_several_threads_share_a_client(many: Many, client: RegoloClient) -> None:
    """Calls from several threads, each with an event loop of its own where there is one, keep apart."""
    with ThreadPoolExecutor(4) as threads:
        for size, got in enumerate(threads.map(lambda size: many(client, [large(0, size)] * 20), range(1, 5)), 1):
            assert [len(response.results) for response in got] == [size] * 20


def test_one_event_loop_after_another(client: RegoloClient) -> None:
    """A client's async calls work in each event loop anew."""
    for _ in range(3):
        assert len(Many("async")(client, smalls(9))) == 9


def pickled(client: RegoloClient) -> RegoloClient:
    """Return a client that went through a pickle."""
    loaded: RegoloClient = pickle.loads(pickle.dumps(client))  # noqa: S301 - our own
    return loaded


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_of_a_client_ranks_too(
    many: Many, client: RegoloClient, stub: Stub, copied: Callable[[RegoloClient], RegoloClient]
) -> None:
    """A copied client, even of one in the middle of a call, has connections of its own and works."""
    under_way = client.rerank_many(smalls(20))
    next(under_way)
    with copied(client.model_copy(update={"default_headers": {"x-copy": "1"}})) as other:
        other.api_key = client.api_key
        assert len(many(other, smalls(5))) == 5
    assert len(list(under_way)) == 19
    assert sum("x-copy" in request.headers for request in stub.received) == 5


def test_a_callers_own_http_client_serves_all_queries(many: Many, stub: Stub) -> None:
    """With a client of the caller's, all queries go over it, and it stays open."""
    options: dict[str, Any] = {"api_key": KEY, "base_url": stub.url, "max_concurrency": 3}

    async def run() -> list[Any]:
        async with httpx.AsyncClient(headers={"x-mine": "1"}) as mine:
            client = RegoloClient(async_http_client=mine, **options)
            got: list[Any] = []
            await many.consumed(client, smalls(20), got)
            assert not mine.is_closed
            return got

    if many.mode == "sync":
        with httpx.Client(headers={"x-mine": "1"}) as mine:
            got = many(RegoloClient(http_client=mine, **options), smalls(20))
            assert not mine.is_closed
    else:
        got = asyncio.run(run())
    assert len(got) == 20
    assert {request.headers.get("x-mine") for request in stub.received} == {"1"}
    assert stub.connections <= 3


WHO: ContextVar[str] = ContextVar("who", default="nobody")


@pytest.mark.parametrize("max_concurrency", [1, 3])
def test_a_scorer_sees_the_callers_context(many: Many, max_concurrency: int) -> None:
    """Context variables of whoever iterates are there in a scorer on this machine, so that traces nest."""
    seen: set[str] = set()

    def scorer(_: str, documents: list[str]) -> list[float]:
        seen.add(WHO.get())
        return [0.0] * len(documents)

    token = WHO.set("me")
    try:
        many(RegoloClient(base_url="local://", scorer=scorer), smalls(12), max_concurrency=max_concurrency)
    finally:
        WHO.reset(token)
    assert seen == {"me"}
