import re
import socket
import sys
from typing import Any, NoReturn

import pytest

from regolo_rerank._version import install_hint
from regolo_rerank.cli.demo import SHOWN
from regolo_rerank.evaluation import example_queries
from tests.cli.conftest import Run
from tests.support.stub import Stub


@pytest.mark.timeout(180)  # it measures 100 questions
def test_without_a_key_the_demo_runs_on_this_machine(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each question ends with the change of its module."""

    def no_network(*_: Any) -> NoReturn:
        pytest.fail("the demo uses the network")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    done = run("demo")
    assert (done.status, done.err) == (0, "")
    lines = done.out.splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) <= 45
    changes = [re.fullmatch(r"(\w+): (\d+)(?:st|nd|rd|th) -> \d+(?:st|nd|rd|th)", line) for line in lines]
    before = {change[1]: int(change[2]) for change in changes if change}
    ranks = {query["relevant"][0]: [each["id"] for each in query["documents"]] for query in example_queries()}
    assert before == {module: ranks[module].index(module) + 1 for module in SHOWN}
    if sys.version_info[:2] == (3, 11):  # the documents are the docstrings of the running Python
        assert "csv: 15th -> 1st" in lines
        assert re.search(r"1\. \w+: .*  1\. csv: ", done.out)
    assert "LangChain and LlamaIndex return the same documents." in done.out
    assert re.search(r"nDCG@10 +0\.\d{3} +0\.\d{3} +\+0\.\d{3} \(\+", done.out)
    assert [line[2:4] for line in lines[-3:]] == ["1.", "2.", "3."]


def test_with_a_key_the_number_of_requests_is_announced(at_stub: Stub, run: Run) -> None:
    """--local sends none."""
    done = run("demo")
    assert done.status == 0
    (count,) = re.findall(rf"Sending (\d+) requests to {at_stub.url}\. Add --local to send none\.", done.out)
    assert len(at_stub.received) == int(count)
    at_stub.received.clear()
    assert run("demo", "--local").status == 0
    assert not at_stub.received


def test_a_missing_framework_is_named_after_the_first_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first line does not wait for the frameworks."""
    monkeypatch.setitem(sys.modules, "llama_index.core.schema", None)
    done = run("demo")
    assert done.status == 2
    assert done.out.startswith("Which module of Python's standard library answers a question?\n")
    assert done.err == f"regolo-rerank: the demo needs more packages: {install_hint('demo')}\n"
