import json
import logging
from typing import Any

import pytest

from regolo_rerank import (
    APIConnectionError,
    APIResponseError,
    APITimeoutError,
    AuthenticationError,
    BadRequestError,
    RateLimitError,
    RegoloError,
    ServerError,
)
from regolo_rerank._protocol import Reply
from regolo_rerank._retries import Pause, Send, Sleep, attempts
from tests.unit.calls import KEY, begin, reply_of, results_of
from tests.unit.conftest import Clock

pytestmark = pytest.mark.real_backoff

GOOD = reply_of(results_of((0, 0.5)))
DOWN = reply_of({"error": "down"}, 503, {"x-litellm-call-id": "call-1"})
PARALLEL = reply_of({"error": "Limit type: max_parallel_requests. Current limit: 2"}, 429)


def refusal(seconds: float | None = None) -> Reply:
    """Return a 429."""
    return reply_of({"error": "slow down"}, 429, {} if seconds is None else {"retry-after": str(seconds)})


class Loop:
    """The retry loop of a call with one batch, driven by hand; sleeping takes the clock's time."""

    def __init__(self, clock: Clock, pause: Pause | None = None, **options: Any) -> None:
        self.call = begin(["a"], **options)
        self.pause = pause or Pause()
        self.slept: list[float] = []
        self.sent: list[Send] = []
        self._clock = clock
        self._steps = attempts(self.call, self.call.batches[0], self.pause)

    def run(self, *outcomes: Reply | RegoloError, takes: float = 0.0) -> None:
        """Send the outcomes one after the other, each after some seconds, until the loop ends."""
        waiting = list(outcomes)
        outcome: Reply | RegoloError | None = None
        while True:
            try:
                step = self._steps.send(outcome)
            except StopIteration:
                break
            if isinstance(step, Sleep):
                self.slept.append(step.seconds)
                self._clock.now += step.seconds
                outcome = None
            else:
                self.sent.append(step)
                self._clock.now += takes
                outcome = waiting.pop(0)
        assert not waiting

    def fail(self, *outcomes: Reply | RegoloError, takes: float = 0.0) -> Any:
        """Run, and return the error at the end."""
        with pytest.raises(RegoloError) as caught:
            self.run(*outcomes, takes=takes)
        return caught.value


@pytest.fixture
def loop(clock: Clock) -> Loop:
    """A loop with the default options."""
    return Loop(clock)


def test_a_good_reply_needs_one_request(loop: Loop) -> None:
    """The request is the call's, with the time limit of an attempt."""
    loop.run(GOOD)
    (sent,) = loop.sent
    assert json.loads(sent.body)["documents"] == ["a"]
    assert sent.seconds == 60.0
    assert loop.slept == []
    assert loop.call.response().usage.requests == 1


@pytest.mark.parametrize(
    "failure",
    [
        DOWN,
        reply_of("", 408),
        reply_of("", 500),
        refusal(),
        reply_of("cut", 200),
        reply_of({"error": {"message": "no worker", "code": 500}}),
        APIConnectionError("reset"),
        APITimeoutError("slow"),
    ],
)
def test_what_may_go_away_is_tried_again(failure: Reply | RegoloError, loop: Loop) -> None:
    """Three further attempts by default; then the last error is raised as it is."""
    error = loop.fail(failure, failure, failure, failure)
    assert len(loop.sent) == 4
    assert len(loop.slept) == 3
    assert isinstance(failure, Reply) or error is failure


@pytest.mark.parametrize(
    ("failure", "kind"),
    [
        (reply_of("", 400), BadRequestError),
        (reply_of("", 401), AuthenticationError),
        (reply_of({"error": {"message": "spent", "type": "budget_exceeded"}}, 429), RateLimitError),
        (reply_of({"results": None}), APIResponseError),
        (reply_of(results_of((1, 0.5))), APIResponseError),
        (reply_of({"error": {"message": "no such model", "code": 400}}), APIResponseError),
        (reply_of({"error": "input is too large to process"}, 500), BadRequestError),
    ],
)
def test_what_stays_wrong_is_sent_once(failure: Reply, kind: type[RegoloError], loop: Loop) -> None:
    """A request that is wrong would only fail again."""
    assert isinstance(loop.fail(failure), kind)
    assert loop.slept == []


@pytest.mark.parametrize("max_retries", [0, 1, 5])
def test_max_retries_counts_further_attempts(clock: Clock, max_retries: int) -> None:
    """A success after the last retry counts, and one failure more does not."""
    Loop(clock, max_retries=max_retries).run(*[DOWN] * max_retries, GOOD)
    loop = Loop(clock, max_retries=max_retries)
    assert type(loop.fail(*[DOWN] * (max_retries + 1))) is ServerError


@pytest.mark.parametrize(
    ("failure", "bounds"),
    [
        (DOWN, [(0.25, 1), (0.25, 2), (0.25, 4), (0.25, 8), (0.25, 8)]),
        (APIConnectionError("reset"), [(0.25, 1), (0.25, 2), (0.25, 4), (0.25, 8), (0.25, 8)]),
        (refusal(), [(1, 2), (5, 10), (25, 50), (25, 50), (25, 50)]),
        (refusal(7), [(7, 7.1)] * 5),
        (reply_of("", 503, {"retry-after": "0"}), [(0, 0.1)] * 5),
    ],
)
def test_waits_are_random_within_their_bounds(
    clock: Clock, failure: Reply | RegoloError, bounds: list[tuple[float, float]]
) -> None:
    """Backoff grows up to a bound; a wait that the server names is kept, with a little jitter."""
    waits = []
    for _ in range(60):
        loop = Loop(clock, max_retries=5, total_timeout=None)
        loop.run(*[failure] * 5, GOOD)
        waits.append(loop.slept)
        assert len(loop.slept) == 5
    for (low, high), seen in zip(bounds, zip(*waits, strict=True), strict=True):
        assert low <= min(seen)
        assert max(seen) <= high
        assert len(set(seen)) > 50  # not all clients come back in the same moment
        assert max(seen) - min(seen) > (high - low) / 2


def test_a_limit_on_parallel_requests_is_no_failure(clock: Clock) -> None:
    """Refusals for too many parallel requests use up no retries, and hold back no other request."""
    loop = Loop(clock, max_retries=1, total_timeout=1_000.0)
    loop.run(*[PARALLEL] * 20, DOWN, *[PARALLEL] * 5, GOOD)
    assert len(loop.sent) == 27
    assert max(loop.slept) <= 8
    assert loop.pause.seconds_left() == 0.0
    assert loop.call.response().usage.requests == 27


def test_without_total_timeout_refusals_count_as_failures(clock: Clock) -> None:
    """Otherwise a call could go on without end."""
    loop = Loop(clock, max_retries=2, total_timeout=None)
    assert type(loop.fail(*[PARALLEL] * 99)) is RateLimitError
    assert len(loop.sent) == 3


def test_a_limit_on_parallel_requests_ends_with_total_timeout(clock: Clock) -> None:
    """A call does not wait for ever, and its error is the server's."""
    loop = Loop(clock, max_retries=0, total_timeout=30.0)
    error = loop.fail(*[PARALLEL] * 99)
    assert type(error) is RateLimitError
    assert "max_parallel_requests" in str(error)
    assert 3 < len(loop.sent) < 99
    assert sum(loop.slept) <= 30


# --- total_timeout ----------------------------------------------------------------------------------------------------


def test_a_wait_beyond_total_timeout_is_not_begun(clock: Clock) -> None:
    """The error is the server's own, and says which option would allow the wait."""
    loop = Loop(clock, total_timeout=20.0)
    error = loop.fail(refusal(30))
    assert type(error) is RateLimitError
    assert str(error).startswith("slow down [HTTP 429]. Another attempt in 30.")
    assert str(error).endswith(" s would exceed total_timeout=20 s")
    assert error.retry_after == 30
    assert loop.slept == []


def test_total_timeout_bounds_each_attempt(clock: Clock) -> None:
    """An attempt gets `timeout`, or what is left of the whole if that is less."""
    loop = Loop(clock, timeout=10.0, total_timeout=25.0)
    loop.run(reply_of("", 503, {"retry-after": "3"}), reply_of("", 503, {"retry-after": "0"}), GOOD, takes=8.0)
    first, second, third = [step.seconds for step in loop.sent]
    assert (first, second) == (10.0, 10.0)
    assert third is not None
    assert 5.7 < third <= 6.0
    loop = Loop(clock, timeout=10.0, total_timeout=None)
    loop.run(GOOD)
    assert loop.sent[0].seconds == 10.0


def test_an_attempt_that_uses_up_the_time_is_a_timeout(clock: Clock) -> None:
    """Whatever came in the end, there was no ranking in time. A good reply that comes too late still counts."""
    loop = Loop(clock, timeout=30.0, total_timeout=20.0)
    error = loop.fail(APITimeoutError("no complete reply"), takes=20.0)
    assert str(error) == "no ranking from rerank.example within total_timeout=20 s"
    late = Loop(clock, total_timeout=20.0)
    late.run(GOOD, takes=30.0)
    assert len(late.call.response()) == 1


# --- the pause --------------------------------------------------------------------------------------------------------


def test_a_refusal_holds_back_the_other_requests(clock: Clock) -> None:
    """Another batch waits until the pause ends, and looks again whether it has become longer."""
    pause = Pause()
    refused = attempts(begin(["a"]), begin(["a"]).batches[0], pause)
    assert isinstance(next(refused), Send)
    wait = refused.send(refusal(10))
    assert isinstance(wait, Sleep)
    assert 10 <= wait.seconds <= 10.1
    assert pause.seconds_left() == pytest.approx(wait.seconds)
    other = Loop(clock, pause)
    step = next(other._steps)  # noqa: SLF001 - the loop of this file
    assert isinstance(step, Sleep)
    assert step.seconds == pytest.approx(wait.seconds)
    clock.now += step.seconds
    pause.extend(5, RateLimitError("b", status_code=429))
    other.run(GOOD)
    assert other.slept == pytest.approx([5.0])


def test_a_pause_only_becomes_longer() -> None:
    """A shorter wait that another reply names does not end it."""
    pause = Pause()
    pause.extend(100, RateLimitError("first", status_code=429))
    pause.extend(1, RateLimitError("second", status_code=429))
    assert 99 < pause.seconds_left() <= 100
    assert str(pause.refusal(5.0)).endswith("The server's message was: first")
    assert pause.refusal(5.0) is not pause.refusal(5.0)  # each request raises its own error


def test_a_request_that_cannot_wait_for_the_pause_fails_at_once(clock: Clock) -> None:
    """Nothing is sent, and the error is a copy of the refusal with the time that is left."""
    pause = Pause()
    refused = RateLimitError("slow down", status_code=429, retry_after=100, request_id="call-1")
    pause.extend(100, refused)
    clock.now += 40
    loop = Loop(clock, pause, total_timeout=50.0)
    error = loop.fail()
    assert loop.sent == []
    assert str(error).startswith("not sent: after an earlier 429 the client waits for another 60.0 s, longer than ")
    assert str(error).endswith("total_timeout=50 s. The server's message was: slow down")
    assert (error.request_id, error.retry_after) == ("call-1", 60.0)
    assert error is not refused
    assert refused.retry_after == 100


# --- calls that end ---------------------------------------------------------------------------------------------------


def test_a_call_that_has_ended_sends_nothing_more(loop: Loop) -> None:
    """After the failure of another batch, the loop ends without an error."""
    loop.call.fail(ServerError("another batch"))
    loop.run()
    assert loop.sent == []


@pytest.mark.parametrize("outcome", [DOWN, reply_of("", 400), APIConnectionError("reset")])
def test_a_failure_of_a_call_that_has_ended_is_ignored(loop: Loop, outcome: Reply | RegoloError) -> None:
    """The first final error is the one that counts."""
    assert isinstance(next(loop._steps), Send)  # noqa: SLF001 - the loop of this file
    loop.call.fail(ServerError("another batch"))
    with pytest.raises(StopIteration):
        loop._steps.send(outcome)  # noqa: SLF001 - the loop of this file


# --- logs -------------------------------------------------------------------------------------------------------------


def test_each_attempt_is_logged(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    """Replies are DEBUG and retries WARNING, with status, request id, attempt and seconds as fields."""
    caplog.set_level("DEBUG", "regolo_rerank")
    loop = Loop(clock)
    loop.run(DOWN, PARALLEL, APIConnectionError("reset"), GOOD)
    records: list[Any] = caplog.records
    debug = [record for record in records if record.levelno == logging.DEBUG]
    warnings = [record for record in records if record.levelno == logging.WARNING]
    assert debug[0].getMessage() == "POST https://rerank.example/rerank: 1 documents, status 503"
    ids = [(503, "call-1"), (429, None), (200, None)]
    assert [(record.status, record.request_id, record.seconds) for record in debug] == [(*each, 0.01) for each in ids]
    retried = [(503, "call-1", 1), (429, None, 2), (None, None, 3)]
    assert [(record.status, record.request_id, record.attempt) for record in warnings] == retried
    assert [record.seconds for record in warnings] == loop.slept
    assert warnings[0].getMessage() == (
        f"Attempt 1 failed, next in {loop.slept[0]:.2f} s: ServerError: down [HTTP 503, request call-1]"
    )
    assert {record.name for record in records} == {"regolo_rerank"}
    assert KEY not in caplog.text
    caplog.clear()
    Loop(clock, max_retries=0).fail(reply_of("", 400))
    assert [record.levelname for record in caplog.records] == ["DEBUG"]  # the last failure is raised instead


def test_nothing_is_sent_when_a_pause_took_all_the_time(clock: Clock) -> None:
    """A sleep may last longer than asked for."""
    pause = Pause()
    pause.extend(5, RateLimitError("slow down", status_code=429))
    call = begin(["a"], total_timeout=10.0)
    steps = attempts(call, call.batches[0], pause)
    assert isinstance(next(steps), Sleep)
    clock.now += 11
    with pytest.raises(APITimeoutError, match="total_timeout=10"):
        steps.send(None)
