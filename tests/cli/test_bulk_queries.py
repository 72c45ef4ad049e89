import gzip
import io
import json
import sys
from pathlib import Path

import pydantic_core
import pytest

from regolo_rerank._cli.main import main
from tests.support.bulk import COUNT, Files, content, failing, numbers, query, ranking, read
from tests.support.stub import Stub, error, scored


def test_a_line_is_what_a_line_feed_ends(files: Files) -> None:
    """BOM, CRLF, blank lines and a missing last line feed are no part of a query; no other character ends a line."""
    strange = "one\u2028two\x85three\u2029\\nfour è \\ud800 \x7f"
    text = '\ufeff{"id": "%s", "query": "q", "documents": ["a %s"]}\r\n\r\n \t\n'
    last = '{"id": {"x": [1, null]}, "query": "q", "documents": []}'
    files.given.write_bytes((text.replace("%s", strange) + last).encode())
    assert files.run("--local") == 0
    lines = files.out.read_bytes()
    assert lines.isascii()
    assert len(lines.decode().splitlines()) == 2
    assert read(files.out)[0]["id"] == json.loads(f'"{strange}"')
    assert files.out.read_text().endswith('{"id": {"x": [1, null]}, "results": []}\n')
    finished = files.contents()
    assert files.run("--local") == 0
    assert files.contents() == finished


@pytest.mark.parametrize("cut", [1, 2, 30, 45, -2, -1])
def test_half_a_line_at_the_end_of_the_input_is_left(
    cut: int, at_stub: Stub, files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    """A line that somebody is writing is no failure: it is named, and ranked by another run once it is whole."""
    last = json.dumps({"id": "é", "query": "q99é", "documents": ["low score=0.1"]}, ensure_ascii=False).encode()
    files.write(*map(query, range(5)))
    whole = files.given.read_bytes()
    files.given.write_bytes(whole + last[:cut])
    for ranked in (5, 0):
        assert files.run() == 1
        said = capsys.readouterr().err
        assert said.startswith(f"regolo-rerank: {ranked} ranked with ")
        assert said.endswith(f" s\nregolo-rerank: line 6 of {files.given} is not complete, and left for another run\n")
        assert not files.errors.exists()
    files.given.write_bytes(whole + last)
    assert files.run() == 0
    files.given.write_bytes(whole + last + b"\n" + json.dumps(query(7)).encode())
    assert files.run() == 0
    assert [line["id"] for line in read(files.out)] == [*(f"id-{number}" for number in range(5)), "é", "id-7"]
    assert numbers(at_stub) == [0, 1, 2, 3, 4, 7]
    assert len(at_stub.received) == 7


REFUSED: list[tuple[bytes, str]] = [
    (b"nonsense", "not a JSON object in UTF-8"),
    (b'{"id": 1, "query": "caf\xe9", "documents": []}', "not a JSON object in UTF-8"),
    (b"[" * 100_000, "not a JSON object in UTF-8"),
    (b'["id", "query", "documents"]', "not a JSON object in UTF-8"),
    (b'{"id": 1, "documents": []}', 'no field "query"'),
    (b'{"id": 1, "query": "q"}', 'no field "documents"'),
    (b'{"id": 1, "query": " ", "documents": ["a"]}', "query: must not be blank"),
    (b'{"id": 1, "query": 7, "documents": ["a"]}', "query: must be a string, got int"),
    (b'{"id": 1, "query": "q", "documents": "a"}', "documents: must be a list of strings or objects"),
    (b'{"id": 1, "query": "q", "documents": ["a", {"id": 2}]}', "documents[1]: must be a string, or an object with"),
    (b'{"id": 1, "query": "q", "documents": [null]}', "documents[0]: must be a string, or an object with"),
    (b'{"id": NaN, "query": "q", "documents": []}', "id: must be JSON, which NaN and Infinity are not"),
    (b'{"id": [-Infinity], "query": "q", "documents": []}', "id: must be JSON, which NaN and Infinity are not"),
    (b'{"id": 1e999, "query": "q", "documents": []}', "id: must be JSON, which NaN and Infinity are not"),
    (b'{"id": 1, "query": "q", "documents": ["a", {"id": NaN, "text": "b"}]}', "documents[1].id: must be JSON, which"),
    (b'{"id": 1, "query": "q", "documents": [7], "rank": NaN}', "documents[0]: must be a string, or an object with"),
]


def is_strict_json(file: Path) -> bool:
    """Return whether a reader that knows neither NaN nor Infinity can read each line."""
    try:
        pydantic_core.from_json(b"[" + b",".join(content(file).splitlines()) + b"]", allow_inf_nan=False)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize(("line", "said"), REFUSED)
def test_a_line_that_is_no_query_is_a_line_of_errors(line: bytes, said: str, at_stub: Stub, files: Files) -> None:
    """It stands there whole with its number and what is wrong, nothing is sent for it, and all others are ranked."""
    files.write(query(0), b"", line, query(1))
    assert files.run() == 1
    assert read(files.out) == [ranking(0), ranking(1)]
    (failure,) = read(files.errors)
    assert (failure.pop("line"), failure["error"]["type"]) == (3, "InvalidInputError")
    assert failure.pop("error")["message"].startswith(said)
    text = line.decode(errors="backslashreplace")
    is_text = b"NaN" in line or b"Infinity" in line or b"1e999" in line or said.startswith("not a JSON object")
    assert failure == {"input": text if is_text else json.loads(text)}
    assert is_strict_json(files.errors)
    assert len(at_stub.received) == 2


def test_a_failed_query_keeps_its_fields(files: Files) -> None:
    """Whatever a query's fields are called, OUT.errors has them, and so has the OUT.errors of running that again."""
    query = {"id": 7, "query": "q", "documents": ["a", 0], "line": "mine", "error": {"type": "mine"}, "input": []}
    ranked = b'{"id": "n", "query": " ", "documents": ["a"], "rank": NaN}'
    files.write({"id": 0, "query": "q", "documents": []}, query, ranked, b"nonsense \xe9 {}")
    assert files.run("--local") == 1
    assert is_strict_json(files.errors)
    first = read(files.errors)
    assert [failure["input"] for failure in first] == [query, ranked.decode(), "nonsense \\xe9 {}"]
    assert [failure["line"] for failure in first] == [2, 3, 4]
    again = Files(files.given.parent)
    again.given, again.out = files.given.with_name("again.jsonl"), files.out.with_name("again")
    again.errors = files.out.with_name("again.errors")
    again.given.write_bytes(files.given.read_bytes().splitlines(keepends=True)[0] + files.errors.read_bytes())
    assert again.run("--local") == 1
    second = read(again.errors)
    assert [failure["line"] for failure in second] == [2, 3, 4]
    assert second[0] == first[0]
    assert second[1]["error"]["message"] == first[1]["error"]["message"] == "query: must not be blank"
    assert second[2] == first[2]


def test_without_an_id_the_lines_number_serves(at_stub: Stub, files: Files) -> None:
    """A query that has none is called by its line, also where it is ranked from OUT.errors, and from that one's."""
    nameless = [{**query(number), "id": None} for number in range(3)]
    del nameless[1]["id"]
    files.write(nameless[0], b"", *nameless[1:])
    at_stub.reply = failing(lambda number: number in {1, 2}, error("broken", 500))
    assert files.run() == 1
    assert [line["id"] for line in read(files.out)] == [1]
    again = Files(files.given.parent)
    again.given, again.out = files.errors, files.out.with_name("again")
    at_stub.reply = failing(lambda number: number == 2, error("broken", 500))
    assert again.run() == 1
    assert [line["id"] for line in read(again.out)] == [3]
    again.given, again.out = files.out.with_name("again.errors"), files.out.with_name("third")
    at_stub.reply = scored
    assert again.run() == 0
    assert [line["id"] for line in read(again.out)] == [4]


@pytest.mark.parametrize(
    ("content", "number", "problem"),
    [
        (b"id,query\n1,capital\n", 1, "not a JSON object in UTF-8"),
        (b'[{"id": 1, "query": "q", "documents": []}]', 1, "not a JSON object in UTF-8"),
        (json.dumps([query(1)], indent=1).encode(), 1, "not a JSON object in UTF-8"),
        (b"PAR1\x15\x04\n\xff\xfe\n\x00", 1, "not a JSON object in UTF-8"),
        (b'\n{"question": "q", "documents": []}\n', 2, 'no field "query"'),
        (b'{"query": "q"}\n' * 10 + json.dumps(query(1)).encode(), 1, 'no field "documents"'),
    ],
    ids=["csv", "array", "indented", "binary", "other field", "ten lines"],
)
def test_what_is_no_file_of_queries_is_refused(
    content: bytes, number: int, problem: str, files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where none of ten lines at the beginning is a query, the first one's problem is told, and no file is made."""
    files.given.write_bytes(content)
    assert files.run("--local") == 2
    said = f"{files.given}: none of its first lines is a query; line {number}: {problem}; a line must be like {{"
    assert said in capsys.readouterr().err
    assert list(files.given.parent.iterdir()) == [files.given]
    files.given.write_bytes(b"nonsense\n" * 9 + json.dumps(query(1)).encode())
    assert files.run("--local") == 1
    assert (len(read(files.out)), len(read(files.errors))) == (1, 9)


def test_an_input_may_be_compressed(
    at_stub: Stub, files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A .gz is read, also as far as it goes while it is being written; a damaged one is told from it."""
    packed = gzip.compress(files.given.read_bytes(), mtime=0)
    files.given = tmp_path / "queries.jsonl.GZ"
    files.given.write_bytes(packed[:-20])
    assert files.run() == 1
    assert f" of {files.given} is not complete, and left for another run" in capsys.readouterr().err
    ranked = len(read(files.out))
    assert 0 < ranked < COUNT
    files.given.write_bytes(packed)
    assert files.run() == 0
    assert read(files.out) == [ranking(number) for number in range(COUNT)]
    assert len(at_stub.received) == COUNT
    for damaged in (b"nonsense", packed + b"nonsense", packed[:50] + b"nonsense" * 9):
        files.given.write_bytes(damaged)
        assert files.run() == 2
        assert f"{files.given}: not gzip, or damaged behind line " in capsys.readouterr().err


def test_what_is_never_sent_needs_no_service(at_stub: Stub, files: Files) -> None:
    """Nothing is sent for an input of lines that are no queries, or have nothing to rank."""
    files.write(*[b"nonsense", {**query(0), "documents": []}, {**query(1), "query": " "}] * 9)
    assert files.run() == 1
    assert (len(read(files.out)), len(read(files.errors))) == (9, 18)
    assert at_stub.received == []


@pytest.mark.parametrize("lines", [b"", b"\xef\xbb\xbf\r\n\n  "])
def test_an_input_without_queries_gives_an_empty_output(lines: bytes, files: Files) -> None:
    """That is no failure, and OUT is there."""
    files.given.write_bytes(lines)
    assert files.run("--local") == 0
    assert files.contents() == (b"", b"")
    assert files.out.exists()


def stdin(monkeypatch: pytest.MonkeyPatch, lines: bytes) -> None:
    """Put bytes on standard input."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines), encoding="ascii"))


def test_standard_input_is_an_input_too(at_stub: Stub, files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """`-` reads it, and goes on by it just the same."""
    lines = files.given.read_bytes()
    stdin(monkeypatch, b"".join(lines.splitlines(keepends=True)[:7]))
    arguments = ["bulk", "-", str(files.out)]
    assert main(arguments) == 0
    stdin(monkeypatch, lines)
    assert main(arguments) == 0
    assert read(files.out) == [ranking(number) for number in range(COUNT)]
    assert len(at_stub.received) == COUNT
    with files.out.open() as opened:
        monkeypatch.setattr(sys, "stdin", opened)
        assert main(arguments) == 2
