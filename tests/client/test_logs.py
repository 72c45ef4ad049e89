"""What is logged, by the logger `regolo_rerank`."""

import logging

import pytest

from regolo_rerank import RegoloClient
from tests.conftest import KEY
from tests.support.modes import Call
from tests.support.stub import Received, Reply, Stub, error, scored, texts


def test_each_reply_and_each_retry_is_logged(call: Call, stub: Stub, caplog: pytest.LogCaptureFixture) -> None:
    """Replies at DEBUG, retries at WARNING, with status, request id, attempt and seconds in `extra`."""

    def reply(request: Received) -> Reply:
        if len(stub.received) == 2:
            return error("try again", 503)
        return Reply(scored(request).body, headers={"x-litellm-call-id": f"call-{len(stub.received)}"})

    stub.reply = reply
    with caplog.at_level(logging.DEBUG, "regolo_rerank"):
        call(RegoloClient(KEY, base_url=stub.url, batch_size=1, max_concurrency=1).rerank, "q", texts(3))
    records = [record for record in caplog.records if record.name == "regolo_rerank"]
    url = f"POST {stub.url}/rerank: 1 documents"
    expected = [
        ("DEBUG", f"{url}, status 200"),
        ("DEBUG", f"{url}, status 503"),
        ("WARNING", "ServerError: try again [HTTP 503]"),
        ("DEBUG", f"{url}, status 200"),
        ("DEBUG", f"{url}, status 200"),
    ]
    assert [record.levelname for record in records] == [level for level, _ in expected]
    assert all(words in record.getMessage() for record, (_, words) in zip(records, expected, strict=True))
    assert records[2].getMessage().startswith("Attempt 1 failed, next in 0.")
    extras = [{name: getattr(record, name, None) for name in ("status", "request_id", "attempt")} for record in records]
    assert extras[0] == {"status": 200, "request_id": "call-1", "attempt": None}
    assert extras[2] == {"status": 503, "request_id": None, "attempt": 1}
    assert all(record.seconds >= 0 for record in records)  # type: ignore[attr-defined]  # from `extra`
