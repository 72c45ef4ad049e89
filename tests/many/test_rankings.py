import asyncio
import random
from collections import deque
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from regolo_rerank import RegoloClient
from tests.conftest import KEY
from tests.support.many import Many, Pair, any_source, essence, queries, smalls
from tests.support.stub import Reply, Stub, scored


@any_source
@pytest.mark.parametrize(
    ("max_concurrency", "arguments"), [(1, {}), (3, {"top_n": 3}), (2, {"top_n": 40, "score_threshold": 0.5})]
)
def test_it_gives_what_one_call_after_another_gives(
    many: Many, stub: Stub, max_concurrency: int, arguments: dict[str, Any]
) -> None:
    """Random queries, whatever their sizes and the order of the replies, give what `rerank` gives for each."""
    chance = random.Random(f"{max_concurrency} {arguments}")  # noqa: S311 - a test's inputs
    words = [*map(str, range(30)), "", "  ", "again", "again"]
    source = [
        (f"query {index}", [chance.choice(words) for _ in range(chance.choice([0, 1, 2, 5, 30]))])
        for index in range(20)
    ]
    stub.reply = lambda request: Reply(scored(request).body, delay=chance.choice([0, 0, 0.001, 0.01]))
    with RegoloClient(KEY, base_url=stub.url, batch_size=8) as client:
        got = many(client, iter(source), max_concurrency=max_concurrency, **arguments)
        sent = len(stub.received)
        assert list(map(essence, got)) == [essence(client.rerank(*pair, **arguments)) for pair in source]
    assert len(stub.received) == 2 * sent


def test_order_is_kept_while_later_queries_overtake(many: Many, client: RegoloClient, stub: Stub) -> None:
    """A slow query holds later ones back, but neither their sending nor their order."""
    stub.reply = lambda request: Reply(scored(request).body, delay=0.3 if "query 1" in request.json["query"] else 0)
    got = many(client, smalls(6))
    assert [response.results[0].document[0] for response in got] == list("012345")
    arrived = dict(zip(queries(stub), (request.at for request in stub.received), strict=True))
    assert max(arrived.values()) - arrived["query 1"] < 0.3


def test_every_argument_reaches_every_request(many: Many, client: RegoloClient, stub: Stub) -> None:
    """The arguments that `rerank` takes hold for all pairs."""
    many(client, smalls(3), top_n=1, model="m", instruction="Find it.", extra_body={"user": "u"})
    for request in stub.received:
        assert {**request.json, "documents": [], "query": ""} == {
            "model": "m",
            "query": "",
            "documents": [],
            "top_n": 1,
            "user": "u",
        }


SOURCES: dict[str, Callable[[list[Pair]], Any]] = {
    "list": list,
    "tuple": tuple,
    "deque": deque,
    "iterator": iter,
    "items of a dict": lambda pairs: dict(pairs).items(),
    "columns": lambda pairs: zip((query for query, _ in pairs), (documents for _, documents in pairs), strict=True),
}


@any_source
@pytest.mark.parametrize("count", [0, 3])
@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES.keys())
def test_pairs_come_in_any_iterable_with_an_order(
    many: Many, client: RegoloClient, stub: Stub, source: Callable[[list[Pair]], Any], count: int
) -> None:
    """One ranking comes out for each pair; no pairs give none, and send nothing."""
    assert len(many(client, source(smalls(count)))) == count
    assert len(stub.received) == count


def test_local_needs_no_server(many: Many) -> None:
    """The embedded endpoint answers many queries too, with the caller's scorer."""
    client = RegoloClient(base_url="local://", scorer=lambda query, texts: [len(query) - len(text) for text in texts])
    got = many(client, (("a" * length, ["bb", "b", ""]) for length in range(1, 40)))
    assert [[result.relevance_score for result in response.results[:2]] for response in got] == [
        [length - 1, length - 2] for length in range(1, 40)
    ]


@pytest.mark.parametrize("own", [True, False], ids=["own client", "caller's client"])
def test_options_are_those_of_the_call(many: Many, stub: Stub, *, own: bool) -> None:
    """What is assigned to the client between the call and its first ranking counts for later calls only."""
    headers, sent = {"x-mine": "1"}, list[httpx.Request]()

    async def note(request: httpx.Request) -> None:
        sent.append(request)

    async def run(client: RegoloClient) -> list[Any]:
        async with httpx.AsyncClient(headers=headers, event_hooks={"request": [note]}) as mine, client:
            client.async_http_client = None if own else mine
            ranked = client.arerank_many(smalls(3))
            client.async_http_client, client.model = mine if own else None, "other"
            return [response async for response in ranked]

    def run_sync(client: RegoloClient) -> list[Any]:
        with httpx.Client(headers=headers, event_hooks={"request": [sent.append]}) as mine, client:
            client.http_client = None if own else mine
            ranked = client.rerank_many(smalls(3))
            client.http_client, client.model = mine if own else None, "other"
            return list(ranked)

    client = RegoloClient(KEY, base_url=stub.url)
    assert len(run_sync(client) if many.mode == "sync" else asyncio.run(run(client))) == 3
    assert {request.json["model"] for request in stub.received} == {"Qwen3-Reranker-4B"}
    assert {"x-mine" in request.headers for request in stub.received} == {not own}
    assert len(sent) == (0 if own else 3)
