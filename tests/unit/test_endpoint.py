import pytest

from regolo_rerank._endpoint import Endpoint, parse_base_url


@pytest.mark.parametrize(
    ("path", "url"),
    [
        ("", "/rerank"),
        ("/", "/rerank"),
        ("/v1", "/v1/rerank"),
        ("/v1//", "/v1/rerank"),
        ("/v1/rerank", "/v1/rerank"),
        ("/rerank/", "/rerank"),
        ("/custom-model/v1", "/custom-model/v1/rerank"),
        ("/v1?tag=a", "/v1/rerank?tag=a"),
        ("/v1/rerank?tag=/rerank", "/v1/rerank?tag=/rerank"),
        ("/team%2Fa/v1", "/team%2Fa/v1/rerank"),
        ("/a%3Fb%23c%0A?d=%2F", "/a%3Fb%23c%0A/rerank?d=%2F"),
        ("/my-rerank", "/my-rerank/rerank"),
    ],
)
def test_a_base_url_may_end_in_many_ways(path: str, url: str) -> None:
    """With or without /v1, /rerank and slashes, the address is the same, and its path stays as it is written."""
    assert parse_base_url(f"https://host:8443{path}").url == f"https://host:8443{url}"


@pytest.mark.parametrize(
    ("base_url", "traits"),
    [
        ("https://api.regolo.ai", ("is_https", "is_regolo")),
        ("https://eu.API.Regolo.AI./v1", ("is_https", "is_regolo")),
        ("https://regolo.ai:443", ("is_https", "is_regolo")),
        ("https://notregolo.ai", ("is_https",)),
        ("https://regolo.ai.example", ("is_https",)),
        ("http://127.0.0.1:8000", ("is_loopback",)),
        ("http://127.5.5.5", ("is_loopback",)),
        ("http://[::1]:8000", ("is_loopback",)),
        ("http://LOCALHOST", ("is_loopback",)),
        ("http://localhost.", ("is_loopback",)),
        ("http://localhost.example", ()),
        ("http://10.0.0.1", ()),
        ("local://", ("is_local", "is_loopback")),
        ("local:///", ("is_local", "is_loopback")),
    ],
)
def test_what_an_address_is(base_url: str, traits: tuple[str, ...]) -> None:
    """The key may only go over https or to this machine, so these are security questions."""
    endpoint = parse_base_url(base_url)
    assert {name for name in Endpoint.__slots__ if getattr(endpoint, name) is True} == set(traits)


def test_the_host_is_for_messages() -> None:
    """It has the port, and the user's own spelling."""
    assert parse_base_url("http://Host.example:81/v1?x=secret").host == "Host.example:81"
    assert parse_base_url("local://").host == "local://"


ASCII = "must contain only printable ASCII"
SCHEME = "must start with https:// or http://, or be local://"
HOST = "must contain a host name"
USER = "must not contain a user, password or fragment. Pass the key as api_key"


@pytest.mark.parametrize(
    ("problem", "base_urls"),
    [
        (SCHEME, ["ftp://host", "api.regolo.ai", "", "local", "local:", "local://x"]),
        (
            HOST,
            ["https://", "https:///v1", "https://.", "https://a..b", f"https://{'a' * 64}.b", f"https://{'a.' * 127}b"],
        ),
        ("must contain a port from 1 to 65535", ["https://host:0"]),
        ("[Pp]ort", ["https://host:65536", "https://host:x"]),
        ("IPv6", ["https://[::1"]),
        (USER, ["https://user@host", "https://:password@host", "https://@host", "https://host/#x"]),
        (ASCII, ["https://host/ü", "https://host/a b", "https://host/\n"]),
    ],
)
def test_an_address_without_a_server_is_rejected(problem: str, base_urls: list[str]) -> None:
    """Each problem is a ValueError that says what the address must be."""
    for base_url in base_urls:
        with pytest.raises(ValueError, match=problem):
            parse_base_url(base_url)
