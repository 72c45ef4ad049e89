"""The retry loop of one batch, without I/O, and the pause after a 429.

`attempts` is a generator in the manner of `httpx.Auth.auth_flow`: it yields what to do next, a request to send or a
time to sleep, and is sent the outcome. Threads and tasks drive the same loop. Scoring has no side effects, so every
request is safe to repeat.
"""

import copy
import logging
import random
import time
from collections.abc import Generator
from dataclasses import dataclass
from typing import Final

from regolo_rerank._call import Batch, Call
from regolo_rerank._protocol import Reply, request_id_of
from regolo_rerank.errors import RateLimitError, RegoloError

__all__ = ["Pause", "Send", "Sleep", "attempts"]

_log = logging.getLogger("regolo_rerank")

_JITTER_SECONDS: Final = 0.1
"""Random addition to a wait that the server named, so that not all clients return in the same moment."""


@dataclass(frozen=True, slots=True)
class Send:
    """Send a request. The outcome is its reply, or the error that came instead.

    Attributes:
        body: The JSON of the request.
        seconds: The time limit, or None.
    """

    body: bytes
    seconds: float | None


@dataclass(frozen=True, slots=True)
class Sleep:
    """Wait. A worker thread stops waiting when its call ends.

    Attributes:
        seconds: The time to wait.
    """

    seconds: float


class Pause:
    """The wait after a 429. All requests with the same API key share it, instead of collecting more refusals."""

    def __init__(self) -> None:
        self._ends_at = 0.0
        self._refusal = RateLimitError("too many requests", status_code=429)

    def extend(self, seconds: float, refusal: RateLimitError) -> None:
        """Send nothing for some seconds, because the server has refused a request."""
        ends_at = time.monotonic() + seconds
        if ends_at > self._ends_at:
            self._ends_at, self._refusal = ends_at, copy.copy(refusal)

    def seconds_left(self) -> float:
        """Return the seconds until requests may be sent again."""
        return max(0.0, self._ends_at - time.monotonic())

    def refusal(self, total_timeout: float | None) -> RateLimitError:
        """Return the error for a request that is not sent, because the pause ends after `total_timeout`."""
        refusal = copy.copy(self._refusal)
        refusal.retry_after = self.seconds_left()
        message = (
            f"not sent: after an earlier 429 the client waits for another {refusal.retry_after:.1f} s, longer than "
            f"total_timeout={total_timeout:g} s. The server's message was: {self._refusal}"
        )
        refusal.args = (message,)
        return refusal


def attempts(call: Call, batch: Batch, pause: Pause) -> Generator[Send | Sleep, Reply | RegoloError | None]:
    """Send a batch until its reply is accepted, or the call is done.

    Raises:
        RegoloError: The error of the last attempt, if it is final.
        APITimeoutError: `total_timeout` has expired.
    """
    call.start()
    failures = refusals = 0
    while not call.is_finished:
        call.check_time()
        # First wait for the end of a pause, which may have become longer during the wait.
        if wait := pause.seconds_left():
            if not _fits(wait, call):
                raise pause.refusal(call.settings.options.total_timeout)
            yield Sleep(wait)
            continue

        outcome = yield Send(call.request_body(batch), _time_limit(call))
        failure = _find_failure(call, batch, outcome)
        if failure is None or call.is_finished:
            return
        call.check_time()

        # Then decide whether, and when, to try again. The server refuses a request over the limit of parallel requests
        # until another one ends: within `total_timeout`, that is only a reason to wait.
        if _is_over_parallel_limit(failure) and call.seconds_left() is not None:
            refusals += 1
            delay = _backoff(refusals)
        else:
            failures += 1
            delay = _delay_after(failure, failures)
            if isinstance(failure, RateLimitError) and failure.retryable:
                pause.extend(delay, failure)
            if not failure.retryable or failures > call.settings.options.max_retries:
                raise failure
        if not _fits(delay, call):
            limit = call.settings.options.total_timeout
            failure.args = (f"{failure}. Another attempt in {delay:.1f} s would exceed total_timeout={limit:g} s",)
            raise failure
        _log_retry(failure, failures + refusals, delay)
        yield Sleep(delay)


def _find_failure(call: Call, batch: Batch, outcome: Reply | RegoloError | None) -> RegoloError | None:
    """Give a reply to the call, and return the failure if it is not valid."""
    if not isinstance(outcome, Reply):
        return outcome
    _log.debug(
        "POST %s: %d documents, status %d",
        call.settings.endpoint.url,
        len(batch),
        outcome.status_code,
        extra={"status": outcome.status_code, "request_id": request_id_of(outcome), "seconds": outcome.seconds},
    )
    try:
        call.accept(batch, outcome)
    except RegoloError as error:
        return error
    return None


def _log_retry(failure: RegoloError, attempt: int, delay: float) -> None:
    _log.warning(
        "Attempt %d failed, next in %.2f s: %s: %s",
        attempt,
        delay,
        type(failure).__name__,
        failure,
        extra={
            "status": getattr(failure, "status_code", None),
            "request_id": getattr(failure, "request_id", None),
            "attempt": attempt,
            "seconds": delay,
        },
    )


def _fits(seconds: float, call: Call) -> bool:
    """Return whether there is time for an attempt after a wait."""
    left = call.seconds_left()
    return left is None or seconds < left


def _time_limit(call: Call) -> float | None:
    """Return the seconds for one attempt."""
    limits = [limit for limit in (call.settings.timeout, call.seconds_left()) if limit is not None]
    return min(limits, default=None)


def _is_over_parallel_limit(error: RegoloError) -> bool:
    return isinstance(error, RateLimitError) and "max_parallel_requests" in str(error)


def _delay_after(error: RegoloError, failures: int) -> float:
    """Return the seconds to wait after a failure: as long as the server asks, else with exponential backoff."""
    named: float | None = getattr(error, "retry_after", None)
    if named is not None:
        return named + random.uniform(0, _JITTER_SECONDS)  # noqa: S311 - jitter is no secret
    if isinstance(error, RateLimitError):
        # The limit counts requests per minute: 1 to 2, 5 to 10, then 25 to 50 seconds.
        return 5.0 ** min(failures - 1, 2) * random.uniform(1, 2)  # noqa: S311 - jitter is no secret
    return _backoff(failures)


def _backoff(failures: int) -> float:
    """Return a random time between 0.25 and 1, 2, 4, then 8 seconds."""
    return random.uniform(0.25, 2.0 ** min(failures - 1, 3))  # noqa: S311 - jitter is no secret
