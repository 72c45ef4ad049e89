"""A reply as it comes in, collected within bounds: of size, of time, and of what a compressed body grows to."""

import time
import zlib
from typing import Final

import httpx

from regolo_rerank._wire.request_ids import is_reply_to_another
from regolo_rerank.errors import APIResponseError

__all__ = ["CONSUMED", "RawReply"]

MAX_REPLY_BYTES: Final = 64 * 1024 * 1024
"""Bytes of a reply, as they come or decompressed, after which it is refused."""

CONSUMED: Final = httpx.ByteStream(b"")
"""What a reply has for a stream once that is read: its own refers back to it, and both would be freed late."""

_GZIP: Final = 16 + zlib.MAX_WBITS
"""zlib's `wbits` for a body with gzip's header."""


class RawReply:
    """A reply whose raw bytes are collected and decompressed here.

    Args:
        response: The reply, its body still to come.
        deadline: When the body has to be complete, by the monotonic clock; None is never.

    Attributes:
        status_code: The HTTP status.
        headers: The reply's headers by name in lower case, as a dict: httpx's own takes long to look anything up.
        content: The bytes so far, decompressed; none of an error reply that cannot be, whose status tells enough.
        is_complete: Whether there is nothing to read, as where a mock has made the reply, or a hook has read it.

    Raises:
        APIResponseError: It is the reply to another request, or a 2xx compressed in a way that was not asked for.
        httpx.StreamClosed: A hook of the client has closed it unread.
    """

    def __init__(self, response: httpx.Response, deadline: float | None) -> None:
        self.status_code = response.status_code
        self.headers = dict(response.headers.items())
        if is_reply_to_another(response, self.headers):  # its connection closes with its body unread
            raise APIResponseError("the reply cannot be trusted: it belongs to another request")
        self.content = bytearray()
        self.is_complete = response.is_stream_consumed
        if response.is_closed and not self.is_complete:
            raise httpx.StreamClosed
        self._deadline = deadline
        self._is_success = 200 <= response.status_code < 300
        self._is_readable = True
        self._received = 0
        self._gzip = None
        encoding = self.headers.get("content-encoding", "").strip().lower()
        if self.is_complete:
            self.content += response.content
        elif encoding in {"gzip", "x-gzip"}:
            self._gzip = zlib.decompressobj(_GZIP)
        elif encoding not in {"", "identity"}:
            self._refuse(f"compressed as {encoding!r}, and only gzip was asked for", httpx.DecodingError(encoding))

    def add(self, chunk: bytes) -> None:
        """Take in the next bytes.

        Raises:
            APIResponseError: The body of a 2xx cannot be decompressed, or any body is too large.
            TimeoutError: It is too late.
        """
        if self._deadline is not None and time.monotonic() > self._deadline:
            raise TimeoutError
        self._received += len(chunk)
        if self._gzip is not None:
            try:
                chunk = self._gzip.decompress(chunk, MAX_REPLY_BYTES + 1 - len(self.content))
            except zlib.error as error:
                self._refuse(f"not what its header says: {error}")
        if self._is_readable:
            self.content += chunk
        if max(self._received, len(self.content)) > MAX_REPLY_BYTES:
            raise APIResponseError(f"the reply cannot be trusted: it is larger than {MAX_REPLY_BYTES} bytes")

    def _refuse(self, problem: str, cause: Exception | None = None) -> None:
        if self._is_success:
            raise APIResponseError(
                f"the reply cannot be trusted: its body cannot be decompressed: {problem}"
            ) from cause
        self._is_readable = False
        self.content.clear()
