import json
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import httpx
import pytest

from regolo_rerank import APIResponseError, RegoloClient, RerankSubstituteWarning
from tests.conftest import KEY, Rank
from tests.support.entries import Entry
from tests.support.many import Many
from tests.support.stub import Received, Reply, Stub, pairs, results, scored, texts

MODEL = "Qwen3-Reranker-4B"
BOTH = "'Qwen3-Reranker-4B' was asked for, and 'other' has answered in its place"


def replaced(request: Received, name: str | None = "other", **headers: str) -> Reply:
    """Answer as a gateway does that has fallen back to another model."""
    group = {} if name is None else {"x-litellm-model-group": name}
    return Reply(scored(request).body, headers={"x-litellm-attempted-fallbacks": "1", **group, **headers})


def kept(request: Received) -> Reply:
    """Answer as a gateway does whose model is up."""
    headers = {"x-litellm-attempted-fallbacks": "0", "x-litellm-model-group": request.json["model"]}
    return Reply(scored(request).body, headers=headers)


def replaced_where(holds: Callable[[Received], bool]) -> Callable[[Received], Reply]:
    """Answer some requests with another model."""
    return lambda request: replaced(request) if holds(request) else kept(request)


@pytest.fixture
def trusting(stub: Stub) -> RegoloClient:
    """A client that takes what a substitute says, and sends a request for each document."""
    return RegoloClient(KEY, base_url=stub.url, allow_substitutes=True, batch_size=1)


def test_an_answer_of_another_model_is_refused(entry: Entry, stub: Stub) -> None:
    """By default the scores of a model that nobody asked for are an error that names both models, at every entry."""
    stub.reply = replaced
    with pytest.raises(APIResponseError, match=BOTH):
        entry(texts(3), max_retries=0)


def test_the_model_may_come_back(rank: Rank, client: RegoloClient, stub: Stub) -> None:
    """A request that another model has answered is sent again, and the ranking is the right model's."""
    stub.script(Reply(results((0, 0.9)), headers={"x-litellm-attempted-fallbacks": "1"}))
    stub.reply = kept
    response = rank(client, "q", ["a score=0.3"])
    assert (pairs(response.results), response.model, response.usage.requests) == ([(0, 0.3)], MODEL, 2)


def test_a_refusal_names_the_request_and_what_to_do(rank: Rank, client: RegoloClient, stub: Stub) -> None:
    """The error has the request's name, says which option would take the ranking, and comes after all attempts."""
    client.max_retries = 2
    stub.reply = lambda request: replaced(request, None, **{"x-litellm-call-id": "call-1"})
    with pytest.raises(APIResponseError, match=r"another model has answered .* option allow_substitutes") as caught:
        rank(client, "q", ["a"])
    assert caught.value.request_id == "call-1"
    assert len(stub.received) == 3


@pytest.mark.parametrize("fallbacks", ["0", "", "None", "-1", "nan", "9" * 5_000])
def test_only_a_number_above_zero_tells_of_a_substitute(
    rank: Rank, client: RegoloClient, stub: Stub, fallbacks: str
) -> None:
    """A model's name that is another one, as that of an alias, says nothing, and nor does a number that is none."""
    headers = {"x-litellm-attempted-fallbacks": fallbacks, "x-litellm-model-group": "Qwen/Alias"}
    stub.reply = lambda request: Reply(scored(request).body, headers=headers)
    assert rank(client, "q", ["a"]).model == "Qwen/Alias"


@pytest.mark.parametrize(
    ("headers", "fields", "model"),
    [
        ({}, {}, None),
        ({}, {"model": "in the body"}, "in the body"),
        ({}, {"model": ["odd"]}, None),
        ({"x-litellm-model-group": "in a header"}, {"model": "in the body"}, "in a header"),
        ({"x-litellm-model-group": f"{KEY}!"}, {}, "***!"),
        ({}, {"model": f"{KEY}!"}, "***!"),
    ],
)
def test_a_response_names_the_model_that_answered(
    rank: Rank, client: RegoloClient, stub: Stub, headers: dict[str, str], fields: dict[str, Any], model: str | None
) -> None:
    """`model` is what the server says, in a header as LiteLLM or in the body as vLLM, never the key, else None."""
    stub.reply = lambda request: Reply(json.loads(scored(request).encoded()) | fields, headers=headers)
    assert rank(client, "q", ["a"]).model == model
    assert rank(client, "q", []).model is None


def test_whole_rankings_of_a_substitute_are_taken_with_a_warning(
    rank: Rank, trusting: RegoloClient, stub: Stub
) -> None:
    """With allow_substitutes a call that one other model has answered is a ranking, and a warning names both models."""
    stub.reply = replaced
    with pytest.warns(RerankSubstituteWarning, match=r"'Qwen3-Reranker-4B' was asked for, .* that of 'other'"):
        response = rank(trusting, "q", texts(3))
    assert [result.index for result in response.results] == [2, 1, 0]
    assert response.model == "other"


@pytest.mark.parametrize(
    "other",
    [
        lambda request: replaced(request, "yet another"),
        kept,
        scored,
        lambda request: replaced(request, MODEL),
    ],
    ids=["two substitutes", "the model itself", "a model that is not named", "a substitute of the same name"],
)
def test_a_ranking_never_mixes_models(
    rank: Rank, trusting: RegoloClient, stub: Stub, other: Callable[[Received], Reply]
) -> None:
    """Where the batches of a call are answered by different models the call is an error, substitutes allowed or not."""
    stub.reply = lambda request: other(request) if "score=0.0" in request.documents[0] else replaced(request)
    with pytest.raises(APIResponseError, match=r"scores come from .*'other'.* on a scale of its own"):
        rank(trusting, "q", texts(3))


def test_replies_that_name_two_models_are_not_mixed(rank: Rank, client: RegoloClient, stub: Stub) -> None:
    """Two names are two models, even where no server tells of a substitute."""
    client.batch_size = 1
    stub.reply = lambda request: Reply(json.loads(scored(request).encoded()) | {"model": request.documents[0][-3:]})
    with pytest.raises(APIResponseError, match=r"scores come from '0\.0' and from '0\.5'"):
        rank(client, "q", texts(2))


@pytest.mark.filterwarnings("ignore::regolo_rerank.RerankSubstituteWarning")
def test_scores_of_a_substitute_are_not_cached(rank: Rank, trusting: RegoloClient, stub: Stub) -> None:
    """A ranking that was taken from a substitute leaves nothing in the cache: the next call asks again."""
    trusting.cache = {}
    stub.reply = replaced
    rank(trusting, "q", texts(2))
    assert trusting.cache == {}
    stub.reply = kept
    assert rank(trusting, "q", texts(2)).usage.requests == 2
    assert len(trusting.cache) == 2


@pytest.mark.parametrize("allowed", [False, True])
def test_a_call_that_mixes_models_caches_the_right_scores_only(
    rank: Rank, trusting: RegoloClient, stub: Stub, *, allowed: bool
) -> None:
    """Of a call that fails because a substitute has answered a part, the scores of the model itself are kept."""
    trusting.allow_substitutes, trusting.cache, trusting.max_retries, trusting.max_concurrency = allowed, {}, 0, 1
    stub.reply = replaced_where(lambda request: "document 1" in request.documents[0])
    with pytest.raises(APIResponseError):
        rank(trusting, "q", texts(2))
    assert list(trusting.cache.values()) == [0.0]


def test_cached_scores_are_not_mixed_with_those_of_a_substitute(rank: Rank, trusting: RegoloClient, stub: Stub) -> None:
    """What the cache holds are the model's own scores, so a substitute's cannot stand beside them."""
    trusting.cache = {}
    rank(trusting, "q", texts(2)[:1])
    stub.reply = replaced
    with pytest.raises(APIResponseError, match=rf"scores come from '{MODEL}' and from 'other'"):
        rank(trusting, "q", texts(2))


def test_each_of_many_queries_has_one_model(mode: str, client: RegoloClient, stub: Stub) -> None:
    """In `rerank_many` a query that a substitute has answered fails in its place, and the others are ranked."""
    client.max_retries = 0
    stub.reply = replaced_where(lambda request: request.json["query"].endswith("q1"))
    outcomes = Many(mode)(client, [(f"q{number}", texts(2)) for number in range(3)], return_exceptions=True)
    assert [getattr(outcome, "model", None) for outcome in outcomes] == [MODEL, None, MODEL]
    assert isinstance(outcomes[1], APIResponseError)


@pytest.mark.parametrize(
    ("base_url", "options", "sent"),
    [
        ("https://api.regolo.ai", {}, True),
        ("https://api.regolo.ai/custom-model/v1", {}, True),
        ("https://api.regolo.ai", {"allow_substitutes": True}, None),
        ("https://api.regolo.ai", {"extra_body": {"disable_fallbacks": False}}, False),
        ("https://gateway.example", {}, None),
        ("https://gateway.example", {"extra_body": {"disable_fallbacks": True}}, True),
    ],
)
def test_regolo_is_asked_for_no_substitute(
    base_url: str,
    options: dict[str, Any],
    sent: bool | None,
) -> None:
    """Requests to regolo.ai say `disable_fallbacks`, which its FAQ names; other servers might refuse the field."""
    seen: list[dict[str, Any]] = []

    def refuse(request: httpx.Request) -> httpx.Response:
        seen.append(json.loads(request.content))
        return httpx.Response(404)

    with httpx.Client(transport=httpx.MockTransport(refuse)) as http_client, suppress(Exception):
        RegoloClient(KEY, base_url=base_url, http_client=http_client, **options).rerank("q", ["a"])
    assert [body.get("disable_fallbacks") for body in seen] == [sent]


def test_what_is_known_does_not_depend_on_the_refusal_of_substitutes() -> None:
    """Scores that regolo.ai gave while substitutes were refused are known to a client that would take them."""

    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, content=scored(Received("POST", "", {}, request.content, 0.0)).encoded())

    with httpx.Client(transport=httpx.MockTransport(answer)) as http_client:
        client = RegoloClient(KEY, http_client=http_client, cache={})
        client.rerank("q", ["a"])
        client.allow_substitutes = True
        assert client.rerank("q", ["a"]).usage.requests == 0
