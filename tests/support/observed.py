"""What tests observe of a process: in another thread, task or process it happens a moment later."""

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from tests.support.stub import Received, Reply, scored

__all__ = ["asoon", "own_process", "slowly", "sockets", "soon", "threads"]

_ROOT: Final = Path(__file__).parents[2]
_PAUSE: Final = 0.002
_WITHIN: Final = 20.0


def soon(condition: Callable[[], object], within: float = _WITHIN) -> bool:
    """Return whether a condition becomes true within some seconds."""
    deadline = time.monotonic() + within
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(_PAUSE)
    return True


async def asoon(condition: Callable[[], object], within: float = _WITHIN) -> bool:
    """Return the same without blocking the event loop."""
    deadline = time.monotonic() + within
    while not condition():
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(_PAUSE)
    return True


def sockets() -> int:
    """Count the open sockets of this process."""
    count = 0
    for link in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # the listing's own
            count += str(link.readlink()).startswith("socket:")
    return count


def threads() -> list[threading.Thread]:
    """Return the worker threads of the package."""
    return [thread for thread in threading.enumerate() if thread.name == "regolo_rerank"]


def slowly(seconds: float) -> Callable[[Received], Reply]:
    """Return a function that answers as the service does, after some seconds."""
    return lambda request: Reply(scored(request).body, delay=seconds)


def own_process(code: str, *arguments: str, **options: Any) -> subprocess.Popen[str]:
    """Run code in a Python process of its own."""
    return subprocess.Popen(  # noqa: S603 - our own interpreter
        [sys.executable, "-c", code, *arguments],
        text=True,
        cwd=_ROOT,
        env={name: value for name, value in os.environ.items() if not name.startswith("COV")},
        **options,
    )
