from collections.abc import Iterator

import pytest

from regolo_rerank import RegoloClient
from tests.support.modes import Call
from tests.support.stub import Stub

KEY = "sk-canary-4f1d"


@pytest.fixture
def anyio_backend() -> str:
    """Async tests run on asyncio; mark them with `pytest.mark.anyio`."""
    return "asyncio"


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the machine's key, server and proxies from the tests."""
    for name in ("REGOLO_API_KEY", "REGOLO_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.fixture(autouse=True)
def _no_backoff(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Retry at once, unless the server names a wait or the test is marked `real_backoff`."""
    if "real_backoff" not in request.keywords:
        monkeypatch.setattr("regolo_rerank._retries._backoff", lambda failures: 0.001 * failures)


@pytest.fixture
def stub() -> Iterator[Stub]:
    """A server on loopback that answers as the service does, unless a test scripts other replies."""
    with Stub() as server:
        yield server


@pytest.fixture
def client(stub: Stub) -> Iterator[RegoloClient]:
    """A client of the stub server."""
    with RegoloClient(KEY, base_url=stub.url) as opened:
        yield opened


@pytest.fixture(params=["sync", "async"])
def call(request: pytest.FixtureRequest) -> Call:
    """Call a method, or its async variant: `call(client.rerank, ...)` or `await client.arerank(...)`."""
    return Call(request.param)
