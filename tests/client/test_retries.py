"""Retries of one request, and the pause after a 429 that all requests with one API key share."""

import threading
import time

import pytest

from regolo_rerank import (
    APIConnectionError,
    AuthenticationError,
    RateLimitError,
    RegoloClient,
    ServerError,
)
from tests.conftest import KEY
from tests.support.faults import FaultServer
from tests.support.modes import Call
from tests.support.observed import soon, threads
from tests.support.stub import Received, Reply, Stub, error, pairs, scored, texts


def test_a_temporary_error_is_retried(call: Call, client: RegoloClient, stub: Stub) -> None:
    """The same request is sent again, over the same connection."""
    stub.script(error("down", 503), error("slow down", 429))
    response = call(client.rerank, "q", ["a score=1"])
    assert pairs(response) == [(0, 1.0)]
    assert [request.json for request in stub.received] == [stub.received[0].json] * 3
    assert (response.usage.requests, stub.connections) == (3, 1)


def test_the_wait_that_the_server_names_is_kept(call: Call, client: RegoloClient, stub: Stub) -> None:
    """The next attempt is sent after it, and soon after it."""
    stub.script(Reply({"error": "slow down"}, 429, {"retry-after": "0.3"}))
    call(client.rerank, "q", ["a"])
    first, second = stub.received
    assert 0.3 <= second.at - first.at < 10


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


def test_a_refused_connection_is_retried_and_named(call: Call) -> None:
    """A server that starts late is reached; one that never starts is an error with its address."""
    with FaultServer(listening=False) as late:
        with pytest.raises(APIConnectionError, match=late.url[7:]):
            call(RegoloClient(KEY, base_url=late.url, max_retries=1).rerank, "q", ["a"])
        late.listen()
        assert call(RegoloClient(KEY, base_url=late.url).rerank, "q", ["a"])
