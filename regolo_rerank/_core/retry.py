"""Which error is worth another attempt, after how long, and the wait after a 429 that all requests of a client share.

Scoring has no side effects, so every request is safe to send again.
"""

import random
import time
from copy import copy
from typing import Final

import httpx

from regolo_rerank.errors import APIConnectionError, APIResponseError, APIStatusError, RateLimitError, ServerError
from regolo_rerank.options import Options

__all__ = ["RateLimitHold", "RetryState", "is_over_parallel_limit", "is_retryable"]

SPREAD: Final = 0.1
"""Seconds at random on top of a wait that the server named."""

_LASTING: Final = (
    RuntimeError,
    httpx.LocalProtocolError,
    httpx.UnsupportedProtocol,
    httpx.InvalidURL,
    httpx.DecodingError,
)
"""Causes that stay: a client that is closed or of another event loop, a request that cannot be sent at all, a reply
compressed in a way that was not asked for."""


def is_retryable(error: BaseException) -> bool:
    """Return whether an error may pass by itself: no connection, a timeout, 408, 429, 5xx, or an odd 2xx."""
    if isinstance(error.__cause__, _LASTING):
        return False
    if isinstance(error, APIResponseError):
        return error.code in {None, "408", "429"} or not error.code.startswith("4")
    if isinstance(error, APIStatusError) and error.type == "budget_exceeded":
        return False
    return isinstance(error, APIConnectionError | RateLimitError | ServerError)


def is_over_parallel_limit(error: BaseException) -> bool:
    """Return whether the service refused a request because too many are in flight: one fewer is the cure."""
    return isinstance(error, RateLimitError) and "max_parallel_requests" in str(error)


def backoff(failures: int) -> float:
    """Return the seconds to wait after so many failures: at random up to 1, 2, 4, 8, so that clients part ways."""
    return random.uniform(0.25, 2.0 ** min(failures - 1, 3))  # noqa: S311 - spreads load, guards nothing


def window_backoff(failures: int) -> float:
    """Return the seconds to wait after a 429 that names no time, in a window of a minute: 1 to 2, 5 to 10, 25 to 50."""
    return 5.0 ** min(failures - 1, 2) * random.uniform(1, 2)  # noqa: S311 - spreads load, guards nothing


class RateLimitHold:
    """The wait after a 429, which all requests of a client share instead of spending its rate limit on refusals.

    Attributes:
        request_seconds: How long the last request took; one refused for too many in flight waits about as long.
    """

    def __init__(self) -> None:
        self.request_seconds = 0.0
        self._ends_at = 0.0
        self._refusal = RateLimitError("too many requests", status_code=429)

    def extend(self, seconds: float, refusal: RateLimitError) -> None:
        """Let nothing be sent for some seconds, because of what the server said."""
        ends_at = time.monotonic() + seconds
        if ends_at > self._ends_at:
            self._ends_at, self._refusal = ends_at, copy(refusal)  # whose traceback would hold the documents

    def seconds_left(self) -> float:
        """Return the seconds until requests may be sent."""
        return max(0.0, self._ends_at - time.monotonic())

    def refusal(self) -> RateLimitError:
        """Return what the server said, for a request that cannot wait for the end of the hold."""
        refusal = copy(self._refusal)
        refusal.retry_after = self.seconds_left()
        return refusal


class RetryState:
    """How often one request was sent, and whether and when it is sent again.

    Args:
        options: The options of its call, of which `max_retries` and `max_retry_seconds` bound the attempts.

    Attributes:
        sent: Requests sent: each spends one of the account's rate limit.
    """

    def __init__(self, options: Options) -> None:
        self.sent = 0
        self._failures = 0
        self._options = options
        self._deadline = 0.0

    def start(self) -> None:
        """Start the clock, unless it runs: from here on, the request could be sent."""
        self._deadline = self._deadline or time.monotonic() + self._options.max_retry_seconds

    def allows(self, seconds: float) -> bool:
        """Return whether an attempt may start after a wait."""
        return time.monotonic() + seconds < self._deadline

    def delay_after(self, error: Exception, hold: RateLimitHold) -> float | None:
        """Return the seconds to wait after a failure, or None where it is final."""
        self._failures += 1
        if self._failures > self._options.max_retries or not is_retryable(error):
            return None
        named = getattr(error, "retry_after", None)
        if named is not None:
            delay = named + random.uniform(0, SPREAD)  # noqa: S311 - spreads load, guards nothing
        elif is_over_parallel_limit(error):
            delay = hold.request_seconds * 2 ** (self._failures - 1) + backoff(self._failures)
        elif isinstance(error, RateLimitError):
            delay = window_backoff(self._failures)
        else:
            delay = backoff(self._failures)
        delay = max(delay, hold.seconds_left())
        return delay if self.allows(delay) else None
