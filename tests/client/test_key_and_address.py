from typing import Any

import httpx
import pytest

from regolo_rerank import (
    APIConnectionError,
    AuthenticationError,
    InvalidInputError,
    MissingAPIKeyError,
    RegoloClient,
    RegoloError,
)
from tests.conftest import KEY, Rank
from tests.support.inside import forget_certificates
from tests.support.stub import Reply, Stub, error


def test_without_a_key_the_error_names_both_ways_out(rank: Rank) -> None:
    """A regolo.ai host demands a key at the first call, not at construction."""
    client = RegoloClient(base_url="https://eu.regolo.ai/v1")
    with pytest.raises(MissingAPIKeyError, match=r"eu\.regolo\.ai.*REGOLO_API_KEY.*local://"):
        rank(client, "q", ["a"])


@pytest.mark.parametrize(
    ("api_key", "environment", "sent"),
    [
        (" key\n", None, "Bearer key"),
        (None, " env-key\n", "Bearer env-key"),
        ("key", "env-key", "Bearer key"),
        ("", "env-key", None),
        (None, None, None),
    ],
)
def test_the_key_comes_from_the_argument_or_the_environment(
    rank: Rank, stub: Stub, monkeypatch: pytest.MonkeyPatch, api_key: str | None, environment: str | None, sent: Any
) -> None:
    """The environment is read at the call; an empty key sends none; keys are stripped."""
    client = RegoloClient(api_key, base_url=stub.url)
    if environment is not None:
        monkeypatch.setenv("REGOLO_API_KEY", environment)
    rank(client, "q", ["a"])
    assert stub.received[0].headers.get("authorization") == sent


def test_a_malformed_key_in_the_environment_is_refused(rank: Rank, stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error names the variable and the place, not the key."""
    monkeypatch.setenv("REGOLO_API_KEY", "sk-can\nary")
    with pytest.raises(InvalidInputError, match=r"REGOLO_API_KEY: .* position 6") as caught:
        rank(RegoloClient(base_url=stub.url), "q", ["a"])
    assert "sk-can" not in str(caught.value)


@pytest.mark.parametrize("key", [f"Bearer {KEY}", f"'{KEY}'", f'"{KEY}"'])
def test_a_key_with_something_around_it_is_refused(
    rank: Rank, stub: Stub, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    """The environment's too: nothing is sent, and the error does not show it."""
    monkeypatch.setenv("REGOLO_API_KEY", key)
    with pytest.raises(InvalidInputError, match="REGOLO_API_KEY: must be the key alone, without 'Bearer '") as caught:
        rank(RegoloClient(base_url=stub.url), "q", ["a"])
    assert KEY not in str(caught.value)
    assert stub.received == []


@pytest.mark.parametrize(
    ("reply", "advice"),
    [
        (
            error("no such key", 401),
            r"\[HTTP 401\]; check the API key: api_key, or .* REGOLO_API_KEY",
        ),
        (error("not found", 404), "; nothing to rerank with at {url}: see base_url"),
        (Reply({"detail": "Method Not Allowed"}, 405), "; nothing to rerank with at {url}: see base_url"),
        (Reply(b"<!doctype html><p>Hello"), "a web page has answered at {url}, and not the API: see base_url"),
    ],
)
def test_an_error_says_what_to_do(rank: Rank, client: RegoloClient, stub: Stub, reply: Reply, advice: str) -> None:
    """Where key or address are wrong, it names the option, and the address that was used."""
    stub.always(reply)
    with pytest.raises(RegoloError, match=advice.replace("{url}", f"{stub.url}/rerank")):
        rank(client, "q", ["a"])


def test_without_a_key_a_refusal_says_to_set_one(rank: Rank, stub: Stub) -> None:
    """A server of one's own that demands a key says so itself, and the error says where it goes."""
    stub.always(error("no key", 401))
    with pytest.raises(AuthenticationError, match="; set the API key: api_key, or the environment"):
        rank(RegoloClient(base_url=stub.url), "q", ["a"])


def test_the_key_does_not_go_over_plain_http(rank: Rank) -> None:
    """Another machine gets the key over https, or with allow_http."""
    client = RegoloClient(KEY, base_url="http://rerank.invalid", max_retries=0)
    with pytest.raises(InvalidInputError, match=r"rerank\.invalid over plain http"):
        rank(client, "q", ["a"])
    client.allow_http = True
    with pytest.raises(APIConnectionError, match=r"rerank\.invalid"):
        rank(client, "q", ["a"])


@pytest.mark.parametrize(
    ("suffix", "path"),
    [
        ("", "/rerank"),
        ("/", "/rerank"),
        ("/v1", "/v1/rerank"),
        ("/v1/", "/v1/rerank"),
        ("/v1/rerank", "/v1/rerank"),
        ("/rerank/", "/rerank"),
        ("/custom-model/v1", "/custom-model/v1/rerank"),
        ("/v1?tag=a", "/v1/rerank?tag=a"),
        ("/team%2Fa/v1", "/team%2Fa/v1/rerank"),
        ("/%2525/%E9/", "/%2525/%E9/rerank"),
        ("/a%3Fb%23c%0A?d=%2F", "/a%3Fb%23c%0A/rerank?d=%2F"),
        ("/ü x", "/%C3%BC%20x/rerank"),
    ],
)
def test_a_base_url_may_end_in_many_ways(rank: Rank, stub: Stub, suffix: str, path: str) -> None:
    """With or without /v1, /rerank and slashes, requests reach the same place, and the path stays as it is written."""
    rank(RegoloClient(KEY, base_url=f" {stub.url}{suffix} "), "q", ["a"])
    assert stub.received[0].path == path


def test_the_environment_names_the_server(rank: Rank, stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    """REGOLO_BASE_URL is read at the call, and a wrong one is named."""
    client = RegoloClient(KEY)
    monkeypatch.setenv("REGOLO_BASE_URL", stub.url)
    rank(client, "q", ["a"])
    assert len(stub.received) == 1
    for wrong, problem in (("ftp://x", "must start with"), ("http://x:99999", "must name a port"), ("http://", "host")):
        monkeypatch.setenv("REGOLO_BASE_URL", wrong)
        with pytest.raises(InvalidInputError, match=f"REGOLO_BASE_URL: .*{problem}"):
            rank(client, "q", ["a"])


def test_headers_of_the_callers_own_go_along(rank: Rank, stub: Stub) -> None:
    """default_headers are sent with each request."""
    rank(RegoloClient(KEY, base_url=stub.url, default_headers={"X-Team": "search"}), "q", ["a"])
    assert stub.received[0].headers["x-team"] == "search"


def test_loopback_is_never_proxied(rank: Rank, stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy in the environment does not stand between this machine and itself."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    assert rank(RegoloClient(KEY, base_url=stub.url), "q", ["a"]).results


def test_other_hosts_are_reached_through_the_environments_proxy(
    rank: Rank, stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A proxy in the environment carries requests to other machines."""
    monkeypatch.setenv("HTTP_PROXY", stub.url)
    rank(RegoloClient(base_url="http://rerank.invalid/v1", max_retries=0), "q", ["a"])
    assert stub.received[0].path == "http://rerank.invalid/v1/rerank"


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        *(
            ("HTTPS_PROXY", proxy)
            for proxy in ("nonsense://x", "http://", "http://h:x", "http://h:65536", "http://a..b")
        ),
        *(("ALL_PROXY", proxy) for proxy in (f"{'a' * 64}:80", "h:99999999999999999999", "\x01")),
        pytest.param(
            *("SSL_CERT_FILE", "/nonexistent"),
            marks=pytest.mark.skipif(httpx.__version__ < "0.28", reason="httpx 0.27 ignores a file that is not there"),
        ),
        ("SSL_CERT_FILE", __file__),
    ],
)
def test_an_environment_that_cannot_be_used_is_an_error_of_ours(
    rank: Rank, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    """A malformed proxy or certificate in the environment is named, and nothing is retried."""
    monkeypatch.setenv(variable, value)
    forget_certificates(monkeypatch)
    with pytest.raises(APIConnectionError, match="proxies or certificates cannot be used"):
        rank(RegoloClient(KEY), "q", ["a"])


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_request_says_where_it_goes(rank: Rank, stub: Stub, host: str) -> None:
    """Host is the address's own, with its port, by which a proxy or a gateway finds the service."""
    base_url = stub.url.replace("127.0.0.1", host)
    rank(RegoloClient(KEY, base_url=base_url), "q", ["a"])
    assert stub.received[0].headers["host"] == httpx.URL(base_url).netloc.decode()
