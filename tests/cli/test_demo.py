import re
import socket
import subprocess
import sys
from typing import Any, NoReturn

import pytest

from regolo_rerank import RegoloClient, llama_index
from regolo_rerank._cli.demo import SHOWN
from regolo_rerank._cli.main import main
from regolo_rerank.evaluation import evaluate, example_queries
from tests.conftest import KEY
from tests.support.stub import Received, Reply, Stub, error, scored

QUERIES = {query["relevant"][0]: query for query in example_queries()}
REQUESTS = 2 * len(SHOWN) + len(QUERIES)

LOCAL = RegoloClient(base_url="local://", cache={})


@pytest.fixture
def at_stub(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> Stub:
    """The stub server, set up in the environment as a user would, with a key."""
    monkeypatch.setenv("REGOLO_API_KEY", KEY)
    monkeypatch.setenv("REGOLO_BASE_URL", stub.url)
    return stub


def shown(out: str, question: str) -> tuple[list[str], list[str]]:
    """Return the modules that the demo shows for a question, before and after, the right one with its mark."""
    _, rows = out.partition(f"\n{question}\n")[2].partition("\n\n")[0].split("\n", 1)
    cells = re.findall(r"[123]\. (\*| ) (\w+):", rows)
    names = [f"{mark}{name}".strip() for mark, name in cells]
    return names[::2], names[1::2]


def assert_true(out: str, client: RegoloClient) -> None:
    """Assert that the demo shows what BM25 and the client come to, and what evaluate measures."""
    for module in SHOWN:
        query = QUERIES[module]
        results = client.rerank(query["query"], [each["text"] for each in query["documents"]], top_n=3).results
        names = [each["id"] for each in query["documents"]]
        expected = names[:3], [names[result.index] for result in results]
        assert shown(out, query["query"]) == tuple(
            [f"*{name}" if name == module else name for name in side] for side in expected
        )
    measures = evaluate(QUERIES.values(), client).variants[0].measures
    for name in ("nDCG@10", "Recall@10"):
        each = measures[name]
        assert f"{name} {each.before:.3f} {each.after:.3f} {each.difference:+.3f}" in " ".join(out.split())


@pytest.mark.parametrize("width", [20, 80, 200])
def test_without_a_key_the_demo_convinces_on_this_machine(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One screen: right modules first that BM25 has not, both frameworks alike, and the gain; nothing is sent."""

    def no_network(*_: Any) -> NoReturn:
        pytest.fail("the demo uses the network")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setenv("COLUMNS", str(width))
    assert main(["demo"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith("Reranked on this machine, by word vectors. Set REGOLO_API_KEY for a real model.\n")
    assert len(out.splitlines()) <= 36
    assert max(map(len, out.splitlines())) <= max(80, min(width, 120))
    assert "LangChain and LlamaIndex agree: the same documents, the same scores, each time." in out
    for module in SHOWN:
        before, after = shown(out, QUERIES[module]["query"])
        assert f"*{module}" not in before
        assert after[0] == f"*{module}"
    assert_true(out, LOCAL)
    assert out.count("better") == 4


def test_the_frameworks_add_nothing_to_the_output() -> None:
    """As a process of its own, where nobody catches logs and warnings, standard error stays empty."""
    arguments = [sys.executable, "-m", "regolo_rerank", "demo"]
    ended = subprocess.run(arguments, capture_output=True, text=True, encoding="utf-8", check=True)  # noqa: S603 - our own command
    assert ended.stderr == ""
    assert ended.stdout.startswith("Reranked on this machine")


def test_with_a_key_the_demo_asks_the_service(at_stub: Stub, capsys: pytest.CaptureFixture[str]) -> None:
    """Its first line names model, host and what it takes, and each framework sends each question with the key."""
    assert main(["demo"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith(f"Reranked by Qwen3-Reranker-4B at 127.0.0.1, with {REQUESTS} requests.\n")
    assert len(at_stub.received) == REQUESTS
    assert {request.headers["authorization"] for request in at_stub.received} == {f"Bearer {KEY}"}
    agents = [request.headers["user-agent"] for request in at_stub.received]
    for framework in ("langchain-core", "llama-index-core"):
        assert sum(framework in agent for agent in agents) == len(SHOWN)
    assert_true(out, RegoloClient())


@pytest.mark.parametrize(("arguments", "local"), [(["--local"], True), (["--base-url", "URL"], False)])
def test_arguments_say_where_to_rerank(
    arguments: list[str],
    stub: Stub,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    *,
    local: bool,
) -> None:
    """`--local` sends nothing whatever the environment has, and `--base-url` goes to a server that needs no key."""
    if local:
        monkeypatch.setenv("REGOLO_API_KEY", KEY)
        monkeypatch.setenv("REGOLO_BASE_URL", stub.url)
    assert main(["demo", *(stub.url if each == "URL" else each for each in arguments)]) == 0
    assert capsys.readouterr().out.startswith("Reranked on this machine" if local else "Reranked by")
    assert len(stub.received) == (0 if local else REQUESTS)


def test_a_server_in_the_environment_is_enough(
    stub: Stub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`REGOLO_BASE_URL` alone leaves the embedded scorer."""
    monkeypatch.setenv("REGOLO_BASE_URL", stub.url)
    assert main(["demo"]) == 0
    assert capsys.readouterr().out.startswith("Reranked by")


def test_that_the_frameworks_agree_is_checked(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where one of them ranked otherwise, the demo would say so."""
    real = llama_index.RegoloRerank

    def other(**options: Any) -> llama_index.RegoloRerank:
        return real(**options, scorer=lambda _, documents: [float(len(document)) for document in documents])

    monkeypatch.setattr(llama_index, "RegoloRerank", other)
    assert main(["demo", "--local"]) == 0
    assert "LangChain and LlamaIndex do not agree each time." in capsys.readouterr().out


def test_a_failure_of_the_service_ends_the_demo_in_one_line(at_stub: Stub, capsys: pytest.CaptureFixture[str]) -> None:
    """No framework adds its own words to an error."""
    at_stub.always(error("no", 401))
    assert main(["demo"]) == 1
    advice = "check the API key: api_key, or the environment variable REGOLO_API_KEY"
    assert capsys.readouterr().err == f"regolo-rerank: no [HTTP 401]; {advice}\n"


def test_a_question_that_fails_is_told(at_stub: Stub, capsys: pytest.CaptureFixture[str]) -> None:
    """What is wrong with one of the hundred leaves the figures of the others."""
    question = next(query["query"] for module, query in QUERIES.items() if module not in SHOWN)

    def one_fails(request: Received) -> Reply:
        return error("too long", 400) if question in request.json["query"] else scored(request)

    at_stub.reply = one_fails
    assert main(["demo"]) == 0
    assert "1 of the questions failed and count nowhere." in capsys.readouterr().out


@pytest.mark.parametrize(
    "missing", ["langchain_classic", "llama_index.core", "llama_index", "langchain_core", "ir_measures", "bm25s"]
)
def test_a_missing_package_is_one_line_and_status_2(
    missing: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line says what to install."""
    for name in list(sys.modules):
        ours = ("regolo_rerank._cli.demo", "regolo_rerank.evaluation", "regolo_rerank._evaluation")
        if name.startswith((*ours, f"{missing}.")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    assert main(["demo"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert 'pip install "regolo_rerank[demo]"' in err
