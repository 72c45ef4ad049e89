"""The reranker as a step of LCEL chains and LangGraph graphs, with options of one call."""

import asyncio
import pickle
import uuid
from collections.abc import Callable
from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_core.load import dumps
from langchain_core.runnables import (
    ConfigurableField,
    Runnable,
    RunnableConfig,
    RunnableLambda,
    RunnableParallel,
    RunnablePassthrough,
)
from langchain_core.tracers.run_collector import RunCollectorCallbackHandler
from pydantic import SecretStr, ValidationError

from regolo_rerank import InvalidInputError
from regolo_rerank.langchain import RegoloRerank
from tests.adapters.helpers import BEST, QUERY, Everything, documents, runs_in, texts_of, tree
from tests.conftest import KEY
from tests.support.modes import Call
from tests.support.stub import Stub

Step = Runnable[Any, Any]


class TopOne(RegoloRerank):
    """A subclass that returns the best document only, renamed."""

    def compress_documents(self, documents: Any, query: str, callbacks: Any = None) -> list[Document]:
        return [
            Document("sync " + kept.page_content)
            for kept in super().compress_documents(documents, query, callbacks)[:1]
        ]

    async def acompress_documents(self, documents: Any, query: str, callbacks: Any = None) -> list[Document]:
        kept = await super().acompress_documents(documents, query, callbacks)
        return [Document("async " + document.page_content) for document in kept[:1]]


def candidates(query: str = QUERY) -> dict[str, Any]:
    """Return the input of a step."""
    return {"query": query, "documents": documents()}


async def collected(chunks: Any) -> list[Any]:
    """Return all items of an async iterator."""
    return [chunk async for chunk in chunks]


@pytest.fixture
def step(langchain: RegoloRerank) -> Any:
    """The reranker as a step."""
    return langchain.as_runnable()


FORMS: dict[str, Callable[[Any], Any]] = {
    "dict": lambda step: {"query": RunnablePassthrough(), "documents": Everything()} | step,
    "pick": lambda step: (
        RunnableParallel(query=RunnablePassthrough(), documents=Everything())
        | RunnablePassthrough.assign(documents=step).pick("documents")
    ),
}
"""Chains from a query to the documents that are kept."""

CALLS: dict[str, Callable[[Any], list[Any]]] = {
    "invoke": lambda chain: [chain.invoke(QUERY)],
    "ainvoke": lambda chain: [asyncio.run(chain.ainvoke(QUERY))],
    "batch": lambda chain: chain.batch([QUERY]),
    "abatch": lambda chain: asyncio.run(chain.abatch([QUERY])),
    "stream": lambda chain: list(chain.stream(QUERY)),
    "astream": lambda chain: asyncio.run(collected(chain.astream(QUERY))),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=list(FORMS))
@pytest.mark.parametrize("call", CALLS.values(), ids=list(CALLS))
def test_a_chain_reranks_what_its_retriever_found(
    form: Callable[[Any], Any], call: Callable[[Any], list[Any]], step: Any, stub: Stub
) -> None:
    """Each form of a chain, called in each way, returns the best documents in one piece, for one request."""
    (kept,) = call(form(step))
    assert texts_of(kept) == BEST
    assert [request.json["query"] for request in stub.received] == [QUERY]


def test_a_step_has_the_name_tags_and_id_of_its_configuration(call: Call, step: Any) -> None:
    """They are those of the rerank's run, which is the only run of a step."""
    trace, run_id = RunCollectorCallbackHandler(), uuid.uuid4()
    tagged = step.with_config(run_name="second stage", tags=["rag"], metadata={"tenant": "x"}, callbacks=[trace])
    call(tagged.invoke, candidates(), {"tags": ["now"], "run_id": run_id})
    (run,) = trace.traced_runs
    assert run.id == run_id
    assert (tree(run), sorted(run.tags or []), run.extra["metadata"]["tenant"]) == ("second stage", ["now", "rag"], "x")


def test_a_step_describes_its_input(langchain: RegoloRerank) -> None:
    """Its schema accepts what it accepts, and a graph shows it by the name of its class."""
    step: Any = TopOne(base_url="local://").as_runnable(query_key="question", documents_key="context")
    schema = step.get_input_schema()
    assert schema.model_json_schema()["required"] == ["question", "context"]
    schema.model_validate({"question": QUERY, "context": documents()})
    with pytest.raises(ValidationError):
        schema.model_validate({"question": QUERY, "context": ["a"]})
    assert (step.get_name(), schema.__name__) == ("TopOne", "TopOneInput")
    chain = FORMS["dict"](langchain.as_runnable())
    assert "RegoloRerank" in {node.name for node in chain.get_graph().nodes.values()}


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (
            {"question": QUERY, "documents": []},
            r"got the keys 'question', 'documents'\. .*as_runnable\(query_key=..., ",
        ),
        (QUERY, "got str"),
        ({"query": QUERY, "documents": ["a"]}, r"documents\[0\]: must be a Document, got str"),
    ],
)
def test_a_step_rejects_other_input(call: Call, step: Any, stub: Stub, given: Any, problem: str) -> None:
    """The error lists the keys that it found, and never their values."""
    with pytest.raises(InvalidInputError, match=problem) as rejected:
        call(step.invoke, given)
    assert QUERY not in str(rejected.value)
    assert stub.received == []


def test_a_step_accepts_other_keys(call: Call, langchain: RegoloRerank) -> None:
    """A chain's question and context need no renaming."""
    step: Any = langchain.as_runnable(query_key="question", documents_key="context")
    assert texts_of(call(step.invoke, {"question": QUERY, "context": documents(), "more": 1})) == BEST


def test_a_subclass_counts(call: Call, stub: Stub) -> None:
    """A step calls the public method, so a subclass's own `compress_documents` is not passed over."""
    step: Any = TopOne(api_key=KEY, base_url=stub.url).as_runnable()
    assert texts_of(call(step.invoke, candidates())) == [f"{call.mode} b score=0.9"]
    assert texts_of(call(step.invoke, candidates(), model="other")) == [f"{call.mode} b score=0.9"]


# --- options of one call ----------------------------------------------------------------------------------------------

ARGUMENTS: dict[str, Any] = {
    "top_n": 1,
    "model": "other",
    "instruction": "Find it",
    "score_threshold": 0.6,
    "total_timeout": 7.0,
    "extra_body": {"user": "me"},
    "api_key": SecretStr("sk-one-call"),
}
"""The options of one call."""

WAYS: dict[str, Callable[[Any, dict[str, Any]], Any]] = {
    "bind": lambda step, arguments: step.bind(**arguments),
    "configurable": lambda step, arguments: step.configurable_fields(
        **{name: ConfigurableField(id=f"my_{name}") for name in arguments}
    ).with_config(configurable={f"my_{name}": value for name, value in arguments.items()}),
}
"""Ways to set them other than `invoke`."""


@pytest.mark.parametrize("way", ["invoke", *WAYS])
@pytest.mark.parametrize("name", ARGUMENTS)
def test_a_step_accepts_the_options_of_one_call(
    call: Call, langchain: RegoloRerank, stub: Stub, way: str, name: str
) -> None:
    """Each does for a call what the option does, in the trace too, and the reranker keeps its own."""
    langchain.prompt_format = "tagged"
    before, arguments, trace = langchain.model_dump(), {name: ARGUMENTS[name]}, RunCollectorCallbackHandler()
    step: Any = langchain.as_runnable()
    config: RunnableConfig = {"callbacks": [trace]}
    if way == "invoke":
        kept = call(step.invoke, candidates(), config, **arguments)
    else:
        kept = call(WAYS[way](step, arguments).invoke, candidates(), config)
    expected = call(langchain.with_options(**arguments).compress_documents, documents(), QUERY)
    assert kept == expected
    assert len(kept) == (1 if name in {"top_n", "score_threshold"} else 2)
    ours, same = stub.received
    assert (ours.body, ours.headers["authorization"]) == (same.body, same.headers["authorization"])
    assert ours.headers["authorization"] == ("Bearer sk-one-call" if name == "api_key" else f"Bearer {KEY}")
    (run,) = runs_in(trace.traced_runs)
    assert run.inputs["model"] == arguments.get("model", langchain.model)
    assert run.inputs["top_n"] == arguments.get("top_n", 2)
    assert langchain.model_dump() == before


def test_an_argument_replaces_a_configured_option(call: Call, step: Any) -> None:
    """The argument counts first, then the configured field, then the reranker's option. None counts as not given."""
    configured = step.configurable_fields(top_n=ConfigurableField(id="n"))
    for arguments, count in (({"top_n": 3}, 3), ({"top_n": None}, 1)):
        assert len(call(configured.invoke, candidates(), {"configurable": {"n": 1}}, **arguments)) == count
    assert len(call(configured.invoke, candidates())) == 2


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (
            {"batch_size": 5},
            r"batch_size: not an option of one call. Those are top_n, .*api_key.* with with_options\(\)",
        ),
        ({"top_n": 0}, "top_n: "),
        ({"top_n": "many"}, "top_n: .*got 'many'"),
        ({"api_key": "Bearer x"}, "api_key: must be the key itself"),
    ],
)
def test_a_step_rejects_other_arguments(
    call: Call, step: Any, stub: Stub, arguments: dict[str, Any], problem: str
) -> None:
    """An option without effect would be worse than an error. The error lists those that work."""
    with pytest.raises(InvalidInputError, match=problem):
        call(step.bind(**arguments).invoke, candidates())
    assert stub.received == []


@pytest.mark.parametrize("form", [dumps, repr, pickle.dumps, lambda step: step.get_graph().draw_mermaid()])
def test_no_form_of_a_step_shows_the_key(form: Callable[[Any], Any], step: Any) -> None:
    """A step, alone and in a chain, can be dumped, printed, pickled and drawn without the key.

    Only a pickle of `bind` has it, because LangChain pickles the arguments themselves.
    """
    of_one_call = step.model_copy(update={"api_key": SecretStr(KEY)})
    wrapped = [step, RunnablePassthrough() | step, step.with_retry(), of_one_call]
    if form is not pickle.dumps:
        wrapped.append(step.bind(api_key=SecretStr(KEY)))
    for shown in wrapped:
        assert "RegoloRerank" in str(form(shown))
        assert KEY not in str(form(shown))


# --- chains around it -------------------------------------------------------------------------------------------------


def test_stream_events_show_the_rerank(step: Any) -> None:
    """`astream_events` has its start and its end by name, with input, documents and usage."""
    chain = FORMS["dict"](step)
    seen = [
        event
        for event in asyncio.run(collected(chain.astream_events(QUERY, version="v2")))
        if event["name"] == "RegoloRerank"
    ]
    assert [event["event"] for event in seen] == ["on_chain_start", "on_chain_end"]
    assert seen[0]["data"]["input"]["query"] == QUERY
    assert texts_of(seen[1]["data"]["output"]["documents"]) == BEST
    assert seen[1]["data"]["output"]["usage"]["requests"] == 1


def test_a_rerank_in_a_function_nests_below_it(call: Call, langchain: RegoloRerank, step: Any) -> None:
    """A configuration that is passed on, and one that is not, both lead to a run below the function's."""

    def around(query: str, config: RunnableConfig) -> list[Document]:
        kept: list[Document] = step.invoke(candidates(query), config)
        assert kept == langchain.compress_documents(documents(), query)
        return kept

    async def aaround(query: str, config: RunnableConfig) -> list[Document]:
        kept: list[Document] = await step.ainvoke(candidates(query), config)
        assert kept == await langchain.acompress_documents(documents(), query)
        return kept

    trace = RunCollectorCallbackHandler()
    function: Step = RunnableLambda(around, aaround)
    call(function.invoke, QUERY, {"callbacks": [trace]})
    assert [tree(root) for root in trace.traced_runs] == [{"around": ["RegoloRerank", "RegoloRerank"]}]
