"""Which error is worth another attempt, and how patient a request is.

Scoring has no side effects, so every request is safe to send again. What all requests of a client share is the gate:
when the server tells one of them to wait, the others wait too, instead of spending the account's rate limit on further
refusals.
"""

import asyncio
import threading
import time
from contextlib import suppress
from copy import copy
from typing import Final

import httpx

from regolo_rerank.errors import (
    APIConnectionError,
    APIResponseError,
    APIStatusError,
    RateLimitError,
    RegoloError,
    ServerError,
)
from regolo_rerank.options import Options

__all__ = ["SLOT_LAG", "Gate", "Patience", "is_crowded", "is_passing", "pause"]

SLOT_LAG: Final = 0.05
"""Seconds after a reply in which LiteLLM may still count its request as one in flight (5 ms were seen)."""


def is_passing(error: BaseException) -> bool:
    """Return whether an error may pass by itself: no connection, a timeout, 408, 429, 5xx, or an odd 2xx."""
    if isinstance(error, APIConnectionError):
        # A closed client, or one of another event loop, stays so; and so does a request that cannot be sent at all.
        lasting = (RuntimeError, httpx.LocalProtocolError, httpx.UnsupportedProtocol, httpx.InvalidURL)
        return not isinstance(error.__cause__, lasting)
    if isinstance(error, APIResponseError):
        return error.code in {None, "408", "429"} or not error.code.startswith("4")
    if isinstance(error, APIStatusError) and error.type == "budget_exceeded":
        return False
    return isinstance(error, RateLimitError | ServerError)


def is_crowded(error: BaseException | None) -> bool:
    """Return whether the service refused a request because too many are in flight: one fewer is the cure."""
    return isinstance(error, RateLimitError) and "max_parallel_requests" in str(error)


class Gate:
    """The wait after a 429, which all requests of a client share.

    Attributes:
        seconds_a_request: How long requests took lately, so that a crowded one waits as long as another takes.
    """

    def __init__(self) -> None:
        self.seconds_a_request = 0.0
        self._lock = threading.Lock()
        self._opens_at = 0.0
        self._refusal: RateLimitError | None = None

    def close_for(self, seconds: float, refusal: RateLimitError) -> None:
        """Let no request pass for some seconds, because of what the server said."""
        with self._lock:
            opens_at = time.monotonic() + seconds
            if opens_at > self._opens_at:
                # A copy has no traceback, whose frames would keep a whole call.
                self._opens_at, self._refusal = opens_at, copy(refusal)

    def held_for(self) -> float:
        """Return the seconds until requests may pass."""
        return max(0.0, self._opens_at - time.monotonic())

    def refusal(self) -> RateLimitError | None:
        """Return what the server said when it closed the gate, as long as the gate is closed."""
        held = self.held_for()
        if not held or self._refusal is None:
            return None
        refusal = copy(self._refusal)
        refusal.retry_after = held
        return refusal

    def took(self, seconds: float) -> None:
        """Learn how long a request took."""
        weight = 0.25 if self.seconds_a_request else 1.0
        self.seconds_a_request += weight * (seconds - self.seconds_a_request)


class Patience:
    """How one request waits and tries again; its clock starts when it is first sent.

    Attributes:
        max_retries: Further attempts after the first; one more for each refusal that was the pace's fault.
        max_retry_seconds: Seconds after the first sending in which they start.
        gate: The wait after a 429.
        first_sent: When it was first sent, by the monotonic clock.
        sent: How often it was sent.
        held: Whether the last attempt was held back at the gate, and nothing was sent.
        hurries: Whether it is sent at once after its worker's last one was answered: then it is not one too many, and
            a refusal for too many in flight means that the service has not yet noticed the end of the last one.
        lags: Whether the last refusal means that.
    """

    def __init__(self, options: Options, gate: Gate) -> None:
        # Not the options as a whole: tenacity's objects refer to themselves, and would keep all of a call alive.
        self.max_retries = options.max_retries
        self.max_retry_seconds = options.max_retry_seconds
        self.gate = gate
        self.first_sent: float | None = None
        self.held = False
        self._failure: RegoloError | None = None
        self.sent = 0
        self.hurries = False
        self.lags = False

    def has_failed(self, error: RegoloError) -> None:
        """Take the failure of a first attempt, which the retries get as the outcome of their own."""
        self._failure = error

    def before_sending(self) -> None:
        """Count a request that is about to be sent, or raise the failure that is known already."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure
        refusal = self.gate.refusal()
        self.held = refusal is not None
        if refusal is not None:
            raise refusal
        self.first_sent = self.first_sent or time.monotonic()
        self.sent += 1

    def too_many(self) -> bool:
        """Take a refusal for too many in flight; return whether the request is really one too many."""
        self.lags, self.hurries = self.hurries, False
        self.max_retries += self.lags
        return not self.lags


async def pause(over: asyncio.Event, seconds: float) -> None:
    """Wait for some seconds, or until a call is over."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await over.wait()
