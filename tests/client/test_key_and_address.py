"""Where requests go, with which key, through which proxy, and which certificates are trusted."""

import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import httpx
import pytest

from regolo_rerank import (
    APIConnectionError,
    APIStatusError,
    InvalidInputError,
    MissingAPIKeyError,
    RegoloClient,
    RegoloError,
)
from tests.conftest import KEY
from tests.support.modes import Call
from tests.support.stub import Reply, Stub, error


def test_without_a_key_the_error_names_both_ways_out(call: Call) -> None:
    """Regolo's own hosts require a key, at the first call."""
    client = RegoloClient(base_url="https://eu.regolo.ai/v1")
    with pytest.raises(MissingAPIKeyError, match=r"eu\.regolo\.ai.*REGOLO_API_KEY.*local://"):
        call(client.rerank, "q", ["a"])


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
def test_the_key_comes_from_the_option_or_the_environment(
    call: Call, stub: Stub, monkeypatch: pytest.MonkeyPatch, api_key: str | None, environment: str | None, sent: Any
) -> None:
    """The environment is read at the call; an empty key sends none."""
    client = RegoloClient(api_key, base_url=stub.url)
    if environment is not None:
        monkeypatch.setenv("REGOLO_API_KEY", environment)
    call(client.rerank, "q", ["a"])
    assert stub.received[0].headers.get("authorization") == sent


@pytest.mark.parametrize("key", ["sk-canary-4f\n1d", f"Bearer {KEY}", f"'{KEY}'"])
def test_a_wrong_key_in_the_environment_is_named_and_not_shown(
    call: Call, stub: Stub, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    """Nothing is sent."""
    monkeypatch.setenv("REGOLO_API_KEY", key)
    with pytest.raises(InvalidInputError, match=r"REGOLO_API_KEY: ") as caught:
        call(RegoloClient(base_url=stub.url).rerank, "q", ["a"])
    assert "canary" not in str(caught.value)
    assert stub.received == []


@pytest.mark.parametrize(
    ("reply", "advice"),
    [
        (error("no such key", 401), r"\[HTTP 401\]. Check the API key: api_key, or .* REGOLO_API_KEY"),
        (error("not found", 404), r"No rerank endpoint at {url}: check base_url"),
        (Reply({"detail": "Method Not Allowed"}, 405), r"No rerank endpoint at {url}: check base_url"),
        (Reply(b"<!doctype html><p>Hello"), r"a web page answered at {url}, so check base_url"),
    ],
)
def test_an_error_says_what_to_check(call: Call, client: RegoloClient, stub: Stub, reply: Reply, advice: str) -> None:
    """If key or address are wrong, it names the option, and the address that was used."""
    stub.always(reply)
    with pytest.raises(RegoloError, match=advice.replace("{url}", f"{stub.url}/rerank")):
        call(client.rerank, "q", ["a"])


def test_the_key_does_not_go_over_plain_http(call: Call, stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another machine gets the key over https, or with `allow_http`."""
    monkeypatch.setenv("HTTP_PROXY", stub.url)
    client = RegoloClient(KEY, base_url="http://rerank.invalid")
    with pytest.raises(InvalidInputError, match=r"rerank\.invalid over plain http"):
        call(client.rerank, "q", ["a"])
    assert not stub.received
    client.options.allow_http = True
    call(client.rerank, "q", ["a"])
    assert stub.received[0].headers["authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_not_followed(call: Call, client: RegoloClient, stub: Stub, status: int) -> None:
    """The key goes to no other server; the error names the new address."""
    with Stub() as other:
        stub.always(Reply(b"", status, headers={"location": f"{other.url}/rerank"}))
        with pytest.raises(APIStatusError, match=f"redirects to {other.url}/rerank. .* set base_url"):
            call(client.rerank, "q", ["a"])
        assert (len(stub.received), len(other.received)) == (1, 0)


@pytest.mark.parametrize(
    ("suffix", "path"),
    [
        ("", "/rerank"),
        ("/v1/", "/v1/rerank"),
        ("/v1/rerank", "/v1/rerank"),
        ("/v1?tag=a", "/v1/rerank?tag=a"),
        ("/team%2Fa/v1", "/team%2Fa/v1/rerank"),
    ],
)
def test_a_base_url_may_end_in_many_ways(call: Call, stub: Stub, suffix: str, path: str) -> None:
    """The path of the request is the one that is written."""
    call(RegoloClient(KEY, base_url=f" {stub.url}{suffix} ").rerank, "q", ["a"])
    assert stub.received[0].path == path


def test_the_environment_names_the_server(call: Call, stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    """REGOLO_BASE_URL is read at the call, and a wrong one is named."""
    client = RegoloClient(KEY)
    monkeypatch.setenv("REGOLO_BASE_URL", stub.url)
    call(client.rerank, "q", ["a"])
    assert len(stub.received) == 1
    monkeypatch.setenv("REGOLO_BASE_URL", "ftp://x")
    with pytest.raises(InvalidInputError, match="REGOLO_BASE_URL: must start with"):
        call(client.rerank, "q", ["a"])


def test_default_headers_go_along(call: Call, stub: Stub) -> None:
    """Also `Host`, for a server behind a proxy; without it, Host is that of the address."""
    call(RegoloClient(KEY, base_url=stub.url).rerank, "q", ["a"])
    headers = {"X-Team": "search", "Host": "rerank.internal"}
    call(RegoloClient(KEY, base_url=stub.url, default_headers=headers).rerank, "q", ["a"])
    assert [request.headers["host"] for request in stub.received] == [stub.url[7:], "rerank.internal"]
    assert stub.received[1].headers["x-team"] == "search"
    assert stub.received[0].headers["accept-encoding"] == "identity"
    assert stub.received[0].headers["user-agent"].startswith("regolo_rerank/")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_loopback_is_never_proxied(call: Call, stub: Stub, monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    """A proxy in the environment is for other machines."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    client = RegoloClient(KEY, base_url=stub.url.replace("127.0.0.1", host), max_retries=0)
    assert call(client.rerank, "q", ["a"])


def test_other_hosts_are_reached_through_the_proxy(call: Call, stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    """The proxy of the environment, unless NO_PROXY lists the host."""
    monkeypatch.setenv("HTTP_PROXY", stub.url)
    client = RegoloClient(base_url="http://rerank.invalid/v1", max_retries=0)
    call(client.rerank, "q", ["a"])
    assert stub.received[0].path == "http://rerank.invalid/v1/rerank"
    monkeypatch.setenv("NO_PROXY", "rerank.invalid")
    with pytest.raises(APIConnectionError, match=r"rerank\.invalid"):
        call(RegoloClient(base_url="http://rerank.invalid/v1", max_retries=0).rerank, "q", ["a"])


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("HTTPS_PROXY", "nonsense://x"),
        ("HTTPS_PROXY", "http://h:x"),
        ("ALL_PROXY", "\x01"),
        ("SSL_CERT_FILE", __file__),
    ],
)
def test_an_environment_that_cannot_be_used_is_named(
    call: Call, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    """A malformed proxy or certificate is an error of ours, and nothing is retried."""
    monkeypatch.setenv(variable, value)
    with pytest.raises(APIConnectionError, match="proxies or certificates in the environment") as caught:
        call(RegoloClient(KEY).rerank, "q", ["a"])
    assert not caught.value.retryable


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A self-signed certificate for this machine, with its private key in the same file."""
    file = tmp_path_factory.mktemp("tls") / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    try:
        subprocess.run(  # noqa: S603 - our own command
            [*command, "-keyout", file, "-out", f"{file}.crt"], check=True, capture_output=True
        )
    except FileNotFoundError:
        pytest.skip("needs the command openssl")
    file.write_bytes(file.read_bytes() + Path(f"{file}.crt").read_bytes())
    return file


class _TLSStub(Stub):
    """A stub that is reached by https."""

    def __init__(self, certificate: Path) -> None:
        super().__init__()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server = self._server
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        self.url = self.url.replace("http://127.0.0.1", "https://localhost")


@pytest.fixture
def tls_stub(certificate: Path) -> Iterator[Stub]:
    """A server with the self-signed certificate."""
    with _TLSStub(certificate) as server:
        yield server


def test_a_new_client_trusts_the_certificates_of_ssl_cert_file(
    call: Call, tls_stub: Stub, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An untrusted certificate is named with its remedy, and tried once; a new client sees a changed SSL_CERT_FILE."""
    with pytest.raises(
        APIConnectionError, match=r"certificate of localhost:\d+ is not trusted.*SSL_CERT_FILE"
    ) as caught:
        call(RegoloClient(KEY, base_url=tls_stub.url).rerank, "q", ["a"])
    assert not caught.value.retryable
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with RegoloClient(KEY, base_url=tls_stub.url) as client:
        assert call(client.rerank, "q", ["a"])
    assert (tls_stub.connections, len(tls_stub.received)) == (2, 1)


def test_the_tls_context_is_created_once_for_a_client(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes 20 ms, and is shared by all httpx clients, copies and modes."""
    context = httpx.create_ssl_context()
    create = Mock(return_value=context)
    monkeypatch.setattr(httpx, "create_ssl_context", create)
    client = RegoloClient(KEY, base_url="https://127.0.0.1:9", batch_size=1, max_retries=1)
    for each in (client, client.with_options(model="m")):
        with pytest.raises(APIConnectionError):
            call(each.rerank, "q", ["a", "b", "c", "d"])
    assert create.call_count == 1
    assert (context.verify_mode, context.check_hostname) == (ssl.CERT_REQUIRED, True)


def test_options_change_while_calls_run(stub: Stub) -> None:
    """A call keeps the key and the address that it began with."""
    client = RegoloClient("sk-first-key", base_url=stub.url, batch_size=1, max_concurrency=1)
    arrived, changed = threading.Event(), threading.Event()

    def reply(_: Any) -> Reply:
        arrived.set()
        assert changed.wait(20)
        return Reply({"results": [{"index": 0, "relevance_score": 0.5}]})

    stub.reply = reply
    thread = threading.Thread(target=client.rerank, args=("q", ["a", "b"]))
    thread.start()
    assert arrived.wait(20)
    client.options.api_key = "sk-second-key"
    changed.set()
    thread.join()
    client.rerank("q", ["a"])
    sent = [request.headers["authorization"].removeprefix("Bearer ") for request in stub.received]
    assert sent == ["sk-first-key", "sk-first-key", "sk-second-key"]
