"""What other rerankers get wrong, and no entry point of this package does, in either mode."""

import asyncio
import copy
import gc
import gzip
import itertools
import logging
import pickle
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest
from langchain_core.load import dumps
from langchain_core.runnables import RunnableLambda
from langchain_core.tracers.run_collector import RunCollectorCallbackHandler
from llama_index.core.schema import MetadataMode
from pydantic import ValidationError

from regolo_rerank import (
    APIConnectionError,
    APIResponseError,
    APIStatusError,
    APITimeoutError,
    AuthenticationError,
    BadRequestError,
    InvalidInputError,
    RateLimitError,
    RegoloError,
    ServerError,
)
from regolo_rerank.langchain import RegoloRerank as LangChainRerank
from regolo_rerank.llama_index import RegoloRerank as LlamaIndexRerank
from tests.conftest import KEY
from tests.support.entries import (
    Entry,
    Pairs,
    Reranker,
    aranked,
    documents_of,
    nodes_of,
    pairs_of_documents,
    ranked,
)
from tests.support.inside import connections_of
from tests.support.modes import Call
from tests.support.stub import Received, Reply, Stub, error, results, score, scored, together

TEXTS = ["a score=0.2", "b score=0.9", "c score=0.5"]
RANKED = [(1, 0.9), (2, 0.5), (0, 0.2)]


def test_64_async_calls_wait_together_and_start_no_thread(kind: type[Reranker], stub: Stub) -> None:
    """Async calls wait together in the event loop, not in turns in a pool of threads."""
    threads: set[threading.Thread] = set()
    answer = together(64)

    def reply(request: Received) -> Reply:
        threads.update(threading.enumerate())
        return answer(request)

    async def calls() -> list[Pairs]:
        return await asyncio.gather(*(aranked(reranker, TEXTS) for _ in range(64)))

    stub.reply = reply
    reranker = kind(KEY, base_url=stub.url)
    before = set(threading.enumerate())
    assert asyncio.run(calls()) == [RANKED] * 64
    assert [thread.name for thread in threads - before if "process_request_thread" not in thread.name] == []


def test_a_cancelled_call_hangs_up_and_sends_nothing_more(kind: type[Reranker]) -> None:
    """Cancelling a call closes its connection and keeps its other requests from being sent."""

    async def call() -> None:
        connections: list[str] = []
        hung_up = asyncio.Event()

        async def never_reply(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            connections.append("opened")
            await reader.read()
            hung_up.set()
            writer.close()

        async with await asyncio.start_server(never_reply, "127.0.0.1", 0) as server:
            host, port = server.sockets[0].getsockname()
            reranker = kind(KEY, base_url=f"http://{host}:{port}", batch_size=1, max_concurrency=1)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(aranked(reranker, TEXTS), 0.1)
            await asyncio.wait_for(hung_up.wait(), 5)
            await asyncio.sleep(0.1)
            assert connections == ["opened"]

    asyncio.run(call())


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")  # of the loop that was closed with open connections
def test_one_object_serves_one_event_loop_after_another(kind: type[Reranker], stub: Stub) -> None:
    """A loop that has ended, in order or not, takes no connection away from the next one."""
    reranker = kind(KEY, base_url=stub.url)
    assert [asyncio.run(aranked(reranker, TEXTS)) for _ in range(3)] == [RANKED] * 3
    loop = asyncio.new_event_loop()
    assert loop.run_until_complete(aranked(reranker, TEXTS)) == RANKED
    loop.close()
    assert asyncio.run(aranked(reranker, TEXTS)) == RANKED
    gc.collect()


@pytest.mark.parametrize("indices", [(0, 1, -1), (0, 1, 2, 1), (0, 1, 2, 3)], ids=["negative", "repeated", "too high"])
def test_an_odd_index_never_becomes_a_document(entry: Entry, stub: Stub, indices: tuple[int, ...]) -> None:
    """A reply that names a document twice, or one that was not sent, is an error, and worth another attempt."""
    odd = Reply(results(*((index, 0.5) for index in indices)))
    stub.script(odd, odd)
    with pytest.raises(APIResponseError):
        entry(TEXTS, max_retries=0)
    assert entry(TEXTS, max_retries=1) == RANKED


@pytest.mark.parametrize("batch_size", [100, 2], ids=["one request", "several requests"])
def test_a_server_that_ignores_top_n_and_order_costs_nothing(entry: Entry, stub: Stub, batch_size: int) -> None:
    """Exactly the top_n best documents come back, the best first, whatever order and number the server sends."""

    def worst_first(request: Received) -> Reply:
        scores = enumerate(map(score, request.documents))
        return Reply(results(*sorted(scores, key=lambda pair: pair[1])))

    stub.reply = worst_first
    texts = [f"document score={value}" for value in (0.3, 0.9, 0.1, 0.7, 0.5)]
    assert entry(texts, top_n=3, batch_size=batch_size) == [(1, 0.9), (3, 0.7), (4, 0.5)]


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e400", "null", '"0.5"', "true", "[0.5]"])
def test_what_is_no_finite_number_is_no_score(entry: Entry, stub: Stub, literal: str) -> None:
    """A score that cannot be compared is an error, not a place in the ranking."""
    stub.always(Reply(f'{{"results": [{{"index": 0, "relevance_score": {literal}}}]}}'.encode()))
    with pytest.raises(APIResponseError):
        entry(TEXTS[:1], max_retries=0)


@pytest.mark.parametrize("top_n", [None, 7])
def test_many_documents_become_one_ranking(entry: Entry, stub: Stub, top_n: int | None) -> None:
    """2,500 documents go out in concurrent requests within the limits, and are ranked as in a single sort."""
    stub.reply = lambda request: replace(scored(request), delay=0.01)
    scores = [index * 7919 % 997 / 997 for index in range(2_500)]
    texts = [f"document {index} score={value}" for index, value in enumerate(scores)]
    in_order = sorted(enumerate(scores), key=lambda pair: -pair[1])
    assert entry(texts, top_n=top_n, batch_size=100, max_concurrency=4) == in_order[:top_n]
    assert [len(documents) for documents in stub.documents] == [100] * 25
    assert 1 < stub.most_at_once <= 4


@pytest.mark.parametrize("kind", [LangChainRerank], ids=["langchain"])
def test_a_documents_id_is_kept(entry: Entry, call: Call) -> None:
    """LangChain documents come back with the id that they came with."""
    reranker, documents = entry.opened(top_n=2), documents_of(TEXTS)
    assert isinstance(reranker, LangChainRerank)
    kept = call(reranker.compress_documents, documents, "q")
    assert [document.id for document in kept] == ["id-1", "id-2"]


@pytest.mark.parametrize("kind", [LlamaIndexRerank], ids=["llama_index"])
@pytest.mark.parametrize("keep", [False, True])
def test_a_node_keeps_its_id_and_the_text_that_the_llm_sees(entry: Entry, call: Call, *, keep: bool) -> None:
    """LlamaIndex nodes come back with their id, and scores show in their metadata only."""
    reranker, nodes = entry.opened(top_n=2, keep_retrieval_score=keep), nodes_of(TEXTS)
    assert isinstance(reranker, LlamaIndexRerank)
    kept = call(reranker.postprocess_nodes, nodes, query_str="q")
    assert [node.node_id for node in kept] == ["1", "2"]
    assert [node.metadata for node in kept] == [
        {**({"retrieval_score": 0.5} if keep else {}), "relevance_score": node.score} for node in kept
    ]
    for mode in (MetadataMode.LLM, MetadataMode.EMBED):
        assert [node.node.get_content(mode) for node in kept] == [TEXTS[1], TEXTS[2]]


def test_a_persistent_failure_is_sent_max_retries_times_more(entry: Entry, stub: Stub) -> None:
    """A server that keeps failing gets 1 + max_retries requests, not a storm."""
    stub.always(error("no backend", 500))
    with pytest.raises(ServerError):
        entry(TEXTS, max_retries=3)
    assert len(stub.received) == 4


@pytest.mark.real_backoff
def test_a_persistent_failure_ends_within_max_retry_seconds(entry: Entry, stub: Stub) -> None:
    """However many retries are left, none starts after max_retry_seconds, and none is waited for that would."""
    stub.always(error("no backend", 500, retry_after_ms=None))
    start = time.monotonic()
    with pytest.raises(ServerError):
        entry(TEXTS, max_retries=20, max_retry_seconds=0.5)
    assert time.monotonic() - start < 4, "20 waits take 5 s at least"


@pytest.mark.parametrize("trouble", ["429", "hang-up"])
def test_a_passing_failure_is_tried_again(entry: Entry, stub: Stub, trouble: str) -> None:
    """After a 429, or a connection that breaks before the reply, the next attempt gives the ranking."""
    attempts = itertools.count()

    def reply(request: Received) -> Reply:
        if next(attempts):
            return scored(request)
        if trouble == "429":
            return error("Limit type: max_parallel_requests", 429)
        raise ConnectionAbortedError  # the stub hangs up

    stub.reply = reply
    assert entry(TEXTS) == RANKED
    assert len(stub.received) == 2


ODD_REPLIES = {
    "list": Reply([]),
    "string": Reply(b'""'),
    "number": Reply(b"1"),
    "null": Reply(b"null"),
    "object": Reply({}),
    "nothing": Reply(b""),
    "no content": Reply(b"", 204),
    "blank": Reply(b" \n"),
    "not JSON": Reply(b"OK"),
    "truncated": Reply(b'{"results": [{"index": 0, "relevance_sc'),
    "html": Reply(b"<html><body>Welcome</body></html>", headers={"content-type": "text/html"}),
    "not UTF-8": Reply(b'{"results": "\xff\xfe"}'),
    "not gzip": Reply(b"OK", headers={"content-encoding": "gzip"}),
    "truncated gzip": Reply(gzip.compress(b"{}" * 100)[:20], headers={"content-encoding": "gzip"}),
    "nested": Reply(b"[" * 100_000),
    "results are null": Reply({"results": None}),
    "results are an object": Reply({"results": {}}),
    "results are empty": Reply({"results": []}),
    "results are numbers": Reply({"results": [1]}),
    "results are lists": Reply({"results": [[0, 0.5]]}),
    "no index": Reply({"results": [{"relevance_score": 0.5}]}),
    "index is null": Reply(results((None, 0.5))),
    "index is a string": Reply(results(("0", 0.5))),
    "index is a fraction": Reply(results((0.5, 0.5))),
    "index is huge": Reply(results((10**40, 0.5))),
    "no score": Reply({"results": [{"index": 0}]}),
    "error": Reply({"error": {"message": "backend failed", "code": 500}}),
    "error beside results": Reply(results((0, 0.5), error="backend failed")),
}


@pytest.mark.parametrize("reply", ODD_REPLIES.values(), ids=ODD_REPLIES)
def test_an_odd_reply_is_an_error_of_this_package(entry: Entry, stub: Stub, reply: Reply) -> None:
    """A 2xx that is no ranking raises APIResponseError, whatever it is."""
    stub.always(reply)
    with pytest.raises(APIResponseError):
        entry(TEXTS[:1], max_retries=0)


CANARY = "canary"
"""The part of the key, and of its malformed spellings, that must show nowhere."""


def _chain(problem: BaseException | None) -> Iterator[BaseException]:
    while problem is not None:
        yield problem
        problem = problem.__cause__ or (None if problem.__suppress_context__ else problem.__context__)


def _shown(problem: BaseException) -> str:
    """Return all that an error tells, with the locals of every frame but this file's."""
    told: list[object] = []
    for link in _chain(problem):
        stack = traceback.StackSummary.extract(traceback.walk_tb(link.__traceback__), capture_locals=True)
        told += [str(link), repr(link), vars(link), [frame.locals for frame in stack if frame.filename != __file__]]
    return repr(told)


def test_no_form_of_an_object_shows_the_key(entry: Entry) -> None:
    """The key is in no text, dump or pickle of a reranker, before or after its connections were opened."""
    with entry.opened() as reranker:
        for _ in range(2):
            forms: list[object] = [
                repr(reranker),
                str(reranker),
                reranker.model_dump(),
                vars(reranker),
                dumps(reranker),
            ]
            forms += [reranker.model_dump(mode="json"), reranker.model_dump_json(), vars(connections_of(reranker))]
            forms += [pickle.dumps(reranker, protocol) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
            if isinstance(reranker, LlamaIndexRerank):
                forms += [reranker.to_dict(), reranker.to_json()]
            assert CANARY not in repr(forms)
            assert entry.rank(reranker, TEXTS) == RANKED


def test_no_log_record_shows_the_key(entry: Entry, stub: Stub, caplog: pytest.LogCaptureFixture) -> None:
    """The key is in no record of any logger at DEBUG, those of httpx and httpcore included."""
    caplog.set_level(logging.DEBUG)
    stub.script(error(f"Invalid proxy server token {KEY}", 500))
    assert entry(TEXTS) == RANKED
    assert {record.name.partition(".")[0] for record in caplog.records} >= {"httpcore", "regolo_rerank"}
    assert CANARY not in caplog.text
    assert CANARY not in repr([vars(record) for record in caplog.records])


QUOTES = {
    "message": (error(f"Invalid proxy server token: {KEY}", 401), AuthenticationError),
    "type and code": (error("No", 401, type=KEY, code=KEY), AuthenticationError),
    "detail": (Reply({"detail": [{"loc": ["header", KEY], "msg": f"Bearer {KEY}"}]}, 422), BadRequestError),
    "html": (Reply(f"<h1>Bad gateway</h1>{KEY}".encode(), 502), ServerError),
    "plain": (Reply(KEY.encode(), 500), ServerError),
    "escaped": (Reply(b'{"error": {"message": "Invalid key sk-\\u0063anary-4f1d"}}', 401), AuthenticationError),
    "redirect": (Reply(b"", 302, {"location": f"/login?key={KEY}"}), APIStatusError),
    "429": (error(f"Limit of {KEY}", 429), RateLimitError),
    "error in a 200": (Reply({"error": {"message": KEY, "code": KEY}}), APIResponseError),
    "odd 200": (Reply({KEY: KEY}), APIResponseError),
    "score": (Reply(results((0, KEY))), APIResponseError),
}


@pytest.mark.parametrize(("reply", "expected"), QUOTES.values(), ids=QUOTES)
def test_a_server_that_quotes_the_key_does_not_reveal_it(
    entry: Entry, stub: Stub, reply: Reply, expected: type[RegoloError]
) -> None:
    """An error shows neither the key that the server repeats nor a frame that holds it."""
    stub.always(reply)
    with pytest.raises(expected) as caught:
        entry(TEXTS, max_retries=1)
    assert stub.received[0].headers["authorization"] == f"Bearer {KEY}"
    assert CANARY not in _shown(caught.value)


@pytest.mark.parametrize(("trouble", "expected"), [("slow", APITimeoutError), ("hang-up", APIConnectionError)])
def test_a_broken_connection_does_not_reveal_the_key(
    entry: Entry, stub: Stub, trouble: str, expected: type[RegoloError]
) -> None:
    """No frame below a connection that fails after the key was sent shows it."""

    def reply(request: Received) -> Reply:
        if trouble == "hang-up":
            raise ConnectionAbortedError
        return replace(scored(request), delay=0.2)

    stub.reply = reply
    with pytest.raises(expected) as caught:
        entry(TEXTS, max_retries=0, timeout=0.1)
    assert CANARY not in _shown(caught.value)


MISTAKES: dict[str, dict[str, Any]] = {
    "mistyped": {"apikey": KEY},
    "newline": {"api_key": "sk-canary\n4f1d"},
    "typographic hyphen": {"api_key": "sk\u2010canary\u20104f1d"},
    "bytes": {"api_key": KEY.encode()},
    "list": {"api_key": [KEY]},
    "swapped": {"base_url": KEY},
    "in the address": {"base_url": f"https://user:{KEY}@127.0.0.1"},
    "in the headers": {"default_headers": {"Authorization": f"Bearer {KEY}"}},
    "wrong option": {"top_n": KEY},
}


WAYS: dict[str, Callable[[type[Reranker], dict[str, Any]], object]] = {
    "construction": lambda kind, options: kind(**options),
    "assignment": lambda kind, options: setattr(kind(), *next(iter(options.items()))),
    "copy": lambda kind, options: kind().model_copy(update=options),
}


@pytest.mark.parametrize("options", MISTAKES.values(), ids=MISTAKES)
@pytest.mark.parametrize("take", WAYS.values(), ids=WAYS)
def test_a_key_in_the_wrong_place_or_form_is_not_shown(
    kind: type[Reranker],
    options: dict[str, Any],
    take: Callable[[type[Reranker], dict[str, Any]], object],
) -> None:
    """The error about a mistyped or malformed key shows none of it."""
    with pytest.raises(ValidationError) as caught:
        take(kind, options)
    assert CANARY not in _shown(caught.value)


@pytest.mark.parametrize("key", ["sk-canary\n4f1d", "sk\u2010canary"], ids=["newline", "typographic hyphen"])
def test_a_malformed_key_in_the_environment_is_neither_sent_nor_shown(
    entry: Entry, stub: Stub, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    """The call names the variable, and its error shows nothing of the key."""
    monkeypatch.setenv("REGOLO_API_KEY", key)
    with pytest.raises(InvalidInputError, match="REGOLO_API_KEY") as caught:
        entry(TEXTS, api_key=None)
    assert CANARY not in _shown(caught.value)
    assert stub.received == []


def _pickled(reranker: Reranker) -> Reranker:
    copied: Reranker = pickle.loads(pickle.dumps(reranker))  # noqa: S301 - its own pickle
    return copied


@pytest.mark.parametrize("copied", [copy.deepcopy, _pickled], ids=["deepcopy", "pickle"])
def test_a_copy_works_and_leaves_the_original_as_it_is(
    entry: Entry, stub: Stub, monkeypatch: pytest.MonkeyPatch, copied: Callable[[Reranker], Reranker]
) -> None:
    """A copy of a reranker in use ranks with the same options; a pickled one finds its key in the environment."""
    if copied is _pickled:
        monkeypatch.setenv("REGOLO_API_KEY", "sk-environment")
    with entry.opened(top_n=2) as original:
        assert entry.rank(original, TEXTS) == RANKED[:2]
        with copied(original) as twin:
            assert entry.rank(twin, TEXTS) == RANKED[:2]
        assert entry.rank(original, TEXTS) == RANKED[:2]
    keys = [request.headers["authorization"].removeprefix("Bearer ") for request in stub.received]
    assert keys == [KEY, "sk-environment" if copied is _pickled else KEY, KEY]


@pytest.mark.parametrize("kind", [LangChainRerank], ids=["langchain"])
def test_reranking_is_a_run_of_its_own_in_a_trace(entry: Entry, call: Call) -> None:
    """A chain's trace holds the reranking with its query, its documents and its ranking."""
    traced, reranker = RunCollectorCallbackHandler(), entry.opened()
    step = RunnableLambda(lambda texts: ranked(reranker, texts), lambda texts: aranked(reranker, texts))
    call(step.invoke, TEXTS, {"callbacks": [traced]})
    [chain] = traced.traced_runs
    [run] = chain.child_runs
    assert (run.name, run.error) == ("RegoloRerank", None)
    assert run.inputs["query"] == "q"
    assert [document.page_content for document in run.inputs["documents"]] == TEXTS
    assert pairs_of_documents((run.outputs or {})["documents"]) == RANKED
    assert CANARY not in repr([chain.model_dump(), run.model_dump()])


def test_a_refused_key_raises(entry: Entry, stub: Stub) -> None:
    """A 401 is an error at once, not an empty ranking."""
    stub.always(error("Invalid proxy server token", 401))
    with pytest.raises(AuthenticationError):
        entry(TEXTS)
    assert len(stub.received) == 1


@pytest.mark.parametrize("kind", [LangChainRerank, LlamaIndexRerank], ids=["langchain", "llama_index"])
@pytest.mark.parametrize("status", [400, 401, 403, 404])
def test_a_fallback_covers_no_mistake(entry: Entry, stub: Stub, status: int) -> None:
    """Even `on_error="return_input"` raises what only the caller can put right."""
    stub.always(error("no", status))
    with pytest.raises(APIStatusError) as caught:
        entry(TEXTS, on_error="return_input")
    assert caught.value.status_code == status


class Watchful(Stub):
    """Notes requests of every other method too."""

    def __init__(self) -> None:
        self.others: list[str] = []
        super().__init__()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        def refuse(request: BaseHTTPRequestHandler) -> None:
            self.others.append(request.requestline)
            request.send_error(404)

        handler = super()._handler()
        for method in ("GET", "HEAD", "OPTIONS", "PUT", "PATCH", "DELETE"):
            setattr(handler, f"do_{method}", refuse)
        return handler


def test_a_call_is_one_post_and_nothing_else(kind: type[Reranker], mode: str) -> None:
    """No list of models, no probe: one call of one batch is one request."""
    with Watchful() as server:
        assert Entry(kind, mode, server.url)(TEXTS) == RANKED
        assert [request.path for request in server.received] == ["/rerank"]
        assert server.others == []
