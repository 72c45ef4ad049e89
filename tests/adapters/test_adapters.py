import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import httpx
import langchain_core
import llama_index.core
import pytest
from langchain_core.documents import Document
from llama_index.core.schema import NodeWithScore, TextNode
from pydantic import ValidationError

from regolo_rerank import (
    APIConnectionError,
    APIResponseError,
    APITimeoutError,
    AuthenticationError,
    BadRequestError,
    InvalidInputError,
    MissingAPIKeyError,
    NotFoundError,
    PermissionDeniedError,
    RateLimitError,
    RerankFallbackWarning,
    ServerError,
    __version__,
)
from regolo_rerank.langchain import RegoloRerank as LangChainRerank
from regolo_rerank.llama_index import RegoloRerank as LlamaIndexRerank
from tests.conftest import KEY
from tests.support.entries import Pairs, aranked, ranked
from tests.support.inside import is_worker
from tests.support.stub import Received, Reply, Stub, error, results, together
from tests.support.traces import Adapter, Rerank

TEXTS = ["a score=0.1", "b score=0.9", "c score=0.5"]

FAILURES = {
    "refused": (None, APIConnectionError),
    "timeout": (Reply(delay=0.5), APITimeoutError),
    "408": (error("the backend timed out", 408), ServerError),
    "429": (error("too many requests", 429), RateLimitError),
    "500": (error("the backend is down", 500), ServerError),
    "untrustworthy": (Reply(results((0, None), (1, 0.9), (2, 0.5))), APIResponseError),
    "substitute": (
        Reply(results((0, 0.1), (1, 0.9), (2, 0.5)), headers={"x-litellm-attempted-fallbacks": "1"}),
        APIResponseError,
    ),
}


@pytest.fixture(params=[LangChainRerank, LlamaIndexRerank], ids=["langchain", "llama_index"])
def make(request: pytest.FixtureRequest) -> Any:
    """Both adapters' classes."""
    return request.param


@pytest.fixture
def adapter(make: type[Adapter], stub: Stub) -> Adapter:
    """An adapter that does not retry."""
    return make(KEY, base_url=stub.url, max_retries=0)


def items_for(adapter: Adapter, texts: list[str]) -> list[Any]:
    """Return texts as the documents or nodes of an adapter's framework."""
    if isinstance(adapter, LangChainRerank):
        return [Document(text) for text in texts]
    return [NodeWithScore(node=TextNode(text=text), score=0.25) for text in texts]


def scores(ranked: list[Any]) -> list[float | None]:
    """Return the relevance scores that an adapter gave."""
    return [item.score if isinstance(item, NodeWithScore) else item.metadata["relevance_score"] for item in ranked]


@pytest.fixture(params=FAILURES)
def failure(request: pytest.FixtureRequest, adapter: Adapter, stub: Stub) -> Iterator[type[Exception]]:
    """Each failure of the service, which the adapter meets from now on, as the error that stands for it."""
    reply, problem = FAILURES[request.param]
    adapter.timeout = 0.1 if problem is APITimeoutError else 30.0
    if reply is not None:
        stub.always(reply)
        yield problem
        return
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        adapter.base_url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        yield problem


def test_a_failure_of_the_service_can_give_the_input_back(
    rerank: Rerank, adapter: Adapter, failure: type[Exception]
) -> None:
    """The first `top_n` come back in their own order as they were, past any threshold, with a warning that says why."""
    adapter.on_error, adapter.top_n, adapter.score_threshold = "return_input", 2, 0.99
    given = items_for(adapter, TEXTS)
    before = deepcopy(given)
    problem = rf"the first 2 of 3 documents are returned in their own order: {failure.__name__}: "
    with pytest.warns(RerankFallbackWarning, match=problem) as warned:
        kept = rerank(adapter, given)
    assert kept == before[:2]
    assert len(warned) == 1


def test_every_fallback_is_in_the_log(
    rerank: Rerank, adapter: Adapter, stub: Stub, caplog: pytest.LogCaptureFixture
) -> None:
    """Python shows equal warnings once; the log has one for each call."""
    adapter.on_error = "return_input"
    stub.always(error("down", 500))
    for _ in range(3):
        with pytest.warns(RerankFallbackWarning):
            rerank(adapter, items_for(adapter, TEXTS))
    assert caplog.text.count("reranking failed, so the first 3 of 3 documents") == 3


def test_a_failure_of_the_service_can_give_all_of_the_input_back(rerank: Rerank, adapter: Adapter, stub: Stub) -> None:
    """Where all would be kept, all come back."""
    adapter.on_error, adapter.top_n = "return_input", None
    stub.always(error("the backend is down", 500))
    given = items_for(adapter, TEXTS * 3)
    with pytest.warns(RerankFallbackWarning, match="the first 9 of 9"):
        assert rerank(adapter, given) == given


def test_a_failure_of_the_service_is_an_error_by_default(
    rerank: Rerank, adapter: Adapter, failure: type[Exception]
) -> None:
    """Nobody is given unranked documents without having asked for it."""
    with pytest.raises(failure) as raised:
        rerank(adapter, items_for(adapter, TEXTS))
    assert type(raised.value) is failure


@pytest.mark.parametrize(
    ("status", "problem"),
    [(400, BadRequestError), (401, AuthenticationError), (403, PermissionDeniedError), (404, NotFoundError)],
)
def test_a_refusal_is_an_error_in_any_case(
    rerank: Rerank, adapter: Adapter, stub: Stub, status: int, problem: type[Exception]
) -> None:
    """What the caller has to put right is never passed over."""
    adapter.on_error = "return_input"
    stub.always(error("no", status))
    with pytest.raises(problem, match="no"):
        rerank(adapter, items_for(adapter, TEXTS))


def test_a_single_document_is_no_list(rerank: Rerank, adapter: Adapter) -> None:
    """One document in place of a list is refused, though frameworks' documents can be iterated."""
    (item,) = items_for(adapter, ["a"])
    kind = type(item).__name__
    with pytest.raises(InvalidInputError, match=f"must be a list of {kind}, got {kind}"):
        rerank(adapter, item)


@pytest.mark.parametrize(
    ("reply", "problem"),
    [
        (Reply({"error": {"message": "bad key", "code": "401"}}), APIResponseError),
        (error("Budget has been exceeded!", 429, type="budget_exceeded"), RateLimitError),
    ],
)
def test_a_refusal_in_disguise_is_an_error_in_any_case(
    rerank: Rerank, adapter: Adapter, stub: Stub, reply: Reply, problem: type[Exception]
) -> None:
    """A refused key in a 200 and a spent budget in a 429 are for the caller to put right."""
    adapter.on_error = "return_input"
    stub.always(reply)
    with pytest.raises(problem):
        rerank(adapter, items_for(adapter, TEXTS))


def test_a_closed_http_client_is_an_error_in_any_case(rerank: Rerank, adapter: Adapter) -> None:
    """A caller's http client that cannot be used is for the caller to put right."""
    closed, aclosed = httpx.Client(), httpx.AsyncClient()
    closed.close()
    asyncio.run(aclosed.aclose())
    adapter.on_error, adapter.http_client, adapter.async_http_client = "return_input", closed, aclosed
    with pytest.raises(APIConnectionError, match="closed"):
        rerank(adapter, items_for(adapter, TEXTS))


def test_a_missing_key_is_an_error_in_any_case(rerank: Rerank, make: type[Adapter]) -> None:
    """Without a key, Regolo's own service is not even asked."""
    adapter = make(on_error="return_input")
    with pytest.raises(MissingAPIKeyError, match="REGOLO_API_KEY"):
        rerank(adapter, items_for(adapter, TEXTS))


@pytest.mark.parametrize(
    ("items", "query", "problem"),
    [(None, " ", "query: must not be blank"), ([7], "q", r"\[0\]: must be"), ("a", "q", "must be a list of")],
)
def test_bad_input_is_an_error_in_any_case(
    rerank: Rerank, adapter: Adapter, stub: Stub, items: Any, query: str, problem: str
) -> None:
    """It is refused before anything is sent."""
    adapter.on_error = "return_input"
    with pytest.raises(InvalidInputError, match=problem):
        rerank(adapter, items_for(adapter, TEXTS) if items is None else items, query)
    assert stub.received == []


@pytest.mark.parametrize(
    ("texts", "top_n", "score_threshold", "kept"),
    [
        (TEXTS, None, None, [0.9, 0.5, 0.1]),
        (TEXTS, None, 0.5, [0.9, 0.5]),
        (TEXTS, 1, 0.5, [0.9]),
        (TEXTS, 2, 0.6, [0.9]),
        (TEXTS, None, 0.95, []),
        (["a score=-0.5", "b score=0.0", "c score=0.5"], None, 0.0, [0.5, 0.0]),
        (["a score=-0.5", " ", "c score=0.5"], None, None, [0.5, -0.5, -0.5]),
        (["a score=-0.5", " ", "c score=0.5"], None, -1.0, [0.5, -0.5]),
    ],
)
def test_a_threshold_drops_what_scores_lower(
    rerank: Rerank,
    adapter: Adapter,
    texts: list[str],
    top_n: int | None,
    score_threshold: float | None,
    kept: list[float],
) -> None:
    """Of the best `top_n`, those that reach the threshold are kept; 0.0 is one, and a blank text reaches none."""
    adapter.top_n, adapter.score_threshold = top_n, score_threshold
    assert scores(rerank(adapter, items_for(adapter, texts))) == kept


@pytest.mark.parametrize(("options", "kept"), [({}, 5), ({"top_n": 2}, 2), ({"top_n": None}, 7), ({"top_n": 9}, 7)])
def test_top_n_is_how_many_are_kept(
    rerank: Rerank, make: type[Adapter], stub: Stub, options: dict[str, Any], kept: int
) -> None:
    """Five come back by default, all with None, and never more than there are."""
    adapter = make(KEY, base_url=stub.url, **options)
    kept_items = rerank(adapter, items_for(adapter, [f"{number} score=0.{number}" for number in range(1, 8)]))
    assert scores(kept_items) == [0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1][:kept]


CHANGES = pytest.mark.parametrize(
    "change",
    [
        lambda make, name, value: make(**{name: value}),
        lambda make, name, value: setattr(make(), name, value),
        lambda make, name, value: make().model_copy(update={name: value}),
    ],
    ids=["constructor", "assignment", "model_copy"],
)


@CHANGES
@pytest.mark.parametrize("name", ["topn", "max_retry", "regolo_key"])
def test_an_unknown_option_is_refused_by_name(make: type[Adapter], change: Callable[..., Any], name: str) -> None:
    """A mistyped name is an error that holds it, and not an option without effect."""
    with pytest.raises(ValidationError, match=rf"(?m)^{name}$"):
        change(make, name, 3)


@CHANGES
@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("api_key", 7, "int"),
        ("base_url", 7, "int"),
        ("model", None, "NoneType"),
        ("top_n", "5", "str"),
        ("top_n", 0, "int"),
        ("top_n", True, "bool"),
        ("score_threshold", "0.5", "str"),
        ("score_threshold", float("nan"), "float"),
        ("timeout", None, "NoneType"),
        ("max_retries", 1.5, "float"),
        ("batch_size", -1, "int"),
        ("on_error", "ignore", "str"),
        ("prompt_format", 7, "int"),
        ("extra_body", [], "list"),
        ("http_client", "x", "str"),
    ],
)
def test_a_wrong_value_is_refused_by_name_and_type(
    make: type[Adapter], change: Callable[..., Any], name: str, value: Any, kind: str
) -> None:
    """The error names the option and the type of what it was given."""
    with pytest.raises(ValidationError, match=rf"(?ms)^{name}\b.*, got {kind}\b"):
        change(make, name, value)


def test_assigning_an_option_takes_effect_at_the_next_call(rerank: Rerank, adapter: Adapter, stub: Stub) -> None:
    """Key, model and top_n of a call are those that the adapter has when it begins."""
    items = items_for(adapter, TEXTS)
    rerank(adapter, items)
    adapter.api_key, adapter.model, adapter.top_n = "sk-next", "other", 1
    assert scores(rerank(adapter, items)) == [0.9]
    assert [(request.headers["authorization"], request.json["model"]) for request in stub.received] == [
        (f"Bearer {KEY}", "Qwen3-Reranker-4B"),
        ("Bearer sk-next", "other"),
    ]


@pytest.mark.parametrize(("key", "sent"), [("sk-copy", "Bearer sk-copy"), (None, "Bearer sk-env"), ("", None)])
def test_a_copy_never_uses_the_originals_key(
    rerank: Rerank,
    adapter: Adapter,
    stub: Stub,
    monkeypatch: pytest.MonkeyPatch,
    key: str | None,
    sent: str | None,
) -> None:
    """A copy with another key sends that one, or the environment's, or none; the original keeps its own."""
    monkeypatch.setenv("REGOLO_API_KEY", "sk-env")
    items = items_for(adapter, TEXTS)
    rerank(adapter, items)
    copied = adapter.model_copy(update={"api_key": key, "top_n": 1})
    assert len(rerank(copied, items)) == 1
    assert len(rerank(adapter, items)) == 3
    assert [request.headers.get("authorization") for request in stub.received] == [
        f"Bearer {KEY}",
        sent,
        f"Bearer {KEY}",
    ]


def test_requests_say_who_sends_them(rerank: Rerank, adapter: Adapter, stub: Stub) -> None:
    """The User-Agent has the package, its version, and the framework with its own."""
    rerank(adapter, items_for(adapter, TEXTS))
    framework = (
        f"langchain-core/{langchain_core.__version__}"
        if isinstance(adapter, LangChainRerank)
        else f"llama-index-core/{llama_index.core.__version__}"
    )
    assert stub.received[0].headers["user-agent"] == f"regolo_rerank/{__version__} {framework}"


def test_async_calls_run_at_once_without_threads(adapter: Adapter, stub: Stub) -> None:
    """The requests of twenty calls, two of each, are in flight together, sent by the loop's own thread."""
    adapter.batch_size = 2
    workers: set[str] = set()
    answer = together(40)

    def reply(request: Received) -> Reply:
        workers.update(
            thread.name for thread in threading.enumerate() if is_worker(thread) or thread.name.startswith("asyncio_")
        )
        return answer(request)

    stub.reply = reply

    async def calls() -> list[Pairs]:
        return await asyncio.gather(*(aranked(adapter, TEXTS) for _ in range(20)))

    assert asyncio.run(calls()) == [[(1, 0.9), (2, 0.5), (0, 0.1)]] * 20
    assert workers == set()


def test_sync_calls_work_inside_a_running_loop(adapter: Adapter, stub: Stub) -> None:
    """A sync method that a framework calls from a coroutine ranks as it does elsewhere, in several requests too."""
    adapter.batch_size = 1

    async def call() -> Pairs:
        return ranked(adapter, TEXTS)

    assert asyncio.run(call()) == [(1, 0.9), (2, 0.5), (0, 0.1)]
    assert len(stub.received) == 3
