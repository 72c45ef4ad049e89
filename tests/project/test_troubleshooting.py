import asyncio
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from regolo_rerank import RegoloClient
from tests.conftest import KEY
from tests.support.stub import Reply, Stub, error

PAGE = (Path(__file__).parents[2] / "docs" / "help" / "troubleshooting.md").read_text("utf-8")
HEADINGS = re.findall(r"^### `(.+)`$", PAGE, re.MULTILINE)


def rank(stub: Stub, reply: Reply | None = None, **options: Any) -> None:
    """Rank by a server that answers so, or as it should."""
    if reply is not None:
        stub.reply = lambda _: reply
    with RegoloClient(**{"api_key": KEY, "base_url": stub.url, "max_retries": 0, **options}) as client:
        client.rerank("q", ["a"])


def import_without(package: str) -> None:
    """Import the adapter where its framework is not installed, and raise what that raises."""
    code = f"import sys; sys.modules[{package!r}] = None; import regolo_rerank.langchain"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)  # noqa: S603 - our own
    raise ImportError(done.stderr.splitlines()[-1])


def two_loops(stub: Stub) -> None:
    """Use one async http client in two event loops."""
    mine = httpx.AsyncClient()
    client = RegoloClient(KEY, base_url=stub.url, async_http_client=mine)
    loop = asyncio.new_event_loop()
    loop.run_until_complete(client.arerank("q", ["a"]))
    try:
        asyncio.run(client.arerank("q", ["a"]))
    finally:
        loop.run_until_complete(mine.aclose())
        loop.close()


async def run_inside() -> None:
    """Start a loop where there is one, as in a notebook's cell."""
    called = asyncio.sleep(0)
    try:
        asyncio.run(called)
    finally:
        called.close()


TROUBLES: dict[str, Callable[[Stub], object]] = {
    "no API key for api.regolo.ai": lambda _: RegoloClient().rerank("q", ["a"]),
    "AuthenticationError": lambda stub: rank(stub, error("no such key", 401)),
    "PermissionDeniedError": lambda stub: rank(stub, error("not with this model", 403)),
    "over plain http": lambda stub: rank(stub, base_url="http://server.example"),
    "NotFoundError": lambda stub: rank(stub, Reply({"detail": "Not Found"}, 404)),
    "redirects are not followed": lambda stub: rank(stub, Reply(b"", 301, {"location": "https://server.example/"})),
    "the reply cannot be trusted": lambda stub: rank(stub, Reply(b"<html>Sign in</html>")),
    "no complete reply": lambda stub: rank(stub, base_url="http://127.0.0.1:9"),
    "Invalid model name": lambda stub: rank(stub, error("Invalid model name passed in model=x", 400)),
    "has answered in its place": lambda stub: rank(
        stub,
        Reply(
            {"results": [{"index": 0, "relevance_score": 0.5}]},
            headers={"x-litellm-attempted-fallbacks": "1", "x-litellm-model-group": "other"},
        ),
    ),
    "RateLimitError": lambda stub: rank(stub, error("Limit type: requests", 429)),
    "budget_exceeded": lambda stub: rank(stub, error("Budget has been exceeded", 400, type="budget_exceeded")),
    "maximum context length": lambda stub: rank(stub, error("This model's maximum context length is 4096 tokens", 400)),
    "needs LangChain": lambda _: import_without("langchain_core"),
    "first used in": two_loops,
    "asyncio.run() cannot be called from a running event loop": lambda _: asyncio.run(run_inside()),
}

NOT_OURS = {"No module named 'langchain_classic'", "externally-managed-environment", "CERTIFICATE_VERIFY_FAILED"}
"""Words of Python and pip, in situations that a test cannot make without installing or certifying something."""


def test_each_trouble_is_tried() -> None:
    """The page has a heading for each of them, and no other."""
    assert sorted(HEADINGS) == sorted({*TROUBLES, *NOT_OURS})


@pytest.mark.parametrize("heading", TROUBLES)
def test_a_heading_is_what_the_user_reads(heading: str, stub: Stub) -> None:
    """Its words stand in the error that its situation gives, or name its class or type."""
    with pytest.raises(Exception) as caught:  # noqa: PT011 - each heading has its own
        TROUBLES[heading](stub)
    shown = [type(caught.value).__name__, getattr(caught.value, "type", ""), str(caught.value)]
    assert heading in "\n".join(map(str, shown))
