"""What the command line says of how requests are made, and what a shell completes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from regolo_rerank import __version__
from regolo_rerank.prompts import PRESETS
from tests.support.inside import main
from tests.support.stub import Stub


@pytest.mark.parametrize("command", ["rank", "bulk"])
def test_how_requests_are_made_can_be_told(command: str, tmp_path: Path, stub: Stub) -> None:
    """Length, prompt format and headers go into each request."""
    given = tmp_path / "given.jsonl"
    query = {"query": "q", "documents": ["four"]} if command == "bulk" else {"text": "four"}
    given.write_text(json.dumps(query) + "\n", "utf-8")
    arguments = ["rank", "q", str(given)] if command == "rank" else ["bulk", str(given), str(tmp_path / "out")]
    options = ["--max-document-chars", "2", "--prompt-format", "chat", "--timeout", "9.5", "--max-concurrency", "1"]
    headers = ["--header", "x-team: search", "--header", "x-cost-centre:7"]
    assert main([*arguments, *options, *headers, "--base-url", stub.url]) == 0
    (request,) = stub.received
    assert request.documents == [PRESETS["chat"].format_document("fo")]
    assert (request.headers["x-team"], request.headers["x-cost-centre"]) == ("search", "7")


@pytest.mark.parametrize("header", ["sk-canary", "authorization: Bearer sk-canary"])
def test_a_header_that_may_not_be_sent_is_not_repeated(header: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A key has its own place, and a header without a colon may be one."""
    assert main(["rank", "q", "--local", "--header", header]) == 2
    said = capsys.readouterr().err
    assert "canary" not in said
    assert said.count("\n") == 1


def test_the_version_has_a_short_option_too(capsys: pytest.CaptureFixture[str]) -> None:
    """`-V` says what `--version` says."""
    with pytest.raises(SystemExit) as ended:
        main(["-V"])
    assert (ended.value.code, capsys.readouterr().out) == (0, f"regolo-rerank {__version__}\n")


@pytest.mark.parametrize(
    ("line", "word"), [("regolo-rerank ra", "rank"), ("regolo-rerank bulk --max-doc", "--max-document-chars")]
)
def test_words_are_completed(line: str, word: str, tmp_path: Path) -> None:
    """A shell that asks what could come next is told commands and options, and nothing is ranked."""
    told = tmp_path / "told"
    asked = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_IFS": "\n"}
    environment = {**os.environ, **asked, "_ARGCOMPLETE_STDOUT_FILENAME": str(told)}
    subprocess.run([sys.executable, "-m", "regolo_rerank"], env=environment, check=True)
    assert told.read_text("utf-8").split() == [word]
