import json
from pathlib import Path
from typing import Any

import pytest

from regolo_rerank import RegoloClient
from tests.cli.conftest import Run, read_lines, write_lines
from tests.support.stub import Stub, error


def judged(number: int) -> dict[str, Any]:
    """Return a query whose second document is the relevant one."""
    return {
        "query": f"q{number}",
        "documents": [f"low {number} score=0.1", f"high {number} score=0.9"],
        "labels": [0, 1],
    }


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file of judged queries."""
    return write_lines(tmp_path / "judged.jsonl", *map(judged, range(12)))


def test_the_report_is_printed(file: Path, at_stub: Stub, run: Run) -> None:
    """As text in 80 columns or as JSON, with other measures on request."""
    done = run("evaluate", file)
    assert (done.status, done.err) == (0, "")
    assert "nDCG@10" in done.out
    assert "better" in done.out
    assert max(map(len, done.out.splitlines())) <= 80
    assert len(at_stub.received) == 12
    measure = json.loads(run("evaluate", file, "--json", "--measure", "P@1 RR").out)["variants"][0]["measures"]
    assert {name: (each["before"], each["after"]) for name, each in measure.items()} == {"P@1": (0, 1), "RR": (0.5, 1)}


def test_options_that_are_repeated_are_compared(file: Path, at_stub: Stub, run: Run) -> None:
    """Each combination is a variant, named by its values."""
    formats = "--prompt-format", "tagged", "--prompt-format", "plain"
    variants = json.loads(run("evaluate", file, "--json", "--model", "m", "--model", "n", *formats).out)["variants"]
    assert [each["name"] for each in variants] == ["m, tagged", "m, plain", "n, tagged", "n, plain"]
    assert {request.json["model"] for request in at_stub.received} == {"m", "n"}
    assert {request.documents[0][:1] for request in at_stub.received} == {"<", "l"}


@pytest.mark.parametrize("option", ["--picture", "--save-run", "--per-query"])
def test_output_files_are_checked_before_the_first_request(
    option: str, file: Path, tmp_path: Path, at_stub: Stub, run: Run
) -> None:
    """Requests cost money."""
    done = run("evaluate", file, option, tmp_path / "nowhere" / "x.png")
    assert done.status == 2
    assert f"{option}: the folder {tmp_path / 'nowhere'} does not exist" in done.err
    assert f"{option}: cannot write {tmp_path}" in run("evaluate", file, option, tmp_path).err
    assert not at_stub.received


def test_a_picture_needs_a_suffix_that_can_be_drawn(file: Path, tmp_path: Path, at_stub: Stub, run: Run) -> None:
    """Matplotlib would notice after the last request."""
    done = run("evaluate", file, "--picture", tmp_path / "gain.xyz")
    assert done.status == 2
    assert "--picture must end in one of" in done.err
    assert not at_stub.received


def test_files_are_written_and_named(file: Path, tmp_path: Path, at_stub: Stub, run: Run) -> None:
    """Each file is reported when it exists."""
    picture, rankings, queries = tmp_path / "gain.png", tmp_path / "out.run", tmp_path / "queries.jsonl"
    done = run("evaluate", file, "--picture", picture, "--save-run", rankings, "--per-query", queries)
    assert done.status == 0
    assert done.err.splitlines() == [f"regolo-rerank: wrote {path}" for path in (rankings, queries, picture)]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert rankings.read_text().startswith("0 Q0 1 1 0.9")
    assert [each["ranked"] for each in read_lines(queries)] == [["1", "0"]] * 12
    assert at_stub.received


def test_the_cache_is_shared_with_python(file: Path, tmp_path: Path, at_stub: Stub, run: Run) -> None:
    """A notebook reads the scores that the shell paid for."""
    cache = tmp_path / "scores.db"
    run("evaluate", file, "--cache", cache)
    sent = len(at_stub.received)
    assert run("evaluate", file, "--cache", cache).status == 0
    with RegoloClient(cache=str(cache)) as client:
        assert client.rerank("q0", judged(0)["documents"]).usage.requests == 0
    assert len(at_stub.received) == sent


def test_bad_lines_are_named_and_failures_are_status_1(file: Path, at_stub: Stub, run: Run) -> None:
    """The other lines are evaluated."""
    write_lines(file, *map(judged, range(5)), "no json")
    done = run("evaluate", file)
    assert done.status == 1
    assert "line 6" in done.out
    at_stub.script(error("bad", 400))
    write_lines(file, *map(judged, range(5)))
    assert run("evaluate", file).status == 1


def test_a_beir_folder_is_read(tmp_path: Path, at_stub: Stub, run: Run) -> None:
    """Titles are scored, and that is reported."""
    write_lines(
        tmp_path / "corpus.jsonl", *({"_id": f"d{n}", "title": "t", "text": f"cat {n} score=0.{n}"} for n in "12")
    )
    write_lines(tmp_path / "queries.jsonl", {"_id": "q", "text": "cat"})
    (tmp_path / "qrels").mkdir()
    (tmp_path / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq\td2\t1\n")
    done = run("evaluate", "--beir", tmp_path)
    assert done.status == 0
    assert "titles were scored" in done.err
    assert sorted(at_stub.documents[0]) == ["<Document>: t cat 1 score=0.1", "<Document>: t cat 2 score=0.2"]


def test_one_source_is_required(file: Path, run: Run) -> None:
    """Several sources, or parts of one, are a usage error."""
    for arguments in ([], [file, "--beir", "x"], ["--qrels", "x", "--queries", "y"]):
        done = run("evaluate", "--local", *arguments)
        assert done.status == 2
        assert "(see regolo-rerank evaluate --help)" in done.err
