import functools
import gc
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final

import pytest

from regolo_rerank import RegoloClient, RerankResponse
from tests.conftest import KEY
from tests.support.faults import FaultServer
from tests.support.inside import workers
from tests.support.interrupts import Interrupt
from tests.support.observed import sockets, soon
from tests.support.stub import pairs, texts

QUERIES: Final = [(f"query {number}", texts(3)) for number in range(3)]
RANKED: Final = [(2, 2 / 3), (1, 1 / 3), (0, 0.0)]


@dataclass(frozen=True)
class Way:
    """A way of calling a client that has certain options."""

    call: Callable[[RegoloClient], list[RerankResponse]]
    options: dict[str, Any] = field(default_factory=dict)

    def client(self, url: str, *, warm: bool, cached: bool) -> RegoloClient:
        """Return a client, with a connection and with a cache or without."""
        client = RegoloClient(KEY, base_url=url, cache={} if cached else None, **self.options)
        if warm:
            client.rerank("another query", ["a"])
        return client


WAYS: Final = {
    "one request": Way(lambda client: [client.rerank("q", texts(3))]),
    "several requests": Way(lambda client: [client.rerank("q", texts(3))], {"batch_size": 1}),
    "many in turn": Way(lambda client: list(client.rerank_many(QUERIES)), {"max_concurrency": 1}),
    "many at once": Way(lambda client: list(client.rerank_many(QUERIES)), {"max_concurrency": 2}),
}


@functools.cache
def points_of(name: str, *, warm: bool, cached: bool) -> int:
    """Return how many points a call passes that nobody interrupts."""
    interrupt = Interrupt()
    with FaultServer() as server, WAYS[name].client(server.url, warm=warm, cached=cached) as client:
        interrupt(functools.partial(WAYS[name].call, client))
    return interrupt.passed


@pytest.fixture
def elsewhere() -> Iterator[ThreadPoolExecutor]:
    """Another thread, which would wait for a lock that was left behind in this one."""
    with ThreadPoolExecutor(1) as executor:
        executor.submit(int).result()
        yield executor


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # of a socket that only an interrupted frame of httpx has seen
@pytest.mark.parametrize("count", [6, pytest.param(600, marks=[pytest.mark.long, pytest.mark.timeout(900)])])
@pytest.mark.parametrize("name", WAYS)
def test_a_client_that_was_interrupted_is_as_good_as_new(name: str, count: int, elsewhere: ThreadPoolExecutor) -> None:
    """Wherever Ctrl-C ends a sync call, no thread, socket or lock of it is left, and the same client ranks right."""
    way, reached = WAYS[name], 0
    with FaultServer() as server:
        for number in range(count):
            chosen = random.Random(f"{name} {number}")  # noqa: S311 - chooses a case
            kind = {"warm": chosen.random() < 0.5, "cached": chosen.random() < 0.5}
            interrupt = Interrupt(chosen.randint(1, points_of(name, **kind)))
            before = sockets()
            with way.client(server.url, **kind) as client:
                with suppress(KeyboardInterrupt):
                    interrupt(functools.partial(way.call, client))
                responses = elsewhere.submit(way.call, client).result(timeout=20)
                assert [pairs(response.results) for response in responses] == [RANKED] * len(responses), interrupt.where
                assert soon(lambda: not workers()), interrupt.where
            del client
            if sockets() > before:
                gc.collect()  # a connection may hang in the frames that were interrupted
            assert soon(lambda: sockets() <= before), interrupt.where  # noqa: B023 - called at once
            reached += bool(interrupt.where)
    assert reached > count / 2
    print(f"{reached} interrupts")  # noqa: T201 - of a long run
