"""Results of a measure, and its rounds: one turn of each subject, so that drift affects all alike."""

import asyncio
import gc
import inspect
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sized
from contextlib import AbstractContextManager, AsyncExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from benchmarks.subjects import Call, Job, Opening, Subject

__all__ = ["Measured", "Warm", "in_rounds", "warm"]

T = TypeVar("T")


@dataclass(frozen=True)
class Measured:
    """One measure of several subjects.

    Attributes:
        name: What bounds and the JSON call it.
        title: The heading of the table.
        unit: The unit of the values.
        baseline: The subject that the others are divided by, or None for absolute values.
        rounds: A value a round, by subject.
        missing: Why a subject could not be measured, by subject.
    """

    name: str
    title: str
    unit: str
    baseline: str | None
    rounds: Mapping[str, list[float]]
    missing: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Warm:
    """Subjects that have made their first calls, and the event loop that the async ones live in.

    Attributes:
        calls: By subject.
        missing: Why a subject could not be opened, by subject.
        loop: The event loop.
    """

    calls: dict[str, Call]
    missing: dict[str, str]
    loop: asyncio.Runner

    def repeat(self, subject: str, times: int) -> Sized:
        """Make some calls in a row and return the last results."""
        call = self.calls[subject]
        results: Sized = ()
        if not inspect.iscoroutinefunction(call):
            for _ in range(times):
                results = call()
            return results

        async def repeated() -> Sized:
            results: Sized = ()
            for _ in range(times):
                results = await call()
            return results

        return self.loop.run(repeated())

    def together(self, subject: str, tasks: int, seconds: float = 0.0) -> int:
        """Let some tasks call an async subject concurrently until the time is over, and return the number of calls."""
        call, ends_at = self.calls[subject], time.perf_counter() + seconds

        async def repeated() -> int:
            await call()
            calls = 1
            while time.perf_counter() < ends_at:
                await call()
                calls += 1
            return calls

        async def all_tasks() -> int:
            return sum(await asyncio.gather(*(repeated() for _ in range(tasks))))

        return self.loop.run(all_tasks())


@contextmanager
def warm(subjects: Mapping[str, Subject], job: Job) -> Iterator[Warm]:
    """Open subjects and let each do its job once. A subject that fails is missing, with the reason."""
    with asyncio.Runner() as loop, warnings.catch_warnings(action="ignore"):
        opened, stack = Warm({}, {}, loop), AsyncExitStack()
        for name, subject in subjects.items():
            try:
                opened.calls[name] = _enter(loop, stack, subject(job))
                count = len(opened.repeat(name, 2))
            except ImportError:
                problem = "not installed"
            except Exception as error:  # noqa: BLE001 - whatever a peer raises is shown in its line
                problem = f"{type(error).__name__}: {error}"
            else:
                problem = "" if count == job.top_n else f"{count} results in place of {job.top_n}"
            if problem:
                opened.calls.pop(name, None)
                opened.missing[name] = problem
        # Objects of the imports do not belong to a call.
        gc.collect()
        gc.freeze()
        try:
            yield opened
        finally:
            gc.unfreeze()
            loop.run(stack.aclose())


def _enter(loop: asyncio.Runner, stack: AsyncExitStack, opening: Opening) -> Call:
    if isinstance(opening, AbstractContextManager):
        return stack.enter_context(opening)
    return loop.run(stack.enter_async_context(opening))


def in_rounds(subjects: Mapping[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """Return each subject's values, one turn per round. Each round starts with another subject."""
    values: dict[str, list[T]] = {name: [] for name in subjects}
    names = list(subjects)
    for turn in range(rounds):
        first = turn % len(names) if names else 0
        for name in names[first:] + names[:first]:
            gc.collect()
            values[name].append(subjects[name]())
    return values
