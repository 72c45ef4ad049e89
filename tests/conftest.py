import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Protocol

import pytest

from regolo_rerank import RegoloClient, RerankResponse
from tests.support.inside import back_off_for
from tests.support.modes import Call
from tests.support.stub import Stub

if TYPE_CHECKING:
    from tests.support.entries import Entry, Reranker

KEY = "sk-canary-4f1d"

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A script in the background ignores Ctrl-C, and the processes that tests interrupt would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)


class Rank(Protocol):
    """Calls a client's `rerank` or `arerank`."""

    def __call__(self, client: RegoloClient, query: Any, documents: Any, **arguments: Any) -> RerankResponse: ...


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees the machine's key, server or proxies."""
    for name in ("REGOLO_API_KEY", "REGOLO_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.fixture(autouse=True)
def _no_backoff(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries follow at once, except where the server names a wait, or a test asks for `real_backoff`."""
    if "real_backoff" not in request.keywords:
        back_off_for(0.0, monkeypatch)


@pytest.fixture
def stub() -> Iterator[Stub]:
    """A server on loopback that answers as the service does, until it is told otherwise."""
    with Stub() as server:
        yield server


@pytest.fixture(params=["sync", "async"])
def mode(request: pytest.FixtureRequest) -> str:
    """Both ways of calling."""
    return str(request.param)


@pytest.fixture
def call(mode: str) -> Call:
    """Call anything that has both ways."""
    return Call(mode)


@pytest.fixture
def rank(call: Call) -> Rank:
    """Call a client in both ways."""

    def rank(client: RegoloClient, query: Any, documents: Any, **arguments: Any) -> RerankResponse:
        return call(client.rerank, query, documents, **arguments)

    return rank


@pytest.fixture(params=["core", "langchain", "llama_index"])
def kind(request: pytest.FixtureRequest) -> "type[Reranker]":
    """Every entry point: the client, and the adapter of each framework."""
    from tests.support.entries import KINDS  # which loads both frameworks

    return KINDS[request.param]


@pytest.fixture
def entry(kind: "type[Reranker]", mode: str, stub: Stub) -> "Entry":
    """Every entry point to the stub server in both ways."""
    from tests.support.entries import Entry

    return Entry(kind, mode, stub.url)


@pytest.fixture
def client(stub: Stub) -> Iterator[RegoloClient]:
    """A client of the stub server."""
    with RegoloClient(KEY, base_url=stub.url) as opened:
        yield opened
