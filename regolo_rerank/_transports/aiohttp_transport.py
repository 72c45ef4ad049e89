"""An httpx transport on aiohttp, which carries many requests at once with half of the work.

httpx's own pool goes through all of its requests and connections at each of them; aiohttp's does not.
"""

import asyncio
import ssl
from collections.abc import AsyncIterator
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
    """Sends over aiohttp, in the event loop that it was made in.

    Args:
        verify: The SSL context.
        keepalive_expiry: Seconds after which an idle connection is closed.
        trust_env: Whether the environment's proxies are used.
    """

    def __init__(self, verify: ssl.SSLContext, keepalive_expiry: float, *, trust_env: bool) -> None:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, ssl=verify, keepalive_timeout=keepalive_expiry),
            cookie_jar=aiohttp.DummyCookieJar(),
            timeout=_NO_TIMEOUT,
            auto_decompress=False,
            trust_env=trust_env,
        )

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request, and return the reply with its body still to come."""
        try:
            response = await self._session.request(
                request.method,
                URL(str(request.url), encoded=True),
                headers=request.headers,
                data=request.content,
                allow_redirects=False,
            )
        except aiohttp.ClientError as error:
            problem = _as_httpx(error)
        else:
            if response.status >= 200:
                return httpx.Response(response.status, headers=response.raw_headers, stream=_Body(response))
            response.close()
            problem = httpx.RemoteProtocolError("the server wants another protocol")
        raise problem

    async def aclose(self) -> None:
        """Close all connections."""
        await self._session.close()
        await asyncio.sleep(0)  # for the sockets to close too


class _Body(httpx.AsyncByteStream):
    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            async for chunk in self._response.content.iter_any():
                yield chunk
        except aiohttp.ClientError as error:
            problem = _as_httpx(error)
        else:
            return
        raise problem

    async def aclose(self) -> None:
        self._response.close()


def _as_httpx(error: aiohttp.ClientError) -> httpx.TransportError:
    """Return the httpx error to raise in place of aiohttp's, which holds the request's headers and quotes the reply."""
    if isinstance(error, aiohttp.ClientConnectorError | aiohttp.ClientHttpProxyError):
        return httpx.ConnectError((isinstance(error, OSError) and error.strerror) or "the proxy refuses")
    return httpx.RemoteProtocolError(f"the server hung up, or its reply is not HTTP ({type(error).__name__})")
