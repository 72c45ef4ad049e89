import itertools
import json

import pytest

from regolo_rerank import InvalidInputError, RegoloClient
from tests.conftest import KEY, Rank
from tests.support.stub import Received, Reply, Stub, error, results, score, scored, texts


def test_batches_are_even_and_merge_into_one_ranking(rank: Rank, client: RegoloClient, stub: Stub) -> None:
    """101 documents at 100 a request go out as 51 and 50, each asking for top_n, and rank as one."""
    response = rank(client, "q", texts(101), top_n=7)
    assert sorted(map(len, stub.documents)) == [50, 51]
    assert [request.json["top_n"] for request in stub.received] == [7, 7]
    assert [result.index for result in response.results] == list(range(100, 93, -1))


def test_a_request_never_asks_for_more_than_it_sends(rank: Rank, client: RegoloClient, stub: Stub) -> None:
    """top_n is at most the number of documents in the request."""
    rank(client, "q", texts(3), top_n=50)
    assert stub.received[0].json["top_n"] == 3


@pytest.mark.parametrize("limit", [400, 1_000, 5_000])
def test_requests_stay_below_the_limit_of_bytes(rank: Rank, stub: Stub, limit: int) -> None:
    """No request is larger than max_request_bytes, but for one document that is larger by itself."""
    client = RegoloClient(KEY, base_url=stub.url, max_request_bytes=limit, prompt_format="plain")
    documents = [f'{index} "é\n\x00" {"x" * (index * 7 % 61)} score={index}' for index in range(60)]
    huge = "x" * 6_000 + " score=99"
    response = rank(client, "q", [*documents, huge])
    assert [result.index for result in response.results] == list(range(60, -1, -1))
    for request in stub.received:
        assert len(request.body) <= limit or request.documents == [huge]
    assert sum(map(len, stub.documents)) == 61


def test_as_few_requests_as_the_bytes_allow(rank: Rank, stub: Stub) -> None:
    """A single long document does not split the others into more requests than it must."""
    client = RegoloClient(KEY, base_url=stub.url, max_request_bytes=2_000, prompt_format="plain")
    rank(client, "q", [*texts(20), "x" * 3_000, *texts(50)[20:40]])
    assert [len(documents) for documents in sorted(stub.documents, key=lambda sent: len(sent[0]))] == [20, 20, 1]


def test_a_query_that_fills_a_request_is_refused(rank: Rank, client: RegoloClient, stub: Stub) -> None:
    """A query as large as max_request_bytes would send every document alone, so it is refused."""
    with pytest.raises(InvalidInputError, match=r"query: .* max_request_bytes=1000000"):
        rank(client, "q" * 1_000_000, ["a"])
    assert not stub.received


@pytest.mark.parametrize("concurrency", [1, 3])
def test_batches_go_out_concurrently_within_the_limit(rank: Rank, stub: Stub, concurrency: int) -> None:
    """Exactly max_concurrency requests of one call are in flight at once."""
    stub.reply = lambda request: Reply(scored(request).body, delay=0.05)
    client = RegoloClient(KEY, base_url=stub.url, batch_size=2, max_concurrency=concurrency)
    response = rank(client, "q", texts(18))
    assert stub.most_at_once == concurrency
    assert [result.index for result in response.results] == list(range(17, -1, -1))
    assert response.usage.requests == 9


def test_usage_is_that_of_the_replies_that_tell(rank: Rank, stub: Stub) -> None:
    """A reply without a count of tokens takes nothing from those of the others."""

    def reply(request: Received) -> Reply:
        told = {"usage": {"total_tokens": 7}} if "document 0 " in request.documents[0] else {}
        return Reply(json.loads(scored(request).body) | told)

    stub.reply = reply
    response = rank(RegoloClient(KEY, base_url=stub.url, batch_size=1), "q", texts(3))
    assert (response.usage.total_tokens, response.usage.requests) == (7, 3)


@pytest.mark.parametrize(
    ("figures", "cost"),
    [
        (["0.25", "0.5", "1e-3"], 0.751),
        (["0.0", "0.0", "0.0"], 0.0),
        (["", "0.5", "None"], 0.5),
        (["nan", "-1", "inf"], None),
    ],
)
def test_the_cost_is_that_of_the_replies_that_tell(
    rank: Rank, client: RegoloClient, stub: Stub, figures: list[str], cost: float | None
) -> None:
    """US dollars add up over the requests of a call, what is no amount counts as nothing, and free is not unknown."""
    left = iter(figures)
    stub.reply = lambda request: Reply(scored(request).body, headers={"x-litellm-response-cost": next(left)})
    client.batch_size = client.max_concurrency = 1
    assert rank(client, "q", texts(3)).usage.cost == (None if cost is None else pytest.approx(cost))
    assert rank(client, "q", []).usage.cost is None


def test_usage_and_request_ids_add_up_over_batches(rank: Rank, stub: Stub) -> None:
    """Tokens, requests (retries included) and request ids of all batches are in the response."""
    numbers = itertools.count(1)

    def reply(request: Received) -> Reply:
        if (number := next(numbers)) == 1:
            return error("busy", 503)
        body = results(*((index, score(text)) for index, text in enumerate(request.documents)))
        meta = {"billed_units": {"total_tokens": 10}, "tokens": {"input_tokens": 10}}
        return Reply({**body, "meta": meta}, headers={"x-litellm-call-id": f"call-{number}"})

    stub.reply = reply
    client = RegoloClient(KEY, base_url=stub.url, batch_size=2, max_concurrency=1)
    response = rank(client, "q", texts(5))
    assert (response.usage.total_tokens, response.usage.requests) == (30, 4)
    assert response.request_ids == ["call-2", "call-3", "call-4"]
    assert response.id == "stub-1"
    assert response.meta == {"billed_units": {"total_tokens": 10}, "tokens": {"input_tokens": 10}}
