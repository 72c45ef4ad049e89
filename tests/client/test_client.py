import asyncio
import itertools
import json
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from tenacity import Future, RetryCallState, Retrying, wait_fixed

from regolo_rerank import (
    APIConnectionError,
    APIResponseError,
    APIStatusError,
    APITimeoutError,
    AuthenticationError,
    InvalidInputError,
    MissingAPIKeyError,
    NotFoundError,
    PromptFormat,
    RateLimitError,
    RegoloClient,
    RegoloError,
    RerankResponse,
    ServerError,
)
from regolo_rerank._core import backoff, calls, retry
from regolo_rerank._transports import pools
from regolo_rerank.options import Options
from tests.conftest import KEY, Rank
from tests.support.stub import Received, Reply, Stub, crowded, error, pairs, results, score, scored


def texts(count: int) -> list[str]:
    """Return distinct documents, the later ones better."""
    return [f"document {index} score={index / count}" for index in range(count)]


# --- the ranking ------------------------------------------------------------------------------------------------------


def test_a_ranking_is_sorted_and_holds_the_callers_own_strings(rank: Rank, client: RegoloClient, stub: Stub) -> None:
    """The best document comes first, each with its own index, score and string."""
    documents = ["a score=0.1", "b score=0.9", "c score=0.5"]
    response = rank(client, "q", documents)
    assert pairs(response.results) == [(1, 0.9), (2, 0.5), (0, 0.1)]
    assert all(result.document is documents[result.index] for result in response.results)
    assert len(stub.received) == 1


@pytest.mark.parametrize("kind", [list, tuple, iter, lambda documents: (text for text in documents)])
def test_documents_may_come_in_any_order_keeping_iterable(
    rank: Rank, client: RegoloClient, kind: Callable[[list[str]], Any]
) -> None:
    """Lists, tuples, iterators and generators rank alike."""
    assert pairs(rank(client, "q", kind(texts(3))).results) == [(2, 2 / 3), (1, 1 / 3), (0, 0.0)]


@pytest.mark.parametrize("documents", [[], (), iter([])])
def test_nothing_to_rank_sends_nothing(rank: Rank, stub: Stub, documents: Any) -> None:
    """An empty list gives an empty response, and needs no key."""
    assert rank(RegoloClient(), "q", documents) == RerankResponse()
    assert not stub.received


def test_blank_documents_are_not_sent_and_rank_last(rank: Rank, client: RegoloClient, stub: Stub) -> None:
    """Blank documents get the lower of 0.0 and the lowest score, behind all others."""
    response = rank(client, "q", ["", "b score=-3", " \n\t", "d score=2"])
    assert pairs(response.results) == [(3, 2.0), (1, -3.0), (0, -3.0), (2, -3.0)]
    assert pairs(rank(client, "q", ["", "b score=3"]).results) == [(1, 3.0), (0, 0.0)]
    assert [len(documents) for documents in stub.documents] == [2, 1]


def test_only_blank_documents_send_nothing(rank: Rank, client: RegoloClient, stub: Stub) -> None:
    """A list of blanks comes back in its own order with score 0."""
    assert pairs(rank(client, "q", ["", " "]).results) == [(0, 0.0), (1, 0.0)]
    assert not stub.received


def test_equal_documents_are_sent_once_and_share_the_score(rank: Rank, client: RegoloClient, stub: Stub) -> None:
    """Duplicates cost nothing, come back each with its own index, and count for top_n."""
    documents = ["a score=1", "b score=2", "a score=1", "b score=2"]
    assert pairs(rank(client, "q", documents).results) == [(1, 2.0), (3, 2.0), (0, 1.0), (2, 1.0)]
    assert pairs(rank(client, "q", documents, top_n=3).results) == [(1, 2.0), (3, 2.0), (0, 1.0)]
    assert [len(sent) for sent in stub.documents] == [2, 2]


def test_ties_keep_input_order(rank: Rank, client: RegoloClient, stub: Stub) -> None:
    """Equal scores rank in input order, whatever order the server gives them."""
    stub.always(Reply(results((2, 0.5), (0, 0.5), (1, 0.5))))
    assert [result.index for result in rank(client, "q", ["a", "b", "c"]).results] == [0, 1, 2]


def test_a_threshold_applies_after_top_n_and_no_blank_passes_it(rank: Rank, client: RegoloClient) -> None:
    """Results below the threshold are dropped from the top_n, and 0.0 is a threshold."""
    documents = ["a score=0.2", "b score=-1", "", "c score=0.9"]
    assert pairs(rank(client, "q", documents, score_threshold=0.0).results) == [(3, 0.9), (0, 0.2)]
    assert pairs(rank(client, "q", documents, top_n=1, score_threshold=0.1).results) == [(3, 0.9)]
    assert rank(client, "q", documents, top_n=1, score_threshold=0.95).results == []


def test_the_strings_that_are_sent_are_built_a_batch_at_a_time(
    rank: Rank, stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No more documents than one request holds are put into words at once, and each of them once."""
    built: list[int] = []
    put_into_words = PromptFormat.format_documents

    def counted(self: PromptFormat, documents: list[str]) -> list[str]:
        built.append(len(documents))
        return put_into_words(self, documents)

    monkeypatch.setattr(PromptFormat, "format_documents", counted)
    documents = [f"{index} score=0.5" for index in range(1_000)]
    rank(RegoloClient(KEY, base_url=stub.url, top_n=5), "q", documents)
    # One more for each reply, whose first echo is compared with what was sent.
    assert sorted(built) == [1] * 10 + [100] * 10


def test_arguments_of_a_call_stand_in_for_options(rank: Rank, stub: Stub) -> None:
    """An argument left None takes the object's value; any other holds for this call only."""
    client = RegoloClient(KEY, base_url=stub.url, top_n=1, model="m", extra_body={"a": 1}, prompt_format="documented")
    rank(client, "q", texts(3))
    rank(client, "q", texts(3), top_n=3, model="n", instruction="Find", extra_body={"b": 2})
    rank(client, "q", texts(3))
    first, second, third = (request.json for request in stub.received)
    assert (first["top_n"], first["model"], first["a"]) == (1, "m", 1)
    assert (second["top_n"], second["model"], second["b"], second["query"]) == (3, "n", 2, "Find\n<Query>: q")
    assert "a" not in second
    assert third == first


def test_the_request_is_what_the_api_documents(rank: Rank, client: RegoloClient, stub: Stub) -> None:
    """One POST with model, query and documents; top_n is left out where all results are wanted."""
    rank(client, "q", ["a"])
    request = stub.received[0]
    assert (request.path, request.headers["authorization"]) == ("/rerank", f"Bearer {KEY}")
    assert request.headers["user-agent"].startswith("regolo_rerank/")
    assert request.json == {
        "model": "Qwen3-Reranker-4B",
        "query": ("<Instruct>: Given a web search query, retrieve relevant passages that answer the query\n<Query>: q"),
        "documents": ["<Document>: a"],
    }


# --- batches ----------------------------------------------------------------------------------------------------------


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


# --- input that is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "documents", "arguments", "message"),
    [
        ("q", "one string", {}, "documents: must be a list of str, got str"),
        ("q", b"bytes", {}, "documents: must be a list of str, got bytes"),
        ("q", {"a", "b"}, {}, "documents: must be a list of str, got set"),
        ("q", frozenset("a"), {}, "documents: must be a list of str, got frozenset"),
        ("q", {"a": "b"}, {}, "documents: must be a list of str, got dict"),
        ("q", None, {}, "documents: must be a list of str, got NoneType"),
        ("q", ["a", None], {}, r"documents\[1\]: must be str, got NoneType"),
        ("q", [7], {}, r"documents\[0\]: must be str, got int"),
        ("q", ["a", b"b"], {}, r"documents\[1\]: must be str, got bytes"),
        ("", ["a"], {}, "query: must not be blank"),
        (" \n", ["a"], {}, "query: must not be blank"),
        (None, ["a"], {}, "query: must be a string, got NoneType"),
        (["q"], ["a"], {}, "query: must be a string, got list"),
        ("q", ["a"], {"top_n": 0}, r"top_n: .* got int \(0\)"),
        ("q", ["a"], {"top_n": -1}, r"top_n: .* got int \(-1\)"),
        ("q", ["a"], {"top_n": True}, r"top_n: .* got bool \(True\)"),
        ("q", ["a"], {"top_n": 2.5}, r"top_n: .* got float \(2\.5\)"),
        ("q", ["a"], {"top_n": "2"}, "top_n: .* got str"),
        ("q", ["a"], {"model": " "}, "model: must not be blank, got str"),
        ("q", ["a"], {"instruction": 1}, "instruction: .* got int"),
        ("q", ["a"], {"score_threshold": float("nan")}, r"score_threshold: .* got float \(nan\)"),
        ("q", ["a"], {"score_threshold": True}, r"score_threshold: .* got bool"),
        ("q", ["a"], {"extra_body": {"top_n": 1}}, "extra_body: must not hold top_n"),
        ("q", ["a"], {"extra_body": {"x": float("nan")}}, "extra_body: must be plain JSON"),
        ("q", ["a"], {"extra_body": {"x": object()}}, "extra_body: must be plain JSON"),
        ("q", ["a"], {"extra_body": {"x": "\ud800"}}, "extra_body: must be plain JSON"),
    ],
)
def test_bad_input_is_refused_before_anything_is_sent(
    rank: Rank,
    client: RegoloClient,
    stub: Stub,
    query: Any,
    documents: Any,
    arguments: dict[str, Any],
    message: str,
) -> None:
    """The error names the argument and the value's type, and the server sees nothing."""
    with pytest.raises(InvalidInputError, match=message):
        rank(client, query, documents, **arguments)
    assert not stub.received


# --- key and address --------------------------------------------------------------------------------------------------


def test_without_a_key_the_error_names_both_ways_out(rank: Rank) -> None:
    """A regolo.ai host demands a key at the first call, not at construction."""
    client = RegoloClient(base_url="https://eu.regolo.ai/v1")
    with pytest.raises(MissingAPIKeyError, match=r"eu\.regolo\.ai.*REGOLO_API_KEY.*local://"):
        rank(client, "q", ["a"])


@pytest.mark.parametrize(
    ("api_key", "environment", "sent"),
    [
        (" key\n", None, "Bearer key"),
        (None, " env-key\n", "Bearer env-key"),
        ("key", "env-key", "Bearer key"),
        ("", "env-key", None),
        (None, None, None),
    ],
)
def test_the_key_comes_from_the_argument_or_the_environment(
    rank: Rank, stub: Stub, monkeypatch: pytest.MonkeyPatch, api_key: str | None, environment: str | None, sent: Any
) -> None:
    """The environment is read at the call; an empty key sends none; keys are stripped."""
    client = RegoloClient(api_key, base_url=stub.url)
    if environment is not None:
        monkeypatch.setenv("REGOLO_API_KEY", environment)
    rank(client, "q", ["a"])
    assert stub.received[0].headers.get("authorization") == sent


def test_a_malformed_key_in_the_environment_is_refused(rank: Rank, stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the variable and the place, not the key."""
    monkeypatch.setenv("REGOLO_API_KEY", "sk-can\nary")
    with pytest.raises(InvalidInputError, match=r"REGOLO_API_KEY: .* position 6") as caught:
        rank(RegoloClient(base_url=stub.url), "q", ["a"])
    assert "sk-can" not in str(caught.value)


def test_the_key_does_not_go_over_plain_http(rank: Rank) -> None:
    """Another machine gets the key over https, or with allow_http."""
    client = RegoloClient(KEY, base_url="http://rerank.invalid", max_retries=0)
    with pytest.raises(InvalidInputError, match=r"rerank\.invalid over plain http"):
        rank(client, "q", ["a"])
    client.allow_http = True
    with pytest.raises(APIConnectionError, match=r"rerank\.invalid"):
        rank(client, "q", ["a"])


@pytest.mark.parametrize(
    ("suffix", "path"),
    [
        ("", "/rerank"),
        ("/", "/rerank"),
        ("/v1", "/v1/rerank"),
        ("/v1/", "/v1/rerank"),
        ("/v1/rerank", "/v1/rerank"),
        ("/rerank/", "/rerank"),
        ("/custom-model/v1", "/custom-model/v1/rerank"),
        ("/v1?tag=a", "/v1/rerank?tag=a"),
    ],
)
def test_a_base_url_may_end_in_many_ways(rank: Rank, stub: Stub, suffix: str, path: str) -> None:
    """With or without /v1, /rerank and slashes, requests reach the same place."""
    rank(RegoloClient(KEY, base_url=f" {stub.url}{suffix} "), "q", ["a"])
    assert stub.received[0].path == path


def test_the_environment_names_the_server(rank: Rank, stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    """REGOLO_BASE_URL is read at the call, and a wrong one is named."""
    client = RegoloClient(KEY)
    monkeypatch.setenv("REGOLO_BASE_URL", stub.url)
    rank(client, "q", ["a"])
    assert len(stub.received) == 1
    monkeypatch.setenv("REGOLO_BASE_URL", "ftp://x")
    with pytest.raises(InvalidInputError, match="REGOLO_BASE_URL: must start with"):
        rank(client, "q", ["a"])


def test_headers_of_the_callers_own_go_along(rank: Rank, stub: Stub) -> None:
    """default_headers are sent with each request."""
    rank(RegoloClient(KEY, base_url=stub.url, default_headers={"X-Team": "search"}), "q", ["a"])
    assert stub.received[0].headers["x-team"] == "search"


def test_loopback_is_never_proxied(rank: Rank, stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy in the environment does not stand between this machine and itself."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    assert rank(RegoloClient(KEY, base_url=stub.url), "q", ["a"]).results


def test_other_hosts_are_reached_through_the_environments_proxy(
    rank: Rank, stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proxy in the environment carries requests to other machines."""
    monkeypatch.setenv("HTTP_PROXY", stub.url)
    rank(RegoloClient(base_url="http://rerank.invalid/v1", max_retries=0), "q", ["a"])
    assert stub.received[0].path == "http://rerank.invalid/v1/rerank"


@pytest.mark.parametrize(
    ("variable", "value"),
    [("HTTPS_PROXY", "nonsense://x"), ("SSL_CERT_FILE", "/nonexistent"), ("SSL_CERT_FILE", __file__)],
)
def test_an_environment_that_cannot_be_used_is_an_error_of_ours(
    rank: Rank, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    """A malformed proxy or certificate in the environment is named, and nothing is retried."""
    monkeypatch.setenv(variable, value)
    monkeypatch.setattr(pools, "_ssl_context", pools._ssl_context.__wrapped__)
    with pytest.raises(APIConnectionError, match="proxies or certificates cannot be used"):
        rank(RegoloClient(KEY), "q", ["a"])


# --- retries ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504, 529])
def test_a_passing_error_is_retried(rank: Rank, client: RegoloClient, stub: Stub, status: int) -> None:
    """After an error that may pass, the same request is sent again."""
    stub.script(error("no", status), error("no", status))
    assert pairs(rank(client, "q", ["a score=1"]).results) == [(0, 1.0)]
    assert [request.json for request in stub.received] == [stub.received[0].json] * 3


@pytest.mark.parametrize("status", [300, 400, 401, 402, 403, 404, 405, 409, 413, 422])
def test_a_lasting_error_is_not_retried(rank: Rank, client: RegoloClient, stub: Stub, status: int) -> None:
    """An error that another attempt cannot mend is raised at once."""
    stub.always(error("no", status))
    with pytest.raises(APIStatusError, match="no") as caught:
        rank(client, "q", ["a"])
    assert caught.value.status_code == status
    assert len(stub.received) == 1


def test_nothing_at_the_address_names_the_address(rank: Rank, client: RegoloClient, stub: Stub) -> None:
    """A 404 says which URL was asked, and which option names it."""
    stub.always(Reply({"detail": "Not Found"}, 404))
    with pytest.raises(NotFoundError, match=rf"Not Found \[HTTP 404\]; .* {stub.url}/rerank: see base_url"):
        rank(client, "q", ["a"])


def test_a_spent_budget_is_not_retried(rank: Rank, client: RegoloClient, stub: Stub) -> None:
    """A budget that is exceeded stays so, whatever status says it."""
    stub.always(error("Budget has been exceeded!", 429, type="budget_exceeded"))
    with pytest.raises(RateLimitError, match="Budget"):
        rank(client, "q", ["a"])
    assert len(stub.received) == 1


@pytest.mark.parametrize("max_retries", [0, 2])
def test_attempts_are_counted(rank: Rank, stub: Stub, max_retries: int) -> None:
    """At most max_retries + 1 requests are sent, and the last error is raised as it is."""
    stub.always(error("down", 503))
    with pytest.raises(ServerError, match=r"down \[HTTP 503\]") as caught:
        rank(RegoloClient(KEY, base_url=stub.url, max_retries=max_retries), "q", ["a"])
    assert caught.value.body.startswith('{"error"')
    assert len(stub.received) == max_retries + 1


@pytest.mark.parametrize(
    ("headers", "waited"),
    [
        ({"retry-after": "0.3"}, 0.3),
        ({"retry-after-ms": "300", "retry-after": "60"}, 0.3),
        ({"retry-after": "Mon, 23 Nov 2026 10:00:01 GMT", "date": "Mon, 23 Nov 2026 10:00:00 GMT"}, 1.0),
        ({"retry-after": "Mon, 23 Nov 2020 10:00:01 GMT"}, 0.0),
    ],
)
def test_the_wait_that_the_server_names_is_kept(
    rank: Rank, client: RegoloClient, stub: Stub, headers: dict[str, str], waited: float
) -> None:
    """Retry-After in seconds, in milliseconds and as a date is waited for, and not for long more."""
    stub.script(Reply({"error": "slow down"}, 429, headers))
    rank(client, "q", ["a"])
    first, second = stub.received
    assert waited <= second.at - first.at < waited + 2


def test_a_wait_past_the_bound_fails_at_once(rank: Rank, client: RegoloClient, stub: Stub) -> None:
    """Where the server asks to wait past max_retry_seconds, its word is raised instead of waited for."""
    stub.always(error("come back tomorrow", 429, retry_after_ms=86_400_000))
    started = time.monotonic()
    with pytest.raises(RateLimitError, match="come back tomorrow") as caught:
        rank(client, "q", ["a"])
    assert time.monotonic() - started < 5
    assert caught.value.retry_after == 86_400
    assert len(stub.received) == 1


def test_the_bound_holds_over_all_attempts(rank: Rank, stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    """No attempt starts later than max_retry_seconds after the first."""
    monkeypatch.setattr(backoff, "_BACKOFF", wait_fixed(0.25))
    stub.always(Reply({"error": "down"}, 500))
    with pytest.raises(ServerError):
        rank(RegoloClient(KEY, base_url=stub.url, max_retry_seconds=0.6, max_retries=50), "q", ["a"])
    assert 2 <= len(stub.received) <= 3  # the fourth would start after 0.75 s


@pytest.mark.real_backoff
def test_backoff_grows_and_is_random(rank: Rank, client: RegoloClient, stub: Stub) -> None:
    """Without a word from the server, at least a quarter of a second passes before the next attempt."""
    stub.script(Reply({"error": "down"}, 500))
    rank(client, "q", ["a"])
    assert 0.25 <= stub.received[1].at - stub.received[0].at < 3


def test_one_refusal_holds_the_other_requests_back(rank: Rank, stub: Stub) -> None:
    """After a 429 no request of the client is sent until the time that the server named."""
    stub.reply = lambda request: Reply(scored(request).body, delay=0.1)
    stub.script(Reply({"error": "slow down"}, 429, {"retry-after": "0.4"}))
    client = RegoloClient(KEY, base_url=stub.url, batch_size=1, max_concurrency=3)
    rank(client, "q", texts(7))
    refused = stub.received[0].at
    assert len(stub.received) == 8
    assert sum(request.at - refused < 0.4 for request in stub.received) <= 3  # those that were in flight together


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
    monkeypatch.setattr(calls, "_FORGETS_AFTER", 0.25)
    service = Lagging(1, until=16)
    stub.reply = service
    rank(RegoloClient(KEY, base_url=stub.url, batch_size=1, max_concurrency=1), "q", texts(16))
    assert 2 <= service.refused <= 10  # 15 if nobody ever rested


def test_a_limit_that_is_lifted_is_found_out(rank: Rank, stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some time after a refusal one more request of the same call is tried at once, and then another."""
    monkeypatch.setattr(calls, "_FORGETS_AFTER", 0.05)
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


def test_the_first_final_failure_stops_the_rest(rank: Rank, stub: Stub) -> None:
    """With a wrong key no more requests are sent than were in flight at once, and its own error is raised."""
    stub.always(Reply({"error": {"message": "wrong key"}}, 401, delay=0.02))
    with pytest.raises(AuthenticationError, match="wrong key"):
        rank(RegoloClient(KEY, base_url=stub.url, batch_size=1, max_concurrency=4), "q", texts(50))
    assert len(stub.received) <= 4


def test_a_request_waiting_to_be_retried_is_given_up_with_its_call(stub: Stub) -> None:
    """A thread that waits for its next attempt sends nothing any more once the call has failed."""

    def reply(request: Received) -> Reply:
        if "document 0" in request.documents[0]:
            return Reply({"error": "down"}, 503, {"retry-after": "0.3"})
        return Reply({"error": "wrong key"}, 401, delay=0.1)

    stub.reply = reply
    with pytest.raises(AuthenticationError):
        RegoloClient(KEY, base_url=stub.url, batch_size=1).rerank("q", texts(2))
    time.sleep(0.4)
    assert len(stub.received) == 2


def test_a_request_that_cannot_be_sent_is_not_tried_again(mode: str, stub: Stub) -> None:
    """A header of the caller's own http client that HTTP does not allow fails at once."""
    illegal = {"x-mine": "a\nb"}
    options: dict[str, Any] = {"api_key": KEY, "base_url": stub.url, "max_retries": 10**9}

    def call() -> None:
        with httpx.Client(headers=illegal) as mine:
            RegoloClient(http_client=mine, **options).rerank("q", ["a"])

    async def acall() -> None:
        async with httpx.AsyncClient(headers=illegal) as mine:
            await RegoloClient(async_http_client=mine, **options).arerank("q", ["a"])

    with pytest.raises(APIConnectionError, match="Illegal header"):
        call() if mode == "sync" else asyncio.run(acall())
    assert not stub.received


def test_a_failed_call_says_nothing_more(stub: Stub, caplog: pytest.LogCaptureFixture) -> None:
    """A thread whose request fails after its call has failed elsewhere ends without a word of further attempts."""

    def reply(request: Received) -> Reply:
        if "document 0" in request.documents[0]:
            return Reply({"error": "down"}, 503, delay=0.2)
        return Reply({"error": "wrong key"}, 401, delay=0.05)

    stub.reply = reply
    with pytest.raises(AuthenticationError):
        RegoloClient(KEY, base_url=stub.url, batch_size=1).rerank("q", texts(2))
    time.sleep(0.3)
    assert len(stub.received) == 2
    assert "attempt" not in caplog.text


# --- time, size and connections ---------------------------------------------------------------------------------------


def test_a_slow_server_is_a_timeout(rank: Rank, stub: Stub) -> None:
    """An attempt that takes longer than timeout is an APITimeoutError."""
    stub.always(Reply(results((0, 1.0)), delay=0.5))
    with pytest.raises(APITimeoutError, match="within the timeout"):
        rank(RegoloClient(KEY, base_url=stub.url, timeout=0.1, max_retries=0), "q", ["a"])


def test_nobody_there_is_a_connection_error(rank: Rank) -> None:
    """A refused connection is retried and then an APIConnectionError that names the host."""
    with Stub() as gone:
        client = RegoloClient(KEY, base_url=gone.url)
    with pytest.raises(APIConnectionError, match=r"127\.0\.0\.1:\d+"):
        rank(client, "q", ["a"])


def test_an_endless_reply_is_refused(
    rank: Rank, client: RegoloClient, stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reply over the limit of bytes is refused while it is read."""
    monkeypatch.setattr(calls, "MAX_REPLY_BYTES", 10_000)
    client.max_retries = 0
    stub.always(Reply(results((0, 1.0), filler="x" * 20_000)))
    with pytest.raises(APIResponseError, match="larger than 10000 bytes"):
        rank(client, "q", ["a"])


def test_a_body_that_cannot_be_decompressed_is_refused(rank: Rank, client: RegoloClient, stub: Stub) -> None:
    """Broken gzip is an untrustworthy reply, tried again and then refused."""
    stub.script(Reply(b"not gzip", headers={"content-encoding": "gzip"}))
    assert rank(client, "q", ["a"]).results
    stub.always(Reply(b"not gzip", headers={"content-encoding": "gzip"}))
    with pytest.raises(APIResponseError, match="cannot be decompressed"):
        rank(client, "q", ["a"])


def test_redirects_are_not_followed(rank: Rank, client: RegoloClient, stub: Stub) -> None:
    """A redirect is an error that says where the server points, and the key stays here."""
    with Stub() as elsewhere:
        stub.always(Reply(b"", 307, {"location": f"{elsewhere.url}/rerank"}))
        with pytest.raises(APIStatusError, match="redirects are not followed: set base_url"):
            rank(client, "q", ["a"])
        assert not elsewhere.received


def test_connections_are_kept_across_calls(mode: str, client: RegoloClient, stub: Stub) -> None:
    """Calls in a row share one connection, and a closed client opens a new one."""

    async def twice() -> None:
        await client.arerank("q", ["a"])
        await client.arerank("q", ["a"])
        await client.aclose()
        await client.arerank("q", ["a"])

    if mode == "async":
        asyncio.run(twice())
    else:
        client.rerank("q", ["a"])
        client.rerank("q", ["a"])
        client.close()
        client.rerank("q", ["a"])
    assert stub.connections == 2


def test_sync_calls_work_inside_a_running_loop(stub: Stub) -> None:
    """A sync call starts no event loop, so it works where one is running, as in a notebook."""

    async def inside() -> RerankResponse:
        with RegoloClient(KEY, base_url=stub.url, batch_size=1) as client:
            return client.rerank("q", texts(3))

    assert len(asyncio.run(inside()).results) == 3


def test_the_client_is_an_async_context_manager(stub: Stub) -> None:
    """Leaving the block closes the loop's connections."""

    async def inside() -> int:
        async with RegoloClient(KEY, base_url=stub.url) as client:
            await client.arerank("q", ["a"])
            client.rerank("q", ["a"])
        return len(client._pools._loops) + len(client._pools._pools)

    assert asyncio.run(inside()) == 0


@pytest.mark.parametrize("seconds", [0.1, 5.0])
def test_the_callers_own_http_client_counts(mode: str, stub: Stub, seconds: float) -> None:
    """The caller's client is used with its own timeout, and is left open."""
    stub.always(Reply(results((0, 1.0)), delay=0.3))
    options: dict[str, Any] = {"api_key": KEY, "base_url": stub.url, "max_retries": 0, "timeout": 0.01}

    def called() -> RerankResponse:
        with httpx.Client(timeout=seconds, headers={"x-mine": "1"}) as mine:
            with RegoloClient(http_client=mine, **options) as client:
                response = client.rerank("q", ["a"])
            assert not mine.is_closed
            return response

    async def acalled() -> RerankResponse:
        async with httpx.AsyncClient(timeout=seconds, headers={"x-mine": "1"}) as mine:
            async with RegoloClient(async_http_client=mine, **options) as client:
                response = await client.arerank("q", ["a"])
            assert not mine.is_closed
            return response

    def call() -> RerankResponse:
        return called() if mode == "sync" else asyncio.run(acalled())

    if seconds < 0.3:
        with pytest.raises(APITimeoutError):
            call()
    else:
        assert len(call().results) == 1
    assert stub.received[0].headers["x-mine"] == "1"


def test_a_closed_http_client_is_an_error_that_says_so(mode: str, stub: Stub) -> None:
    """A caller's client that is closed is named, and not tried again."""
    closed, aclosed = httpx.Client(), httpx.AsyncClient()
    closed.close()
    asyncio.run(aclosed.aclose())
    client = RegoloClient(KEY, base_url=stub.url, http_client=closed, async_http_client=aclosed)
    with pytest.raises(APIConnectionError, match="closed"):
        client.rerank("q", ["a"]) if mode == "sync" else asyncio.run(client.arerank("q", ["a"]))


def test_an_async_http_client_in_a_second_loop_is_an_error_that_says_so(stub: Stub) -> None:
    """A caller's async client with a connection of another event loop is named, and not tried again."""
    mine = httpx.AsyncClient()
    client = RegoloClient(KEY, base_url=stub.url, async_http_client=mine)
    loop = asyncio.new_event_loop()
    loop.run_until_complete(client.arerank("q", ["a"]))
    with pytest.raises(APIConnectionError, match="event loop"):
        asyncio.run(client.arerank("q", ["a"]))
    loop.run_until_complete(mine.aclose())
    loop.close()


@pytest.mark.parametrize("option", ["http_client", "async_http_client"])
def test_the_embedded_endpoint_takes_no_http_client(rank: Rank, option: str) -> None:
    """A client that could not be used is refused."""
    mine: dict[str, Any] = {option: httpx.Client() if option == "http_client" else httpx.AsyncClient()}
    with pytest.raises(InvalidInputError, match="http_client: not with base_url='local://'"):
        rank(RegoloClient(base_url="local://", **mine), "q", ["a"])


def test_a_clear_text_proxy_does_not_see_the_key(mode: str, stub: Stub) -> None:
    """The key goes over http to this machine, but not by way of a caller's proxy, except with allow_http."""

    def call(**options: Any) -> RerankResponse:
        with httpx.Client(proxy=stub.url) as mine:
            return RegoloClient(base_url="http://127.0.0.1:9", http_client=mine, **options).rerank("q", ["a"])

    async def acall(**options: Any) -> RerankResponse:
        async with httpx.AsyncClient(proxy=stub.url) as mine:
            return await RegoloClient(base_url="http://127.0.0.1:9", async_http_client=mine, **options).arerank(
                "q", ["a"]
            )

    def ranked(**options: Any) -> RerankResponse:
        return call(**options) if mode == "sync" else asyncio.run(acall(**options))

    with pytest.raises(InvalidInputError, match="proxy would see the API key"):
        ranked(api_key=KEY)
    assert not stub.received
    assert ranked(api_key=KEY, allow_http=True).results
    assert ranked(api_key="").results


# --- long documents ---------------------------------------------------------------------------------------------------


def test_long_documents_are_cut_for_scoring_only(rank: Rank, stub: Stub) -> None:
    """max_document_chars cuts what is sent; the caller's document comes back whole, and a blank cut is blank."""
    client = RegoloClient(KEY, base_url=stub.url, max_document_chars=5, prompt_format="plain")
    documents = ["abcdefgh", "abcdeXYZ", "     late"]
    response = rank(client, "q", documents)
    assert stub.documents == [["abcde"]]
    assert [result.document for result in response.results] == documents


# --- what is said -----------------------------------------------------------------------------------------------------


def test_every_request_is_logged(rank: Rank, stub: Stub, caplog: pytest.LogCaptureFixture) -> None:
    """Each request is a line at DEBUG, with its reply's name or what came in its place; each repeated one a WARNING."""

    def reply(request: Received) -> Reply:
        if "document 1 " in request.documents[0] and len(stub.received) == 2:
            raise ConnectionAbortedError
        return Reply(scored(request).body, headers={"x-litellm-call-id": f"call-{len(stub.received)}"})

    stub.reply = reply
    with caplog.at_level(logging.DEBUG, "regolo_rerank"):
        rank(RegoloClient(KEY, base_url=stub.url, batch_size=1, max_concurrency=1), "q", texts(3))
    said = [(record.levelname, record.getMessage()) for record in caplog.records if record.name == "regolo_rerank"]
    expected = [
        ("DEBUG", "answered 200 to 1 documents, request call-1"),
        ("DEBUG", "has not answered to 1 documents: no complete reply from"),
        ("WARNING", "attempt 1 failed, next in 0.00 s: APIConnectionError: no complete reply from"),
        ("DEBUG", "answered 200 to 1 documents, request call-3"),
        ("DEBUG", "answered 200 to 1 documents, request call-4"),
    ]
    assert [level for level, _ in said] == [level for level, _ in expected]
    assert all(words in message for (_, message), (_, words) in zip(said, expected, strict=True))


def test_a_batch_that_is_handed_on_is_logged(rank: Rank, stub: Stub, caplog: pytest.LogCaptureFixture) -> None:
    """A request that another worker sends again is a line at WARNING too."""
    stub.script(crowded(1))
    rank(RegoloClient(KEY, base_url=stub.url, batch_size=1, max_concurrency=2), "q", texts(3))
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(said) == 1
    assert said[0].startswith("attempt 1 failed, next by another worker: Limit type: max_parallel_requests")


def test_every_error_is_one_of_ours(rank: Rank, client: RegoloClient, stub: Stub) -> None:
    """Whatever a server says, a RegoloError comes out."""
    client.max_retries = 0
    for status, body in itertools.product(
        (200, 302, 418, 599), (b"", b"\xff\xfe", b"[1]", b"<html>", b'{"a":' * 9_999)
    ):
        stub.always(Reply(body, status))
        with pytest.raises(RegoloError):
            rank(client, "q", ["a"])


# --- what stays whole -------------------------------------------------------------------------------------------------


def test_the_callers_own_exceptions_are_left_alone(rank: Rank) -> None:
    """An error inside an `except` block forgets its own frames, not those of what the caller is handling."""

    def fail() -> None:
        precious = "kept"
        problem = ValueError(precious)
        raise problem from problem

    client = RegoloClient(base_url="http://127.0.0.1:9", max_retries=0)
    try:
        fail()
    except ValueError as handled:
        with pytest.raises(APIConnectionError):
            rank(client, "q", ["a"])
        traceback = handled.__traceback__
        assert traceback is not None
        assert traceback.tb_next is not None
        assert traceback.tb_next.tb_frame.f_locals["precious"] == "kept"


def test_a_thread_that_cannot_start_is_an_error_of_ours(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the machine has no more threads, nothing more is sent, and the error says what to lower."""
    real, started = threading.Thread.start, itertools.count()

    def start(thread: threading.Thread) -> None:
        if thread.name == "regolo_rerank" and next(started) == 2:
            raise RuntimeError("can't start new thread")
        real(thread)

    stub.reply = lambda request: Reply(scored(request).body, delay=0.1)
    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(APIConnectionError, match="can't start new thread; lower max_concurrency"):
        RegoloClient(KEY, base_url=stub.url, batch_size=1).rerank("q", texts(20))
    time.sleep(0.3)
    assert len(stub.received) <= 2


def test_closing_waits_for_async_calls_under_way(stub: Stub) -> None:
    """A call that is under way when its client is closed comes to its end; later ones share one new pool."""
    stub.reply = lambda request: Reply(scored(request).body, delay=0.2)

    async def main() -> list[RerankResponse]:
        client = RegoloClient(KEY, base_url=stub.url, batch_size=1, max_concurrency=1, max_retries=0)
        call = asyncio.create_task(client.arerank("q", texts(2)))
        await asyncio.sleep(0.1)
        await client.aclose()
        later = await client.arerank("q", texts(1))
        first = await call
        last = await client.arerank("q", texts(1))
        await client.aclose()
        return [first, later, last]

    assert [len(response.results) for response in asyncio.run(main())] == [2, 1, 1]
    assert stub.connections == 2


def test_a_worker_that_somebody_cancels_cancels_the_call(stub: Stub) -> None:
    """A call never comes back without one of its batches."""
    stub.reply = lambda request: Reply(scored(request).body, delay=0.2)

    async def main() -> None:
        async with RegoloClient(KEY, base_url=stub.url, batch_size=1) as client:
            before = asyncio.all_tasks()
            call = asyncio.create_task(client.arerank("q", texts(3)))
            await asyncio.sleep(0.1)
            next(iter(asyncio.all_tasks() - before - {call})).cancel()
            await call

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(main())


@pytest.mark.parametrize("value", [float("nan"), object(), {"documents": ["x"]}])
def test_an_extra_body_that_was_changed_in_place_is_checked_again(rank: Rank, stub: Stub, value: Any) -> None:
    """What no check has seen is not sent, and never replaces the documents."""
    client = RegoloClient(KEY, base_url=stub.url, extra_body={"x": 1})
    assert client.extra_body is not None
    client.extra_body.update(value if isinstance(value, dict) else {"x": value})
    with pytest.raises(InvalidInputError, match="extra_body: must"):
        rank(client, "q", ["a"])
    assert not stub.received


def test_waiting_at_the_gate_uses_up_no_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that was held back several times before it was sent waits as after a first refusal."""
    patience = retry.Patience(Options(), retry.Gate())
    patience.before_sending()
    state = RetryCallState(Retrying(), None, (), {})
    state.attempt_number = 5
    state.outcome = Future(5)
    state.outcome.set_exception(RateLimitError("Rate limit exceeded", status_code=429))
    monkeypatch.setattr(backoff, "_WINDOW_BACKOFF", lambda state: float(state.attempt_number))
    assert backoff.again(patience, threading.Event()).wait(state) == 1.0
