import importlib.util
import json
from collections.abc import Callable
from typing import Any

import pytest

from regolo_rerank import BadRequestError, RegoloClient
from tests.conftest import Rank
from tests.external.gateway.conftest import OPEN, Gateway
from tests.support.inside import main
from tests.support.models import concatenating, ranked, templating
from tests.support.stub import Received, Reply, Stub, error, pairs

if importlib.util.find_spec("litellm") is None:
    pytest.skip('the gateway is not installed: python3 -m pip install -e ".[gateway]"', allow_module_level=True)

pytestmark = pytest.mark.timeout(180)  # the first test waits for the gateway to start


@pytest.fixture
def client(gateway: Gateway) -> RegoloClient:
    """A client of a gateway in front of a server that has the model's template."""
    return RegoloClient(OPEN, base_url=gateway.url, model="vllm", prompt_format="server_template")


def test_a_server_with_a_template_gets_the_instruction(rank: Rank, client: RegoloClient, upstream: Stub) -> None:
    """Texts go through the gateway as they are, and the instruction in a field of its own."""
    response = rank(client, "q", ["a score=0.4", "b score=0.9"], instruction="Find recipes")
    assert pairs(response.results) == [(1, 0.9), (0, 0.4)]
    assert upstream.received[0].json == {
        "model": "reranker",
        "query": "q",
        "documents": ["a score=0.4", "b score=0.9"],
        "instruction": "Find recipes",
    }


def test_no_other_server_gets_it(rank: Rank, client: RegoloClient, upstream: Stub) -> None:
    """Where the gateway speaks Cohere's words to the server behind it, the instruction does not arrive."""
    rank(client, "q", ["a"], model="Qwen3-Reranker-4B")
    assert "instruction" not in upstream.received[0].json


CONTEXT = 8
"""Words that the model behind the gateway reads at most, each of them a token."""


def with_a_context(request: Received) -> Reply:
    """Answer as vLLM does: a longer document fails the request, unless it may be cut, the prompt or the document."""
    body = request.json
    most = body.get("max_tokens_per_doc") or body.get("truncate_prompt_tokens")
    if most is None and max(len(document.split()) for document in request.documents) > CONTEXT:
        return error(f"This model's maximum context length is {CONTEXT} tokens.", 400, None)
    cut = [" ".join(document.split()[:most]) for document in request.documents]
    return ranked([1 / len(document) for document in cut])


LONG = ["word " * 20, "a few words"]


def test_a_document_over_the_context_is_told_with_both_ways_out(
    rank: Rank, client: RegoloClient, upstream: Stub
) -> None:
    """The server's words come through the gateway, and the error has numbers for characters and for tokens."""
    upstream.reply = with_a_context
    words = r"(?s)context length is 8 tokens.* documents\[0\] with 100 characters"
    with pytest.raises(BadRequestError, match=words) as caught:
        rank(client, "q", LONG)
    assert 'max_document_chars=16, or with extra_body={"truncate_prompt_tokens": 8}' in str(caught.value)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("vllm", {"max_document_chars": 16}),
        ("Qwen3-Reranker-4B", {"max_document_chars": 16}),
        ("vllm", {"extra_body": {"truncate_prompt_tokens": 8}}),
        ("vllm", {"extra_body": {"max_tokens_per_doc": 8}}),
        ("Qwen3-Reranker-4B", {"extra_body": {"max_tokens_per_doc": 8}}),
    ],
)
def test_a_long_document_is_cut(
    model: str, options: dict[str, Any], rank: Rank, client: RegoloClient, upstream: Stub
) -> None:
    """Cut here by characters or there by tokens, it ranks, and comes back whole."""
    upstream.reply = with_a_context
    with client.model_copy(update={"model": model, **options}) as cutting:
        response = rank(cutting, "q", LONG)
    assert {result.document for result in response.results} == set(LONG)


def test_not_every_gateway_passes_the_field_on(rank: Rank, client: RegoloClient, upstream: Stub) -> None:
    """Where the gateway speaks Cohere's words to the server behind it, `truncate_prompt_tokens` does not arrive."""
    upstream.reply = with_a_context
    client.extra_body = {"truncate_prompt_tokens": 8}
    with pytest.raises(BadRequestError, match="context length"):
        rank(client, "q", LONG, model="Qwen3-Reranker-4B")


@pytest.mark.parametrize(
    ("model", "answer", "right"),
    [
        ("vllm", templating, "server_template"),
        ("vllm", concatenating, "chat"),
        ("Qwen3-Reranker-4B", concatenating, "chat"),
    ],
)
def test_the_check_finds_the_right_format_through_the_gateway(
    model: str,
    answer: Callable[[Received], Reply],
    right: str,
    gateway: Gateway,
    upstream: Stub,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`regolo-rerank check` says what the server behind the gateway does, and what the gateway tells of itself."""
    upstream.reply = answer
    monkeypatch.setenv("REGOLO_API_KEY", OPEN)
    assert main(["check", "--json", "--base-url", gateway.url, "--model", model]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["verdict"]["prompt_format"], report["verdict"]["agree"]) == (right, True)
    assert report["model"] == {"asked": model, "answered": model}
    assert report["key"] == {"set": True, "from": "REGOLO_API_KEY", "accepted": True}
    assert report["request_id"]
    assert report["usage"]["requests"] == len(upstream.received) == 20
    assert report["usage"]["cost"] == 0.0
