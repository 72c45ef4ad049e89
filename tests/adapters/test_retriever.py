"""`RerankRetriever`, on langchain-core alone, and the retrievers and tools of LangChain around a reranker."""

import pickle
import threading
from typing import Any

import pytest
from langchain_classic.retrievers import ContextualCompressionRetriever
from langchain_core.documents import Document
from langchain_core.runnables import ConfigurableField, RunnableLambda
from langchain_core.tools import create_retriever_tool
from langchain_core.tracers.run_collector import RunCollectorCallbackHandler
from pydantic import SecretStr

from regolo_rerank import InvalidInputError, RerankFallbackWarning
from regolo_rerank.langchain import RegoloRerank, RerankRetriever
from tests.adapters.helpers import BEST, QUERY, Everything, documents, runs_in, texts_of, tree
from tests.adapters.test_runnable import TopOne
from tests.conftest import KEY
from tests.support.modes import Call
from tests.support.stub import Received, Reply, Stub, scored

Retriever = Any
"""`RerankRetriever`, whose `invoke` LangChain types without further arguments."""


@pytest.fixture
def retriever(langchain: RegoloRerank) -> Retriever:
    """A retriever that keeps two documents."""
    return RerankRetriever(base_retriever=Everything(), reranker=langchain)


class NativeOnly(Everything):
    """A retriever whose sync method must not be called."""

    def _get_relevant_documents(self, query: str, *, run_manager: Any) -> list[Document]:
        raise AssertionError(query, run_manager)

    async def _aget_relevant_documents(self, query: str, *, run_manager: Any) -> list[Document]:
        del query, run_manager
        return documents()


def test_it_reranks_what_its_base_finds(call: Call, retriever: Retriever, stub: Stub) -> None:
    """The best documents are returned in order, and the query is sent unchanged."""
    assert texts_of(call(retriever.invoke, QUERY)) == BEST
    assert stub.received[0].json["query"] == QUERY


def test_any_runnable_from_a_query_to_documents_is_a_base(call: Call, langchain: RegoloRerank) -> None:
    """A chain that first rewrites the query is one."""
    asked = []

    def search(query: str) -> list[Document]:
        asked.append(query)
        return documents()

    base = RunnableLambda(str.upper) | RunnableLambda(search)
    retriever: Retriever = RerankRetriever(base_retriever=base, reranker=langchain)
    assert texts_of(call(retriever.invoke, "q")) == BEST
    assert asked == ["Q"]


@pytest.mark.parametrize(
    ("options", "arguments", "count"),
    [
        ({}, {}, 2),
        ({"k": 1}, {}, 1),
        ({"top_n": 1}, {}, 1),
        ({"k": 1}, {"k": 3}, 3),
        ({"k": 1}, {"k": None}, 1),
        ({"top_n": 1}, {"top_n": 3}, 3),
        ({}, {"k": 1}, 1),
        ({}, {"top_n": 1}, 1),
    ],
)
def test_k_is_the_number_of_documents(
    call: Call, langchain: RegoloRerank, options: dict[str, Any], arguments: dict[str, Any], count: int
) -> None:
    """`k` and `top_n` are the same, at construction and for one call, which counts first."""
    retriever: Retriever = RerankRetriever(base_retriever=Everything(), reranker=langchain, **options)
    assert len(call(retriever.invoke, QUERY, **arguments)) == count
    assert langchain.top_n == 2


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"top_n": 1, "k": 1}, "k: the same as top_n. Pass one of them"),
        ({"batch_size": 5}, r"batch_size: not an option of one call. Those are top_n, .*, api_key"),
        ({"k": 0}, "top_n: "),
    ],
)
def test_other_arguments_are_rejected(
    call: Call, retriever: Retriever, stub: Stub, arguments: dict[str, Any], problem: str
) -> None:
    """An argument that would have no effect is an error, before anything is retrieved."""
    with pytest.raises(InvalidInputError, match=problem):
        call(retriever.invoke, QUERY, **arguments)
    assert stub.received == []


@pytest.mark.parametrize(("name", "meant"), [("api_keys", "api_key"), ("base_compressor", "reranker")])
def test_a_wrong_option_is_rejected_at_construction(langchain: RegoloRerank, name: str, meant: str) -> None:
    """The error has the right name, also for those of `ContextualCompressionRetriever`, and shows no key."""
    wrong: Any = {name: KEY}
    with pytest.raises(InvalidInputError, match=f"{name}: unknown option, did you mean {meant}") as rejected:
        RerankRetriever(base_retriever=Everything(), reranker=langchain, **wrong)
    assert KEY not in str(rejected.value)


def test_k_can_be_bound_and_configured(call: Call, retriever: Retriever) -> None:
    """The short name works in each way too."""
    assert len(call(retriever.bind(k=1).invoke, QUERY)) == 1
    configured = retriever.configurable_fields(k=ConfigurableField(id="k"))
    assert len(call(configured.invoke, QUERY, {"configurable": {"k": 1}})) == 1


def test_a_subclass_of_the_reranker_counts(call: Call, stub: Stub) -> None:
    """The retriever calls the public method, with options of one call too."""
    retriever: Retriever = RerankRetriever(base_retriever=Everything(), reranker=TopOne(api_key=KEY, base_url=stub.url))
    assert texts_of(call(retriever.invoke, QUERY)) == [f"{call.mode} b score=0.9"]
    assert texts_of(call(retriever.invoke, QUERY, k=3)) == [f"{call.mode} b score=0.9"]


def test_retrieval_and_rerank_are_child_runs(call: Call, retriever: Retriever) -> None:
    """A trace shows both below the retriever, with the tags of the chain around it."""
    trace = RunCollectorCallbackHandler()
    chain = retriever | RunnableLambda(texts_of)
    assert call(chain.invoke, QUERY, {"callbacks": [trace], "tags": ["rag"]}) == BEST
    (root,) = trace.traced_runs
    assert tree(root) == {"RunnableSequence": [{"RerankRetriever": ["Everything", "RegoloRerank"]}, "texts_of"]}
    (run,) = runs_in([root])
    assert "rag" in (run.tags or [])
    assert texts_of((run.outputs or {})["documents"]) == BEST


@pytest.mark.anyio
async def test_it_is_async_without_threads(langchain: RegoloRerank, stub: Stub) -> None:
    """It calls the async methods of base and reranker, in the event loop's own thread."""
    started: list[str] = []

    def reply(request: Received) -> Reply:
        started.extend(thread.name for thread in threading.enumerate() if thread.name.startswith("asyncio_"))
        return scored(request)

    stub.reply = reply
    retriever = RerankRetriever(base_retriever=NativeOnly(), reranker=langchain)
    assert texts_of(await retriever.ainvoke(QUERY)) == BEST
    assert texts_of(await langchain.as_runnable().ainvoke({"query": QUERY, "documents": documents()})) == BEST
    assert started == []


def test_repr_and_pickle_do_not_show_the_key(
    call: Call, langchain: RegoloRerank, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the reranker's key nor one of the retriever's own. A pickled retriever works elsewhere."""
    retriever: Retriever = RerankRetriever(
        base_retriever=Everything(), reranker=langchain, k=1, api_key=SecretStr("sk-retriever")
    )
    pickled = pickle.dumps(retriever)
    shown = f"{retriever!r} {retriever} {retriever.model_dump_json()} {retriever.to_json()} {pickled!r}"
    assert KEY not in shown
    assert "sk-retriever" not in shown
    monkeypatch.setenv("REGOLO_API_KEY", KEY)
    assert texts_of(call(pickle.loads(pickled).invoke, QUERY)) == BEST[:1]  # noqa: S301 - our own
    assert retriever.api_key is not None


def test_an_agents_tool_survives_an_empty_query(call: Call, langchain: RegoloRerank, stub: Stub) -> None:
    """With `on_error="return_input"`, a tool answers a model that asks for nothing."""
    langchain.on_error = "return_input"
    for retriever in (
        RerankRetriever(base_retriever=Everything(), reranker=langchain),
        ContextualCompressionRetriever(base_compressor=langchain, base_retriever=Everything()),
    ):
        tool: Any = create_retriever_tool(retriever, "search", "Search documents.")
        with pytest.warns(RerankFallbackWarning, match="must not be blank"):
            assert call(tool.invoke, {"query": ""}) == "a score=0.1\n\nb score=0.9"
        assert call(tool.invoke, {"query": QUERY}) == "b score=0.9\n\nc score=0.5"
    assert len(stub.received) == 2
