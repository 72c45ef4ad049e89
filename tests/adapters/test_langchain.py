import asyncio
import threading
from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import Any

import pytest
from langchain_classic.retrievers import ContextualCompressionRetriever
from langchain_classic.retrievers.document_compressors import DocumentCompressorPipeline
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding
from langchain_core.language_models.fake_chat_models import ParrotFakeChatModel
from langchain_core.runnables import Runnable, RunnableLambda
from langchain_core.tracers import BaseTracer, Run
from langchain_core.tracers.base import AsyncBaseTracer
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_text_splitters import CharacterTextSplitter
from pydantic import ValidationError

from regolo_rerank import APIStatusError, AuthenticationError, InvalidInputError
from regolo_rerank.langchain import RegoloRerank
from tests.conftest import KEY
from tests.support.modes import Call
from tests.support.stub import Received, Reply, Stub, error, scored


class Page(Document):
    """A document with a field of its own."""

    number: int


class Trace(BaseTracer):
    """Keeps the finished runs that have no parent."""

    def __init__(self) -> None:
        super().__init__()
        self.roots: list[Run] = []

    def _persist_run(self, run: Run) -> None:
        self.roots.append(run)


class AsyncTrace(AsyncBaseTracer):
    """Does the same for async calls."""

    def __init__(self) -> None:
        super().__init__()
        self.roots: list[Run] = []

    async def _persist_run(self, run: Run) -> None:
        self.roots.append(run)


@pytest.fixture
def reranker(stub: Stub) -> RegoloRerank:
    """A reranker that sends texts as they are and does not retry."""
    return RegoloRerank(KEY, base_url=stub.url, prompt_format="plain", max_retries=0)


@pytest.fixture
def trace(mode: str) -> Trace | AsyncTrace:
    """A callback handler of each kind."""
    return Trace() if mode == "sync" else AsyncTrace()


def documents() -> list[Document]:
    """Return documents whose best one is the second and whose worst one is the first."""
    return [Document("a score=0.1", id="1"), Document("b score=0.9", id="2"), Document("c score=0.5", id="3")]


def texts(ranked: Iterable[Document]) -> list[str]:
    """Return the documents' texts."""
    return [document.page_content for document in ranked]


def retriever(reranker: RegoloRerank) -> ContextualCompressionRetriever:
    """Return a retriever that reranks what a vector store finds."""
    store = InMemoryVectorStore.from_documents(documents(), DeterministicFakeEmbedding(size=4))
    return ContextualCompressionRetriever(base_compressor=reranker, base_retriever=store.as_retriever())


def test_the_best_documents_come_first_with_their_scores(call: Call, reranker: RegoloRerank, stub: Stub) -> None:
    """The `top_n` best documents come back in order, each with `relevance_score`; all of them were sent."""
    reranker.top_n = 2
    ranked = call(reranker.compress_documents, documents(), "q")
    assert [(document.page_content, document.metadata) for document in ranked] == [
        ("b score=0.9", {"relevance_score": 0.9}),
        ("c score=0.5", {"relevance_score": 0.5}),
    ]
    assert stub.documents == [texts(documents())]


def test_everything_a_document_has_is_kept(call: Call, reranker: RegoloRerank) -> None:
    """Class, id, type, further fields and metadata come back, and `relevance_score` is added."""
    page = Page(page_content="a score=0.4", id="p-7", number=7, metadata={"source": "x", "nested": {"tags": ["y"]}})
    (kept,) = call(reranker.compress_documents, [page], "q")
    assert type(kept) is Page
    assert kept == page.model_copy(update={"metadata": {**page.metadata, "relevance_score": 0.4}})


def test_the_callers_documents_are_never_changed(call: Call, reranker: RegoloRerank) -> None:
    """List, documents and metadata are after the call what they were before, and none is handed out itself."""
    given = [Document("a score=0.1", metadata={"nested": {"tags": ["y"]}}), *documents()]
    before = deepcopy(given)
    ranked = call(reranker.compress_documents, given, "q")
    assert given == before
    assert not {id(document) for document in given} & {id(document) for document in ranked}
    assert not {id(document.metadata) for document in given} & {id(document.metadata) for document in ranked}


@pytest.mark.parametrize("kind", [tuple, iter])
def test_documents_come_in_a_tuple_or_an_iterator_too(
    call: Call, reranker: RegoloRerank, kind: Callable[[list[Document]], Any]
) -> None:
    """A tuple and an iterator are as good as a list."""
    assert texts(call(reranker.compress_documents, kind(documents()), "q")) == [
        "b score=0.9",
        "c score=0.5",
        "a score=0.1",
    ]
    assert [result["index"] for result in call(reranker.rerank, kind(documents()), "q")] == [1, 2, 0]


def test_an_empty_list_sends_nothing(call: Call, reranker: RegoloRerank, stub: Stub) -> None:
    """Without documents there is nothing to rank and nothing to ask."""
    assert call(reranker.compress_documents, [], "q") == []
    assert call(reranker.rerank, [], "q") == []
    assert stub.received == []


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (
            [Document("a"), "b"],
            r"documents\[1\]: must be Document, got str; pass Document\(.*, or call rerank",
        ),
        ([Document("a"), None], r"documents\[1\]: must be Document, got NoneType"),
        ("text", r"documents: must be a list of Document, got str"),
        ({Document: 1}, r"documents: must be a list of Document, got dict"),
    ],
)
def test_what_is_no_document_is_refused_by_index_and_type(
    call: Call, reranker: RegoloRerank, stub: Stub, given: Any, problem: str
) -> None:
    """The error names the place and the type of what is no document, and nothing is sent."""
    with pytest.raises(InvalidInputError, match=problem):
        call(reranker.compress_documents, given, "q")
    assert stub.received == []


def test_metadata_fields_are_scored_and_not_shown(call: Call, reranker: RegoloRerank, stub: Stub) -> None:
    """Each named key that a document has is a `key: value` line in front of its text, on the wire only."""
    reranker.metadata_fields = ("title", "year")
    given = [
        Document("a", metadata={"year": 1999, "title": "T", "other": "o"}),
        Document("b", metadata={"year": None}),
        Document("c"),
    ]
    ranked = call(reranker.compress_documents, given, "q")
    assert stub.documents == [["title: T\nyear: 1999\na", "year: None\nb", "c"]]
    assert sorted(texts(ranked)) == ["a", "b", "c"]


def test_the_key_has_two_names(call: Call, stub: Stub) -> None:
    """`regolo_api_key` is `api_key` under the name that LangChain's conventions give it."""
    options: dict[str, Any] = {"regolo_api_key": KEY, "base_url": stub.url}
    call(RegoloRerank(**options).compress_documents, documents(), "q")
    assert stub.received[0].headers["authorization"] == f"Bearer {KEY}"


def test_the_key_under_both_names_is_refused() -> None:
    """Two keys leave open which one counts; neither shows in the error."""
    options: dict[str, Any] = {"api_key": KEY, "regolo_api_key": "sk-other"}
    with pytest.raises(ValidationError, match="api_key and regolo_api_key are the same option") as refused:
        RegoloRerank(**options)
    assert KEY not in str(refused.value)
    assert "sk-other" not in str(refused.value)


def test_rerank_follows_the_convention_of_langchains_rerankers(call: Call, reranker: RegoloRerank, stub: Stub) -> None:
    """Strings, documents and dicts with a `text` give plain dicts of index and score, the best first."""
    given: list[Any] = ["a score=0.1", Document("b score=0.9"), {"text": "c score=0.5", "id": 3}]
    assert call(reranker.rerank, given, "q") == [
        {"index": 1, "relevance_score": 0.9},
        {"index": 2, "relevance_score": 0.5},
        {"index": 0, "relevance_score": 0.1},
    ]
    assert stub.documents == [["a score=0.1", "b score=0.9", "c score=0.5"]]


def test_rerank_takes_model_and_top_n_for_one_call(call: Call, reranker: RegoloRerank, stub: Stub) -> None:
    """They stand in for the options in this call and leave them as they are."""
    assert [result["index"] for result in call(reranker.rerank, documents(), "q", model="other", top_n=1)] == [1]
    assert [result["index"] for result in call(reranker.rerank, documents(), "q")] == [1, 2, 0]
    assert [request.json["model"] for request in stub.received] == ["other", "Qwen3-Reranker-4B"]
    assert (reranker.model, reranker.top_n) == ("Qwen3-Reranker-4B", 5)


def test_rerank_takes_the_task_of_one_call(call: Call, reranker: RegoloRerank, stub: Stub) -> None:
    """An instruction stands in for the option in this call, wherever the format puts it."""
    for prompt_format in ("tagged", "server_template"):
        reranker.prompt_format = prompt_format
        call(reranker.rerank, documents(), "q", instruction="Find recipes")
        call(reranker.rerank, documents(), "q")
    tagged, by_default, in_a_field, in_a_field_by_default = [request.json for request in stub.received]
    assert tagged["query"] == "<Instruct>: Find recipes\n<Query>: q"
    assert by_default["query"] == f"<Instruct>: {reranker.instruction}\n<Query>: q"
    assert (in_a_field["query"], in_a_field["instruction"]) == ("q", "Find recipes")
    assert in_a_field_by_default["instruction"] == reranker.instruction


@pytest.mark.parametrize(
    ("document", "problem"),
    [
        ({"content": "a"}, r"documents\[1\]: a dict's text is a string in 'text', got NoneType"),
        ({"text": 7}, r"documents\[1\]: a dict's text is a string in 'text', got int"),
        (7, r"documents\[1\]: must be str or Document or dict, got int"),
    ],
)
def test_rerank_refuses_what_has_no_text(
    call: Call, reranker: RegoloRerank, stub: Stub, document: Any, problem: str
) -> None:
    """The error names the place and the type, and nothing is sent."""
    with pytest.raises(InvalidInputError, match=problem):
        call(reranker.rerank, ["a", document], "q")
    assert stub.received == []


def test_rerank_raises_whatever_on_error_says(call: Call, reranker: RegoloRerank, stub: Stub) -> None:
    """Indices need scores, so there is nothing to fall back to."""
    reranker.on_error = "return_input"
    stub.always(error("down", 500))
    with pytest.raises(APIStatusError, match="down"):
        call(reranker.rerank, documents(), "q")


def test_a_compression_retriever_reranks(call: Call, reranker: RegoloRerank, stub: Stub) -> None:
    """A retriever's documents come back reranked, and the query goes out as it is."""
    ranked = call(retriever(reranker).invoke, "capital of China")
    assert texts(ranked) == ["b score=0.9", "c score=0.5", "a score=0.1"]
    assert [document.id for document in ranked] == ["2", "3", "1"]
    assert stub.received[0].json["query"] == "capital of China"


def test_a_compressor_pipeline_reranks(call: Call, reranker: RegoloRerank) -> None:
    """As a step of a pipeline, it reranks what the step before made."""
    splitter = CharacterTextSplitter(separator="|", chunk_size=12, chunk_overlap=0)
    pipeline = DocumentCompressorPipeline(transformers=[splitter, reranker])
    ranked = call(pipeline.compress_documents, [Document("a score=0.1|b score=0.9", metadata={"source": "x"})], "q")
    assert [(document.page_content, document.metadata) for document in ranked] == [
        ("b score=0.9", {"source": "x", "relevance_score": 0.9}),
        ("a score=0.1", {"source": "x", "relevance_score": 0.1}),
    ]


@pytest.mark.parametrize(
    "call",
    [
        lambda chain, values: [chain.invoke(value) for value in values],
        lambda chain, values: [asyncio.run(chain.ainvoke(value)) for value in values],
        lambda chain, values: chain.batch(values),
        lambda chain, values: asyncio.run(chain.abatch(values)),
    ],
    ids=["invoke", "ainvoke", "batch", "abatch"],
)
def test_the_runnable_is_a_step_of_a_chain(
    call: Callable[[Any, list[Any]], list[Any]], reranker: RegoloRerank, stub: Stub
) -> None:
    """In a chain, the model is given the documents that were kept, in their order, for each input its own."""
    reranker.top_n = 2
    chain = reranker.as_runnable() | (lambda kept: "\n".join(texts(kept))) | ParrotFakeChatModel()
    first = {"query": "first", "documents": documents()}
    second = {"query": "second", "documents": [Document("d score=0.2"), Document("e score=0.3")]}
    answers = call(chain, [first, second])
    assert [answer.content for answer in answers] == ["b score=0.9\nc score=0.5", "e score=0.3\nd score=0.2"]
    assert sorted(request.json["query"] for request in stub.received) == ["first", "second"]


def test_the_runnable_follows_the_options(call: Call, reranker: RegoloRerank) -> None:
    """An option that is assigned later counts for a runnable that was made before."""
    step = reranker.as_runnable()
    reranker.top_n = 1
    assert texts(call(step.invoke, {"query": "q", "documents": documents()})) == ["b score=0.9"]


def test_the_runnable_is_async_without_threads(reranker: RegoloRerank, stub: Stub) -> None:
    """An async call of the runnable ranks in the loop's own thread."""
    workers: list[str] = []

    def reply(request: Received) -> Reply:
        workers.extend(thread.name for thread in threading.enumerate() if thread.name.startswith("asyncio_"))
        return scored(request)

    stub.reply = reply
    ranked = asyncio.run(reranker.as_runnable().ainvoke({"query": "q", "documents": documents()}))
    assert texts(ranked) == ["b score=0.9", "c score=0.5", "a score=0.1"]
    assert workers == []


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("q", r"the runnable takes \{'query': ..., 'documents': ...\}, got str"),
        ({"query": "q"}, r"the runnable takes \{'query': ..., 'documents': ...\}"),
        ({"query": "q", "documents": ["a"]}, r"documents\[0\]: must be Document, got str"),
    ],
)
def test_the_runnable_refuses_other_input(
    call: Call, reranker: RegoloRerank, stub: Stub, value: Any, problem: str
) -> None:
    """The error says what the runnable takes, and nothing is sent."""
    with pytest.raises(InvalidInputError, match=problem):
        call(reranker.as_runnable().invoke, value)
    assert stub.received == []


def test_a_rerank_is_a_run_of_its_own_in_the_retrievers(
    call: Call, trace: Trace | AsyncTrace, reranker: RegoloRerank
) -> None:
    """A handler of the retriever sees the rerank below it, with its name, inputs and outputs."""
    ranked = call(retriever(reranker).invoke, "capital of China", {"callbacks": [trace]})
    (root,) = trace.roots
    assert [child.name for child in root.child_runs] == ["VectorStoreRetriever", "RegoloRerank"]
    run = root.child_runs[1]
    assert run.parent_run_id == root.id
    assert run.inputs["query"] == "capital of China"
    assert sorted(texts(run.inputs["documents"])) == texts(documents())
    assert run.outputs is not None
    assert run.outputs["documents"] == ranked
    assert run.error is None


def test_a_failed_rerank_is_a_failed_run(
    call: Call, trace: Trace | AsyncTrace, reranker: RegoloRerank, stub: Stub
) -> None:
    """A handler is told of the error, and of no output."""
    stub.always(error("no such key", 401))
    with pytest.raises(AuthenticationError):
        call(retriever(reranker).invoke, "q", {"callbacks": [trace]})
    (root,) = trace.roots
    run = root.child_runs[1]
    assert run.name == "RegoloRerank"
    assert "AuthenticationError" in str(run.error)
    assert not run.outputs


def test_a_cancelled_rerank_is_a_failed_run(reranker: RegoloRerank, stub: Stub) -> None:
    """A handler is told when a call is cancelled, so that no run stays open."""
    sent, trace = asyncio.Event(), AsyncTrace()

    async def cancel() -> None:
        loop = asyncio.get_running_loop()

        def reply(_: Received) -> Reply:
            loop.call_soon_threadsafe(sent.set)
            return Reply(delay=0.5)

        stub.reply = reply
        call = asyncio.create_task(reranker.acompress_documents(documents(), "q", callbacks=[trace]))
        await sent.wait()
        call.cancel()
        await asyncio.wait([call])
        assert call.cancelled()

    asyncio.run(cancel())
    assert ["CancelledError" in str(run.error) for run in trace.roots] == [True]


def test_a_rerank_nests_under_the_runnable_around_it(
    mode: str, call: Call, trace: Trace | AsyncTrace, reranker: RegoloRerank
) -> None:
    """Callbacks that nobody passes are those of the surrounding chain."""

    def step(query: str) -> list[Document]:
        return reranker.compress_documents(documents(), query)

    async def astep(query: str) -> list[Document]:
        return await reranker.acompress_documents(documents(), query)

    around: Runnable[str, list[Document]] = (
        RunnableLambda(step, name="around") if mode == "sync" else RunnableLambda(astep, name="around")
    )
    ranked = call(around.invoke, "q", {"callbacks": [trace]})
    (root,) = trace.roots
    assert [(run.name, (run.outputs or {}).get("documents")) for run in root.child_runs] == [("RegoloRerank", ranked)]


def test_the_runnable_is_one_run(call: Call, trace: Trace | AsyncTrace, reranker: RegoloRerank) -> None:
    """A rerank that is a chain's step shows once in its trace."""
    chain = reranker.as_runnable() | RunnableLambda(texts)
    call(chain.invoke, {"query": "q", "documents": documents()}, {"callbacks": [trace]})
    (root,) = trace.roots
    assert [run.name for run in root.child_runs] == ["RegoloRerank", "texts"]
    assert root.child_runs[0].child_runs == []
