import gzip
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import Run, write_lines
from tests.support.stub import Stub, error

ROWS = [{"_id": "a", "title": "low", "text": "x score=0.1"}, {"_id": "b", "title": "high", "text": "y score=0.9"}]
LONG = "word " * 40 + "UNICORN score=0.7"


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """One document per line, with its score."""
    file = tmp_path / "texts.txt"
    file.write_text(f"low score=0.1\n\nbest score=0.9\n{LONG}\n", "utf-8")
    return file


def test_a_pipe_gets_whole_documents_best_first(texts: Path, at_stub: Stub, run: Run) -> None:
    """No document is cut, so that `grep` finds its end."""
    done = run("rank", "q", texts)
    assert (done.status, done.err) == (0, "")
    assert done.out.splitlines() == ["1  0.9000  best score=0.9", f"2  0.7000  {LONG}", "3  0.1000  low score=0.1"]
    assert len(at_stub.received) == 1


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.txt", "array.json", "rows.gz", "-"])
def test_json_is_recognised_by_its_content(
    name: str, tmp_path: Path, at_stub: Stub, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows have the same texts, ids and lines in each form."""
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    content = {"array.json": json.dumps(ROWS, indent=1).encode(), "rows.gz": gzip.compress(lines)}.get(name, lines)
    (tmp_path / "rows").write_bytes(content)
    with (tmp_path / "rows").open(encoding="utf-8") as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        if name != "-":
            (tmp_path / "rows").rename(tmp_path / name)
        done = run("rank", "q", "-" if name == "-" else tmp_path / name, "--json")
    results = json.loads(done.out)["results"]
    assert [(each["document"], each["id"], each["line"]) for each in results] == [
        ("high y score=0.9", "b", 2),
        ("low x score=0.1", "a", 1),
    ]
    assert at_stub.documents == [["<Document>: low x score=0.1", "<Document>: high y score=0.9"]]
    assert done.err == "regolo-rerank: titles were scored in front of the texts\n"


def test_fields_may_have_other_names(tmp_path: Path, at_stub: Stub, run: Run) -> None:
    """The error suggests the field that may hold the text."""
    file = write_lines(tmp_path / "rows.jsonl", {"id": 7, "body": "x score=0.5", "title": "t"})
    done = run("rank", "q", file)
    assert done.status == 2
    assert '--text-field to "body"' in done.err
    assert run("rank", "q", file, "--text-field", "body", "--title-field", "").status == 0
    assert at_stub.documents == [["<Document>: x score=0.5"]]


def test_results_that_are_left_out_are_explained(texts: Path, at_stub: Stub, run: Run) -> None:
    """An empty result is not silent."""
    assert run("rank", "q", texts, "--top-n", 1).out == "1  0.9000  best score=0.9\n"
    done = run("rank", "q", texts, "--threshold", 0.95)
    assert (done.status, done.out) == (0, "")
    assert done.err == "regolo-rerank: no results: all 3 documents scored below 0.95\n"
    assert len(at_stub.received) == 2


def test_empty_input_is_a_usage_error(tmp_path: Path, at_stub: Stub, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty file is more often a mistake."""
    (tmp_path / "empty").write_text("\n")
    assert run("rank", "q", tmp_path / "empty") == (2, "", "regolo-rerank: no documents: the input is empty\n")
    monkeypatch.setattr("sys.stdin", None)
    assert run("rank", "q") == (2, "", "regolo-rerank: standard input is closed\n")
    assert not at_stub.received


def test_a_terminal_gets_a_table_that_fits(
    texts: Path, at_stub: Stub, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Colours, bars and one line per document on a terminal; no colours if NO_COLOR is set; JSON is indented."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b[32" in run("rank", "q", texts).out
    monkeypatch.setenv("NO_COLOR", "1")
    lines = run("rank", "q", texts).out.splitlines()
    assert "\x1b[3" not in "".join(lines)
    assert len(lines) == 3
    assert "█████████   best" in lines[0]
    assert "UNICORN" not in lines[1]
    assert "…" in lines[1]
    assert run("rank", "q", texts, "--json").out.count("\n    ") > 3 * 4
    assert len(at_stub.received) == 3


@pytest.mark.parametrize("terminal", [False, True])
def test_a_document_cannot_control_the_terminal(
    *, terminal: bool, tmp_path: Path, at_stub: Stub, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control characters and markup of a document have no effect."""
    file = write_lines(tmp_path / "a.jsonl", {"text": "red\x1b[31m \x9b2J\u202e\nnext [bold]line[/bold] score=0.5"})
    if terminal:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("NO_COLOR", "1")
    out = run("rank", "q", file).out
    assert not any(control in out for control in ("\x1b[31m", "\x9b", "\u202e"))
    assert "next [bold]line[/bold] score=0.5" in out
    assert "\x9b" not in run("rank", "q", file, "--json").out
    assert at_stub.received


def test_a_stdout_without_unicode_gets_escapes(texts: Path, at_stub: Stub) -> None:
    """No character ends the command, and JSON stays JSON."""
    texts.write_text("caffè score=0.5\n", "utf-8")
    environment = {"PYTHONIOENCODING": "ascii", "REGOLO_BASE_URL": at_stub.url}
    command = [sys.executable, "-m", "regolo_rerank", "rank", "q", str(texts)]
    plain, as_json = (
        subprocess.run([*command, *more], capture_output=True, check=True, env=environment).stdout  # noqa: S603
        for more in ([], ["--json"])
    )
    assert plain == b"1  0.5000  caff\\xe8 score=0.5\n"
    assert json.loads(as_json)["results"][0]["document"] == "caffè score=0.5"


def test_a_closed_pipe_is_no_error(texts: Path, at_stub: Stub, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in `rank ... | head -1`."""

    class Closed(io.StringIO):
        def flush(self) -> None:
            raise BrokenPipeError(32, "closed")

        def fileno(self) -> int:
            return duplicate.fileno()

    with (texts.parent / "out").open("w") as duplicate:
        monkeypatch.setattr("sys.stdout", Closed())
        assert run("rank", "q", texts).status == 0
    assert at_stub.received


def test_a_service_that_fails_is_status_1(texts: Path, at_stub: Stub, run: Run) -> None:
    """The message is one line."""
    at_stub.always(error("Invalid model name", 400))
    done = run("rank", "q", texts)
    assert done.status == 1
    assert "Invalid model name" in done.err
    assert done.err.count("\n") == 1


def test_without_a_key_the_shell_way_out_is_named(texts: Path, run: Run) -> None:
    """The status is that of a usage error."""
    message = "no API key: set the environment variable REGOLO_API_KEY, or add --local to try without one"
    assert run("rank", "q", texts) == (2, "", f"regolo-rerank: {message}\n")
