import asyncio
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext

import pytest

from regolo_rerank import APIStatusError, AuthenticationError, RateLimitError, RegoloClient, ServerError
from tests.conftest import KEY, Rank
from tests.support.entries import KINDS, Entry, Reranker, aranked, ranked
from tests.support.inside import back_off_for
from tests.support.stub import Received, Reply, Stub, error, pairs, scored, texts


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504, 529])
def test_a_passing_error_is_retried(rank: Rank, client: RegoloClient, stub: Stub, status: int) -> None:
    """After an error that may pass, the same request is sent again."""
    stub.script(error("no", status), error("no", status))
    assert pairs(rank(client, "q", ["a score=1"]).results) == [(0, 1.0)]
    assert [request.json for request in stub.received] == [stub.received[0].json] * 3


@pytest.mark.parametrize("status", [300, 400, 401, 402, 403, 404, 405, 409, 413, 422])
def test_a_lasting_error_is_not_retried(rank: Rank, client: RegoloClient, stub: Stub, status: int) -> None:
    """An error that another attempt cannot mend is raised at once."""
    stub.always(error("no", status))
    with pytest.raises(APIStatusError, match="no") as caught:
        rank(client, "q", ["a"])
    assert caught.value.status_code == status
    assert len(stub.received) == 1


def test_a_spent_budget_is_not_retried(rank: Rank, client: RegoloClient, stub: Stub) -> None:
    """A budget that is exceeded stays so, whatever status says it."""
    stub.always(error("Budget has been exceeded!", 429, type="budget_exceeded"))
    with pytest.raises(RateLimitError, match="Budget"):
        rank(client, "q", ["a"])
    assert len(stub.received) == 1


@pytest.mark.parametrize("max_retries", [0, 2])
def test_attempts_are_counted(rank: Rank, stub: Stub, max_retries: int) -> None:
    """At most max_retries + 1 requests are sent, and the last error is raised as it is."""
    stub.always(error("down", 503))
    with pytest.raises(ServerError, match=r"down \[HTTP 503\]") as caught:
        rank(RegoloClient(KEY, base_url=stub.url, max_retries=max_retries), "q", ["a"])
    assert caught.value.body.startswith('{"error"')
    assert len(stub.received) == max_retries + 1


@pytest.mark.parametrize(
    ("headers", "waited"),
    [
        ({"retry-after": "0.3"}, 0.3),
        ({"retry-after-ms": "300", "retry-after": "60"}, 0.3),
        ({"retry-after": "Mon, 23 Nov 2026 10:00:01 GMT", "date": "Mon, 23 Nov 2026 10:00:00 GMT"}, 1.0),
        ({"retry-after": "Mon, 23 Nov 2020 10:00:01 GMT"}, 0.0),
    ],
)
def test_the_wait_that_the_server_names_is_kept(
    rank: Rank, client: RegoloClient, stub: Stub, headers: dict[str, str], waited: float
) -> None:
    """Retry-After in seconds, in milliseconds and as a date is waited for, and not for long more."""
    stub.script(Reply({"error": "slow down"}, 429, headers))
    rank(client, "q", ["a"])
    first, second = stub.received
    assert waited <= second.at - first.at < waited + 2


def test_a_wait_past_the_bound_fails_at_once(rank: Rank, client: RegoloClient, stub: Stub) -> None:
    """Where the server asks to wait past max_retry_seconds, its word is raised instead of waited for."""
    stub.always(error("come back tomorrow", 429, retry_after_ms=86_400_000))
    started = time.monotonic()
    with pytest.raises(RateLimitError, match="come back tomorrow") as caught:
        rank(client, "q", ["a"])
    assert time.monotonic() - started < 5
    assert caught.value.retry_after == 86_400
    assert len(stub.received) == 1


def test_the_bound_holds_over_all_attempts(rank: Rank, stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    """No attempt starts later than max_retry_seconds after the first."""
    back_off_for(0.25, monkeypatch)
    stub.always(Reply({"error": "down"}, 500))
    with pytest.raises(ServerError):
        rank(RegoloClient(KEY, base_url=stub.url, max_retry_seconds=0.6, max_retries=50), "q", ["a"])
    assert 2 <= len(stub.received) <= 3  # the fourth would start after 0.75 s


@pytest.mark.real_backoff
def test_backoff_grows_and_is_random(rank: Rank, client: RegoloClient, stub: Stub) -> None:
    """Without a word from the server, at least a quarter of a second passes before the next attempt."""
    stub.script(Reply({"error": "down"}, 500))
    rank(client, "q", ["a"])
    assert 0.25 <= stub.received[1].at - stub.received[0].at < 3


def test_one_refusal_holds_the_other_requests_back(rank: Rank, stub: Stub) -> None:
    """After a 429 no request of the client is sent until the time that the server named."""
    stub.reply = lambda request: Reply(scored(request).body, delay=0.1)
    stub.script(Reply({"error": "slow down"}, 429, {"retry-after": "0.4"}))
    client = RegoloClient(KEY, base_url=stub.url, batch_size=1, max_concurrency=3)
    rank(client, "q", texts(7))
    refused = stub.received[0].at
    assert len(stub.received) == 8
    assert sum(request.at - refused < 0.4 for request in stub.received) <= 3  # those that were in flight together


def test_the_first_final_failure_stops_the_rest(rank: Rank, stub: Stub) -> None:
    """With a wrong key no more requests are sent than were in flight at once, and its own error is raised."""
    stub.always(Reply({"error": {"message": "wrong key"}}, 401, delay=0.02))
    with pytest.raises(AuthenticationError, match="wrong key"):
        rank(RegoloClient(KEY, base_url=stub.url, batch_size=1, max_concurrency=4), "q", texts(50))
    assert len(stub.received) <= 4


def test_a_request_waiting_to_be_retried_is_given_up_with_its_call(stub: Stub) -> None:
    """A thread that waits for its next attempt sends nothing any more once the call has failed."""

    def reply(request: Received) -> Reply:
        if "document 0" in request.documents[0]:
            return Reply({"error": "down"}, 503, {"retry-after": "0.3"})
        return Reply({"error": "wrong key"}, 401, delay=0.1)

    stub.reply = reply
    with pytest.raises(AuthenticationError):
        RegoloClient(KEY, base_url=stub.url, batch_size=1).rerank("q", texts(2))
    time.sleep(0.4)
    assert len(stub.received) == 2


def test_a_failed_call_says_nothing_more(stub: Stub, caplog: pytest.LogCaptureFixture) -> None:
    """A thread whose request fails after its call has failed elsewhere ends without a word of further attempts."""

    def reply(request: Received) -> Reply:
        if "document 0" in request.documents[0]:
            return Reply({"error": "down"}, 503, delay=0.2)
        return Reply({"error": "wrong key"}, 401, delay=0.05)

    stub.reply = reply
    with pytest.raises(AuthenticationError):
        RegoloClient(KEY, base_url=stub.url, batch_size=1).rerank("q", texts(2))
    time.sleep(0.3)
    assert len(stub.received) == 2
    assert "attempt" not in caplog.text


@pytest.mark.filterwarnings("ignore::regolo_rerank.errors.RerankFallbackWarning")
def test_a_request_that_others_hold_back_ends_in_time(entry: Entry, stub: Stub) -> None:
    """A limit that stays ends every call within max_retry_seconds, also one that was never sent, or makes it fall back.

    The clock starts when the request could have been sent.
    """
    stub.always(Reply({"error": "slow down"}, 429, {"retry-after": "0.4"}))
    falls_back = {"on_error": "return_input"} if entry.kind is KINDS["llama_index"] else {}
    took: list[float] = []

    @contextmanager
    def refused() -> Iterator[None]:
        started = time.monotonic()
        with nullcontext() if falls_back else pytest.raises(RateLimitError, match="slow down"):
            yield
        took.append(time.monotonic() - started)

    def call(reranker: Reranker, number: int) -> None:
        time.sleep(0.05 * number)
        with refused():
            ranked(reranker, [f"a{number}"])

    async def acall(reranker: Reranker, number: int) -> None:
        await asyncio.sleep(0.05 * number)
        with refused():
            await aranked(reranker, [f"a{number}"])

    async def all_refused(reranker: Reranker) -> None:
        await asyncio.gather(*(acall(reranker, number) for number in range(16)))

    with entry.opened(max_retries=50, max_retry_seconds=0.6, **falls_back) as reranker:
        if entry.mode == "async":
            asyncio.run(all_refused(reranker))
        else:
            with ThreadPoolExecutor(16) as threads:
                list(threads.map(lambda number: call(reranker, number), range(16)))
    assert len(took) == 16
    assert max(took) < 2
    assert len(stub.received) < 40
