import logging
import subprocess

import pytest

from regolo_rerank import RegoloClient
from tests.conftest import KEY, Rank
from tests.support.processes import own_process
from tests.support.stub import Received, Reply, Stub, crowded, error, scored, texts


def test_every_request_is_logged(rank: Rank, stub: Stub, caplog: pytest.LogCaptureFixture) -> None:
    """Each request is a line at DEBUG, with its reply's name or what came in its place; each repeated one a WARNING."""

    def reply(request: Received) -> Reply:
        if "document 1 " in request.documents[0] and len(stub.received) == 2:
            raise ConnectionAbortedError
        return Reply(scored(request).body, headers={"x-litellm-call-id": f"call-{len(stub.received)}"})

    stub.reply = reply
    with caplog.at_level(logging.DEBUG, "regolo_rerank"):
        rank(RegoloClient(KEY, base_url=stub.url, batch_size=1, max_concurrency=1), "q", texts(3))
    said = [(record.levelname, record.getMessage()) for record in caplog.records if record.name == "regolo_rerank"]
    expected = [
        ("DEBUG", "answered 200 to 1 documents, request call-1"),
        ("DEBUG", "has not answered: no complete reply from"),
        ("WARNING", "regolo_rerank: attempt 1 failed, next in 0.00 s: APIConnectionError: no complete reply from"),
        ("DEBUG", "answered 200 to 1 documents, request call-3"),
        ("DEBUG", "answered 200 to 1 documents, request call-4"),
    ]
    assert [level for level, _ in said] == [level for level, _ in expected]
    assert all(words in message for (_, message), (_, words) in zip(said, expected, strict=True))


def test_a_line_names_the_package_where_no_logging_is_configured(stub: Stub) -> None:
    """Python then prints the bare message of a warning, and it says whose it is."""
    stub.script(error("try again", 500))
    code = "import sys; from regolo_rerank import *; RegoloClient('k', base_url=sys.argv[1]).rerank('q', ['a'])"
    process = own_process(code, stub.url, stderr=subprocess.PIPE)
    _, printed = process.communicate(timeout=30)
    assert printed.startswith("regolo_rerank: attempt 1 failed, next in ")


def test_a_batch_that_is_handed_on_is_logged(rank: Rank, stub: Stub, caplog: pytest.LogCaptureFixture) -> None:
    """A request that is put back for another worker is a line at WARNING too."""
    stub.script(crowded(1))
    rank(RegoloClient(KEY, base_url=stub.url, batch_size=1, max_concurrency=2), "q", texts(3))
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(said) == 1
    assert said[0].startswith("regolo_rerank: attempt 1 failed, next when there is room: Limit type: max_parallel")
