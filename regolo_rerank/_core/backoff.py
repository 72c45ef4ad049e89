"""How long a request waits before it is sent again; tenacity does the counting and the waiting.

It is loaded, and set up, once something fails: that takes a tenth of a call's time, and most requests need no second
attempt.
"""

import asyncio
import logging
import random
import threading
import time
from copy import copy
from functools import partial
from typing import Any, Final

from tenacity import (
    AsyncRetrying,
    RetryCallState,
    Retrying,
    retry_if_exception,
    sleep_using_event,
    wait_exponential,
    wait_random_exponential,
)

from regolo_rerank._core.retry import SLOT_LAG, Patience, is_crowded, is_passing, pause
from regolo_rerank.errors import RateLimitError

__all__ = ["again", "async_again"]

_log = logging.getLogger("regolo_rerank")

_BACKOFF: Final = wait_random_exponential(multiplier=1.0, min=0.25, max=8.0)
"""Seconds, at random up to 1, 2, 4, 8, so that clients do not come back in step."""
_WINDOW_BACKOFF: Final = wait_exponential(exp_base=5) + wait_random_exponential(exp_base=5)
"""Seconds after a 429 that names no time, at random 1 to 2, 5 to 10, 25 to 50: the gateway's window is a minute."""
_SPREAD: Final = 0.1
"""Seconds at random on top of a wait that the server named."""


def again(patience: Patience, over: threading.Event) -> Retrying:
    """Return what tries again until a request's patience ends, or its call is over."""
    return Retrying(sleep=sleep_using_event(over), **_policy(patience))


def async_again(patience: Patience, over: asyncio.Event) -> AsyncRetrying:
    """Return the same for async calls."""
    return AsyncRetrying(sleep=partial(pause, over), **_policy(patience))


def _policy(patience: Patience) -> dict[str, Any]:
    return {
        "retry": retry_if_exception(is_passing),
        "wait": partial(_wait, patience),
        "stop": partial(_stop, patience),
        "before_sleep": partial(_before_sleep, patience),
        "reraise": True,
    }


def _wait(patience: Patience, state: RetryCallState) -> float:
    error = _error_of(state)
    # Waiting at the gate is no attempt.
    state = copy(state)
    state.attempt_number = max(patience.sent, 1)
    wait = getattr(error, "retry_after", None)
    if wait is not None:
        wait += random.uniform(0, _SPREAD)  # noqa: S311 - spreads load, guards nothing
    elif is_crowded(error) and patience.lags:
        wait = SLOT_LAG
    elif is_crowded(error):
        wait = patience.gate.seconds_a_request * 2 ** (state.attempt_number - 1) + _BACKOFF(state)
    elif isinstance(error, RateLimitError):
        wait = _WINDOW_BACKOFF(state)
    else:
        wait = _BACKOFF(state)
    return max(wait, patience.gate.held_for())


def _stop(patience: Patience, state: RetryCallState) -> bool:
    now = time.monotonic()
    spent = now - (patience.first_sent or now) + state.upcoming_sleep
    return patience.sent > patience.max_retries or spent >= patience.max_retry_seconds


def _before_sleep(patience: Patience, state: RetryCallState) -> None:
    error = _error_of(state)
    if patience.held:
        return
    if isinstance(error, RateLimitError) and not is_crowded(error):
        patience.gate.close_for(state.upcoming_sleep, error)
    _log.warning(
        "attempt %d failed, next in %.2f s: %s: %s",
        patience.sent,
        state.upcoming_sleep,
        type(error).__name__,
        str(error),
    )


def _error_of(state: RetryCallState) -> BaseException | None:
    return state.outcome.exception() if state.outcome is not None else None
