"""Runs commands in this process, as a shell would."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from regolo_rerank.cli.main import main
from tests.conftest import KEY
from tests.support.stub import Stub


class Done(NamedTuple):
    """A command that has ended."""

    status: int
    out: str
    err: str


Run = Callable[..., Done]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command in 80 columns and return its output."""
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments: object) -> Done:
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as end:  # of --help and --version
            status = int(end.code or 0)
        return Done(status, *capsys.readouterr())

    return run


@pytest.fixture
def at_stub(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> Stub:
    """The stub server, set in the environment, with a key."""
    monkeypatch.setenv("REGOLO_API_KEY", KEY)
    monkeypatch.setenv("REGOLO_BASE_URL", stub.url)
    return stub


def write_lines(path: Path, *lines: Any) -> Path:
    """Write JSON Lines; a string is a line as it is."""
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines), "utf-8")
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects of JSON Lines, each of which must be complete."""
    content = path.read_text("utf-8")
    assert content.endswith("\n")
    return [json.loads(line) for line in content.splitlines()]
