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
    RegoloClient,
)
from tests.conftest import KEY
from tests.support.modes import Call
from tests.support.stub import Reply, Stub


def test_the_path_of_a_request_is_the_one_that_is_written(call: Call, stub: Stub) -> None:
    """Escapes and the query string of `base_url` are kept."""
    call(RegoloClient(KEY, base_url=f"{stub.url}/team%2Fa/v1?tag=a").rerank, "q", ["a"])
    assert stub.received[0].path == "/team%2Fa/v1/rerank?tag=a"


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
