"""Retries of one request, and the pause after a 429 that all requests with one API key share."""

import threading
import time
from collections.abc import Callable

import pytest

from regolo_rerank import (
    APIConnectionError,
    APIStatusError,
    AuthenticationError,
    RateLimitError,
    RegoloClient,
    ServerError,
)
from tests.conftest import KEY
from tests.support.faults import FaultServer, sends
from tests.support.modes import Call
from tests.support.observed import soon, threads
from tests.support.stub import Received, Reply, Stub, error, over_parallel_limit, pairs, scored, texts


@pytest.mark.parametrize("status", [408, 429, 500, 503, 529])
def test_a_temporary_error_is_retried(call: Call, client: RegoloClient, stub: Stub, status: int) -> None:
    """The same request is sent again, over the same connection."""
    stub.script(error("no", status), error("no", status))
    response = call(client.rerank, "q", ["a score=1"])
    assert pairs(response) == [(0, 1.0)]
    assert [request.json for request in stub.received] == [stub.received[0].json] * 3
    assert (response.usage.requests, stub.connections) == (3, 1)


@pytest.mark.parametrize("status", [300, 400, 401, 403, 404, 422])
def test_a_permanent_error_is_raised_at_once(call: Call, client: RegoloClient, stub: Stub, status: int) -> None:
    """One request is sent."""
    stub.always(error("no", status))
    with pytest.raises(APIStatusError, match="no") as caught:
        call(client.rerank, "q", ["a"])
    assert (caught.value.status_code, caught.value.retryable, len(stub.received)) == (status, False, 1)


def test_a_spent_budget_is_not_retried(call: Call, client: RegoloClient, stub: Stub) -> None:
    """`budget_exceeded` is permanent, also with the status of a rate limit."""
    stub.always(error("Budget has been exceeded!", 429, type="budget_exceeded"))
    with pytest.raises(RateLimitError, match="Budget"):
        call(client.rerank, "q", ["a"])
    assert len(stub.received) == 1


@pytest.mark.parametrize("max_retries", [0, 2])
def test_attempts_are_counted(call: Call, stub: Stub, max_retries: int) -> None:
    """`max_retries` + 1 requests are sent, and the last error is raised."""
    stub.always(error("down", 503))
    with pytest.raises(ServerError, match=r"down \[HTTP 503\]$"):
        call(RegoloClient(KEY, base_url=stub.url, max_retries=max_retries).rerank, "q", ["a"])
    assert len(stub.received) == max_retries + 1


@pytest.mark.parametrize(
    ("headers", "waited"),
    [
        ({"retry-after": "0.3"}, 0.3),
        ({"retry-after-ms": "300", "retry-after": "60"}, 0.3),
        ({"retry-after": "Mon, 23 Nov 2026 10:00:01 GMT", "date": "Mon, 23 Nov 2026 10:00:00 GMT"}, 1.0),
    ],
)
def test_the_wait_that_the_server_names_is_kept(
    call: Call, client: RegoloClient, stub: Stub, headers: dict[str, str], waited: float
) -> None:
    """Retry-After in seconds, in milliseconds and as a date."""
    stub.script(Reply({"error": "slow down"}, 429, headers))
    call(client.rerank, "q", ["a"])
    first, second = stub.received
    assert waited <= second.at - first.at < waited + 10


@pytest.mark.real_backoff
def test_without_a_named_wait_the_client_backs_off(call: Call, client: RegoloClient, stub: Stub) -> None:
    """At least a quarter of a second passes before the next attempt."""
    stub.script(Reply({"error": "down"}, 500))
    call(client.rerank, "q", ["a"])
    assert stub.received[1].at - stub.received[0].at >= 0.25


def test_a_wait_beyond_total_timeout_fails_at_once(call: Call, client: RegoloClient, stub: Stub) -> None:
    """The server's refusal is raised instead of waiting; later calls with the key are refused without a request."""
    stub.always(error("come back tomorrow", 429, retry_after_ms=86_400_000))
    for _ in range(2):
        with pytest.raises(RateLimitError, match="come back tomorrow") as caught:
            call(client.rerank, "q", ["a"])
        assert caught.value.retry_after == pytest.approx(86_400, abs=60)
    assert len(stub.received) == 1


def test_one_refusal_holds_back_all_requests_with_the_key(call: Call, stub: Stub) -> None:
    """After a 429 nothing is sent until the time that the server named, also by a copy of the client."""
    stub.reply = lambda request: Reply(scored(request).body, delay=0.02)
    stub.script(Reply({"error": "slow down"}, 429, {"retry-after": "0.4"}))
    client = RegoloClient(KEY, base_url=stub.url, batch_size=1, max_concurrency=3)
    call(client.rerank, "q", texts(7))
    refused = stub.received[0].at
    assert len(stub.received) == 8
    assert sum(request.at - refused < 0.4 for request in stub.received) <= 4  # in flight, or sent before it was read

    stub.script(Reply({"error": "slow down"}, 429, {"retry-after": "86400"}))
    for each in (client, client.with_options(model="other")):
        with pytest.raises(RateLimitError):
            call(each.rerank, "q", ["a"])
    assert len(stub.received) == 9


def test_tenants_with_other_keys_do_not_wait(call: Call, client: RegoloClient, stub: Stub) -> None:
    """The pause belongs to a server and a key, also between copies that share connections."""
    stub.script(Reply({"error": "slow down"}, 429, {"retry-after": "86400"}))
    with pytest.raises(RateLimitError):
        call(client.rerank, "q", ["a"])
    assert call(client.with_options(api_key="sk-other-tenant").rerank, "q", ["a"])
    with Stub() as other:
        assert call(client.with_options(base_url=other.url).rerank, "q", ["a"])
    assert [request.headers["authorization"] for request in stub.received] == [
        f"Bearer {KEY}",
        "Bearer sk-other-tenant",
    ]


def test_the_first_final_failure_stops_the_rest(call: Call, stub: Stub) -> None:
    """With a wrong key no more requests are sent than were in flight."""
    stub.always(Reply({"error": {"message": "wrong key"}}, 401, delay=0.02))
    with pytest.raises(AuthenticationError, match="wrong key"):
        call(RegoloClient(KEY, base_url=stub.url, batch_size=1).rerank, "q", texts(50))
    assert len(stub.received) <= 4


def test_a_failed_call_sends_nothing_more(call: Call, stub: Stub, caplog: pytest.LogCaptureFixture) -> None:
    """A batch that sleeps, or whose request fails later, is given up with its call, and without a word."""
    both = threading.Barrier(3, timeout=20)

    def reply(request: Received) -> Reply:
        both.wait()
        if "document 0" in request.documents[0]:
            return Reply({"error": "down"}, 503, {"retry-after": "30"})
        if "document 1" in request.documents[0]:
            return Reply({"error": "down"}, 503, delay=0.3)
        return Reply({"error": "wrong key"}, 401, delay=0.1)

    stub.reply = reply
    with pytest.raises(AuthenticationError):
        call(RegoloClient(KEY, base_url=stub.url, batch_size=1).rerank, "q", texts(3))
    assert soon(lambda: not stub.at_once)
    time.sleep(0.1)
    assert len(stub.received) == 3
    assert [record.getMessage()[:9] for record in caplog.records if record.name == "regolo_rerank"] in (
        ["Attempt 1"],
        [],
    )


def test_a_worker_that_sleeps_ends_with_its_call(stub: Stub, caplog: pytest.LogCaptureFixture) -> None:
    """A thread that waits 30 s for its next attempt does not outlive a call that has failed elsewhere."""
    stuck = set(threads())  # in requests of other tests

    def reply(request: Received) -> Reply:
        if "document 0" in request.documents[0]:
            return Reply({"error": "down"}, 503, {"retry-after": "30"})
        return Reply({"error": "wrong key"}, 401, delay=0.2)

    stub.reply = reply
    with RegoloClient(KEY, base_url=stub.url, batch_size=1) as client:
        with pytest.raises(AuthenticationError):
            client.rerank("q", texts(2))
        assert soon(lambda: not set(threads()) - stuck, within=15)
        stub.always(Reply({"error": "down"}, 503, {"retry-after": "30"}))
        with pytest.raises(ServerError):
            client.rerank("q", texts(2), total_timeout=0.5)
        stub.reply = lambda request: reply(request) if "0" in request.json["query"] else scored(request)
        many = client.rerank_many([("q", texts(1)), ("0", texts(1))])
        caplog.clear()
        next(many)
        assert soon(lambda: "next in 30" in caplog.text)
        many.close()
        assert soon(lambda: not set(threads()) - stuck, within=15)


def one_at_once(stub: Stub) -> Callable[[Received], Reply]:
    """Return a function that answers one request at a time, and refuses the others."""

    def reply(request: Received) -> Reply:
        return over_parallel_limit(1) if stub.at_once > 1 else Reply(scored(request).body, delay=0.02)

    return reply


def test_a_limit_on_parallel_requests_is_no_failure(call: Call, stub: Stub) -> None:
    """A refused request waits for others to end, more often than `max_retries`, without a pause for all requests."""
    stub.reply = one_at_once(stub)
    with RegoloClient(KEY, base_url=stub.url, batch_size=1, max_retries=0) as client:
        response = call(client.rerank, "q", texts(12))
    assert [result.index for result in response] == list(range(11, -1, -1))
    assert response.usage.requests == len(stub.received) > 12


def test_a_limit_on_parallel_requests_ends_with_total_timeout(call: Call, stub: Stub) -> None:
    """A limit that never frees is raised in time."""
    stub.always(over_parallel_limit(0))
    with pytest.raises((RateLimitError, APIConnectionError), match=r"max_parallel_requests|total_timeout"):
        call(RegoloClient(KEY, base_url=stub.url, max_retries=0).rerank, "q", ["a"], total_timeout=0.5)
    assert len(stub.received) > 1


def test_a_refused_connection_is_retried_and_named(call: Call) -> None:
    """A server that starts late is reached; one that never starts is an error with its address."""
    with FaultServer(listening=False) as late:
        with pytest.raises(APIConnectionError, match=late.url[7:]):
            call(RegoloClient(KEY, base_url=late.url, max_retries=1).rerank, "q", ["a"])
        late.listen()
        assert call(RegoloClient(KEY, base_url=late.url).rerank, "q", ["a"])


@pytest.mark.parametrize("reset", [False, True])
def test_a_lost_connection_is_retried(call: Call, *, reset: bool) -> None:
    """A connection that closes, or is reset, before the reply."""
    with FaultServer(sends(b"", then_reset=reset), sends(b"HTTP/1.1 200 OK\r\ncon", then_reset=reset)) as server:
        assert call(RegoloClient(KEY, base_url=server.url).rerank, "q", ["a"])
        assert len(server.received) == 3
