"""How tests call what is there twice: the name of the async method is that of the sync one with an "a" before it."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

__all__ = ["Call"]

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
