"""What tracers, recorders and mocks of httpx see: every request once, and never the key."""

import functools
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import httpx
import pytest

pytest.importorskip("respx", reason="part of the extra [dev]")
pytest.importorskip("vcr", reason="part of the extra [dev]")
pytest.importorskip("pytest_httpx", reason="part of the extra [dev]")

import respx
import vcr  # type: ignore[import-untyped]  # it has no types
from pytest_httpx import HTTPXMock

from regolo_rerank import APIConnectionError, APITimeoutError
from tests.conftest import KEY
from tests.external.watched import CALLS, CONNECTIONS, DOCUMENTS, RANKING, TRACERS, Observation, Span, rank
from tests.support.stub import Received, Stub, error, scored

ROOT: Final = Path(__file__).parents[2]

SETTINGS: Final = {
    "DD_INSTRUMENTATION_TELEMETRY_ENABLED": "false",
    "DD_REMOTE_CONFIGURATION_ENABLED": "false",
    "OTEL_SEMCONV_STABILITY_OPT_IN": "http",
}
"""Datadog asks for no agent, and OpenTelemetry's attributes have the names that its standard has settled on."""

STATUSES: Final = {"batched": [200] * 3, "retried": [200, 500], "refused": [500], "unreachable": [None]}
"""Of the requests of each call, in numerical order."""

PACKAGES: Final = {
    "sentry": "sentry_sdk",
    "datadog": "ddtrace",
    "opentelemetry": "opentelemetry.instrumentation.httpx",
}

TRACE_HEADERS: Final = {
    "sentry": {"sentry-trace", "baggage"},
    "datadog": {"x-datadog-trace-id", "x-datadog-parent-id", "x-datadog-sampling-priority", "traceparent"},
    "opentelemetry": {"traceparent"},
}

BASE_URL: Final = "https://rerank.invalid"
URL: Final = f"{BASE_URL}/rerank"
"""What mocks answer for: there is no such server."""


@pytest.fixture(params=["sync", "async"])
def mode(request: pytest.FixtureRequest) -> str:
    """Both ways of calling."""
    return str(request.param)


# --- tracers ----------------------------------------------------------------------------------------------------------


@functools.cache
def seen_by(tracer: str) -> dict[tuple[str, str, str], Observation]:
    """Return what a tracer has seen of each call, mode and connections, in a process of its own, which it patches."""
    if find_spec(PACKAGES[tracer]) is None:
        pytest.skip(f"{PACKAGES[tracer]} is part of the extra [dev]")
    command = [sys.executable, "-m", "tests.external.watched", tracer]
    environment = {**os.environ, **SETTINGS, "REGOLO_API_KEY": KEY}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)  # noqa: S603 - our own
    assert ran.returncode == 0, ran.stderr
    return {
        (seen["call"], seen["mode"], seen["connections"]): Observation(
            **{**seen, "spans": [Span(**span) for span in seen["spans"]]}
        )
        for seen in json.loads(ran.stdout)
    }


@pytest.fixture(params=TRACERS, scope="module")
def tracer(request: pytest.FixtureRequest) -> str:
    """Each tracer's name."""
    return str(request.param)


@pytest.fixture(params=CONNECTIONS)
def connections(request: pytest.FixtureRequest) -> str:
    """The package's own connections, and an httpx client of the caller's."""
    return str(request.param)


@pytest.fixture(params=CALLS)
def seen(request: pytest.FixtureRequest, tracer: str, connections: str, mode: str) -> Observation:
    """What a tracer has seen of each call."""
    return seen_by(tracer)[request.param, mode, connections]


def test_a_tracer_sees_every_request_once(seen: Observation) -> None:
    """Each request, a retry included, is one span with its status, in the caller's trace."""
    assert sorted([span.status for span in seen.spans], key=str) == STATUSES[seen.call]
    assert {span.trace for span in seen.spans} == {seen.caller[0]}
    assert len(seen.requests) == (0 if seen.call == "unreachable" else len(seen.spans))


def test_the_server_receives_the_trace(tracer: str, seen: Observation) -> None:
    """The tracer's headers are on each request, beside the package's own."""
    assert bool(seen.requests) == (seen.call != "unreachable")
    for headers in seen.requests:
        assert TRACE_HEADERS[tracer] <= set(headers)
        assert ids_in(headers)[0] == seen.caller[0]
        assert headers["content-type"] == headers["accept"] == "application/json"


def test_spans_nest(tracer: str, seen: Observation) -> None:
    """Whichever thread or task sends, a request's span is below the caller's, and the server is told of that span."""
    if tracer == "sentry" and seen.call == "batched":
        pytest.skip("Sentry's current span is in an object that the threads and tasks of a call share")
    assert {span.parent for span in seen.spans} == {seen.caller[1]}
    sent = seen.spans if seen.requests else []
    assert {ids_in(headers) for headers in seen.requests} == {(span.trace, span.id) for span in sent}


def ids_in(headers: dict[str, str]) -> tuple[str, str]:
    """Return the ids of trace and span in a request's headers."""
    *_, trace, span, _sampled = (headers.get("sentry-trace") or headers["traceparent"]).split("-")
    return trace, span


def test_no_tracer_records_the_key(seen: Observation) -> None:
    """Spans, breadcrumbs, and errors with the variables of all their frames hold the key in no form."""
    assert [headers["authorization"] for headers in seen.requests] == [f"Bearer {KEY}"] * len(seen.requests)
    assert "caller" in seen.exported
    assert KEY not in seen.exported


def test_an_error_comes_with_its_requests(mode: str, connections: str) -> None:
    """Sentry's event of an error has the request and the reply that led to it."""
    seen = seen_by("sentry")["refused", mode, connections]
    (event,) = [json.loads(line) for line in seen.exported.splitlines() if '"exception":' in line]
    assert event["exception"]["values"][-1]["type"] == "ServerError"
    crumbs = [crumb["data"] for crumb in event["breadcrumbs"]["values"] if crumb["category"] == "httplib"]
    assert [(crumb["http.method"], crumb["http.response.status_code"]) for crumb in crumbs] == [("POST", 500)]


def test_httpx_logs_every_request(mode: str, connections: str, stub: Stub, caplog: pytest.LogCaptureFixture) -> None:
    """The logger of httpx has its line at INFO for each request."""
    caplog.set_level(logging.INFO, logger="httpx")
    assert rank(mode, connections, stub.url, api_key=KEY) == RANKING
    lines = [record.getMessage() for record in caplog.records if record.name == "httpx"]
    assert lines == [f'HTTP Request: POST {stub.url}/rerank "HTTP/1.1 200 OK"'] * 3


# --- recorders and mocks ----------------------------------------------------------------------------------------------
# pytest-httpx and respx keep the requests themselves, whose headers hold the key: that is what they are for.


def test_a_recorded_call_is_replayed_without_a_server(mode: str, connections: str, tmp_path: Path) -> None:
    """A cassette of vcrpy has each request and its reply, a retry's too, and no key where it is told so."""
    cassette = tmp_path / "cassette.yaml"
    recorder = vcr.VCR(match_on=("method", "uri", "body"), filter_headers=["authorization"])

    with Stub() as stub, recorder.use_cassette(cassette) as recorded:
        stub.script(error("down", 500))
        assert rank(mode, connections, stub.url, api_key=KEY, max_retries=1) == RANKING
        assert len(recorded) == len(stub.received) == 4
        assert {request.headers["authorization"] for request in stub.received} == {f"Bearer {KEY}"}
    with recorder.use_cassette(cassette, record_mode=vcr.mode.NONE) as replayed:
        assert rank(mode, connections, stub.url, api_key=KEY, max_retries=1) == RANKING
        assert replayed.play_count == 4
    assert "a score=0.1" in cassette.read_text()
    assert KEY not in cassette.read_text()


def mocked(request: httpx.Request) -> httpx.Response:
    """Answer as the service does, with a reply whose body is in memory."""
    reply = scored(Received(request.method, request.url.path, {}, request.content, 0.0))
    return httpx.Response(reply.status, json=json.loads(reply.encoded()))


@pytest.fixture(params=["httpcore", "httpx"])
def router(request: pytest.FixtureRequest) -> Iterator[respx.MockRouter]:
    """Respx in both of its ways: below httpx's transports, and in their place."""
    with respx.mock(using=request.param) as opened:
        yield opened


def test_respx_answers_every_request(mode: str, connections: str, router: respx.MockRouter) -> None:
    """A route answers each request of a call, and knows what they were."""
    route = router.post(URL).mock(side_effect=mocked)
    assert rank(mode, connections, BASE_URL, api_key=KEY) == RANKING
    assert sorted(json.loads(call.request.content)["documents"] for call in route.calls) == [
        [f"<Document>: {document}" for document in DOCUMENTS[start : start + 2]] for start in (0, 2, 4)
    ]
    assert {call.request.headers["authorization"] for call in route.calls} == {f"Bearer {KEY}"}


def test_respx_answers_a_retry(mode: str, connections: str, router: respx.MockRouter) -> None:
    """A mocked failure is tried again, and a mocked exception is the package's own error."""
    down = httpx.Response(500, headers={"retry-after-ms": "1"}, json={"error": {"message": "down"}})
    fine = httpx.Response(200, json={"results": [{"index": 0, "relevance_score": 0.1}]})
    route = router.post(URL).mock(side_effect=[down, fine, httpx.ConnectError("no route")])
    assert rank(mode, connections, BASE_URL, DOCUMENTS[:1], api_key=KEY, max_retries=1) == [(0, 0.1)]
    with pytest.raises(APIConnectionError, match="no route"):
        rank(mode, connections, BASE_URL, DOCUMENTS[:1], api_key=KEY, max_retries=0)
    assert route.call_count == 3


def test_pytest_httpx_answers_every_request(mode: str, connections: str, httpx_mock: HTTPXMock) -> None:
    """A callback answers each request of a call."""
    httpx_mock.add_callback(
        mocked, method="POST", url=URL, match_headers={"Authorization": f"Bearer {KEY}"}, is_reusable=True
    )
    assert rank(mode, connections, BASE_URL, api_key=KEY) == RANKING
    assert len(httpx_mock.get_requests()) == 3


def test_pytest_httpx_answers_a_retry(mode: str, connections: str, httpx_mock: HTTPXMock) -> None:
    """A mocked failure is tried again, and a mocked exception is the package's own error."""
    httpx_mock.add_response(500, headers={"retry-after-ms": "1"}, json={"error": {"message": "down"}})
    httpx_mock.add_callback(mocked, url=URL)
    httpx_mock.add_exception(httpx.ReadTimeout("too late"))
    assert rank(mode, connections, BASE_URL, DOCUMENTS[:1], api_key=KEY, max_retries=1) == [(0, 0.1)]
    with pytest.raises(APITimeoutError):
        rank(mode, connections, BASE_URL, DOCUMENTS[:1], api_key=KEY, max_retries=0)
    assert len(httpx_mock.get_requests()) == 3
