"""Daemon threads that are reused for a few seconds, and locks that a fork waits for.

A `ThreadPoolExecutor` does not fit: at exit Python waits for its threads, and so for every request that hangs.
"""

import os
import threading
from collections import deque
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Final

__all__ = ["loading", "opening", "run_in_thread"]

IDLE_SECONDS: Final = 5.0

_idle: Final[deque["_Worker"]] = deque()
opening: Final = threading.RLock()
"""Held while httpx clients are opened and closed; reentrant, as garbage collection may close some at any point."""
loading: Final = threading.RLock()
"""Held while the offline scorer loads its model."""

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_idle.clear)  # a forked process has none of the threads
    # A fork waits until no other thread opens clients or loads the model: their half-finished imports would stay
    # half-finished in the child.
    for _lock in (opening, loading):
        os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


def run_in_thread(function: Callable[[], None]) -> None:
    """Run a function in a daemon thread.

    Raises:
        RuntimeError: The system allows no further thread.
    """
    try:
        worker = _idle.pop()
    except IndexError:
        worker = _Worker()
        worker.start()
    worker.functions.put(function)


class _Worker(threading.Thread):
    def __init__(self) -> None:
        super().__init__(daemon=True, name="regolo_rerank")
        self.functions: SimpleQueue[Callable[[], None]] = SimpleQueue()

    def run(self) -> None:
        while True:
            try:
                function = self.functions.get(timeout=IDLE_SECONDS)
            except Empty:
                try:
                    _idle.remove(self)
                except ValueError:  # taken from the deque just now, so a function is coming
                    continue
                return
            function()
            del function  # it refers to documents
            _idle.append(self)
