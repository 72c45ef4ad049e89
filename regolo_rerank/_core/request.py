"""What happens to one batch, written once: a generator that never waits and never does I/O.

It yields what is to be done next, a request to send or seconds to sleep, and is given the reply, or the exception that
came in its place, as `httpx.Auth.auth_flow` is. `threads` and `tasks` do what it says.
"""

import logging
import time
from collections.abc import Generator
from typing import Any

import httpx

from regolo_rerank._core.call import Event
from regolo_rerank._core.queue import Job, WorkQueue
from regolo_rerank._core.retry import is_over_parallel_limit
from regolo_rerank._wire.failures import translate_error
from regolo_rerank.errors import RateLimitError, RegoloError

__all__ = ["rank_batch"]

_log = logging.getLogger("regolo_rerank")


def rank_batch(job: Job[Event], queue: WorkQueue[Event]) -> Generator[httpx.Request | float, Any, None]:
    """Send a batch until its reply is accepted, its call is done, or the queue has taken it back.

    Yields:
        A request, for its `RawReply`, or the seconds to sleep while its call is not done.

    Raises:
        RegoloError: The last failure of a batch that cannot be ranked.
        Exception: What is neither of httpx nor of this package, as it came.
    """
    call, hold, retry = job.call, job.call.config.hold, job.retry
    retry.start()
    if pause := queue.pause_seconds():
        yield pause
    while not call.done.is_set():
        if held := hold.seconds_left():
            if not retry.allows(held):
                raise hold.refusal()
            yield held
            continue
        retry.sent += 1
        sent_at = time.monotonic()
        try:
            reply = yield call.config.request(call.plan.encode(job.batch))
            call.accept(job.batch, reply, retry.sent)
        except Exception as error:  # noqa: BLE001 - what is not of httpx is raised again
            timeout = call.config.timeout
            # A tenth less: clocks are not exact.
            left = None if timeout is None else 0.9 * timeout - (time.monotonic() - sent_at)
            failure = translate_error(error, call.config.endpoint.url, call.config.key, left)
        else:
            hold.request_seconds = time.monotonic() - sent_at
            queue.answered = True
            return
        if call.done.is_set():
            return  # it has failed already, and one error is enough
        if is_over_parallel_limit(failure) and queue.put_back(job, sent_at):
            _log.warning("regolo_rerank: attempt %d failed, next when there is room: %s", retry.sent, failure)
            return
        yield _schedule_retry(job, failure)


def _schedule_retry(job: Job[Event], failure: RegoloError) -> float:
    """Return the seconds until a batch is sent again, or raise a failure that is final."""
    hold = job.call.config.hold
    delay = job.retry.delay_after(failure, hold)
    if delay is None:
        raise failure
    if isinstance(failure, RateLimitError) and not is_over_parallel_limit(failure):
        hold.extend(delay, failure)
    words = "regolo_rerank: attempt %d failed, next in %.2f s: %s: %s"
    _log.warning(words, job.retry.sent, delay, type(failure).__name__, failure)
    return delay
