"""The batches that wait to be sent, shared by the workers that send them: threads or tasks."""

import math
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import Final, Generic

from regolo_rerank._core.call import Call, Event
from regolo_rerank._core.retry import RetryState

__all__ = ["Job", "WorkQueue"]

_MEMORY: Final = 60.0
"""Seconds after which what a refusal taught is tried again: LiteLLM's window is a minute."""

_SLOT_LAG: Final = 0.05
"""Seconds after a reply in which LiteLLM may still count its request as one in flight (5 ms were seen)."""


@dataclass(slots=True)
class Job(Generic[Event]):
    """One batch of a call, and how often it was sent."""

    call: Call[Event]
    batch: range
    retry: RetryState


class WorkQueue(Generic[Event]):
    """The batches of the calls under way, first come first served.

    An account may allow fewer requests in flight than there are workers. Then a batch that is refused is put back for
    another worker, and the queue has room for one worker fewer; a minute later, for one more. A refusal after an answer
    may only mean that the service still counts the request before: then workers pause before they send, for a minute.

    Attributes:
        max_workers: Workers at most, each with one request in flight.
        read_ahead: Calls under way at most: enough that a slow one keeps no worker idle.
        answered: Whether a request was answered so far.
    """

    def __init__(self, max_workers: int) -> None:
        self.max_workers = self._limit = max_workers
        self.read_ahead = 4 * max_workers if max_workers > 1 else 1
        self._workers = 0
        self._jobs: deque[Job[Event]] = deque()
        self.answered = False
        self._lowered_at = self._pausing_since = -math.inf
        self._lock = threading.Lock()

    def put(self, call: Call[Event]) -> None:
        """Add all batches of a call."""
        with self._lock:
            for batch in call.batches:
                self._jobs.append(Job(call, batch, RetryState(call.config.options)))

    def add_workers(self) -> int:
        """Return how many workers the caller has to start now; they count from here on."""
        with self._lock:
            if self._limit < self.max_workers and time.monotonic() - self._lowered_at > _MEMORY:
                self._limit += 1
                self._lowered_at = time.monotonic()
            missing = max(0, min(self._limit - self._workers, len(self._jobs)))
            self._workers += missing
            return missing

    def get(self) -> Job[Event] | None:
        """Return a worker's next batch; a worker that gets none has left."""
        with self._lock:
            while self._jobs and self._workers <= self._limit:
                job = self._jobs.popleft()
                if not job.call.done.is_set():
                    return job
            self._workers -= 1
            return None

    def leave(self) -> None:
        """Count a worker out that ends without having asked for more."""
        with self._lock:
            self._workers -= 1

    def pause_seconds(self) -> float:
        """Return the seconds that a worker waits before it sends."""
        return _SLOT_LAG if time.monotonic() - self._pausing_since < _MEMORY else 0.0

    def put_back(self, job: Job[Event], sent_at: float) -> bool:
        """Take back a batch that was refused for too many in flight; False where its worker is the only one."""
        with self._lock:
            if not self.pause_seconds() and self.answered:
                self._pausing_since = time.monotonic()
            elif sent_at >= self._pausing_since:  # what was sent before tells nothing new
                if self._limit == 1 or self._workers == 1:
                    return False
                self._limit = min(self._limit, self._workers) - 1
                self._lowered_at = time.monotonic()
            self._jobs.appendleft(job)
            return True
