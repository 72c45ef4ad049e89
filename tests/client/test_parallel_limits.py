import threading
import time

import pytest

from regolo_rerank import RateLimitError, RegoloClient
from tests.conftest import KEY, Rank
from tests.support.inside import forget_refusals_after
from tests.support.stub import Received, Reply, Stub, crowded, scored, texts


def test_a_call_takes_fewer_requests_at_once_where_the_account_may_have_no_more(rank: Rank, stub: Stub) -> None:
    """Refused for too many parallel requests, a call goes on with fewer, and loses nothing."""
    stub.allow(2, delay=0.05)
    client = RegoloClient(KEY, base_url=stub.url, batch_size=1, max_concurrency=6)
    response = rank(client, "q", texts(20))
    assert [result.index for result in response.results] == list(range(19, -1, -1))
    assert len(stub.received) <= 24


class Lagging:
    """A service that counts a request as in flight for a moment after its reply.

    The last `limit` of `until` requests are answered together: with fewer in flight at once, none of them is.
    """

    def __init__(self, limit: int, until: int) -> None:
        self.limit = limit
        self.until = until
        self.refused = 0
        self._accepted = 0
        self._busy: list[float] = []
        self._lock = threading.Lock()
        self._together = threading.Barrier(limit)

    def __call__(self, request: Received) -> Reply:
        delay, lag = 0.04, 0.02
        with self._lock:
            now = time.monotonic()
            self._busy = [end for end in self._busy if end > now]
            if len(self._busy) >= self.limit:
                self.refused += 1
                return crowded(self.limit)
            self._busy.append(now + delay + lag)
            self._accepted += 1
            last = self._accepted > self.until - self.limit
        if last:
            self._together.wait(10)
        return Reply(scored(request).body, delay=delay)


@pytest.mark.parametrize("limit", [1, 4])
def test_a_slot_that_is_freed_late_costs_no_worker(rank: Rank, stub: Stub, limit: int) -> None:
    """Where a service counts a request for a moment after its reply, workers rest that moment, and none leaves."""
    service = Lagging(limit, until=6 * limit)
    stub.reply = service
    client = RegoloClient(KEY, base_url=stub.url, batch_size=1, max_concurrency=limit, max_retries=0)
    response = rank(client, "q", texts(6 * limit))
    assert [result.index for result in response.results] == list(reversed(range(6 * limit)))
    assert 1 <= service.refused <= limit  # each worker learns it once, at most
    assert response.usage.requests == len(stub.received) == 6 * limit + service.refused


def test_whoever_has_rested_and_is_refused_leaves(rank: Rank, stub: Stub) -> None:
    """Where fewer requests are allowed from now on, a worker that rests knows from its first refusal."""
    service = Lagging(4, until=99)
    learnt = 0

    def reply(request: Received) -> Reply:
        nonlocal learnt
        if len(stub.received) == 16:
            learnt, service.limit = service.refused, 2
        return service(request)

    stub.reply = reply
    response = rank(RegoloClient(KEY, base_url=stub.url, batch_size=1, max_concurrency=4), "q", texts(32))
    assert len(response.results) == 32
    assert service.refused == learnt + 2


def test_a_moment_of_rest_is_forgotten(rank: Rank, stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some time after the last such refusal a worker sends at once again, and learns anew where it must not."""
    forget_refusals_after(0.25, monkeypatch)
    service = Lagging(1, until=16)
    stub.reply = service
    rank(RegoloClient(KEY, base_url=stub.url, batch_size=1, max_concurrency=1), "q", texts(16))
    assert 2 <= service.refused <= 10  # 15 if nobody ever rested


def test_a_limit_that_is_lifted_is_found_out(rank: Rank, stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some time after a refusal one more request of the same call is tried at once, and then another."""
    forget_refusals_after(0.05, monkeypatch)
    four, met = threading.Barrier(4), threading.Event()
    limit = 1

    def reply(request: Received) -> Reply:
        nonlocal limit
        if stub.at_once > limit:
            return crowded(limit)
        if len(stub.received) >= 12:
            limit = 4
        if len(stub.received) > 80 and not met.is_set():
            four.wait(10)
            met.set()
        return Reply(scored(request).body, delay=0.02)

    stub.reply = reply
    response = rank(RegoloClient(KEY, base_url=stub.url, batch_size=1, max_concurrency=4), "q", texts(100))
    assert len(response.results) == 100
    assert met.is_set()


def test_a_batch_that_is_handed_on_keeps_its_retries(rank: Rank, stub: Stub) -> None:
    """A request that one worker after another finds to be one too many has not failed: it fails no call."""

    def reply(request: Received) -> Reply:
        if "document 0 " in request.documents[0] and len(refused) < 3:
            refused.append(request)
            return crowded(9)
        return Reply(scored(request).body, delay=0.02)

    refused: list[Received] = []
    stub.reply = reply
    client = RegoloClient(KEY, base_url=stub.url, batch_size=1, max_concurrency=4, max_retries=0)
    response = rank(client, "q", texts(20))
    assert len(response.results) == 20
    assert response.usage.requests == len(stub.received) == 20 + 3


def test_the_last_request_waits_where_no_other_can_take_over(rank: Rank, client: RegoloClient, stub: Stub) -> None:
    """A single request that is one too many is tried again, and fails as what it is."""
    stub.script(crowded(0), crowded(0))
    assert rank(client, "q", ["a"]).usage.requests == 3
    stub.always(crowded(0))
    with pytest.raises(RateLimitError, match="max_parallel_requests"):
        rank(RegoloClient(KEY, base_url=stub.url, batch_size=1), "q", texts(8))
    assert len(stub.received) <= 3 + 4 + 3
