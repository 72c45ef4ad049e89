"""The only place where tests look inside the package: when its inside changes, this file changes, and no other.

Unit tests whose subject is a module of the inside import that module by themselves.
"""

import asyncio
import ssl
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from regolo_rerank._cli import output
from regolo_rerank._cli.main import main
from regolo_rerank._core import queue, retry
from regolo_rerank._core.reranker import Reranker
from regolo_rerank._transports import clients, scorer, spread
from regolo_rerank._transports.local import answer
from regolo_rerank._wire import body

__all__ = [
    "allow_replies_of",
    "answer",
    "back_off_for",
    "break_run_outputs",
    "close_pool_of",
    "connections_of",
    "forget_certificates",
    "forget_refusals_after",
    "forget_word_vectors",
    "hide_word_vectors",
    "is_worker",
    "keep_idle_for",
    "limit_pictures_to",
    "loops_of",
    "main",
    "pools_of",
    "private_state_of",
    "refusal_of",
    "ssl_context_of",
    "watch_bulk_files",
    "workers",
    "write_labels",
]


# --- what there is ----------------------------------------------------------------------------------------------------


def workers() -> list[threading.Thread]:
    """Return the threads of ours that are alive; sync calls of several requests start them."""
    return list(filter(is_worker, threading.enumerate()))


def is_worker(thread: threading.Thread) -> bool:
    """Return whether a thread is one of ours."""
    return thread.name == "regolo_rerank"


def private_state_of(reranker: Reranker) -> object:
    """Return all that a client or an adapter holds besides its options: its connections, and what they know."""
    return reranker.__pydantic_private__


def connections_of(reranker: Reranker) -> object:
    """Return what holds the connections, the same object for as long as the client or adapter lives."""
    return reranker._shared.clients


def loops_of(reranker: Reranker) -> list[asyncio.AbstractEventLoop]:
    """Return the event loops in which connections are held."""
    return list(reranker._shared.clients._loops)


def pools_of(reranker: Reranker) -> int:
    """Return how many httpx clients are held: one for sync calls, and one for each event loop."""
    return len(reranker._shared.clients._loops) + len(reranker._shared.clients._clients)


async def close_pool_of(reranker: Reranker, loop: asyncio.AbstractEventLoop) -> None:
    """Close the connections of an event loop, and leave them where they are held."""
    for client, _ in reranker._shared.clients._loops[loop].values():
        await client.aclose()


def refusal_of(reranker: Reranker) -> Exception:
    """Return the 429 that held back all requests of a client or an adapter last."""
    return reranker._shared.hold._refusal


def ssl_context_of(reranker: Reranker, mode: str) -> ssl.SSLContext:
    """Return the SSL context of a reranker's sync or async calls."""

    def read(client: Any) -> ssl.SSLContext:
        context: ssl.SSLContext = client._transport._idle[0][1]._pool._ssl_context
        return context

    async def aread() -> ssl.SSLContext:
        return read(await reranker._shared.clients.loop_client(reranker.endpoint()))

    return asyncio.run(aread()) if mode == "async" else read(reranker._shared.clients.client(reranker.endpoint()))


def write_labels(axes: Any, texts: list[str], size: float) -> None:
    """Write texts beside the y axis of Matplotlib's axes as a picture of a ranking does, in letters of a size."""
    from regolo_rerank import plot

    plot._label(axes, texts, size)


def watch_bulk_files(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Return a list that grows by a path for each line that `bulk` writes."""
    written: list[Path] = []
    add = output._File.add

    def add_and_tell(file: output._File, line: bytes) -> None:
        written.append(file.path)
        add(file, line)

    monkeypatch.setattr(output._File, "add", add_and_tell)
    return written


# --- what a test changes ----------------------------------------------------------------------------------------------


def back_off_for(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each retry for which the server names no wait follow after so many seconds, and any other just in time."""
    monkeypatch.setattr(retry, "backoff", lambda _: seconds)
    monkeypatch.setattr(retry, "window_backoff", lambda _: seconds)
    monkeypatch.setattr(retry, "SPREAD", 0.0)


def allow_replies_of(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse replies of more bytes than that."""
    monkeypatch.setattr(body, "MAX_REPLY_BYTES", size)


def forget_refusals_after(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a call try so many seconds after a refusal for too many parallel requests whether the limit still holds."""
    monkeypatch.setattr(queue, "_MEMORY", seconds)


def keep_idle_for(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a connection that was idle for so many seconds be closed by the next call."""
    monkeypatch.setattr(spread, "KEEPALIVE", seconds)


def forget_certificates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the next client load the certificates that the environment names, and not use those of an earlier one."""
    monkeypatch.setattr(clients, "_ssl_context", clients._ssl_context.__wrapped__)


def forget_word_vectors() -> None:
    """Let the embedded scorer be asked as if for the first time."""
    scorer._model.cache_clear()


def hide_word_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the embedded scorer be asked for the first time, where what it needs is not installed."""
    forget_word_vectors()
    monkeypatch.setitem(sys.modules, "tokenizers", None)


def limit_pictures_to(inches: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw no picture of a ranking taller than that."""
    monkeypatch.setattr("regolo_rerank.plot._TALLEST", inches)


def break_run_outputs(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail wherever it is put together what LangChain's handlers are told of a rerank that went well."""

    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr("regolo_rerank.langchain._tell_outputs", fail)
