import importlib.util
from collections.abc import Callable

import pytest

from regolo_rerank import APIResponseError, RegoloClient, RerankSubstituteWarning, ServerError
from tests.conftest import Rank
from tests.external.gateway.conftest import OPEN, Gateway
from tests.support.many import Many
from tests.support.stub import Received, Reply, Stub, error, pairs, scored, texts

if importlib.util.find_spec("litellm") is None:
    pytest.skip('the gateway is not installed: python3 -m pip install -e ".[gateway]"', allow_module_level=True)

pytestmark = pytest.mark.timeout(180)  # the first test waits for the gateway to start

BOTH = "'replaced' was asked for, and 'substitute' has answered in its place"


def down_for(text: str) -> Callable[[Received], Reply]:
    """Let the model that may be replaced fail for documents that hold a text, and every other model answer."""

    def reply(request: Received) -> Reply:
        fails = request.json["model"] == "replaced" and any(text in document for document in request.documents)
        return error("out of memory", 500, None) if fails else scored(request)

    return reply


@pytest.fixture
def client(gateway: Gateway) -> RegoloClient:
    """A client that asks for a model that the gateway may replace, a request for each document."""
    return RegoloClient(OPEN, base_url=gateway.url, model="replaced", batch_size=1, max_retries=0)


def test_a_substitute_is_refused(rank: Rank, client: RegoloClient, gateway: Gateway, upstream: Stub) -> None:
    """What the gateway calls a success is an error here that names both models and the request."""
    upstream.reply = down_for("document 0")
    with pytest.raises(APIResponseError, match=BOTH) as caught:
        rank(client, "q", texts(1))
    assert caught.value.request_id
    assert gateway.statuses == [200]


def test_a_part_of_a_ranking_is_refused(rank: Rank, client: RegoloClient, upstream: Stub) -> None:
    """Where the gateway falls back for one of several batches there is no ranking, substitutes allowed or not."""
    upstream.reply = down_for("document 2")
    with pytest.raises(APIResponseError, match=BOTH):
        rank(client, "q", texts(4))
    client.allow_substitutes = True
    with pytest.raises(APIResponseError, match=r"scores come from '(replaced|substitute)' and from"):
        rank(client, "q", texts(4))


def test_the_model_that_comes_back_is_believed(rank: Rank, client: RegoloClient, upstream: Stub) -> None:
    """A request that a substitute has answered is sent again, and the model itself ranks."""
    client.max_retries = 1
    upstream.script(error("out of memory", 500, None))
    response = rank(client, "q", texts(1))
    assert (pairs(response.results), response.model, response.usage.requests) == ([(0, 0.0)], "replaced", 2)


def test_a_whole_ranking_of_a_substitute_can_be_taken(rank: Rank, client: RegoloClient, upstream: Stub) -> None:
    """With `allow_substitutes` the ranking is the substitute's, is named so, and comes with a warning."""
    client.allow_substitutes = True
    upstream.reply = down_for("document")
    with pytest.warns(RerankSubstituteWarning, match="'replaced' was asked for"):
        response = rank(client, "q", texts(4))
    assert response.model == "substitute"
    assert [result.index for result in response.results] == [3, 2, 1, 0]


def test_only_the_query_that_a_substitute_has_answered_fails(mode: str, client: RegoloClient, upstream: Stub) -> None:
    """In `rerank_many` each query has one model or an error in its place."""
    upstream.reply = down_for("document 1")
    queries = [("q", [document]) for document in texts(3)]
    outcomes = Many(mode)(client, queries, return_exceptions=True)
    assert [getattr(outcome, "model", None) for outcome in outcomes] == ["replaced", None, "replaced"]
    assert BOTH in str(outcomes[1])


def test_the_gateway_can_be_told_not_to_fall_back(
    rank: Rank, client: RegoloClient, gateway: Gateway, upstream: Stub
) -> None:
    """With `disable_fallbacks` in the request the failure is the 500 that it is, and the substitute is not asked."""
    client.extra_body = {"disable_fallbacks": True}
    upstream.reply = down_for("document")
    with pytest.raises(ServerError, match="out of memory"):
        rank(client, "q", texts(1))
    assert gateway.statuses == [500]
    assert [request.json["model"] for request in upstream.received] == ["replaced"]


def test_the_field_stays_in_the_gateway(rank: Rank, client: RegoloClient, upstream: Stub) -> None:
    """The server behind the gateway never sees `disable_fallbacks`."""
    client.extra_body = {"disable_fallbacks": True}
    assert rank(client, "q", texts(1)).model == "replaced"
    assert [sorted(request.json) for request in upstream.received] == [["documents", "model", "query"]]


def test_an_alias_is_no_substitute(rank: Rank, client: RegoloClient) -> None:
    """A model that answers to another name keeps the name that was asked for, and nothing is refused."""
    assert rank(client, "q", texts(1), model="alias").model == "alias"
