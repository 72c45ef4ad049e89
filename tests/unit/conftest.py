import pytest


class Clock:
    """The time of calls and pauses, which only passes if a test says so."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Stop the time of calls and pauses."""
    stopped = Clock()
    monkeypatch.setattr("regolo_rerank._call.time", stopped)
    monkeypatch.setattr("regolo_rerank._retries.time", stopped)
    return stopped
