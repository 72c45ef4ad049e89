"""`on_error="return_input"`: which failures fall back, which raise, the result, and the time that it takes."""

import inspect
import logging
import socket
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
from langchain_core.documents import Document
from llama_index.core.schema import NodeWithScore, TextNode

from regolo_rerank import (
    APIConnectionError,
    APIResponseError,
    APIStatusError,
    APITimeoutError,
    AuthenticationError,
    BadRequestError,
    ContextLengthError,
    InvalidInputError,
    MissingAPIKeyError,
    NotFoundError,
    PermissionDeniedError,
    RateLimitError,
    RegoloError,
    RerankFallbackWarning,
    ServerError,
)
from regolo_rerank.langchain import RegoloRerank as LangChainRerank
from tests.adapters.helpers import (
    DOWN,
    QUERY,
    TEXTS,
    Adapter,
    Rerank,
    documents,
    items_for,
    metadata_of,
)
from tests.support.faults import FaultServer, stalls
from tests.support.modes import Call
from tests.support.stub import Reply, Stub, error, results

COVERED: dict[str, tuple[Reply, type[RegoloError]]] = {
    "timeout": (Reply(delay=0.4), APITimeoutError),
    "429": (error("too many requests", 429), RateLimitError),
    "500": (DOWN, ServerError),
    "invalid score": (Reply(results((0, None), (1, 0.9), (2, 0.5))), APIResponseError),
    "402": (error("payment required", 402), APIStatusError),
    "budget in a 400": (error("Budget has been exceeded!", 400, type="budget_exceeded"), BadRequestError),
    "context length": (error("This model's maximum context length is 4096 tokens.", 400), ContextLengthError),
}
"""Failures that fall back, with the error that is raised otherwise."""

NOT_COVERED: dict[str, tuple[Reply, type[RegoloError]]] = {
    "400": (error("no such model", 400), BadRequestError),
    "401": (error("no such key", 401), AuthenticationError),
    "403": (error("no access", 403), PermissionDeniedError),
    "404": (error("no such path", 404), NotFoundError),
    "409": (error("conflict", 409), APIStatusError),
}
"""Failures that raise in any case, because the caller can prevent them."""


@pytest.fixture
def falling_back(adapter: Adapter) -> Adapter:
    """An adapter that falls back."""
    adapter.on_error = "return_input"
    return adapter


@pytest.fixture(params=["refused", *COVERED])
def failure(request: pytest.FixtureRequest, adapter: Adapter, stub: Stub) -> Iterator[type[RegoloError]]:
    """Each failure that falls back, as the error for it."""
    if request.param == "refused":
        with socket.socket() as silent:
            silent.bind(("127.0.0.1", 0))
            adapter.base_url = f"http://127.0.0.1:{silent.getsockname()[1]}"
            yield APIConnectionError
        return
    reply, problem = COVERED[request.param]
    adapter.timeout = 0.1 if problem is APITimeoutError else 30.0
    stub.always(reply)
    yield problem


def test_a_failure_returns_the_input(rerank: Rerank, adapter: Adapter, failure: type[RegoloError]) -> None:
    """By default each failure raises its error. With the option, the first `top_n` items are returned as they were.

    A threshold does not apply without scores. One warning names the reason.
    """
    adapter.score_threshold = 0.99
    given = items_for(adapter, TEXTS)
    with pytest.raises(failure) as raised:
        rerank(adapter, given)
    assert type(raised.value) is failure
    adapter.on_error = "return_input"
    with pytest.warns(RerankFallbackWarning) as caught:
        assert rerank(adapter, given) == items_for(adapter, TEXTS)[:2]
    (message,) = [str(warning.message) for warning in caught]
    assert "the first 2 of 3 documents are returned in their own order" in message
    assert f"{failure.__name__}: " in message


@pytest.mark.parametrize("failure", NOT_COVERED)
def test_a_request_that_the_caller_can_correct_raises(
    rerank: Rerank, falling_back: Adapter, stub: Stub, failure: str
) -> None:
    """A wrong key, model or address is never hidden by a fallback."""
    reply, problem = NOT_COVERED[failure]
    stub.always(reply)
    with pytest.raises(problem) as raised:
        rerank(falling_back)
    assert type(raised.value) is problem


def test_a_missing_key_raises(rerank: Rerank, falling_back: Adapter) -> None:
    """Without a key, no request is sent."""
    falling_back.base_url, falling_back.api_key = None, None
    with pytest.raises(MissingAPIKeyError, match="REGOLO_API_KEY"):
        rerank(falling_back)


def test_a_blank_query_falls_back(rerank: Rerank, adapter: Adapter, stub: Stub) -> None:
    """Agents call tools with empty queries, and their run should not end because of it."""
    given = items_for(adapter, TEXTS)
    with pytest.raises(InvalidInputError, match="query: must not be blank"):
        rerank(adapter, given, " ")
    adapter.on_error, adapter.top_n = "return_input", None
    with pytest.warns(RerankFallbackWarning, match=r"the first 3 of 3 documents.*query: must not be blank"):
        assert rerank(adapter, given, " ") == given
    assert stub.received == []


@pytest.mark.parametrize("key", ["relevance_score", "second", None])
def test_a_fallback_removes_an_earlier_score(
    rerank: Rerank, falling_back: Adapter, stub: Stub, key: str | None
) -> None:
    """Only the score under the adapter's own key would be taken for its result. The input keeps it."""
    falling_back.score_metadata_key = key
    stub.always(DOWN)
    metadata: dict[str, Any] = {"relevance_score": 0.8, "source": "x"}
    given: Any = Document("a", id="1", metadata=dict(metadata))
    if not isinstance(falling_back, LangChainRerank):
        given = NodeWithScore(node=TextNode(text="a", id_="1", metadata=dict(metadata)), score=0.8)
    with pytest.warns(RerankFallbackWarning):
        (kept,) = rerank(falling_back, [given])
    assert metadata_of(kept) == ({"source": "x"} if key == "relevance_score" else metadata)
    assert metadata_of(given) == metadata


@pytest.mark.anyio
async def test_the_warning_points_at_the_callers_line(falling_back: Adapter, stub: Stub) -> None:
    """A reader, and a warnings filter by module, see whose call fell back."""
    stub.always(DOWN)
    given = items_for(falling_back, TEXTS)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        first_line = inspect.currentframe().f_lineno  # type: ignore[union-attr]
        if isinstance(falling_back, LangChainRerank):
            falling_back.compress_documents(given, QUERY)
            falling_back.as_runnable().invoke({"query": QUERY, "documents": given})
            await falling_back.acompress_documents(given, QUERY)
            lines = [2, 3, 4]
        else:
            falling_back.postprocess_nodes(given, query_str=QUERY)
            await falling_back.apostprocess_nodes(given, query_str=QUERY)
            lines = [7, 8]
    assert [(warning.filename, warning.lineno - first_line) for warning in caught] == [
        (__file__, line) for line in lines
    ]


def test_a_fallback_warns_and_does_not_log_as_well(
    rerank: Rerank, falling_back: Adapter, stub: Stub, caplog: pytest.LogCaptureFixture
) -> None:
    """The same words twice on one stream would look like two failures."""
    stub.always(DOWN)
    with caplog.at_level(logging.INFO), pytest.warns(RerankFallbackWarning):
        rerank(falling_back)
    assert "returned in their own order" not in caplog.text


def test_total_timeout_of_one_call(call: Call, langchain: LangChainRerank) -> None:
    """`total_timeout` and `top_n` of a step apply to its fallback, with a reranker that has no limit."""
    langchain.on_error, langchain.total_timeout = "return_input", None
    with FaultServer(usual=stalls(b"", 60)) as server:
        langchain.base_url = server.url
        step: Any = langchain.as_runnable()
        with pytest.warns(RerankFallbackWarning, match="APITimeoutError"):
            kept = call(step.invoke, {"query": QUERY, "documents": documents()}, total_timeout=0.2, top_n=1)
    assert len(kept) == 1
