"""Locks that a fork waits for.

If a process forked while another thread opens HTTP clients or loads the offline scorer, the child would inherit imports
that never finish.
"""

import os
import threading
from typing import Final

__all__ = ["loading", "opening"]

opening: Final = threading.RLock()
"""Held while httpx clients are opened and lists of them change; reentrant, because garbage collection may close
some at any point."""
loading: Final = threading.RLock()
"""Held while the offline scorer loads its model."""

if hasattr(os, "register_at_fork"):
    for _lock in (opening, loading):
        os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)
