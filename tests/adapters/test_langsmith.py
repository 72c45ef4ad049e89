"""What LangSmith's own client sends of a rerank, received by a server on loopback in LangSmith's place."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from langchain_core.tracers import LangChainTracer
from langsmith import Client

from regolo_rerank import AuthenticationError
from regolo_rerank.langchain import RegoloRerank
from tests.conftest import KEY
from tests.support.modes import Call
from tests.support.stub import Stub, error
from tests.support.traces import QUERY, Way, documents, telling

INFO = {
    "version": "0.12.0",
    "batch_ingest_config": {
        "use_multipart_endpoint": False,
        "size_limit": 100,
        "size_limit_bytes": 20_000_000,
        "scale_up_qsize_trigger": 1_000,
        "scale_up_nthreads_limit": 16,
        "scale_down_nempty_trigger": 4,
    },
}
"""What such a server says of itself."""

Received = Callable[[], list[dict[str, Any]]]
"""Gives all runs that were sent so far, complete."""


@pytest.fixture
def langsmith() -> Iterator[tuple[LangChainTracer, Received]]:
    """A tracer of LangSmith's, and what its server has received."""
    bodies: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            if body:
                assert KEY.encode() not in body
                bodies.append(json.loads(body))
            content = json.dumps(INFO).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PATCH = _answer  # noqa: N815 - http.server's names

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.001,), daemon=True).start()
    client = Client(api_url=f"http://127.0.0.1:{server.server_address[1]}", api_key="made-up")

    def received() -> list[dict[str, Any]]:
        client.flush()
        runs: dict[str, dict[str, Any]] = {}
        for body in bodies:
            for part in (*body.get("post", ()), *body.get("patch", ())):
                runs.setdefault(part["id"], {}).update({name: value for name, value in part.items() if value})
        return list(runs.values())

    yield LangChainTracer(client=client), received
    client.cleanup()
    server.shutdown()
    server.server_close()


@pytest.fixture
def tracer(langsmith: tuple[LangChainTracer, Received]) -> LangChainTracer:
    """The tracer alone."""
    return langsmith[0]


@pytest.fixture
def metadata(langsmith: tuple[LangChainTracer, Received]) -> Callable[[], dict[str, Any]]:
    """Gives what LangSmith is told of the only rerank, and sees that no other run is told of as one."""

    def metadata() -> dict[str, Any]:
        runs = langsmith[1]()
        (rerank,) = (run for run in runs if run["name"] == "RegoloRerank")
        others = [run for run in runs if run is not rerank]
        assert not [run for run in others if "ls_model_name" in run["extra"]["metadata"]]
        told: dict[str, Any] = rerank["extra"]["metadata"]
        return told

    return metadata


def test_a_run_says_which_model_of_which_provider_and_counts_tokens(
    way: Way, langchain: RegoloRerank, stub: Stub, tracer: LangChainTracer, metadata: Callable[[], dict[str, Any]]
) -> None:
    """It has the names by which LangSmith knows models, and the tokens of all requests of the call."""
    langchain.batch_size, stub.reply = 2, telling
    way(langchain, tracer)
    told = metadata()
    assert (told["ls_provider"], told["ls_model_name"]) == ("regolo", "Qwen3-Reranker-4B")
    assert told["usage_metadata"] == {"input_tokens": 14, "output_tokens": 0, "total_tokens": 14}


def test_a_model_of_one_call_is_the_one_that_is_told(
    call: Call, langchain: RegoloRerank, tracer: LangChainTracer, metadata: Callable[[], dict[str, Any]]
) -> None:
    """An argument of the call takes the option's place in the trace too; tokens that nobody counted are not made up."""
    step = langchain.as_runnable().bind(model="other")
    call(step.invoke, {"query": QUERY, "documents": documents()}, {"callbacks": [tracer], "metadata": {"tenant": "x"}})
    told = metadata()
    assert (told["ls_model_name"], told["tenant"]) == ("other", "x")
    assert "usage_metadata" not in told


def test_a_run_that_failed_says_so_too(
    way: Way, langchain: RegoloRerank, stub: Stub, tracer: LangChainTracer, metadata: Callable[[], dict[str, Any]]
) -> None:
    """Without a ranking there are no tokens, but still a model."""
    stub.always(error("no such key", 401))
    with pytest.raises(AuthenticationError):
        way(langchain, tracer)
    told = metadata()
    assert (told["ls_model_name"], "usage_metadata" in told) == ("Qwen3-Reranker-4B", False)
