"""Where an error of a call ends: at its caller's line, with one or two lines of ours below it."""

import asyncio
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from langchain_core.documents import Document
from llama_index.core.schema import NodeWithScore, TextNode
from pydantic import ValidationError

import regolo_rerank
from regolo_rerank import RegoloClient, RegoloError
from regolo_rerank.langchain import RegoloRerank as LangChainRerank
from regolo_rerank.llama_index import RegoloRerank as LlamaIndexRerank
from tests.conftest import KEY
from tests.support.modes import Call
from tests.support.stub import Stub, error
from tests.support.traces import Handler

OURS = str(Path(regolo_rerank.__file__).parent)
DOCUMENTS = [Document("a"), Document("b")]
NODES = [NodeWithScore(node=TextNode(text="a")), NodeWithScore(node=TextNode(text="b"))]


def frames_of(failure: BaseException) -> list[str]:
    """Return the files of the frames that a failure shows, and those of what it comes from."""
    shown = [frame.filename for frame in traceback.extract_tb(failure.__traceback__)]
    below = failure.__cause__ or (None if failure.__suppress_context__ else failure.__context__)
    return shown + (frames_of(below) if below is not None else [])


Use = Callable[[Call, dict[str, Any]], Any]


async def _all(rankings: Any) -> list[Any]:
    return [ranking async for ranking in rankings]


def _many(call: Call, options: dict[str, Any], pairs: Any, **arguments: Any) -> Any:
    client = RegoloClient(**options)
    if call.mode == "sync":
        return list(client.rerank_many(pairs, **arguments))

    async def main() -> list[Any]:
        return await _all(client.arerank_many(pairs, **arguments))

    return asyncio.run(main())


def _step(options: dict[str, Any]) -> Any:
    return LangChainRerank(**options).as_runnable()


bad: Any = [5]

CALLS: dict[str, Use] = {
    "one request": lambda call, options: call(RegoloClient(**options).rerank, "q", ["a"]),
    "several requests": lambda call, options: call(RegoloClient(**options, batch_size=1).rerank, "q", ["a", "b"]),
    "many queries": lambda call, options: _many(call, options, [("q", ["a"])]),
    "compressor": lambda call, options: call(LangChainRerank(**options).compress_documents, DOCUMENTS, "q"),
    "traced": lambda call, options: call(LangChainRerank(**options).compress_documents, DOCUMENTS, "q", [Handler()]),
    "rerank of LangChain": lambda call, options: call(LangChainRerank(**options).rerank, DOCUMENTS, "q"),
    "step": lambda call, options: call(_step(options).invoke, {"query": "q", "documents": DOCUMENTS}),
    "postprocessor": lambda call, options: call(LlamaIndexRerank(**options).postprocess_nodes, NODES, query_str="q"),
}
"""Calls whose reply is a failure."""

MISTAKES: dict[str, Use] = {
    "blank query": lambda call, options: call(RegoloClient(**options).rerank, " ", ["a"]),
    "top_n": lambda call, options: call(RegoloClient(**options).rerank, "q", ["a"], top_n=0),
    "top_n of many": lambda call, options: _many(call, options, [], top_n=0),
    "pair": lambda call, options: _many(call, options, [("q", ["a"], 1)]),
    "pairs": lambda call, options: _many(call, options, 5),
    "document": lambda call, options: call(LangChainRerank(**options).compress_documents, bad, "q"),
    "document of LangChain": lambda call, options: call(LangChainRerank(**options).rerank, bad, "q"),
    "no query": lambda call, options: call(LlamaIndexRerank(**options).postprocess_nodes, NODES),
    "keys": lambda call, options: call(_step(options).invoke, {}),
    "argument": lambda call, options: call(_step(options).invoke, {"query": "q", "documents": []}, nonsense=1),
}
"""Calls that are refused."""


def ours_in(call: Call, use: Use, **options: Any) -> list[str]:
    """Return the frames of ours in the error of a call, which follow on the caller's."""
    with pytest.raises(RegoloError) as caught:
        use(call, {"api_key": KEY, "max_retries": 0, **options})
    frames = frames_of(caught.value)
    assert frames[0] == __file__
    return [frame for frame in frames if frame.startswith(OURS)]


@pytest.mark.parametrize("use", CALLS.values(), ids=list(CALLS))
def test_a_failure_of_the_service_shows_two_frames_at_most(call: Call, stub: Stub, use: Use) -> None:
    """A refusal, and a connection that fails, whose cause is told without frames."""
    stub.always(error("no such key", 401))
    assert 1 <= len(ours_in(call, use, base_url=stub.url)) <= 2
    assert 1 <= len(ours_in(call, use, base_url="http://127.0.0.1:9")) <= 2


@pytest.mark.parametrize("use", MISTAKES.values(), ids=list(MISTAKES))
def test_a_mistake_shows_two_frames_at_most(call: Call, use: Use) -> None:
    """So does what is refused before anything is sent, and a missing key."""
    assert 1 <= len(ours_in(call, use, base_url="http://127.0.0.1:9")) <= 2


@pytest.mark.parametrize("use", CALLS.values(), ids=list(CALLS))
def test_a_missing_key_shows_two_frames_at_most(call: Call, use: Use) -> None:
    """It is found out before the first request."""
    assert 1 <= len(ours_in(call, use, api_key=None, base_url="https://api.regolo.ai")) <= 2


def test_what_the_callers_own_code_raises_keeps_its_frames(call: Call) -> None:
    """An error that is none of ours shows where it comes from, in the caller's own iterable too."""

    def pairs() -> Any:
        yield 1 / 0, ["a"]

    with pytest.raises(ZeroDivisionError) as caught:
        _many(call, {"base_url": "local://"}, pairs())
    assert traceback.extract_tb(caught.value.__traceback__)[-1].name == "pairs"


@pytest.mark.parametrize("mode_of_errors", ["Context", "Verbose"])
def test_a_notebook_shows_every_frame_in_full(
    stub: Stub, mode_of_errors: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """IPython can show the arguments of each frame that is left, of which none is the key, or what was mistyped."""
    ipython: Any = pytest.importorskip("IPython.core.interactiveshell", reason="part of the extra [dev]")
    stub.always(error("no such key", 401))
    shell: Any = ipython.InteractiveShell.instance()
    shell.run_line_magic("colors", "nocolor")
    shell.run_line_magic("xmode", mode_of_errors)
    client = RegoloClient(KEY, base_url=stub.url)
    shell.push({"RegoloClient": RegoloClient, "client": client})
    key = f"{KEY[:5]!r} {KEY[5:]!r}"  # so that the cell itself does not show it
    cells = {
        "client.rerank('q', ['a'])": "AuthenticationError",
        "await client.arerank('q', ['a'])": "AuthenticationError",
        "list(client.rerank_many([('q', ['a'])]))": "AuthenticationError",
        f"RegoloClient(apikey={key})": ValidationError.__name__,
        f"client.apikey = {key}": ValidationError.__name__,
        f"client.model_copy(update={{'apikey': {key}}})": ValidationError.__name__,
    }
    for cell, name in cells.items():
        capsys.readouterr()
        shell.run_cell(cell)
        shown = capsys.readouterr().out
        assert name in shown
        assert cell in shown
        assert 1 <= shown.count(OURS) <= 2
        assert "failed resolving arguments" not in shown
        assert KEY not in shown
