import re
import socket
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any, NoReturn

import pytest

from regolo_rerank import RegoloClient
from regolo_rerank._cli.demo import QUESTIONS, keyword_search, standard_library
from regolo_rerank._cli.main import main
from tests.conftest import KEY
from tests.support.stub import Stub, error

FRAMEWORKS = ["LangChain", "LlamaIndex"]


@pytest.fixture(scope="module")
def documents() -> dict[str, str]:
    """The documents that the demo ranks."""
    return standard_library()


@pytest.fixture
def at_stub(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> Stub:
    """The stub server, set up in the environment as a user would, with a key."""
    monkeypatch.setenv("REGOLO_API_KEY", KEY)
    monkeypatch.setenv("REGOLO_BASE_URL", stub.url)
    return stub


def shown(output: str, question: str) -> tuple[list[str], dict[str, list[tuple[str, str, str]]]]:
    """Return what the demo shows for a question: its candidates, and (score, way, module) by framework."""
    block = output.partition(f"\n{question}\n")[2].partition("\n\n")[0]
    keywords, *rankings = re.split(rf"^  (?:{'|'.join(FRAMEWORKS)}) ", block, flags=re.MULTILINE)
    line = re.compile(r"^ +\d\. (\d\.\d{4})  ((?:up|down) \d|stays) +(\w+):", re.MULTILINE)
    return re.findall(r"\d+\.(\w+)", keywords), dict(zip(FRAMEWORKS, map(line.findall, rankings), strict=True))


def assert_ranked(out: str, documents: dict[str, str], **options: Any) -> None:
    """Assert that both frameworks rank each question's candidates as the client does."""
    with RegoloClient(**options) as client:
        for question in QUESTIONS:
            candidates, rankings = shown(out, question)
            assert candidates == list(keyword_search(question, documents))
            results = client.rerank(question, [documents[name] for name in candidates], top_n=3).results
            moves = [result.index - place for place, result in enumerate(results)]
            expected = [
                (
                    f"{result.relevance_score:.4f}",
                    f"{'up' if move > 0 else 'down'} {abs(move)}" if move else "stays",
                    candidates[result.index],
                )
                for result, move in zip(results, moves, strict=True)
            ]
            assert rankings == dict.fromkeys(FRAMEWORKS, expected)


@pytest.mark.parametrize("width", [20, 80, 120])
def test_without_a_key_the_demo_scores_on_this_machine_and_says_so(
    width: int, documents: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first line names the scorer, both frameworks rank each question as the client does, and nothing is sent."""

    def no_network(*_: Any) -> NoReturn:
        pytest.fail("the demo uses the network")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setenv("COLUMNS", str(width))
    assert main(["demo"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith("Using the embedded lexical scorer (local://): it compares words, not meanings.\n")
    assert len(out.splitlines()) < 100
    assert max(map(len, out.splitlines())) <= max(80, min(width, 100))
    assert_ranked(out, documents, base_url="local://")


def test_the_frameworks_add_nothing_to_the_output() -> None:
    """As a process of its own, where nobody catches logs and warnings, standard error stays empty."""
    arguments = [sys.executable, "-m", "regolo_rerank", "demo"]
    ended = subprocess.run(arguments, capture_output=True, text=True, encoding="utf-8", check=True)  # noqa: S603 - our own command
    assert ended.stderr == ""
    assert ended.stdout.startswith("Using the embedded lexical scorer")


def test_with_a_key_the_demo_asks_the_service(
    at_stub: Stub, documents: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Its first line names model and host, and each framework sends each question with the key."""
    assert main(["demo"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith("Reranking with Qwen3-Reranker-4B at 127.0.0.1.\n")
    assert {request.headers["authorization"] for request in at_stub.received} == {f"Bearer {KEY}"}
    agents = [request.headers["user-agent"].split()[1].partition("/")[0] for request in at_stub.received]
    assert agents == ["langchain-core", "llama-index-core"] * len(QUESTIONS)
    assert_ranked(out, documents)


def test_the_demo_asks_a_server_that_needs_no_key(
    stub: Stub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`REGOLO_BASE_URL` alone is enough to leave the embedded scorer."""
    monkeypatch.setenv("REGOLO_BASE_URL", stub.url)
    assert main(["demo"]) == 0
    assert capsys.readouterr().out.startswith("Reranking with")
    assert stub.received


def test_a_failure_of_the_service_ends_the_demo_in_one_line(at_stub: Stub, capsys: pytest.CaptureFixture[str]) -> None:
    """No framework adds its own words to an error."""
    at_stub.always(error("no", 401))
    assert main(["demo"]) == 1
    advice = "check the API key: api_key, or the environment variable REGOLO_API_KEY"
    assert capsys.readouterr().err == f"regolo-rerank: no [HTTP 401]; {advice}\n"


@pytest.mark.parametrize("missing", ["langchain_classic", "llama_index.core", "llama_index", "langchain_core"])
def test_a_missing_framework_is_one_line_and_status_2(
    missing: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line says what to install."""
    for name in list(sys.modules):
        if name == "regolo_rerank._cli.demo" or name.startswith(f"{missing}."):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    assert main(["demo"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert 'pip install "regolo_rerank[demo]"' in err


def test_the_standard_library_is_read_and_not_run() -> None:
    """There is a document for each documented public module, and no module is imported for it."""
    before = set(sys.modules)
    documents = standard_library.__wrapped__()
    assert set(sys.modules) == before
    assert len(documents) > 100
    assert documents["shelve"].startswith("shelve: Manage shelves of pickled objects.")
    assert not [name for name in documents if name.startswith("_")]


def test_what_cannot_be_read_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that is private, damaged, undocumented or absent is no document, and does no harm."""
    for name, source in {
        "abc": b'"""Kept."""',
        "json/__init__": b'# coding: latin-1\n"""caf\xe9"""',
        "_pyio": b'"""Private."""',
        "ast": b'"""Cut',
        "bz2": b'"""\xff"""',
        "cmd": b"x = 1",
        "mine": b'"""No module of the standard library."""',
    }.items():
        file = tmp_path / f"{name}.py"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(source)
    (tmp_path / "dis").mkdir()
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    assert standard_library.__wrapped__() == {"abc": "abc: Kept.", "json": "json: café"}


def test_keyword_search_counts_rare_words_for_more() -> None:
    """The rarest shared words win, equals stay in order, and what shares only short words is not found."""
    documents = {"a": "How to open it", "b": "open FILES", "c": "open shelves", "d": "files", "e": "open files again"}
    assert list(keyword_search("how to open shelves, files?", documents)) == ["c", "b", "e", "d", "a"]
    assert keyword_search("how to", documents) == {}
    assert len(keyword_search("open", {str(number): "open" for number in range(20)})) == 10
