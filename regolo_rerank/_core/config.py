"""What all requests of a call have in common."""

from dataclasses import dataclass, field
from typing import Any

import httpx
from pydantic import SecretStr

from regolo_rerank._core.retry import RateLimitHold
from regolo_rerank._transports.clients import Clients
from regolo_rerank._transports.local import SCORER_EXTENSION
from regolo_rerank._wire.request_ids import new_id_headers
from regolo_rerank.options import Options

__all__ = ["RequestConfig", "Shared"]


@dataclass(slots=True)
class Shared:
    """What all calls of a reranker share, and no copy of it but that of `copy.copy`."""

    clients: Clients = field(default_factory=Clients)
    hold: RateLimitHold = field(default_factory=RateLimitHold)


class RequestConfig:
    """The options of a call as they are now, and where and how its requests are sent.

    Attributes:
        key: The key that requests carry, once `require_key` has found it.
        fields: What requests say besides model, query, documents and top_n.
        timeout: Seconds for one attempt; None leaves that to the caller's client, or to a scorer on this machine.
        send_options: Arguments of the client's `send`.

    Raises:
        InvalidInputError: Options contradict each other.
    """

    key: SecretStr | None = None

    def __init__(
        self,
        options: Options,
        user_agent: str,
        shared: Shared,
        callers_client: httpx.Client | httpx.AsyncClient | None,
    ) -> None:
        self.options = options
        self.clients, self.hold = shared.clients, shared.hold
        self.callers_client = callers_client
        self.endpoint = options.endpoint()
        self.prompt_format = options.format_for(self.endpoint)
        self.fields = options.fields_for(self.endpoint, self.prompt_format)
        self.timeout = None if callers_client is not None or self.endpoint.embedded else options.timeout
        self.send_options: dict[str, Any] = {"stream": True, "follow_redirects": False}
        self._headers = {
            "accept": "application/json",
            "accept-encoding": "gzip",
            "content-type": "application/json",
            "user-agent": user_agent,
        }
        for name, value in (options.default_headers or {}).items():
            self._headers[name.lower()] = value
        self._extensions = {} if options.scorer is None else {SCORER_EXTENSION: options.scorer}

    def require_key(self) -> None:
        """Find the key, before the first request is sent.

        Raises:
            MissingAPIKeyError: The endpoint demands a key, and there is none.
            InvalidInputError: The key is malformed, or would travel in the clear.
        """
        self.key = self.options.key_for(self.endpoint)
        if self.key is not None:
            self.send_options["auth"] = httpx.Auth()  # adds nothing, and keeps out that of a client of the caller's

    def request(self, content: bytes) -> httpx.Request:
        """Return the request that carries some JSON; a client of the caller's adds what it adds to each."""
        url, headers = self.endpoint.url, new_id_headers() | self._headers
        extensions = dict(self._extensions)  # as the headers, each its own: tools that watch httpx write into them
        if client := self.callers_client:
            request = client.build_request("POST", url, content=content, headers=headers, extensions=extensions)
        else:
            # httpx would work these out from `content`, which is half of what it costs to make a request.
            framing = {"host": url.netloc.decode(), "content-length": str(len(content))}
            stream = httpx.ByteStream(content)
            request = httpx.Request("POST", url, stream=stream, headers=framing | headers, extensions=extensions)
            request.read()  # for whoever looks at its content
        if self.key is not None:  # last, so that it counts, and that no frame holds the header by itself
            request.headers["Authorization"] = f"Bearer {self.key.get_secret_value()}"
        return request
