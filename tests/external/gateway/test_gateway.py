import importlib.util
import time
from collections.abc import Callable
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from langchain_core.documents import Document
from llama_index.core.schema import NodeWithScore, TextNode

from regolo_rerank import (
    APIResponseError,
    AuthenticationError,
    BadRequestError,
    ContextLengthError,
    RateLimitError,
    RegoloClient,
    ServerError,
)
from regolo_rerank.langchain import RegoloRerank as LangChainRerank
from regolo_rerank.llama_index import RegoloRerank as LlamaIndexRerank
from tests.external.gateway.conftest import OPEN, WINDOW, Gateway
from tests.support.modes import Call
from tests.support.stub import Received, Reply, Stub, error, pairs, scored, texts

if importlib.util.find_spec("litellm") is None:
    pytest.skip('the gateway is not installed: python3 -m pip install -e ".[gateway]"', allow_module_level=True)

pytestmark = pytest.mark.timeout(180)  # the first test waits for the gateway to start

QUERY = "Qual è la capitale della Cina? 中国的首都"
TEXTS = ["Rome\nis in Italy", "Beijing 北京 🐉", "pizza", 'a "quoted" {brace} \\n', "pizza", "torta \x00 dolce"]
MANY = [f"document {number}" for number in range(1000)]

Ranked = Callable[[str], list[tuple[str, float | None]]]


@pytest.fixture(params=["client", "langchain", "llama_index"])
def ranked(request: pytest.FixtureRequest, call: Call) -> Ranked:
    """Rank `TEXTS` at a base URL, with the client and with both adapters."""

    def ranked(base_url: str) -> list[tuple[str, float | None]]:
        options: dict[str, Any] = {"base_url": base_url, "prompt_format": "plain", "batch_size": 2, "top_n": 4}
        if request.param == "client":
            response = call(RegoloClient(OPEN, **options).rerank, QUERY, TEXTS)
            return [(result.document, result.relevance_score) for result in response]
        if request.param == "langchain":
            documents = [Document(text) for text in TEXTS]
            kept = call(LangChainRerank(api_key=OPEN, **options).compress_documents, documents, QUERY)
            return [(document.page_content, document.metadata["relevance_score"]) for document in kept]
        nodes = [NodeWithScore(node=TextNode(text=text)) for text in TEXTS]
        found = call(LlamaIndexRerank(api_key=OPEN, **options).postprocess_nodes, nodes, query_str=QUERY)
        return [(node.text, node.score) for node in found]

    return ranked


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


def test_each_request_has_the_gateways_name(call: Call, gateway: Gateway) -> None:
    """`request_ids` holds what the gateway calls each request, as it was asked to; an error names its own."""
    with RegoloClient(OPEN, base_url=gateway.url, batch_size=2) as client:
        request_ids = call(client.rerank, QUERY, MANY[:6]).request_ids
        with pytest.raises(BadRequestError) as caught:
            call(client.rerank, QUERY, TEXTS, model="no-such-model")
    names = [*request_ids, str(caught.value.request_id)]
    assert len({UUID(name.removeprefix("regolo_rerank-")) for name in names}) == 4
    assert all(name.startswith("regolo_rerank-") for name in request_ids)


def test_a_wrong_key_is_refused(call: Call, gateway: Gateway, upstream: Stub) -> None:
    """A wrong key is an AuthenticationError at once, and does not show in it."""
    with RegoloClient("sk-wrong-4f1d", base_url=gateway.url) as client, pytest.raises(AuthenticationError) as caught:
        call(client.rerank, QUERY, TEXTS)
    assert "no such key" in str(caught.value)
    assert "4f1d" not in str(caught.value) + caught.value.body
    assert (gateway.statuses, upstream.received) == ([401], [])


def test_an_unknown_model_is_refused(call: Call, gateway: Gateway, upstream: Stub) -> None:
    """An unknown model is a BadRequestError at once that names it."""
    with (
        RegoloClient(OPEN, base_url=gateway.url) as client,
        pytest.raises(BadRequestError, match="model=no-such-model"),
    ):
        call(client.rerank, QUERY, TEXTS, model="no-such-model")
    assert (gateway.statuses, upstream.received) == ([400], [])


def test_batches_add_up_to_one_ranking(call: Call, gateway: Gateway, upstream: Stub) -> None:
    """1,000 documents in 20 requests rank exactly as in a single one without the gateway."""
    expected = direct(upstream, MANY)
    with RegoloClient(OPEN, base_url=gateway.url, prompt_format="plain", batch_size=50) as client:
        response = call(client.rerank, QUERY, MANY)
    assert pairs(response.results) == expected
    assert gateway.statuses == [200] * 20
    assert sorted(map(len, upstream.documents)) == [50] * 20


def test_a_limit_beyond_the_total_timeout_is_raised_at_once(call: Call, gateway: Gateway, upstream: Stub) -> None:
    """If the wait would exceed `total_timeout`, the gateway's error is raised without another request."""
    key = limited("five-a-window")
    with (
        RegoloClient(key, base_url=gateway.url, batch_size=1, max_concurrency=1, total_timeout=1.0) as client,
        pytest.raises(RateLimitError, match=r"Limit type: requests\. .*Limit resets at: ") as caught,
    ):
        call(client.rerank, QUERY, MANY[:6])
    assert caught.value.retry_after == pytest.approx(WINDOW, abs=2)
    assert gateway.statuses == [200] * 5 + [429]
    assert len(upstream.received) == 5


def test_a_limit_on_requests_is_waited_for(call: Call, gateway: Gateway, upstream: Stub) -> None:
    """Within `total_timeout` the client waits for the gateway's window, and returns the whole ranking."""
    expected = direct(upstream, MANY[:8])
    key = limited("five-a-window")
    with RegoloClient(key, base_url=gateway.url, prompt_format="plain", batch_size=1, total_timeout=30.0) as client:
        assert pairs(call(client.rerank, QUERY, MANY[:8]).results) == expected
    assert gateway.statuses.count(200) == 8
    assert set(gateway.statuses) == {200, 429}
    assert len(upstream.received) == 8


@pytest.mark.real_backoff
def test_a_limit_on_parallel_requests_loses_nothing(call: Call, gateway: Gateway, upstream: Stub) -> None:
    """With four concurrent requests where two are allowed, refused ones are sent again until all are ranked."""
    expected = direct(upstream, MANY)
    upstream.reply = lambda request: Reply(scored(request).body, delay=0.2)
    key = limited("two-at-once")
    with RegoloClient(key, base_url=gateway.url, prompt_format="plain", batch_size=50, max_concurrency=4) as client:
        response = call(client.rerank, QUERY, MANY)
    assert pairs(response.results) == expected
    assert gateway.statuses.count(200) == len(upstream.received) == 20
    assert set(gateway.statuses) == {200, 429}
    assert response.usage.requests == len(gateway.statuses)


def test_a_failure_behind_the_gateway_passes(call: Call, gateway: Gateway, upstream: Stub) -> None:
    """A request that failed behind the gateway is sent again, and its ranking comes out."""
    expected = direct(upstream, TEXTS)
    upstream.script(error("out of memory", 500, None))
    with RegoloClient(OPEN, base_url=gateway.url, prompt_format="plain") as client:
        assert pairs(call(client.rerank, QUERY, TEXTS).results) == expected
    assert gateway.statuses == [500, 200]


def test_nobody_behind_the_gateway(call: Call, gateway: Gateway) -> None:
    """Where nobody answers the gateway, its 500 is raised after `max_retries` further attempts."""
    with (
        RegoloClient(OPEN, base_url=gateway.url, model="down", max_retries=2) as client,
        pytest.raises(ServerError, match="Cannot connect to host") as caught,
    ):
        call(client.rerank, QUERY, TEXTS)
    assert caught.value.status_code == 500
    assert gateway.statuses == [500, 500, 500]


def test_the_gateways_own_timeout(call: Call, gateway: Gateway, upstream: Stub) -> None:
    """Where the gateway gives up on a slow server, its 408 is raised after `max_retries` further attempts."""
    upstream.reply = lambda request: Reply(scored(request).body, delay=10.0)
    started = time.monotonic()
    with (
        RegoloClient(OPEN, base_url=gateway.url, model="impatient", max_retries=1) as client,
        pytest.raises(ServerError, match="Connection timed out") as caught,
    ):
        call(client.rerank, QUERY, TEXTS)
    assert caught.value.status_code == 408
    assert time.monotonic() - started < 10.0
    assert gateway.statuses == [408, 408]
    assert len(upstream.received) == 2


def test_a_server_with_a_template_gets_the_instruction(call: Call, gateway: Gateway, upstream: Stub) -> None:
    """LiteLLM passes the instruction on to vLLM in a field of its own, and drops it for other servers."""
    client = RegoloClient(OPEN, base_url=gateway.url, model="vllm", prompt_format="server_template")
    response = call(client.rerank, "q", ["a score=0.4", "b score=0.9"], instruction="Find recipes")
    assert pairs(response.results) == [(1, 0.9), (0, 0.4)]
    assert upstream.received[0].json == {
        "model": "reranker",
        "query": "q",
        "documents": ["a score=0.4", "b score=0.9"],
        "instruction": "Find recipes",
        "top_n": 2,
    }
    call(client.rerank, "q", ["a"], model="Qwen3-Reranker-4B", instruction="Find recipes")
    assert "instruction" not in upstream.received[1].json


CONTEXT = 8
"""Maximum words of a document of the model behind the gateway, one token each."""


def with_a_context(request: Received) -> Reply:
    """Answer as vLLM does: a longer document fails the request, unless it may be cut."""
    body = request.json
    most = body.get("max_tokens_per_doc") or body.get("truncate_prompt_tokens")
    if most is None and max(len(document.split()) for document in request.documents) > CONTEXT:
        return error(f"This model's maximum context length is {CONTEXT} tokens.", 400, None)
    return scored(request)


LONG = ["word " * 20, "a few words"]


def test_a_document_over_the_context_is_named(call: Call, gateway: Gateway, upstream: Stub) -> None:
    """The server's words come through the gateway, and the error names the document and the option that helps."""
    upstream.reply = with_a_context
    client = RegoloClient(OPEN, base_url=gateway.url, model="vllm")
    with pytest.raises(ContextLengthError, match=r"(?s)length is 8 .* documents\[0\] with 100 .* max_document_chars"):
        call(client.rerank, "q", LONG)
    assert gateway.statuses == [400]


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("vllm", {"max_document_chars": 16}),
        ("vllm", {"extra_body": {"truncate_prompt_tokens": 8}}),
        ("vllm", {"extra_body": {"max_tokens_per_doc": 8}}),
        ("Qwen3-Reranker-4B", {"extra_body": {"max_tokens_per_doc": 8}}),
    ],
)
def test_a_long_document_is_cut(
    model: str, options: dict[str, Any], call: Call, gateway: Gateway, upstream: Stub
) -> None:
    """Cut by characters in the client or by tokens on the server, it is ranked and returned whole."""
    upstream.reply = with_a_context
    client = RegoloClient(OPEN, base_url=gateway.url, model=model, **options)
    assert {result.document for result in call(client.rerank, "q", LONG)} == set(LONG)


def down_for(text: str) -> Callable[[Received], Reply]:
    """Return a reply for which the replaceable model fails if a document contains a text, and all others answer."""

    def reply(request: Received) -> Reply:
        fails = request.json["model"] == "replaced" and any(text in document for document in request.documents)
        return error("out of memory", 500, None) if fails else scored(request)

    return reply


def test_a_substitute_is_an_error(call: Call, gateway: Gateway, upstream: Stub) -> None:
    """A 200 of a substitute model is an error that names both models, for a whole ranking and for one batch of it."""
    # One request at a time: no other one may be in flight when the call ends, and be logged in the next test.
    options: dict[str, Any] = {"batch_size": 1, "max_retries": 0, "max_concurrency": 1}
    client = RegoloClient(OPEN, base_url=gateway.url, model="replaced", **options)
    message = "'replaced' was requested, and 'substitute' answered as its substitute"
    upstream.reply = down_for("document 0")
    with pytest.raises(APIResponseError, match=message) as caught:
        call(client.rerank, "q", texts(1))
    assert caught.value.request_id
    assert gateway.statuses == [200]
    upstream.reply = down_for("document 2")
    with pytest.raises(APIResponseError, match=message):
        call(client.rerank, "q", texts(4))


def test_a_refused_substitute_becomes_the_models_error(call: Call, gateway: Gateway, upstream: Stub) -> None:
    """With the field that is sent to regolo.ai the gateway replaces no model: the model's own error comes out."""
    upstream.reply = down_for("document")
    options: dict[str, Any] = {"model": "replaced", "max_retries": 0, "extra_body": {"disable_fallbacks": True}}
    with pytest.raises(ServerError, match="out of memory"):
        call(RegoloClient(OPEN, base_url=gateway.url, **options).rerank, "q", texts(1))


def test_an_alias_is_no_substitute(call: Call, gateway: Gateway) -> None:
    """A model that the gateway knows under another name is the requested one."""
    response = call(RegoloClient(OPEN, base_url=gateway.url, model="alias").rerank, "q", texts(1))
    assert response.model == "alias"
