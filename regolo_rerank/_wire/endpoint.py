"""Where requests go, as `base_url` says."""

import functools
import ipaddress
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import httpx

__all__ = ["BASE_URL_VARIABLE", "DEFAULT_BASE_URL", "Endpoint", "Scorer", "check_host", "read_base_url"]

BASE_URL_VARIABLE: Final = "REGOLO_BASE_URL"
DEFAULT_BASE_URL: Final = "https://api.regolo.ai"

Scorer = Callable[[str, list[str]], Sequence[float]]
"""What can score for `local://`: (query, documents) -> one finite number a document, higher is better."""


class Endpoint(NamedTuple):
    """Where requests go, as `base_url` says.

    Attributes:
        url: The address.
        address: The same as text.
        embedded: Whether the scorer on this machine answers.
        loopback: Whether nothing leaves this machine.
        is_regolo: Whether this is Regolo's own service, which answers nobody without a key.
    """

    url: httpx.URL
    address: str
    embedded: bool = False
    loopback: bool = False
    is_regolo: bool = False


@functools.lru_cache(maxsize=64)
def read_base_url(base_url: str) -> Endpoint:
    """Read a base URL, with or without `/rerank` and slashes at its end; raise ValueError for any other text."""
    if base_url.rstrip("/") == "local:" and base_url.startswith("local://"):
        address = "local://embedded/rerank"
        return Endpoint(httpx.URL(address), address, embedded=True, loopback=True)
    try:
        url = httpx.URL(base_url)
    except httpx.InvalidURL as error:
        raise ValueError(str(error)) from None
    if url.scheme not in {"http", "https"}:
        raise ValueError("must start with https://, http:// or be local://")
    check_host(url)
    if url.userinfo or url.fragment:
        raise ValueError("must hold no user, password or fragment; a key goes into api_key")
    path, mark, parameters = url.raw_path.partition(b"?")  # as it is: `%2F` is not `/`
    path = path.rstrip(b"/").removesuffix(b"/rerank") + b"/rerank"
    url = url.copy_with(raw_path=path + mark + parameters)
    return Endpoint(
        url,
        str(url),
        loopback=_is_loopback(url.host),
        is_regolo=url.host == "regolo.ai" or url.host.endswith(".regolo.ai"),
    )


def check_host(url: httpx.URL) -> None:
    """Raise ValueError where no connection can be opened to a URL's host and port."""
    host = url.raw_host.decode().removesuffix(".")
    if not host or " " in host:
        raise ValueError("must name a host")
    if len(host) > 253 or not all(0 < len(label) < 64 for label in host.split(".")):
        raise ValueError("must name a host whose labels have 1 to 63 characters, 253 in all")
    if url.port is not None and not 0 < url.port < 65_536:
        raise ValueError("must name a port from 1 to 65535")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.rstrip(".") == "localhost"
