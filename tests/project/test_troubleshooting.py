"""The page about troubleshooting: each message in a heading is one that a user reads."""

import asyncio
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from regolo_rerank import RegoloClient, RerankWarning
from tests.conftest import KEY
from tests.support.stub import Reply, Stub, error, results

PAGE = (Path(__file__).parents[2] / "docs/help/troubleshooting.md").read_text("utf-8")
HEADINGS = re.findall(r"^### `(.+)`$", PAGE, re.MULTILINE)


def rank(stub: Stub, reply: Reply | None = None, documents: Any = ("a",), **options: Any) -> None:
    """Rank by a server that answers so, or as it should."""
    if reply is not None:
        stub.always(reply)
    with RegoloClient(**{"api_key": KEY, "base_url": stub.url, "max_retries": 0, **options}) as client:
        client.rerank("q", documents)


def warn(stub: Stub, reply: Reply | None = None, count: int = 1, **options: Any) -> None:
    """Rank, and raise the warning that this issues."""
    with warnings.catch_warnings(action="error", category=RerankWarning):
        rank(stub, reply, [f"text {number}" for number in range(count)], **options)


def import_without_langchain(_: Stub) -> None:
    """Import the adapter without its framework, and raise the error of that process."""
    code = "import sys; sys.modules['langchain_core'] = None; import regolo_rerank.langchain"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)  # noqa: S603 - our own
    raise ImportError(done.stderr.splitlines()[-1])


def use_two_loops(stub: Stub) -> None:
    """Use one async HTTP client in two event loops."""
    mine = httpx.AsyncClient()
    client = RegoloClient(KEY, base_url=stub.url, async_http_client=mine, max_retries=0)
    with asyncio.Runner() as first:
        first.run(client.arerank("q", ["a"]))
        try:
            with asyncio.Runner() as second:
                second.run(client.arerank("q", ["a"]))
        finally:
            first.run(mine.aclose())


async def run_inside_a_loop() -> None:
    """Start an event loop inside another one, as in a notebook's cell."""
    coroutine = asyncio.sleep(0)
    try:
        asyncio.run(coroutine)
    finally:
        coroutine.close()


SUBSTITUTE = {"x-litellm-attempted-fallbacks": "1", "x-litellm-model-group": "other"}
TROUBLES: dict[str, Callable[[Stub], object]] = {
    "no API key for api.regolo.ai": lambda _: RegoloClient().rerank("q", ["a"]),
    "AuthenticationError": lambda stub: rank(stub, error("no such key", 401)),
    "PermissionDeniedError": lambda stub: rank(stub, error("not with this model", 403)),
    "would send the API key": lambda stub: rank(stub, base_url="http://server.example"),
    "NotFoundError": lambda stub: rank(stub, Reply({"detail": "Not Found"}, 404)),
    "Redirects are not followed": lambda stub: rank(stub, Reply(b"", 301, {"location": "https://server.example/"})),
    "invalid reply": lambda stub: rank(stub, Reply(b"<html>Sign in</html>")),
    "answered as its substitute": lambda stub: rank(stub, Reply(results((0, 0.5)), headers=SUBSTITUTE)),
    "no complete reply": lambda stub: rank(stub, base_url="http://127.0.0.1:9"),
    "total_timeout": lambda stub: rank(
        stub, error("busy", 503, retry_after_ms=9_000), max_retries=1, total_timeout=1.0
    ),
    "Invalid model name": lambda stub: rank(stub, error("Invalid model name passed in model=x", 400)),
    "have the same score": lambda stub: warn(stub, Reply(results(*((index, 0.5) for index in range(20)))), count=20),
    "instruction has no effect": lambda stub: warn(stub, instruction="Find recipes", prompt_format="plain"),
    "RateLimitError": lambda stub: rank(stub, error("Limit type: requests", 429)),
    "budget_exceeded": lambda stub: rank(stub, error("Budget has been exceeded", 400, type="budget_exceeded")),
    "maximum context length": lambda stub: rank(stub, error("This model's maximum context length is 4096 tokens", 400)),
    "must be a list": lambda stub: rank(stub, documents="a"),
    "Name the field of its text": lambda stub: rank(stub, documents=[{"body": "a"}]),
    "needs LangChain": import_without_langchain,
    "must belong to the running event loop": use_two_loops,
    "asyncio.run() cannot be called from a running event loop": lambda _: asyncio.run(run_inside_a_loop()),
}
NOT_OURS = {"No module named 'langchain_classic'", "externally-managed-environment", "is not trusted"}
"""Situations that a test cannot make without installing or certifying something."""


def test_each_heading_is_tried() -> None:
    """The page has a heading for each situation, and no other."""
    assert sorted(HEADINGS) == sorted({*TROUBLES, *NOT_OURS})


@pytest.mark.parametrize("heading", TROUBLES)
def test_a_heading_is_what_the_user_reads(heading: str, stub: Stub) -> None:
    """It is part of the message, or the class or type of the error."""
    with pytest.raises(Exception) as caught:  # noqa: PT011 - each heading has its own
        TROUBLES[heading](stub)
    shown = [type(caught.value).__name__, getattr(caught.value, "type", ""), str(caught.value)]
    assert heading.lower() in "\n".join(map(str, shown)).lower()
