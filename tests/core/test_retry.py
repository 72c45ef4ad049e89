from regolo_rerank import RateLimitError, RegoloClient, ServerError
from regolo_rerank._core.retry import RateLimitHold, RetryState
from tests.conftest import KEY


def test_a_failure_waits_for_a_hold_that_ends_in_time_and_is_final_where_it_does_not() -> None:
    """A request that fails while a 429 holds others back waits as they do, or fails at once with its own error."""
    hold, retry = RateLimitHold(), RetryState(RegoloClient(KEY, max_retry_seconds=5))
    retry.start()
    hold.extend(3, RateLimitError("quota", status_code=429))
    delay = retry.delay_after(ServerError("down", status_code=500), hold)
    assert delay is not None
    assert 2 < delay < 5
    hold.extend(20, RateLimitError("quota", status_code=429))
    assert retry.delay_after(ServerError("down", status_code=500), hold) is None
