"""The reranker as a step of LCEL chains and as a node of LangGraph's graphs: each of their ways does what it says."""

import asyncio
import pickle
import uuid
from collections.abc import Callable
from operator import itemgetter
from typing import Any, TypedDict, cast

import pytest
from langchain_classic.retrievers import ContextualCompressionRetriever
from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import (
    ConfigurableField,
    Runnable,
    RunnableConfig,
    RunnableLambda,
    RunnableParallel,
    RunnablePassthrough,
)
from langchain_core.runnables.utils import AddableDict
from langchain_core.tracers import Run
from langchain_core.tracers.run_collector import RunCollectorCallbackHandler
from langgraph.graph import START, StateGraph
from pydantic import ValidationError

from regolo_rerank import AuthenticationError, InvalidInputError, RateLimitError, RerankFallbackWarning, ServerError
from regolo_rerank.langchain import RegoloRerank
from tests.conftest import KEY
from tests.support.modes import Call
from tests.support.stub import Received, Reply, Stub, error, scored

QUERY = "capital of China"
BEST = ["b score=0.9", "c score=0.5"]
"""The texts that are kept, in their order."""

Step = Runnable[Any, Any]


class Everything(BaseRetriever):
    """Retrieves three documents, the best one in the middle."""

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:
        del query, run_manager
        return documents()


class State(TypedDict, total=False):
    """The state of a graph."""

    query: str
    documents: list[Document]
    answer: str


def documents() -> list[Document]:
    """Return what is retrieved."""
    return [Document("a score=0.1"), Document("b score=0.9"), Document("c score=0.5")]


def candidates(query: str = QUERY) -> dict[str, Any]:
    """Return what a step takes."""
    return {"query": query, "documents": documents()}


def texts(kept: list[Document]) -> list[str]:
    """Return the documents' texts."""
    return [document.page_content for document in kept]


def first_two(given: dict[str, Any]) -> list[Document]:
    """Stand in for a reranker."""
    return list(given["documents"][:2])


async def collected(chunks: Any) -> list[Any]:
    """Return all that an async iterator gives."""
    return [chunk async for chunk in chunks]


def tree(above: Run) -> Any:
    """Return the names of a run and of those below it."""
    return {above.name: [tree(below) for below in above.child_runs]} if above.child_runs else above.name


def named(roots: list[Run], name: str) -> list[Run]:
    """Return all runs of a name."""
    return [found for root in roots for found in ([root] * (root.name == name) + named(root.child_runs, name))]


@pytest.fixture
def reranker(stub: Stub) -> RegoloRerank:
    """A reranker that keeps two documents and does not retry."""
    return RegoloRerank(KEY, base_url=stub.url, prompt_format="plain", max_retries=0, top_n=2)


@pytest.fixture
def step(reranker: RegoloRerank) -> Step:
    """The same as a step."""
    return reranker.as_runnable()


def test_a_step_is_named_after_its_reranker() -> None:
    """A subclass's step has the subclass's name, as its runs have."""

    class Reordered(RegoloRerank):
        """A reranker of the caller's own."""

    assert Reordered(base_url="local://").as_runnable().get_name() == "Reordered"


FORMS: dict[str, Callable[[Step], Step]] = {
    "dict": lambda step: {"query": RunnablePassthrough[str](), "documents": Everything()} | step,
    "parallel": lambda step: RunnableParallel(query=RunnablePassthrough[str](), documents=Everything()) | step,
    "assign": lambda step: (
        RunnableParallel(query=RunnablePassthrough[str]())
        | RunnablePassthrough.assign(documents=itemgetter("query") | Everything())
        | step
    ),
    "retriever first": lambda step: Everything() | (lambda found: {"query": QUERY, "documents": found}) | step,
    "pick": lambda step: (
        RunnableParallel(query=RunnablePassthrough[str](), documents=Everything())
        | RunnablePassthrough.assign(documents=step).pick("documents")
    ),
}
"""Chains from a query to the documents that are kept."""

CALLS: dict[str, Callable[[Step], list[Any]]] = {
    "invoke": lambda chain: [chain.invoke(QUERY)],
    "ainvoke": lambda chain: [asyncio.run(chain.ainvoke(QUERY))],
    "batch": lambda chain: chain.batch([QUERY]),
    "abatch": lambda chain: asyncio.run(chain.abatch([QUERY])),
    "stream": lambda chain: list(chain.stream(QUERY)),
    "astream": lambda chain: asyncio.run(collected(chain.astream(QUERY))),
    "transform": lambda chain: list(chain.transform(iter([QUERY]))),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=list(FORMS))
@pytest.mark.parametrize("call", CALLS.values(), ids=list(CALLS))
def test_a_chain_reranks_what_its_retriever_found(
    form: Callable[[Step], Step], call: Callable[[Step], list[Any]], step: Step, stub: Stub
) -> None:
    """Each form of a chain, called in each way, gives the best documents once, in one piece, for one request."""
    (kept,) = call(form(step))
    assert texts(kept) == BEST
    assert [request.json["query"] for request in stub.received] == [QUERY]


def test_a_step_waits_for_its_input_in_a_stream(mode: str, step: Step, stub: Stub) -> None:
    """Of an input that comes in pieces, all is ranked together."""
    pieces = [AddableDict(query=QUERY), AddableDict(documents=documents()[:1]), AddableDict(documents=documents()[1:])]

    async def later() -> list[Any]:
        async def source() -> Any:
            for piece in pieces:
                yield piece

        return await collected(step.atransform(source()))

    (kept,) = list(step.transform(iter(pieces))) if mode == "sync" else asyncio.run(later())
    assert texts(kept) == BEST
    assert len(stub.received) == 1


def test_a_step_can_be_named_and_tagged(call: Call, step: Step) -> None:
    """Name, tags, metadata and id of a configuration are those of the rerank's run."""
    trace, run_id = RunCollectorCallbackHandler(), uuid.uuid4()
    tagged = step.with_config(run_name="second stage", tags=["rag"], metadata={"tenant": "x"}, callbacks=[trace])
    call(tagged.invoke, candidates(), {"tags": ["now"], "run_id": run_id})
    (traced,) = trace.traced_runs
    assert (traced.name, traced.id, sorted(traced.tags or [])) == ("second stage", run_id, ["now", "rag"])
    assert traced.extra["metadata"]["tenant"] == "x"


def test_a_step_is_tried_again(call: Call, step: Step, stub: Stub) -> None:
    """`with_retry` sends again after the errors that it names, and after no others."""
    patient = step.with_retry(
        retry_if_exception_type=(RateLimitError,), wait_exponential_jitter=False, stop_after_attempt=2
    )
    stub.script(error("too many requests", 429))
    trace = RunCollectorCallbackHandler()
    assert texts(call(patient.invoke, candidates(), {"callbacks": [trace]})) == BEST
    (around,) = trace.traced_runs
    assert tree(around) == {"RegoloRerank": ["RegoloRerank", "RegoloRerank"]}
    assert ["RateLimitError" in str(attempt.error) for attempt in around.child_runs] == [True, False]
    stub.script(error("down", 500))
    with pytest.raises(ServerError):
        call(patient.invoke, candidates())
    assert len(stub.received) == 3


def test_a_step_can_have_a_stand_in(call: Call, step: Step, stub: Stub) -> None:
    """`with_fallbacks` gives what the next runnable makes of the same input, and the trace shows both."""
    stub.always(error("down", 500))
    safe = step.with_fallbacks([RunnableLambda(first_two)])
    trace = RunCollectorCallbackHandler()
    assert call(safe.invoke, candidates(), {"callbacks": [trace]}) == documents()[:2]
    runs = [(traced.name, "ServerError" in str(traced.error)) for traced in trace.traced_runs]
    assert runs == [("RegoloRerank", True), ("first_two", False), ("RunnableWithFallbacks", False)]


def test_a_stand_in_can_be_for_some_errors_only(call: Call, step: Step, stub: Stub) -> None:
    """A wrong key is raised past a stand-in for failures of the service."""
    stub.always(error("no such key", 401))
    safe = step.with_fallbacks([RunnableLambda(first_two)], exceptions_to_handle=(ServerError, RateLimitError))
    with pytest.raises(AuthenticationError):
        call(safe.invoke, candidates())


def batched(step: Step, call: Call, **arguments: Any) -> list[Any]:
    """Rerank for eight queries, of which the fourth fails."""
    given = [candidates(f"query {number}") for number in range(8)]
    return call(step.batch, given, **arguments)


def failing_for_the_fourth(request: Received) -> Reply:
    """Answer as the service does, slowly, and fail for one query."""
    if request.json["query"] == "query 3":
        return error("no such key", 401)
    return Reply(scored(request).body, delay=0.05)


def test_a_batch_keeps_its_order_and_its_errors(call: Call, step: Step, stub: Stub) -> None:
    """With `return_exceptions`, an error stands in the place of its input; without, it is raised."""
    stub.reply = failing_for_the_fourth
    outcomes = batched(step, call, return_exceptions=True)
    assert isinstance(outcomes.pop(3), AuthenticationError)
    assert [texts(kept) for kept in outcomes] == [BEST] * 7
    with pytest.raises(AuthenticationError):
        batched(step, call)


@pytest.mark.parametrize("most", [1, 3])
def test_a_batch_keeps_to_its_concurrency(call: Call, step: Step, stub: Stub, most: int) -> None:
    """No more inputs than `max_concurrency` are under way at once, and as many as that."""
    stub.reply = failing_for_the_fourth
    batched(step, call, config={"max_concurrency": most}, return_exceptions=True)
    assert stub.most_at_once == most


def test_a_batch_traces_each_input(call: Call, step: Step) -> None:
    """Every input of a batch is a run of its own, with its own query."""
    trace = RunCollectorCallbackHandler()
    batched(step, call, config={"callbacks": [trace]})
    queries = sorted(found.inputs["query"] for found in named(trace.traced_runs, "RegoloRerank"))
    assert queries == [f"query {number}" for number in range(8)]


def test_a_step_says_what_it_takes_and_gives(step: Step) -> None:
    """Its schemas accept what it takes and gives and refuse other things, and a graph shows it by its name."""
    takes: Any = step.get_input_schema()
    gives: Any = step.get_output_schema()
    assert takes.model_json_schema()["required"] == ["query", "documents"]
    assert takes.model_validate(candidates()).model_dump()["query"] == QUERY
    for wrong in ({"query": QUERY}, {"query": QUERY, "documents": ["a"]}, QUERY):
        with pytest.raises(ValidationError):
            takes.model_validate(wrong)
    assert gives.model_validate(documents()).model_dump() == [document.model_dump() for document in documents()]
    with pytest.raises(ValidationError):
        gives.model_validate(["a"])
    assert (step.get_name(), takes.__name__, gives.__name__) == (
        "RegoloRerank",
        "RegoloRerankInput",
        "RegoloRerankOutput",
    )
    assert "RegoloRerank" in {node.name for node in FORMS["dict"](step).get_graph().nodes.values()}


ARGUMENTS: dict[str, Any] = {
    "top_n": 1,
    "model": "other",
    "instruction": "Find it",
    "score_threshold": 0.6,
    "extra_body": {"user": "me"},
}
"""What a step takes for one call."""

GIVEN: dict[str, Callable[[Any, dict[str, Any]], Step]] = {
    "bind": lambda step, arguments: step.bind(**arguments),
    "configurable": lambda step, arguments: step.configurable_fields(
        **{name: ConfigurableField(id=f"my_{name}") for name in arguments}
    ).with_config(configurable={f"my_{name}": value for name, value in arguments.items()}),
}
"""Ways to give it to all calls of a chain; `invoke` takes it too."""


@pytest.mark.parametrize("way", ["invoke", *GIVEN])
@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_step_takes_the_arguments_of_one_call(
    call: Call, reranker: RegoloRerank, stub: Stub, way: str, name: str
) -> None:
    """Each does for a call what the option does, in the trace too, and the reranker keeps its own."""
    reranker.prompt_format = "tagged"
    before, arguments, trace = reranker.model_dump(), {name: ARGUMENTS[name]}, RunCollectorCallbackHandler()
    step: Any = reranker.as_runnable()
    config: RunnableConfig = {"callbacks": [trace]}
    if way == "invoke":
        kept = call(step.invoke, candidates(), config, **arguments)
    else:
        kept = call(GIVEN[way](step, arguments).invoke, candidates(), config)
    assert texts(kept) == (BEST[:1] if name in {"top_n", "score_threshold"} else BEST)
    call(reranker.model_copy(update=arguments).compress_documents, documents(), QUERY)
    assert stub.received[0].body == stub.received[1].body
    (traced,) = named(trace.traced_runs, "RegoloRerank")
    assert (traced.inputs["model"], traced.inputs["top_n"]) == (
        arguments.get("model", reranker.model),
        arguments.get("top_n", 2),
    )
    assert reranker.model_dump() == before


def test_an_argument_of_one_call_stands_before_a_configured_one(call: Call, step: Step) -> None:
    """What `invoke` is given counts, else what is configured, else the option; None is nothing given."""
    configured = cast("Any", step).configurable_fields(top_n=ConfigurableField(id="n"))
    for given, kept in (({"top_n": 3}, 3), ({"top_n": None}, 1)):
        assert len(call(configured.invoke, candidates(), {"configurable": {"n": 1}}, **given)) == kept
    assert len(call(configured.invoke, candidates())) == 2


def test_an_argument_of_one_call_counts_for_a_fallback(call: Call, reranker: RegoloRerank, stub: Stub) -> None:
    """Where the service fails, the first `top_n` of the call come back."""
    reranker.on_error = "return_input"
    stub.always(error("down", 500))
    with pytest.warns(RerankFallbackWarning):
        assert call(cast("Step", reranker.as_runnable()).invoke, candidates(), top_n=1) == documents()[:1]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"batch_size": 5}, "batch_size: no argument of a call, which are top_n, model, .*; set other options on the"),
        ({"top_n": 0}, "top_n: "),
        ({"top_n": "many"}, "top_n: .*got str"),
    ],
)
def test_a_step_refuses_other_arguments(
    call: Call, step: Step, stub: Stub, arguments: dict[str, Any], problem: str
) -> None:
    """What would have no effect, and what is wrong, is an error of ours that names it."""
    for way in (step.bind(**arguments), *([GIVEN["configurable"](step, arguments)] if "top_n" in arguments else [])):
        with pytest.raises(InvalidInputError, match=problem):
            call(way.invoke, candidates())
    assert stub.received == []


def test_a_step_can_be_exchanged_by_configuration(call: Call, step: Step, stub: Stub) -> None:
    """`configurable_alternatives` puts another runnable in its place for a call, without a request."""
    choice = cast("Any", step).configurable_alternatives(
        ConfigurableField(id="ranker"), default_key="regolo", none=RunnableLambda(first_two)
    )
    assert call(choice.invoke, candidates(), {"configurable": {"ranker": "none"}}) == documents()[:2]
    assert stub.received == []
    assert texts(call(choice.invoke, candidates())) == BEST


@pytest.mark.parametrize(
    ("given", "got"),
    [
        ({"question": QUERY, "documents": []}, r"got the keys 'question', 'documents'; as_runnable\(query_key=..., "),
        ({}, "got dict"),
        (QUERY, "got str"),
    ],
)
def test_a_step_names_the_keys_that_it_got(call: Call, step: Step, given: Any, got: str) -> None:
    """An input without the keys that it takes is an error with both, and with the way to others; no value is shown."""
    with pytest.raises(InvalidInputError, match=got) as caught:
        call(step.invoke, given)
    assert "the runnable takes {'query': ..., 'documents': ...}" in str(caught.value)
    assert QUERY not in str(caught.value)


def test_a_step_takes_the_keys_of_its_chain(call: Call, reranker: RegoloRerank) -> None:
    """A chain's question and context go in as they are, and the schema says so."""
    step: Any = reranker.as_runnable(query_key="question", documents_key="context")
    chain: Step = {"question": RunnablePassthrough[str](), "context": Everything()} | RunnablePassthrough.assign(
        context=step
    )
    assert texts(call(chain.invoke, QUERY)["context"]) == BEST
    assert step.get_input_schema().model_json_schema()["required"] == ["question", "context"]
    with pytest.raises(
        InvalidInputError, match=r"the runnable takes \{'question': ..., 'context': ...\}, got the keys"
    ):
        call(step.invoke, candidates())


def test_a_step_can_be_pickled(call: Call, step: Step, monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes to another process with its options, and finds its key in the environment there."""
    monkeypatch.setenv("REGOLO_API_KEY", KEY)
    assert texts(call(pickle.loads(pickle.dumps(step)).invoke, candidates())) == BEST  # noqa: S301 - our own


def test_events_of_a_stream_tell_of_the_rerank(step: Step) -> None:
    """`astream_events` has its start and its end, by name, with what came in and what it took."""
    chain = FORMS["dict"](step)
    told = [
        event
        for event in asyncio.run(collected(chain.astream_events(QUERY, version="v2")))
        if event["name"] == "RegoloRerank"
    ]
    assert [event["event"] for event in told] == ["on_chain_start", "on_chain_end"]
    assert told[0]["data"]["input"]["query"] == QUERY
    assert texts(told[-1]["data"]["output"]["documents"]) == BEST
    assert told[-1]["data"]["output"]["usage"]["requests"] == 1


def test_a_compression_retriever_in_a_chain_traces_as_one_tree(call: Call, reranker: RegoloRerank) -> None:
    """Callbacks of the chain's configuration reach the rerank in a retriever in a chain."""
    retriever = ContextualCompressionRetriever(base_compressor=reranker, base_retriever=Everything())
    trace = RunCollectorCallbackHandler()
    assert call((retriever | RunnableLambda(texts)).invoke, QUERY, {"callbacks": [trace], "tags": ["rag"]}) == BEST
    (root,) = trace.traced_runs
    assert tree(root) == {
        "RunnableSequence": [{"ContextualCompressionRetriever": ["Everything", "RegoloRerank"]}, "texts"]
    }
    assert "rag" in (named([root], "RegoloRerank")[0].tags or [])


def test_a_step_called_by_a_function_nests_below_it(call: Call, step: Step) -> None:
    """A configuration that is handed on, and one that is not, both lead to a run below the function's."""

    def around(query: str, config: RunnableConfig) -> list[Document]:
        kept: list[Document] = step.invoke(candidates(query), config)
        assert kept == step.invoke(candidates(query))
        return kept

    async def aaround(query: str, config: RunnableConfig) -> list[Document]:
        kept: list[Document] = await step.ainvoke(candidates(query), config)
        assert kept == await step.ainvoke(candidates(query))
        return kept

    trace = RunCollectorCallbackHandler()
    function: Step = RunnableLambda(around, aaround)
    call(function.invoke, QUERY, {"callbacks": [trace]})
    assert [tree(root) for root in trace.traced_runs] == [{"around": ["RegoloRerank", "RegoloRerank"]}]


# --- LangGraph --------------------------------------------------------------------------------------------------------


def function_node(reranker: RegoloRerank, mode: str) -> Any:
    """Return a node in the form of LangGraph's documentation: a function from the state to what changes in it."""

    def rerank(state: State) -> State:
        return {"documents": reranker.compress_documents(state["documents"], state["query"])}

    async def arerank(state: State) -> State:
        return {"documents": await reranker.acompress_documents(state["documents"], state["query"])}

    return rerank if mode == "sync" else arerank


def step_node(reranker: RegoloRerank, _: str) -> Any:
    """Return the same as a runnable, which is sync and async in one."""
    return RunnableParallel(documents=reranker.as_runnable())


@pytest.mark.parametrize(
    ("node", "above"),
    [(function_node, "RegoloRerank"), (step_node, {"RunnableParallel<documents>": ["RegoloRerank"]})],
    ids=["function", "step"],
)
def test_a_graph_reranks_what_its_retrieving_node_found(
    mode: str, call: Call, reranker: RegoloRerank, stub: Stub, node: Callable[[RegoloRerank, str], Any], above: Any
) -> None:
    """A node that reranks puts the best documents into the state, and its run nests below the graph's."""

    def retrieve(state: State) -> State:
        return {"documents": Everything().invoke(state["query"])}

    def answer(state: State) -> State:
        return {"answer": " ".join(texts(state["documents"]))}

    graph = StateGraph(State)
    graph.add_node("retrieve", retrieve)
    graph.add_node("rerank", node(reranker, mode))
    graph.add_node("answer", answer)
    graph.add_edge(START, "retrieve")
    graph.add_edge("retrieve", "rerank")
    graph.add_edge("rerank", "answer")
    trace, compiled = RunCollectorCallbackHandler(), cast("Step", graph.compile())
    state = call(compiled.invoke, {"query": QUERY}, {"callbacks": [trace]})
    assert (state["answer"], texts(state["documents"])) == ("b score=0.9 c score=0.5", BEST)
    assert [request.json["query"] for request in stub.received] == [QUERY]
    (root,) = trace.traced_runs
    assert tree(root) == {"LangGraph": [{"retrieve": ["Everything"]}, {"rerank": [above]}, "answer"]}
    (traced,) = named([root], "RegoloRerank")
    assert (traced.outputs or {})["scores"] == [0.9, 0.5]


def test_a_failed_rerank_fails_its_graph(mode: str, call: Call, reranker: RegoloRerank, stub: Stub) -> None:
    """The error of a node's rerank is the graph's, and of the package's own class."""
    stub.always(error("no such key", 401))
    graph = StateGraph(State)
    graph.add_node("rerank", function_node(reranker, mode))
    graph.add_edge(START, "rerank")
    trace, compiled = RunCollectorCallbackHandler(), cast("Step", graph.compile())
    with pytest.raises(AuthenticationError):
        call(compiled.invoke, candidates(), {"callbacks": [trace]})
    assert ["AuthenticationError" in str(found.error) for found in named(trace.traced_runs, "RegoloRerank")] == [True]
