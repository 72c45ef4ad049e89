import threading
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from regolo_rerank import RegoloClient, RerankResponse
from tests.conftest import KEY
from tests.support.inside import forget_refusals_after, workers
from tests.support.many import Endless, Many, Pair, any_source, large, slowly, small, smalls
from tests.support.observed import asoon, soon
from tests.support.stub import Received, Reply, Stub, crowded, scored

SHAPES: dict[str, list[Pair]] = {
    "many small ones": smalls(20),
    "a large one last": [*smalls(4), large(4, 12)],
    "large ones only": [large(index, 10) for index in range(2)],
}


@pytest.mark.parametrize("max_concurrency", [1, 4])
@pytest.mark.parametrize("source", SHAPES.values(), ids=SHAPES.keys())
def test_as_many_requests_are_in_flight_as_allowed(
    many: Many, stub: Stub, source: list[Pair], max_concurrency: int
) -> None:
    """All workers are busy, never more than `max_concurrency`, and the whole takes far less than one after another."""
    delay = 0.005 if max_concurrency == 1 else 0.06
    stub.reply = slowly(delay)
    with RegoloClient(KEY, base_url=stub.url, batch_size=1 if source != SHAPES["many small ones"] else 9) as client:
        started = time.monotonic()
        got = many(client, source, max_concurrency=max_concurrency)
        took = time.monotonic() - started
    assert len(got) == len(source)
    assert stub.most_at_once == max_concurrency
    assert took < 0.75 * len(stub.received) * delay or max_concurrency == 1


def test_one_at_a_time_needs_no_thread() -> None:
    """With `max_concurrency=1` a sync call sends in the caller's own thread, and reads a pair when it is its turn."""
    threads: set[threading.Thread] = set()
    behind: list[int] = []

    def source() -> Iterator[Pair]:
        for index in range(5):
            behind.append(index - len(got))
            yield small(index)

    def scorer(_: str, documents: list[str]) -> list[float]:
        threads.add(threading.current_thread())
        return [0.0] * len(documents)

    got: list[RerankResponse] = []
    Many("sync")(RegoloClient(base_url="local://", scorer=scorer), source(), into=got, max_concurrency=1)
    assert threads == {threading.current_thread()}
    assert behind == [0] * 5


def test_a_limit_on_parallel_requests_is_kept_to(many: Many, stub: Stub) -> None:
    """Refused for too many requests in flight, it goes on with fewer over all queries, and loses nothing."""
    stub.allow(2, delay=0.01)
    with RegoloClient(KEY, base_url=stub.url, batch_size=2, max_concurrency=6) as client:
        got = many(client, [*smalls(20), large(20, 20), *smalls(20)])
    assert [len(response.results) for response in got] == [2] * 20 + [20] + [2] * 20
    assert len(stub.received) <= 50 + 8


def test_a_limit_that_is_lifted_is_found_out(many: Many, stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some time after a refusal one more request is tried at once, and then another, up to `max_concurrency`."""
    forget_refusals_after(0.05, monkeypatch)
    limit = 1
    refused: list[int] = []
    busy: list[int] = []

    def limited(request: Received) -> Reply:
        busy.append(stub.at_once)
        if stub.at_once > limit:
            refused.append(len(stub.received))
            return crowded(limit)
        return Reply(scored(request).body, delay=0.02)

    got: list[Any] = []

    def lifted() -> bool:
        nonlocal limit
        if len(got) == 8:
            limit = 4
            busy.clear()
        return True

    stub.reply = limited
    with RegoloClient(KEY, base_url=stub.url, max_concurrency=4) as client:
        many(client, smalls(70), into=got, until=lifted)
    assert len(got) == 70
    assert refused
    assert 3 <= max(busy) <= 4


def test_a_rate_limit_holds_all_queries_back(many: Many, client: RegoloClient, stub: Stub) -> None:
    """After a 429 that names a time no query of the call is sent until then, and none is lost."""
    stub.reply = slowly(0.02)
    stub.script(Reply({"error": "slow down"}, 429, {"retry-after": "0.3"}))
    assert len(many(client, smalls(12))) == 12
    refused = stub.received[0].at
    assert len(stub.received) == 13
    assert sum(request.at - refused < 0.3 for request in stub.received) <= 8  # in flight, or sent before it was read


@any_source
@pytest.mark.parametrize(("max_concurrency", "delay"), [(1, 0), (4, 0), (3, 0.01)])
def test_an_endless_source_is_read_a_window_ahead(many: Many, stub: Stub, max_concurrency: int, delay: float) -> None:
    """No more than 4 x `max_concurrency` pairs are read ahead; leaving the loop ends all, and sends nothing more."""
    stub.reply = slowly(delay)
    source = Endless()
    with RegoloClient(KEY, base_url=stub.url) as client:
        many(client, iter(source), into=source.got, stop=20, max_concurrency=max_concurrency)
        sent = len(stub.received)
        time.sleep(0.05)
    assert len(source.got) == 20
    assert source.ahead <= 4 * max_concurrency
    assert source.ahead >= (max_concurrency if delay else 1)  # a server that takes no time may keep up with the reading
    assert len(stub.received) <= sent + max_concurrency  # those on their way into the server
    assert soon(lambda: stub.at_once == 0)


def test_a_slow_consumer_idles_nobody(many: Many, stub: Stub) -> None:
    """While the consumer is busy, all that was read is sent, and no more than the window is read."""
    source = Endless()

    def reply(request: Received) -> Reply:
        assert soon(lambda: source.ahead >= 8)  # a sync call gives a ranking that is there before it reads on
        return Reply(scored(request).body, delay=0.01)

    stub.reply = reply
    with RegoloClient(KEY, base_url=stub.url, max_concurrency=2) as client:
        many(
            client,
            iter(source),
            into=source.got,
            stop=4,
            until=lambda: len(stub.received) >= len(source.got) + 7 and not stub.at_once,
        )
    assert source.ahead == 8


def test_a_slow_source_holds_no_ranking_back(client: RegoloClient) -> None:
    """In a sync call a ranking that is there is given before more pairs are asked for."""
    got: list[RerankResponse] = []
    behind: list[int] = []

    def source() -> Iterator[Pair]:
        for index in range(10):
            behind.append(index - len(got))
            assert soon(lambda: not workers())
            yield small(index)

    Many("sync")(client, source(), into=got)
    assert len(got) == 10
    assert max(behind) == 1


def test_an_async_source_may_wait_for_the_rankings(client: RegoloClient) -> None:
    """In an async call a ranking is given as soon as it is there, even while the source waits for it to be."""
    got: list[RerankResponse] = []

    async def source() -> AsyncIterator[Pair]:
        for index in range(10):
            assert await asoon(lambda: len(got) == index)  # noqa: B023 - awaited before the next turn
            yield small(index)

    Many("async source")(client, source(), into=got)
    assert len(got) == 10
