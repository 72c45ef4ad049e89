"""Locks that a fork waits for.

If a process forked while another thread opens HTTP clients or loads the offline scorer, the child would get
half-finished imports that nothing completes.
"""

import os
import threading
from typing import Final

__all__ = ["loading", "opening"]

opening: Final = threading.RLock()
"""Held while httpx clients are opened and lists of them change; reentrant, as garbage collection may close some."""
loading: Final = threading.RLock()
"""Held while the offline scorer loads its model."""

if hasattr(os, "register_at_fork"):
    for _lock in (opening, loading):
        os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)
