"""Options of both adapters: constructor, assignment, copies, and what copies share."""

import asyncio
import pickle
import threading
from collections.abc import Callable
from typing import Any

import langchain_core
import llama_index.core
import pytest

from regolo_rerank import InvalidInputError, RateLimitError, RerankFallbackWarning, __version__
from regolo_rerank.langchain import RegoloRerank as LangChainRerank
from tests.adapters.helpers import DOWN, TEXTS, Adapter, Rerank, aranked, documents, items_for, ranked, scores_of
from tests.conftest import KEY
from tests.support.stub import Reply, Stub, scored, together

CHANGES = pytest.mark.parametrize(
    "change",
    [
        lambda adapter, name, value: type(adapter)(**{name: value}),
        setattr,
        lambda adapter, name, value: adapter.model_copy(update={name: value}),
        lambda adapter, name, value: adapter.with_options(**{name: value}),
    ],
    ids=["constructor", "assignment", "model_copy", "with_options"],
)
COPIES = pytest.mark.parametrize(
    "copied",
    [
        lambda adapter, **changes: adapter.with_options(**changes),
        lambda adapter, **changes: adapter.model_copy(update=changes),
    ],
    ids=["with_options", "model_copy"],
)


@CHANGES
@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("topn", 3, "topn: unknown option, did you mean top_n?"),
        ("device", "cuda", "device: unknown option, leave it out"),
        ("top_n", 0, "top_n: .*None keeps all"),
        ("on_error", "ignore", "on_error: must be 'raise' or 'return_input', got 'ignore'"),
        ("score_metadata_key", "", "score_metadata_key: "),
        ("timeout", None, "timeout: "),
    ],
)
def test_a_wrong_option_is_rejected_by_name(
    adapter: Adapter, change: Callable[..., Any], name: str, value: Any, problem: str
) -> None:
    """The error contains the option, however it is set, and the adapter stays as it was."""
    before = adapter.model_dump()
    with pytest.raises(InvalidInputError, match=problem):
        change(adapter, name, value)
    assert adapter.model_dump() == before


def test_requests_name_package_and_framework(rerank: Rerank, adapter: Adapter, stub: Stub) -> None:
    """The User-Agent has the version of each."""
    rerank(adapter)
    name, module = (
        ("langchain", langchain_core) if isinstance(adapter, LangChainRerank) else ("llama-index", llama_index.core)
    )
    framework = f"{name}-core/{module.__version__}"
    assert stub.received[0].headers["user-agent"] == f"regolo_rerank/{__version__} {framework}"


def test_assigning_an_option_takes_effect_at_the_next_call(rerank: Rerank, adapter: Adapter, stub: Stub) -> None:
    """Key, model and top_n of a call are those that the adapter has when the call begins."""
    rerank(adapter)
    adapter.api_key, adapter.model, adapter.top_n = "sk-next-key", "other", 1
    assert scores_of(rerank(adapter)) == [0.9]
    assert [(request.headers["authorization"], request.json["model"]) for request in stub.received] == [
        (f"Bearer {KEY}", "Qwen3-Reranker-4B"),
        ("Bearer sk-next-key", "other"),
    ]


@COPIES
@pytest.mark.parametrize(("key", "sent"), [("sk-copy-key", "Bearer sk-copy-key"), (None, "Bearer sk-env"), ("", None)])
def test_a_copy_has_options_of_its_own(
    rerank: Rerank,
    adapter: Adapter,
    stub: Stub,
    monkeypatch: pytest.MonkeyPatch,
    copied: Callable[..., Adapter],
    key: str | None,
    sent: str | None,
) -> None:
    """A copy with another key sends that one, or the environment's, or none. The original keeps its key and top_n."""
    monkeypatch.setenv("REGOLO_API_KEY", "sk-env")
    copy = copied(adapter, api_key=key, top_n=1)
    assert type(copy) is type(adapter)
    assert [len(rerank(either)) for either in (copy, adapter)] == [1, 2]
    assert [request.headers.get("authorization") for request in stub.received] == [sent, f"Bearer {KEY}"]


@COPIES
def test_copies_share_connections_and_cache(adapter: Adapter, stub: Stub, copied: Callable[..., Adapter]) -> None:
    """A copy per request opens no connection, and finds scores that another copy has cached."""
    adapter.cache = {}
    for number in range(5):
        copy = copied(adapter, top_n=1, api_key=f"sk-tenant-{number}")
        ranked(copy, items_for(copy, [f"text {number}", "shared"]))
    assert stub.connections == 1
    assert stub.documents == [["text 0", "shared"], *([f"text {number}"] for number in range(1, 5))]


@COPIES
@pytest.mark.real_backoff
def test_copies_with_the_same_key_share_the_pause_after_a_429(
    rerank: Rerank, adapter: Adapter, stub: Stub, copied: Callable[..., Adapter]
) -> None:
    """While one key is paused, a copy with that key waits, and a tenant with another key does not."""
    stub.script(Reply({"error": {"message": "slow down"}}, 429, {"retry-after": "30"}))
    adapter.total_timeout, adapter.max_retries = 5.0, 1
    with pytest.raises(RateLimitError):
        rerank(adapter)
    assert len(rerank(copied(adapter, api_key="sk-another-key"))) == 2
    sent = len(stub.received)
    with pytest.raises(RateLimitError):
        rerank(copied(adapter, top_n=1))
    assert len(stub.received) == sent


def test_a_pickle_keeps_the_options_without_the_key(
    rerank: Rerank, adapter: Adapter, stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In another process, the adapter finds its key in the environment."""
    adapter.on_error, adapter.extra_body = "return_input", {"user": "u"}
    pickled = pickle.dumps(adapter)
    assert KEY.encode() not in pickled
    loaded = pickle.loads(pickled)  # noqa: S301 - our own
    assert loaded.api_key is None
    assert loaded.model_dump() == adapter.model_dump()
    monkeypatch.setenv("REGOLO_API_KEY", "sk-environment")
    assert len(rerank(loaded)) == 2
    assert stub.received[0].headers["authorization"] == "Bearer sk-environment"
    stub.always(DOWN)
    with pytest.warns(RerankFallbackWarning):
        rerank(loaded)


@pytest.mark.anyio
async def test_async_calls_run_at_once_without_threads(adapter: Adapter, stub: Stub) -> None:
    """The requests of twenty calls, two of each, are in flight together, sent from the event loop's own thread."""
    adapter.batch_size, before = 2, {thread.name for thread in threading.enumerate()}
    answer, started = together(40), set[str]()

    def reply(request: Any) -> Reply:
        started.update(thread.name for thread in threading.enumerate())
        return answer(request)

    stub.reply = reply
    kept = await asyncio.gather(*(aranked(adapter, items_for(adapter, TEXTS)) for _ in range(20)))
    assert [scores_of(items) for items in kept] == [[0.9, 0.5]] * 20
    assert {name for name in started - before if "process_request" not in name} == set()


@pytest.mark.anyio
async def test_sixteen_tenants_never_cross_keys(adapter: Adapter, stub: Stub) -> None:
    """Concurrent requests with a key each send every query with its own key, with retries in between."""
    adapter.max_retries = 2
    failed = set[str]()

    def reply(request: Any) -> Reply:
        query = request.json["query"]
        if query in failed:
            return scored(request)
        failed.add(query)
        return Reply(DOWN.body, 503, {"retry-after-ms": "1"})

    stub.reply = reply

    async def one(tenant: int) -> None:
        key, given = f"sk-tenant-{tenant}", items_for(adapter, TEXTS)
        if tenant % 2 and isinstance(adapter, LangChainRerank):
            await adapter.as_runnable().ainvoke({"query": str(tenant), "documents": given}, api_key=key)
        else:
            await aranked(adapter.with_options(api_key=key), given, str(tenant))

    await asyncio.gather(*(one(tenant) for tenant in range(16)))
    sent = [(request.json["query"], request.headers["authorization"]) for request in stub.received]
    assert sorted(sent) == sorted((str(tenant), f"Bearer sk-tenant-{tenant}") for tenant in [*range(16)] * 2)


@pytest.mark.anyio
async def test_with_blocks_close_the_connections(langchain: LangChainRerank, stub: Stub) -> None:
    """A call after the block opens new ones, sync and async."""
    for _ in range(2):
        with langchain as opened:
            opened.compress_documents(documents(), "q")
            opened.compress_documents(documents(), "q")
    for _ in range(2):
        async with langchain as opened:
            await opened.acompress_documents(documents(), "q")
            await opened.acompress_documents(documents(), "q")
    assert stub.connections == 4
