"""What tests see of a process, and wait for: in another thread or task it happens a moment later."""

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

__all__ = ["asoon", "sockets", "soon"]

_LOOKS: Final = 5_000
_BETWEEN: Final = 0.002
"""Seconds."""


def soon(condition: Callable[[], object], within: float = _LOOKS * _BETWEEN) -> bool:
    """Return whether something becomes true within ten seconds, or as many as are given."""
    for _ in range(round(within / _BETWEEN)):
        if condition():
            return True
        time.sleep(_BETWEEN)
    return False


async def asoon(condition: Callable[[], object]) -> bool:
    """Return the same without blocking the event loop."""
    for _ in range(_LOOKS):
        if condition():
            return True
        await asyncio.sleep(_BETWEEN)
    return False


def sockets() -> int:
    """Count this process's open sockets."""
    count = 0
    for link in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # the listing's own
            count += str(link.readlink()).startswith("socket:")
    return count
