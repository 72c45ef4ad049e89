import gzip
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from regolo_rerank._files import Document, read_document, read_documents, read_rows
from regolo_rerank.errors import InvalidInputError

OBJECTS: list[dict[str, Any]] = [{"_id": "r", "title": "Rome", "text": "A city."}, {"docid": 2, "text": "Größe"}]
DOCUMENTS = [Document("Rome A city.", "r", "Rome", 1), Document("Größe", 2, None, 2)]
JSON_LINES = "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in OBJECTS).encode()
ARRAY = json.dumps(OBJECTS, indent=2).encode()
LINES = "Rome\r\n\n[1] Größe\n".encode()


def write(folder: Path, content: bytes) -> Path:
    """Return a file whose name promises something else."""
    file = folder / "data.txt"
    file.write_bytes(content)
    return file


@pytest.mark.parametrize(
    "wrap", [bytes, gzip.compress, lambda content: b"\xef\xbb\xbf" + content], ids=["plain", "gzip", "BOM"]
)
def test_the_content_decides_how_a_file_is_read(tmp_path: Path, wrap: Any) -> None:
    """A misleading name, compression and a byte order mark make no difference."""
    assert list(read_documents(write(tmp_path, wrap(JSON_LINES)))) == DOCUMENTS
    assert list(read_documents(write(tmp_path, wrap(ARRAY)))) == DOCUMENTS
    lines = [Document("Rome", number=1), Document("[1] Größe", number=3)]
    assert list(read_documents(write(tmp_path, wrap(LINES)))) == lines


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        (b'["Rome", "Oslo"]', ["Rome", "Oslo"]),
        (b"[1] First reference\nsecond", ["[1] First reference", "second"]),
        (b"{{ template }}\n{", ["{{ template }}", "{"]),
        (b'"quoted" text', ['"quoted" text']),
        (b"[]", []),
        (b"\n \n", []),
    ],
)
def test_text_that_looks_like_json_stays_text(tmp_path: Path, content: bytes, texts: list[str]) -> None:
    """Only whole JSON counts as JSON."""
    assert [document.text for document in read_documents(write(tmp_path, content))] == texts


def test_standard_input_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe may be compressed too."""
    stream = io.TextIOWrapper(io.BufferedReader(io.BytesIO(gzip.compress(JSON_LINES, mtime=0))))
    monkeypatch.setattr(sys, "stdin", stream)
    assert list(read_documents("-")) == DOCUMENTS


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (JSON_LINES + b"Oslo\n", r"data\.txt, line 3: expected a text or an object like {\"id\""),
        (b'{"text": 1}', r'line 1: the text "text" must be a string, got int'),
        (b'{"id": 1, "contents": "a"}', 'Is the text in "contents"\\? Then set text_field to "contents"'),
        (b'{"id": 1, "url": "a"}', r'missing field "text" \(fields: "id", "url"\)'),
        (b'{"text": "a", "title": ["b"]}', 'the title "title" must be a string, got list'),
        (b'{"text": "a", "id": 1.5}', 'the id "id" must be a string or an integer, got float'),
        (b'[\n"a", 7\n]', "has JSON of an unexpected shape. Expected one object per line"),
        (b'{\n"text": "a"\n}', "data.txt has JSON of an unexpected shape"),
        (b"a\nb\xff\n", r"data\.txt, line 2: not UTF-8 \(byte 2 of the line\)"),
        ("很长".encode("utf-16"), "data.txt is UTF-16, expected UTF-8. Convert it first: iconv"),
        ("ab".encode("utf-16-be"), "data.txt is UTF-16"),
        (gzip.compress(LINES, mtime=0)[:-9], "data.txt: the gzip data is damaged or incomplete"),
    ],
)
def test_errors_name_the_file_the_line_and_the_next_step(tmp_path: Path, content: bytes, message: str) -> None:
    """Each message has the place of the problem and the expected shape."""
    with pytest.raises(InvalidInputError, match=message):
        list(read_documents(write(tmp_path, content)))


def test_a_file_that_cannot_be_opened_is_an_input_error(tmp_path: Path) -> None:
    """The operating system's reason is in the message."""
    with pytest.raises(InvalidInputError, match=r"nowhere\.txt: No such file"):
        list(read_documents(tmp_path / "nowhere.txt"))
    with pytest.raises(InvalidInputError, match="Is a directory"):
        list(read_documents(tmp_path))


def test_fields_can_be_named() -> None:
    """A title is scored in front of the text unless it is blank or switched off."""
    row = {"body": "A city.", "name": "Rome", "title": "not this"}
    assert read_document(row, text_field="body", title_field="name").text == "Rome A city."
    assert read_document(row, text_field="body", title_field=None).text == "A city."
    assert read_document({"text": "A city.", "title": " "}).text == "A city."


def test_a_long_file_is_read_as_needed(tmp_path: Path) -> None:
    """A corpus of millions of lines is not loaded to read its beginning."""
    file = write(tmp_path, JSON_LINES * 10_000 + b"\xff\n")
    assert next(read_rows(file)).value == OBJECTS[0]
