"""An httpx transport on aiohttp, which carries many requests at once with half of the work.

httpx's own pool goes through all of its requests and connections at each of them; aiohttp's does not.
"""

import asyncio
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Final

import httpx

from regolo_rerank.errors import InvalidInputError

try:
    import aiohttp
    from yarl import URL
except ImportError:
    raise InvalidInputError(
        'async_transport: "aiohttp" needs aiohttp: pip install "regolo_rerank[aiohttp]", or leave it out'
    ) from None

__all__ = ["AiohttpTransport"]

# Each attempt as a whole has a timeout already.
_NO_TIMEOUT: Final = aiohttp.ClientTimeout(total=None, sock_connect=None)


class AiohttpTransport(httpx.AsyncBaseTransport):
    """Sends over aiohttp, in the event loop that it was first used in.

    Args:
        verify: The SSL context.
        keepalive_expiry: Seconds after which an idle connection is closed.
        trust_env: Whether the environment's proxies are used.
    """

    def __init__(self, verify: ssl.SSLContext, keepalive_expiry: float, *, trust_env: bool) -> None:
        self._verify = verify
        self._keepalive_expiry = keepalive_expiry
        self._trust_env = trust_env
        self._session: aiohttp.ClientSession | None = None

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, ssl=self._verify, keepalive_timeout=self._keepalive_expiry),
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=_NO_TIMEOUT,
                auto_decompress=False,
                trust_env=self._trust_env,
            )
        return self._session

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request, and return the reply with its body still to come."""
        with _errors():
            response = await self._opened().request(
                request.method,
                URL(str(request.url), encoded=True),
                headers=request.headers,
                data=request.content,
                allow_redirects=False,
            )
        return httpx.Response(response.status, headers=response.raw_headers, stream=_Body(response))

    async def aclose(self) -> None:
        """Close all connections."""
        if self._session is not None:
            await self._session.close()
            await asyncio.sleep(0)  # for the sockets to close too


class _Body(httpx.AsyncByteStream):
    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response

    async def __aiter__(self) -> AsyncIterator[bytes]:
        with _errors():
            async for chunk in self._response.content.iter_any():
                yield chunk

    async def aclose(self) -> None:
        self._response.close()


@contextmanager
def _errors() -> Iterator[None]:
    """Turn aiohttp's errors into httpx's."""
    try:
        yield
    except (aiohttp.ClientConnectorError, aiohttp.ClientHttpProxyError) as error:
        raise httpx.ConnectError(str(error)) from error
    except aiohttp.ClientError as error:
        raise httpx.RemoteProtocolError(str(error) or type(error).__name__) from error
