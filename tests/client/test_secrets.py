"""The API key is in no error, cause, context, log, repr or pickle."""

import copy
import logging
import pickle
from collections.abc import Iterator

import pytest

from regolo_rerank import APIConnectionError, RegoloClient, RegoloError
from tests.conftest import KEY
from tests.support.faults import Fault, FaultServer, http, sends
from tests.support.modes import Call
from tests.support.stub import Stub

BROKEN = {
    "no http": f"-ERR unknown command: Bearer {KEY}\r\n\r\n",
    "no header": f"HTTP/1.1 200 OK\r\n{KEY}\r\n\r\n",
    "no chunk": f"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n{KEY}\r\n",
    "nothing": "",
    "half a reply": "HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n{}",
}
COMPLETE: dict[str, Fault] = {
    "error": sends(http(f'{{"error": {{"message": "no {KEY}", "type": "{KEY}", "code": "{KEY}"}}}}'.encode(), 401)),
    "text": sends(http(f"Internal Server Error {KEY}".encode(), 500)),
    "escaped": sends(http(f'{{"detail": "Bearer \\"{KEY}\\""}}'.encode(), 422)),
    "request id": sends(http(b"{}", 400, x_litellm_call_id=KEY)),
    "location": sends(http(b"", 307, location=f"https://elsewhere.invalid/?key={KEY}")),
    "no json": sends(http(f"{KEY} is no JSON".encode())),
    "wrong shape": sends(http(f'{{"{KEY}": 1}}'.encode())),
    "wrong score": sends(http(f'{{"results": [{{"index": 0, "relevance_score": "{KEY}"}}]}}'.encode())),
}


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error with all its causes and contexts."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def assert_clean(error: BaseException) -> None:
    """Fail if an error or what is printed with it contains the key."""
    for link in chain(error):
        assert KEY not in f"{link} {link!r} {link.args} {vars(link)}"
        assert KEY.encode() not in pickle.dumps(link)
        assert "httpx" not in type(link).__module__  # which would refer to the request


@pytest.mark.parametrize("reply", BROKEN.values(), ids=BROKEN.keys())
def test_an_error_of_the_connection(call: Call, reply: str, caplog: pytest.LogCaptureFixture) -> None:
    """A reply that is no HTTP, or only half, is an APIConnectionError and is retried."""
    caplog.set_level(logging.DEBUG, "regolo_rerank")
    with FaultServer(usual=sends(reply.encode())) as server, pytest.raises(APIConnectionError) as caught:
        call(RegoloClient(KEY, base_url=server.url, max_retries=1).rerank, "q", ["a"])
    assert len(server.received) == 2
    assert_clean(caught.value)
    assert KEY not in caplog.text


@pytest.mark.parametrize("fault", COMPLETE.values(), ids=COMPLETE.keys())
def test_an_error_of_the_server(call: Call, fault: Fault, caplog: pytest.LogCaptureFixture) -> None:
    """Servers do repeat keys, in bodies and headers."""
    caplog.set_level(logging.DEBUG, "regolo_rerank")
    with FaultServer(usual=fault) as server, pytest.raises(RegoloError) as caught:
        call(RegoloClient(KEY, base_url=server.url, max_retries=1).rerank, "q", ["a"])
    assert "***" in f"{caught.value} {vars(caught.value)}"
    assert_clean(caught.value)
    assert KEY not in caplog.text


def test_reprs_copies_and_pickles(client: RegoloClient, stub: Stub) -> None:
    """A pickled client takes the key from the environment again."""
    for each in (client, client.options, copy.copy(client), copy.deepcopy(client)):
        assert KEY not in f"{each!r} {each}"
    assert KEY not in f"{client.options.model_dump()} {client.options.model_dump_json()}"
    data = pickle.dumps(client)
    assert KEY.encode() not in data
    loaded: RegoloClient = pickle.loads(data)  # noqa: S301 - our own
    loaded.rerank("q", ["a"])
    copy.deepcopy(client).rerank("q", ["a"])
    assert [request.headers.get("authorization") for request in stub.received] == [None, f"Bearer {KEY}"]
