"""What the client and both adapters are: options, connections, and one way to rank texts, sync and async."""

import asyncio
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager, closing, contextmanager, nullcontext
from traceback import clear_frames
from types import TracebackType
from typing import Any, ClassVar, Self

import httpx
from pydantic import PrivateAttr

from regolo_rerank import __version__
from regolo_rerank._core.calls import Call, Terms
from regolo_rerank._core.sending import AsyncLines, Lines, afinish, aprepare, finish, prepare
from regolo_rerank._transports.pools import Pools
from regolo_rerank.errors import RegoloError
from regolo_rerank.options import Options
from regolo_rerank.results import RerankResponse

__all__ = ["Reranker", "forgetful_errors"]


class Reranker(Options):
    """What the client and both adapters are: options, connections, and one way to rank texts.

    Connections are opened at the first call, kept for later ones and closed when the object is forgotten; with a
    large number of short-lived objects, use each as a (async) context manager, or share one httpx client.
    """

    _pools: Pools = PrivateAttr(default_factory=Pools)

    framework: ClassVar[str] = ""
    """The framework and its version, for the User-Agent."""

    @classmethod
    def user_agent(cls) -> str:
        """Return what requests call themselves: this package, its version and the framework."""
        return f"regolo_rerank/{__version__} {cls.framework}".rstrip()

    def _terms(self, arguments: dict[str, Any], callers_client: httpx.Client | httpx.AsyncClient | None) -> Terms:
        return Terms(self.for_call(**arguments), self.user_agent(), self._pools.gate, callers_client)

    def _lines(self, terms: Terms) -> AbstractContextManager[Lines]:
        if isinstance(client := terms.callers_client, httpx.Client):
            return nullcontext(lambda: nullcontext(client))
        return self._pools.pool(terms.endpoint)

    def _async_lines(self, terms: Terms) -> AbstractAsyncContextManager[AsyncLines]:
        if isinstance(client := terms.callers_client, httpx.AsyncClient):
            return nullcontext(lambda: nullcontext(client))
        return self._pools.async_pool(terms.endpoint, terms.options.async_transport)

    def _rank(self, query: str, documents: Iterable[str], **arguments: Any) -> RerankResponse:
        with forgetful_errors():
            terms = self._terms(arguments, self.http_client)
            with closing(Call(terms, query, documents, threading.Event())) as call:
                prepare(call)
                if call.plan.batches:
                    with self._lines(terms) as lines:
                        finish(call, lines)
                return call.response()

    async def _arank(self, query: str, documents: Iterable[str], **arguments: Any) -> RerankResponse:
        with forgetful_errors():
            terms = self._terms(arguments, self.async_http_client)
            with closing(Call(terms, query, documents, asyncio.Event())) as call:
                await aprepare(call)
                if call.plan.batches:
                    async with self._async_lines(terms) as lines:
                        await afinish(call, lines)
                return call.response()

    def close(self) -> None:
        """Close the connections of sync calls; the next call opens new ones."""
        self._pools.close()

    async def aclose(self) -> None:
        """Close the connections of sync calls, and of async calls in the running event loop."""
        await self._pools.aclose()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()


@contextmanager
def forgetful_errors() -> Iterator[None]:
    """Empty the frames behind an error: they hold replies, which may quote the key, and all of the documents."""
    callers_own = sys.exception()
    try:
        yield
    except RegoloError as error:
        _forget(error, callers_own)
        raise


def _forget(error: RegoloError, callers_own: BaseException | None) -> None:
    todo: list[BaseException | None] = [error]
    seen = {id(None), id(callers_own)}
    while todo:
        link = todo.pop()
        if link is None or id(link) in seen:
            continue
        seen.add(id(link))
        clear_frames(link.__traceback__)
        todo += [link.__cause__, link.__context__]
