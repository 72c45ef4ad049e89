import json
from typing import Any

import pytest
from langchain_core.tracers.run_collector import RunCollectorCallbackHandler

from regolo_rerank import AuthenticationError, RerankFallbackWarning
from regolo_rerank.langchain import RegoloRerank as LangChainRerank
from tests.support.inside import break_run_outputs
from tests.support.stub import Stub, error
from tests.support.traces import (
    DOWN,
    FALLEN_BACK,
    QUERY,
    TOLD,
    AsyncHandler,
    Handler,
    Rerank,
    Way,
    documents,
    reranks_in,
    telling,
)


def test_a_run_tells_what_came_in_and_out_and_what_it_took(way: Way, langchain: LangChainRerank, stub: Stub) -> None:
    """Query, documents, model and top_n go in; documents, scores, ids and usage of all requests come out."""
    langchain.batch_size, stub.reply = 2, telling
    trace = RunCollectorCallbackHandler()
    kept = way(langchain, trace)
    (run,) = reranks_in(trace.traced_runs)
    assert (run.run_type, run.error) == ("chain", None)
    assert run.inputs == {"query": QUERY, "documents": documents(), "model": "Qwen3-Reranker-4B", "top_n": 2}
    assert run.outputs == {"documents": kept, "scores": [0.9, 0.5], **TOLD}
    json.dumps([run.outputs["scores"], {name: run.outputs[name] for name in TOLD}])


def test_a_handler_is_told_of_a_start_and_an_end(mode: str, rerank: Rerank, langchain: LangChainRerank) -> None:
    """A handler of either kind is told of one run, once of its start and once of its end."""
    handler = Handler() if mode == "sync" else AsyncHandler()
    kept = rerank(langchain, handler=handler)
    (started, run_id, inputs), (ended, same_id, outputs) = handler.told
    assert (started, ended, same_id) == ("start", "end", run_id)
    assert (inputs["query"], outputs["documents"]) == (QUERY, kept)


@pytest.mark.parametrize("on_error", ["raise", "return_input"])
def test_a_handler_is_told_of_an_error(way: Way, langchain: LangChainRerank, stub: Stub, on_error: Any) -> None:
    """A wrong key ends the run with the error that the caller gets, whatever `on_error` says, and with no output."""
    langchain.on_error = on_error
    stub.always(error("no such key", 401))
    handler, trace = Handler(), RunCollectorCallbackHandler()
    for listener in (handler, trace):
        with pytest.raises(AuthenticationError, match="no such key"):
            way(langchain, listener)
    errors = [told for what, _, told in handler.told if what == "error"]
    assert {type(told) for told in errors} == {AuthenticationError}
    (run,) = reranks_in(trace.traced_runs)
    assert "AuthenticationError" in str(run.error)
    assert not run.outputs


def test_a_fallback_shows_in_the_run(way: Way, langchain: LangChainRerank, stub: Stub) -> None:
    """A run that has fallen back ends well, and says so and why, with no score anywhere."""
    langchain.on_error = "return_input"
    stub.always(DOWN)
    trace = RunCollectorCallbackHandler()
    with pytest.warns(RerankFallbackWarning, match="down"):
        kept = way(langchain, trace)
    (run,) = reranks_in(trace.traced_runs)
    assert kept == documents()[:2]
    assert run.error is None
    assert run.outputs == {"documents": kept, "scores": None, **FALLEN_BACK}


def test_nothing_is_written_down_where_nobody_listens(
    way: Way, langchain: LangChainRerank, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a handler, a call does not even put together what it would tell one."""
    break_run_outputs(AssertionError(), monkeypatch)
    assert len(way(langchain)) == 2
    with pytest.raises(AssertionError):
        way(langchain, Handler())


def test_an_interrupted_call_ends_its_run(rerank: Rerank, langchain: LangChainRerank) -> None:
    """Ctrl-C leaves no run open: its error is the interruption."""

    def interrupted(query: str, documents: list[str]) -> list[float]:
        raise KeyboardInterrupt(query, documents)

    handler = Handler()
    langchain.base_url, langchain.scorer = "local://", interrupted
    with pytest.raises(KeyboardInterrupt):
        rerank(langchain, handler=handler)
    assert [(what, type(told)) for what, _, told in handler.told] == [("start", dict), ("error", KeyboardInterrupt)]
