import importlib.util

import pytest

from regolo_rerank import RegoloClient
from tests.conftest import Rank
from tests.external.gateway.conftest import OPEN, Gateway
from tests.support.stub import Stub, pairs

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
