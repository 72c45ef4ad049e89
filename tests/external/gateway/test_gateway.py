import asyncio
import importlib.util
import time
from collections.abc import Callable
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from langchain_core.documents import Document
from llama_index.core.schema import NodeWithScore, TextNode

from regolo_rerank import AuthenticationError, BadRequestError, RateLimitError, RegoloClient, ServerError
from regolo_rerank.langchain import RegoloRerank as LangChainRerank
from regolo_rerank.llama_index import RegoloRerank as LlamaIndexRerank
from tests.conftest import Rank
from tests.external.gateway.conftest import OPEN, WINDOW, Gateway
from tests.support.stub import Reply, Stub, error, pairs, scored

if importlib.util.find_spec("litellm") is None:
    pytest.skip('the gateway is not installed: python3 -m pip install -e ".[gateway]"', allow_module_level=True)

pytestmark = pytest.mark.timeout(180)  # the first test waits for the gateway to start

QUERY = "Qual è la capitale della Cina? 中国的首都"
TEXTS = ["Rome\nis in Italy", "Beijing 北京 🐉", "pizza", 'a "quoted" {brace} \\n', "pizza", "torta \x00 dolce"]
MANY = [f"document {number}" for number in range(1000)]

Ranked = Callable[[str], list[tuple[str, float | None]]]


@pytest.fixture(params=["core", "langchain", "llama_index"])
def ranked(request: pytest.FixtureRequest, mode: str) -> Ranked:
    """Rank `TEXTS` at a base URL, with the core and with both adapters."""

    def call(base_url: str) -> list[tuple[str, float | None]]:
        options: dict[str, Any] = {
            "api_key": OPEN,
            "base_url": base_url,
            "prompt_format": "plain",
            "batch_size": 2,
            "top_n": 4,
        }
        if request.param == "core":
            client = RegoloClient(**options)
            response = client.rerank(QUERY, TEXTS) if mode == "sync" else asyncio.run(client.arerank(QUERY, TEXTS))
            return [(result.document, result.relevance_score) for result in response.results]
        if request.param == "langchain":
            compressor, documents = LangChainRerank(**options), [Document(text) for text in TEXTS]
            kept = (
                compressor.compress_documents(documents, QUERY)
                if mode == "sync"
                else asyncio.run(compressor.acompress_documents(documents, QUERY))
            )
            return [(document.page_content, document.metadata["relevance_score"]) for document in kept]
        postprocessor, nodes = LlamaIndexRerank(**options), [NodeWithScore(node=TextNode(text=text)) for text in TEXTS]
        found = (
            postprocessor.postprocess_nodes(nodes, query_str=QUERY)
            if mode == "sync"
            else asyncio.run(postprocessor.apostprocess_nodes(nodes, query_str=QUERY))
        )
        return [(node.text, node.score) for node in found]

    return call


def limited(limit: str) -> str:
    """Return a key with one of the limits in auth.py, and with nothing on its count."""
    return f"sk-{limit}-{uuid4().hex}"


def direct(upstream: Stub, documents: list[str]) -> list[tuple[int, float]]:
    """Return how the server behind the gateway ranks documents, asked in one request and without this package."""
    body = {"model": "any", "query": QUERY, "documents": documents}
    reply = httpx.post(f"{upstream.url}/v2/rerank", json=body, trust_env=False).json()
    upstream.received.clear()
    return [(result["index"], result["relevance_score"]) for result in reply["results"]]


def test_the_ranking_is_the_one_of_the_server_behind_it(ranked: Ranked, gateway: Gateway, upstream: Stub) -> None:
    """The best documents come back in the order and with the scores that the server behind the gateway gives them."""
    expected = direct(upstream, TEXTS)[:4]
    assert ranked(gateway.url) == [(TEXTS[index], score) for index, score in expected]
    assert gateway.statuses == [200, 200, 200]


def test_each_request_has_the_gateways_name(rank: Rank, gateway: Gateway) -> None:
    """`request_ids` holds what the gateway calls each request, as it was asked to; an error names its own."""
    with RegoloClient(OPEN, base_url=gateway.url, batch_size=2) as client:
        request_ids = rank(client, QUERY, MANY[:6]).request_ids
        with pytest.raises(BadRequestError) as caught:
            rank(client, QUERY, TEXTS, model="no-such-model")
    names = [*request_ids, str(caught.value.request_id)]
    assert len({UUID(name.removeprefix("regolo_rerank-")) for name in names}) == 4
    assert all(name.startswith("regolo_rerank-") for name in request_ids)


def test_a_wrong_key_is_refused(rank: Rank, gateway: Gateway, upstream: Stub) -> None:
    """A wrong key is an AuthenticationError at once, and does not show in it."""
    with RegoloClient("sk-wrong-4f1d", base_url=gateway.url) as client, pytest.raises(AuthenticationError) as caught:
        rank(client, QUERY, TEXTS)
    assert "no such key" in str(caught.value)
    assert "4f1d" not in str(caught.value) + caught.value.body
    assert (gateway.statuses, upstream.received) == ([401], [])


def test_an_unknown_model_is_refused(rank: Rank, gateway: Gateway, upstream: Stub) -> None:
    """An unknown model is a BadRequestError at once that names it."""
    with (
        RegoloClient(OPEN, base_url=gateway.url) as client,
        pytest.raises(BadRequestError, match="model=no-such-model"),
    ):
        rank(client, QUERY, TEXTS, model="no-such-model")
    assert (gateway.statuses, upstream.received) == ([400], [])


def test_batches_add_up_to_one_ranking(rank: Rank, gateway: Gateway, upstream: Stub) -> None:
    """1,000 documents in 20 requests rank exactly as in a single one without the gateway."""
    expected = direct(upstream, MANY)
    with RegoloClient(OPEN, base_url=gateway.url, prompt_format="plain", batch_size=50) as client:
        response = rank(client, QUERY, MANY)
    assert pairs(response.results) == expected
    assert gateway.statuses == [200] * 20
    assert sorted(map(len, upstream.documents)) == [50] * 20


def test_a_limit_on_requests_is_told_at_once(rank: Rank, gateway: Gateway, upstream: Stub) -> None:
    """Where the gateway's window outlasts the patience, its words and its wait are raised without another request."""
    key = limited("five-a-window")
    with (
        RegoloClient(key, base_url=gateway.url, batch_size=1, max_concurrency=1, max_retry_seconds=1.0) as client,
        pytest.raises(RateLimitError, match=r"Limit type: requests\. .*Limit resets at: ") as caught,
    ):
        rank(client, QUERY, MANY[:6])
    assert caught.value.retry_after == pytest.approx(WINDOW, abs=2)
    assert gateway.statuses == [200] * 5 + [429]
    assert len(upstream.received) == 5


def test_a_limit_on_requests_is_waited_for(rank: Rank, gateway: Gateway, upstream: Stub) -> None:
    """Where the patience outlasts the gateway's window, the whole ranking comes out."""
    expected = direct(upstream, MANY[:8])
    key = limited("five-a-window")
    with RegoloClient(key, base_url=gateway.url, prompt_format="plain", batch_size=1, max_retry_seconds=30.0) as client:
        assert pairs(rank(client, QUERY, MANY[:8]).results) == expected
    assert gateway.statuses.count(200) == 8
    assert set(gateway.statuses) == {200, 429}
    assert len(upstream.received) == 8


@pytest.mark.real_backoff
def test_a_limit_on_parallel_requests_loses_nothing(rank: Rank, gateway: Gateway, upstream: Stub) -> None:
    """With four requests in flight where two may be, the whole ranking comes out, and few requests are refused."""
    expected = direct(upstream, MANY)
    upstream.reply = lambda request: Reply(scored(request).body, delay=0.2)
    key = limited("two-at-once")
    with RegoloClient(key, base_url=gateway.url, prompt_format="plain", batch_size=50, max_concurrency=4) as client:
        response = rank(client, QUERY, MANY)
    assert pairs(response.results) == expected
    assert gateway.statuses.count(200) == len(upstream.received) == 20
    assert 1 <= gateway.statuses.count(429) <= 10  # two leave, and two learn that the gateway counts for a moment more
    assert set(gateway.statuses) == {200, 429}
    assert response.usage.requests == len(gateway.statuses)


def test_a_failure_behind_the_gateway_passes(rank: Rank, gateway: Gateway, upstream: Stub) -> None:
    """A request that failed behind the gateway is sent again, and its ranking comes out."""
    expected = direct(upstream, TEXTS)
    upstream.script(error("out of memory", 500, None))
    with RegoloClient(OPEN, base_url=gateway.url, prompt_format="plain") as client:
        assert pairs(rank(client, QUERY, TEXTS).results) == expected
    assert gateway.statuses == [500, 200]


def test_nobody_behind_the_gateway(rank: Rank, gateway: Gateway) -> None:
    """Where nobody answers the gateway, its 500 is raised after `max_retries` further attempts."""
    with (
        RegoloClient(OPEN, base_url=gateway.url, model="down", max_retries=2) as client,
        pytest.raises(ServerError, match="Cannot connect to host") as caught,
    ):
        rank(client, QUERY, TEXTS)
    assert caught.value.status_code == 500
    assert gateway.statuses == [500, 500, 500]


def test_the_gateways_own_timeout(rank: Rank, gateway: Gateway, upstream: Stub) -> None:
    """Where the gateway gives up on a slow server, its 408 is raised after `max_retries` further attempts."""
    upstream.reply = lambda request: Reply(scored(request).body, delay=10.0)
    started = time.monotonic()
    with (
        RegoloClient(OPEN, base_url=gateway.url, model="impatient", max_retries=1) as client,
        pytest.raises(ServerError, match="Connection timed out") as caught,
    ):
        rank(client, QUERY, TEXTS)
    assert caught.value.status_code == 408
    assert time.monotonic() - started < 10.0
    assert gateway.statuses == [408, 408]
    assert len(upstream.received) == 2
