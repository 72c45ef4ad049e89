"""Which error is worth another attempt, and after how long.

Scoring has no side effects, so every request is safe to send again; tenacity does the counting and the waiting. What
all requests of a client share is the gate: when the server tells one of them to wait, the others wait too, instead of
spending the account's rate limit on further refusals.
"""

import logging
import random
import threading
import time
from copy import copy
from typing import TYPE_CHECKING, Any, Final

import httpx
from tenacity import retry_if_exception, wait_exponential, wait_random_exponential

from regolo_rerank.errors import (
    APIConnectionError,
    APIResponseError,
    APIStatusError,
    RateLimitError,
    RegoloError,
    ServerError,
)
from regolo_rerank.options import Options

if TYPE_CHECKING:
    from tenacity import RetryCallState

__all__ = ["Gate", "Patience", "is_passing"]

_log = logging.getLogger("regolo_rerank")

_BACKOFF: Final = wait_random_exponential(multiplier=1.0, min=0.25, max=8.0)
"""Seconds, at random up to 1, 2, 4, 8, so that clients do not come back in step."""
_WINDOW_BACKOFF: Final = wait_exponential(exp_base=5) + wait_random_exponential(exp_base=5)
"""Seconds after a 429 that names no time, at random 1 to 2, 5 to 10, 25 to 50: the gateway's window is a minute."""
_SPREAD: Final = 0.1
"""Seconds at random on top of a wait that the server named."""
_SLOT_LAG: Final = 0.05
"""Seconds after a reply in which LiteLLM may still count its request as one in flight (5 ms were seen)."""


def is_passing(error: BaseException) -> bool:
    """Return whether an error may pass by itself: no connection, a timeout, 408, 429, 5xx, or an odd 2xx."""
    if isinstance(error, APIConnectionError):
        # A closed client, or one of another event loop, stays so; and so does a request that cannot be sent at all.
        lasting = (RuntimeError, httpx.LocalProtocolError, httpx.UnsupportedProtocol, httpx.InvalidURL)
        return not isinstance(error.__cause__, lasting)
    if isinstance(error, APIResponseError):
        return error.code in {None, "200", "408", "429"} or not error.code.startswith("4")
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
        sent: How often it was sent.
        follows_success: Whether its sender's last request was good: then the request is not one too many, and a
            refusal for too many in flight means that the service has not yet noticed the end of the last one.
    """

    def __init__(self, options: Options, gate: Gate) -> None:
        # Not the options as a whole: tenacity's objects refer to themselves, and would keep all of a call alive.
        self._max_retries = options.max_retries
        self._max_retry_seconds = options.max_retry_seconds
        self._gate = gate
        self._first_sent: float | None = None
        self._held = False
        self._failure: RegoloError | None = None
        self.sent = 0
        self.follows_success = False
        self._lags = False

    def has_failed(self, error: RegoloError) -> None:
        """Take the failure of a first attempt, which tenacity gets as the outcome of its own.

        Setting tenacity up takes a tenth of a call's time, and most requests need no second attempt.
        """
        self._failure = error

    def before_sending(self) -> None:
        """Count a request that is about to be sent, or raise the failure that is known already."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure
        refusal = self._gate.refusal()
        self._held = refusal is not None
        if refusal is not None:
            raise refusal
        self._first_sent = self._first_sent or time.monotonic()
        self.sent += 1

    def too_many(self) -> bool:
        """Take a refusal for too many in flight; return whether the request is really one too many."""
        self._lags, self.follows_success = self.follows_success, False
        return not self._lags

    def policy(self) -> dict[str, Any]:
        """Return what tenacity's sync and async drivers both take."""
        return {
            "retry": retry_if_exception(is_passing),
            "wait": self._wait,
            "stop": self._stop,
            "before_sleep": self._before_sleep,
            "reraise": True,
        }

    def _wait(self, state: "RetryCallState") -> float:
        error = _error_of(state)
        # Waiting at the gate is no attempt.
        state = copy(state)
        state.attempt_number = max(self.sent, 1)
        wait = getattr(error, "retry_after", None)
        if wait is not None:
            wait += random.uniform(0, _SPREAD)  # noqa: S311 - spreads load, guards nothing
        elif is_crowded(error) and self._lags:
            wait = _SLOT_LAG
        elif is_crowded(error):
            wait = self._gate.seconds_a_request * 2 ** (state.attempt_number - 1) + _BACKOFF(state)
        elif isinstance(error, RateLimitError):
            wait = _WINDOW_BACKOFF(state)
        else:
            wait = _BACKOFF(state)
        return max(wait, self._gate.held_for())

    def _stop(self, state: "RetryCallState") -> bool:
        now = time.monotonic()
        spent = now - (self._first_sent or now) + state.upcoming_sleep
        return self.sent > self._max_retries or spent >= self._max_retry_seconds

    def _before_sleep(self, state: "RetryCallState") -> None:
        error = _error_of(state)
        if self._held:
            return
        if isinstance(error, RateLimitError) and not is_crowded(error):
            self._gate.close_for(state.upcoming_sleep, error)
        _log.warning(
            "attempt %d failed, next in %.2f s: %s: %s",
            self.sent,
            state.upcoming_sleep,
            type(error).__name__,
            str(error),
        )


def _error_of(state: "RetryCallState") -> BaseException | None:
    return state.outcome.exception() if state.outcome is not None else None
