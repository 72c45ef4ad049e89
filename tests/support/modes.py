"""How tests call what is there twice: the name of the async method is that of the sync one with an "a" before it."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

from regolo_rerank import RegoloClient

__all__ = ["Call", "Many", "awaited"]

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Call:
    """Calls a method in one mode: where that is async, `call(client.rerank, "q", texts)` awaits `client.arerank`.

    The method may be that of a client, an adapter, or anything else that keeps to the rule: a runnable, an engine.

    Attributes:
        mode: "sync", or "async": in an event loop of its own.
    """

    mode: str

    def __call__(self, method: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Return what the method returns, or raise what it raises."""
        if self.mode == "sync":
            return method(*args, **kwargs)
        bound: Any = method
        twin: Any = getattr(bound.__self__, f"a{bound.__name__}")
        result: T = asyncio.run(twin(*args, **kwargs))
        return result


async def awaited(items: Iterable[Any]) -> AsyncIterator[Any]:
    """Yield items as an async generator, with other tasks running in between."""
    for item in items:
        await asyncio.sleep(0)
        yield item


class Many:
    """Runs `rerank_many` or `arerank_many`, the latter from a list or from an async generator."""

    def __init__(self, mode: str) -> None:
        self.mode = mode

    def __call__(
        self, client: RegoloClient, source: Any, *, into: list[Any] | None = None, stop: int = -1, **options: Any
    ) -> list[Any]:
        """Return the outcomes, or the first `stop` ones, and put them into a list one by one."""
        got = [] if into is None else into
        if self.mode == "sync":
            with closing(client.rerank_many(source, **options)) as ranked:
                for outcome in ranked:
                    got.append(outcome)
                    if len(got) == stop:
                        break
        else:
            asyncio.run(self._consume(client, source, got, stop, **options))
        return got

    async def _consume(self, client: RegoloClient, source: Any, got: list[Any], stop: int, **options: Any) -> None:
        pairs = awaited(source) if self.mode == "async source" else source
        ranked = client.arerank_many(pairs, **options)
        try:
            async for outcome in ranked:
                got.append(outcome)
                if len(got) == stop:
                    break
        finally:
            await ranked.aclose()
            assert asyncio.all_tasks() == {asyncio.current_task()}
        await client.aclose()
