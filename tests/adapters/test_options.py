"""Options of both adapters: constructor, assignment, copies, and what copies share."""

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import langchain_core
import llama_index.core
import pytest

from regolo_rerank import InvalidInputError, __version__
from regolo_rerank.langchain import RegoloRerank as LangChainRerank
from tests.adapters.helpers import TEXTS, Adapter, Rerank, aranked, documents, items_for, ranked, scores_of
from tests.conftest import KEY
from tests.support.stub import Reply, Stub, together

COPIES = pytest.mark.parametrize(
    "copied",
    [
        lambda adapter, **changes: adapter.with_options(**changes),
        lambda adapter, **changes: adapter.model_copy(update=changes),
    ],
    ids=["with_options", "model_copy"],
)


@COPIES
@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("topn", 3, "topn: unknown option, did you mean top_n?"),
        ("on_error", "ignore", "on_error: must be 'raise' or 'return_input', got 'ignore'"),
        ("score_metadata_key", "", "score_metadata_key: "),
    ],
)
def test_a_wrong_option_is_rejected_by_name(
    adapter: Adapter, copied: Callable[..., Adapter], name: str, value: Any, problem: str
) -> None:
    """The error contains the option."""
    with pytest.raises(InvalidInputError, match=problem):
        copied(adapter, **{name: value})


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
