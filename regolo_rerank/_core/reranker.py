"""One way to rank texts, sync and async, for the client and both adapters."""

import asyncio
from collections.abc import Iterable
from typing import Any, ClassVar, Self

import httpx
from pydantic import PrivateAttr

from regolo_rerank._core import tasks, threads
from regolo_rerank._core.call import Call
from regolo_rerank._core.config import RequestConfig, Shared
from regolo_rerank._transports.spread import Done
from regolo_rerank._version import __version__
from regolo_rerank.errors import InvalidInputError
from regolo_rerank.options import Options
from regolo_rerank.results import RerankResponse

__all__ = ["Reranker"]


class Reranker(Options):
    """What the client and both adapters are: options, connections, and one way to rank texts.

    Connections are opened at the first call, kept for later ones and closed when the object is forgotten; with a
    large number of short-lived objects, use each as a (async) context manager, or share one httpx client.
    """

    _shared: Shared = PrivateAttr(default_factory=Shared)

    user_agent: ClassVar[str] = f"regolo_rerank/{__version__}"
    """What requests call themselves: this package and its version, and in adapters the framework and its."""

    def _part_from_original(self) -> None:
        self._shared = Shared()

    def _configure(self, *, is_async: bool, **arguments: Any) -> RequestConfig:
        options = self.for_call(**arguments)
        callers_client = options.async_http_client if is_async else options.http_client
        return RequestConfig(options, self.user_agent, self._shared, callers_client)

    def _client_for(self, config: RequestConfig) -> httpx.Client:
        return config.options.http_client or config.clients.client(config.endpoint)

    async def _async_client_for(self, config: RequestConfig) -> httpx.AsyncClient:
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            raise InvalidInputError(
                "async calls need asyncio's event loop, and none is running, as under trio"
            ) from None
        return config.options.async_http_client or await config.clients.loop_client(config.endpoint)

    def _rank(self, query: str, documents: Iterable[str], **arguments: Any) -> RerankResponse:
        config = self._configure(is_async=False, **arguments)
        call = Call(config, (query, documents), Done())
        try:
            if not call.done.is_set():
                threads.finish(call, self._client_for(config))
        finally:
            call.close()
        return call.result()

    async def _arank(self, query: str, documents: Iterable[str], **arguments: Any) -> RerankResponse:
        config = self._configure(is_async=True, **arguments)
        call = Call(config, (query, documents), asyncio.Event())
        try:
            if not call.done.is_set():
                await tasks.finish(call, await self._async_client_for(config))
        finally:
            call.close()
        return call.result()

    def close(self) -> None:
        """Close the connections of sync calls; the next call opens new ones."""
        self._shared.clients.close()

    async def aclose(self) -> None:
        """Close the connections of sync calls, and of async calls in the running event loop."""
        await self._shared.clients.aclose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()
