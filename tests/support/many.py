"""Many queries on one client: how a test makes them, and runs through them in every way."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import aclosing, closing
from typing import Any

import pytest

from regolo_rerank import RegoloClient, RerankResponse
from tests.support.observed import asoon, soon
from tests.support.stub import Received, Reply, Stub, error, scored

Pair = tuple[str, list[str]]


class Many:
    """Runs `rerank_many` or `arerank_many`, and sees to it that no task outlives the loop over it.

    Args:
        mode: "sync", "async", "async source", where the pairs come from an async generator too, or "sync in a loop",
            where an event loop runs meanwhile.
    """

    def __init__(self, mode: str) -> None:
        self.mode = mode

    def __call__(
        self,
        client: RegoloClient,
        source: Any,
        *,
        into: list[Any] | None = None,
        stop: int | None = None,
        until: Callable[[], bool] = lambda: True,
        **arguments: Any,
    ) -> list[Any]:
        """Return the outcomes, put `into` a list one by one; leave after `stop`, and go on only when `until` holds."""
        outcomes = [] if into is None else into
        if self.mode == "sync in a loop":

            async def in_a_loop() -> list[Any]:
                return Many("sync")(client, source, into=outcomes, stop=stop, until=until, **arguments)

            return asyncio.run(in_a_loop())
        if self.mode != "sync":
            asyncio.run(self.consumed(client, source, outcomes, stop, until, **arguments))
            return outcomes
        ranked: Any = client.rerank_many(source, **arguments)
        with closing(ranked):
            for outcome in ranked:
                outcomes.append(outcome)
                if len(outcomes) == stop:
                    break
                assert soon(until)
        return outcomes

    async def consumed(
        self,
        client: RegoloClient,
        source: Any,
        outcomes: list[Any],
        stop: int | None = None,
        until: Callable[[], bool] = lambda: True,
        **arguments: Any,
    ) -> None:
        """Do the same in a running event loop."""
        before = asyncio.all_tasks()
        if self.mode == "async source" and not isinstance(source, AsyncIterator):
            source = awaited(source)
        ranked: Any = client.arerank_many(source, **arguments)
        try:
            async with aclosing(ranked):
                async for outcome in ranked:
                    outcomes.append(outcome)
                    if len(outcomes) == stop:
                        break
                    assert await asoon(until)
        finally:
            await asyncio.sleep(0)
            assert asyncio.all_tasks() <= before
            await client.aclose()


async def awaited(items: Iterable[Any]) -> AsyncIterator[Any]:
    """Give items as an async generator that lets others run before each of them."""
    for item in items:
        await asyncio.sleep(0)
        yield item


def small(index: int) -> Pair:
    """Return a query of one request."""
    return f"query {index}", [f"{index} a score={index % 7 / 7}", f"{index} b score=0.5"]


def large(index: int, size: int) -> Pair:
    """Return a query of as many documents."""
    return f"query {index}", [f"{index} {number} score={number / size}" for number in range(size)]


def smalls(count: int) -> list[Pair]:
    """Return so many small queries."""
    return [small(index) for index in range(count)]


def queries(stub: Stub) -> list[str]:
    """Return the query of each request so far."""
    return [request.json["query"].rpartition(": ")[2] for request in stub.received]


def essence(outcome: Any) -> Any:
    """Return what of a response is the same each time."""
    assert isinstance(outcome, RerankResponse)
    return outcome.results, outcome.usage


def slowly(delay: float) -> Callable[[Received], Reply]:
    """Return what answers as the service does, after so many seconds."""
    return lambda request: Reply(scored(request).body, delay=delay)


def fails_on(word: str, delay: float = 0.0) -> Callable[[Received], Reply]:
    """Return what refuses a query that has the word, at once, and answers the others after so many seconds."""

    def reply(request: Received) -> Reply:
        if word in request.json["query"]:
            return error("bad query", 400)
        return Reply(scored(request).body, delay=delay)

    return reply


any_source = pytest.mark.parametrize("mode", ["sync", "async", "async source"])


class Endless:
    """Pairs without end, which knows how far it was read ahead of the outcomes.

    Attributes:
        got: The outcomes.
        ahead: How many pairs had been read without an outcome, at most.
    """

    def __init__(self) -> None:
        self.got: list[Any] = []
        self.ahead = 0

    def __iter__(self) -> Iterator[Pair]:
        for index in itertools.count():
            self.ahead = max(self.ahead, index + 1 - len(self.got))
            yield small(index)
