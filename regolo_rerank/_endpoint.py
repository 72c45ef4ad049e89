"""The address of the server: `base_url` with or without `/v1`, `/rerank` or a trailing slash."""

import functools
import ipaddress
from dataclasses import dataclass
from typing import Final
from urllib.parse import SplitResult, urlsplit

__all__ = ["DEFAULT_BASE_URL", "Endpoint", "parse_base_url"]

DEFAULT_BASE_URL: Final = "https://api.regolo.ai"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """The address that requests are sent to.

    Attributes:
        url: The complete address, ending in `/rerank` (and the query string of `base_url`, if it has one).
        host: Host and port, for messages.
        is_https: Whether the connection is encrypted.
        is_local: Whether this is `local://`, the scorer in this process.
        is_loopback: Whether the server is on this machine.
        is_regolo: Whether this is Regolo's own service, which always requires a key.
    """

    url: str
    host: str
    is_https: bool = False
    is_local: bool = False
    is_loopback: bool = False
    is_regolo: bool = False


@functools.lru_cache(maxsize=64)
def parse_base_url(base_url: str) -> Endpoint:
    """Return the endpoint for a base URL.

    Raises:
        ValueError: It is not a URL that requests can be sent to.
    """
    if base_url.rstrip("/") == "local:" and base_url != "local:":
        return Endpoint("local://embedded/rerank", "local://", is_local=True, is_loopback=True)
    if not base_url.isascii() or not base_url.isprintable() or " " in base_url:
        raise ValueError("must contain only printable ASCII characters without spaces")
    parts = urlsplit(base_url)
    if parts.scheme not in {"http", "https"}:
        raise ValueError("must start with https:// or http://, or be local://")
    host = _check_host(parts)
    if parts.username is not None or parts.fragment:
        raise ValueError("must not contain a user, password or fragment. Pass the key as api_key")
    path = parts.path.rstrip("/").removesuffix("/rerank") + "/rerank"
    return Endpoint(
        parts._replace(path=path).geturl(),
        parts.netloc,
        is_https=parts.scheme == "https",
        is_loopback=_is_loopback(host),
        is_regolo=host == "regolo.ai" or host.endswith(".regolo.ai"),
    )


def _check_host(parts: SplitResult) -> str:
    """Return the host name, or raise ValueError if no connection to it is possible."""
    host = (parts.hostname or "").removesuffix(".")
    lengths = [len(label) for label in host.split(".")]
    if len(host) > 253 or min(lengths) == 0 or max(lengths) > 63:
        raise ValueError("must contain a host name")
    if parts.port == 0:  # `port` itself raises ValueError for text, and for numbers over 65535
        raise ValueError("must contain a port from 1 to 65535")
    return host


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
