"""Reads the files that people have: JSON Lines, a JSON array or one text per line, compressed or not.

The content decides, not the file's name. If the first line that is not blank is a JSON object, the file is JSON Lines.
A JSON array of objects or strings is read as such. Everything else is one text per line.
"""

import codecs
import gzip
import json
import sys
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import chain
from numbers import Integral
from pathlib import Path
from typing import Any, BinaryIO, Final, cast

from regolo_rerank.errors import InvalidInputError

__all__ = [
    "Document",
    "Row",
    "decode_line",
    "open_binary",
    "parse_object",
    "read_document",
    "read_documents",
    "read_id",
    "read_lines",
    "read_rows",
]

ID_FIELDS: Final = "_id", "id", "docid", "doc_id"
OTHER_TEXT_FIELDS: Final = "text", "contents", "content", "page_content", "passage", "body", "document"
SHAPE: Final = '{"id": "7", "title": "...", "text": "..."}'


@dataclass(frozen=True, slots=True)
class Row:
    """One entry of a file.

    Attributes:
        number: Number of its line, or of its element in a JSON array, from 1.
        value: A JSON object, or a string. None for a line of JSON Lines that is not a JSON object.
        place: Where it is, for messages: "line 4" or "element 4".
    """

    number: int
    value: dict[str, Any] | str | None
    place: str


@dataclass(frozen=True, slots=True)
class Document:
    """A document of a file.

    Attributes:
        text: The text to score: the title, if there is one, a space, and the text.
        id: Its id as in the file, or None.
        title: Its title, or None.
        number: Number of its row, or 0 if it is not from a file.
    """

    text: str
    id: str | int | None = None
    title: str | None = None
    number: int = 0

    @property
    def body(self) -> str:
        """The text without the title."""
        return self.text.removeprefix(f"{self.title} ") if self.title else self.text


def read_documents(
    file: str | Path, *, text_field: str = "text", title_field: str | None = "title"
) -> Iterator[Document]:
    """Yield the documents of a file, "-" for standard input.

    Args:
        file: JSON Lines, a JSON array of objects or strings, or one text per line.
        text_field: Field of an object that holds its text.
        title_field: Field that holds its title. None leaves titles out.

    Raises:
        InvalidInputError: The file cannot be read, or an entry has no text. The message has the file and the line.
    """
    for row in read_rows(file):
        try:
            document = read_document(row.value, text_field=text_field, title_field=title_field)
        except InvalidInputError as error:
            raise InvalidInputError(f"{_name(file)}, {row.place}: {error}") from None
        yield replace(document, number=row.number)


def read_document(value: Any, *, text_field: str = "text", title_field: str | None = "title") -> Document:
    """Return the document that a string or a mapping describes.

    Raises:
        InvalidInputError: It has no text. The message suggests a field that may hold it.
    """
    if isinstance(value, str):
        return Document(value)
    if not isinstance(value, Mapping):
        kind = "" if value is None else f", got {type(value).__name__}"
        raise InvalidInputError(f"expected a text or an object like {SHAPE}{kind}")
    text, title = value.get(text_field), value.get(title_field)
    if not isinstance(text, str):
        raise InvalidInputError(_explain_missing_text(value, text_field))
    if not isinstance(title, str | None):
        raise InvalidInputError(f'the title "{title_field}" must be a string, got {type(title).__name__}')
    if not title or not title.strip():
        return Document(text, read_id(value))
    return Document(f"{title} {text}", read_id(value), title)


def read_id(value: Mapping[Any, Any]) -> str | int | None:
    """Return the id of an object, from the first of `ID_FIELDS` that it has.

    Raises:
        InvalidInputError: The id is not a string or an integer.
    """
    for name in ID_FIELDS:
        found = value.get(name)
        if isinstance(found, Integral) and not isinstance(found, bool):
            return int(found)
        if not isinstance(found, str | None):
            raise InvalidInputError(f'the id "{name}" must be a string or an integer, got {type(found).__name__}')
        if found is not None:
            return found
    return None


def read_rows(file: str | Path) -> Iterator[Row]:
    """Yield the entries of a file, "-" for standard input. JSON Lines and plain lines are read as needed.

    Raises:
        InvalidInputError: The file cannot be read, or its JSON has another shape.
    """
    lines = ((number, line) for number, line in read_lines(file) if line.strip())
    first = next(lines, (0, ""))
    if parse_object(first[1]) is not None:
        yield from (Row(number, parse_object(line), f"line {number}") for number, line in chain([first], lines))
        return
    # A JSON array must be read whole to tell it from text that begins with a bracket.
    rest = list(lines) if first[1].lstrip().startswith(("[", "{")) else lines
    if isinstance(rest, list) and (elements := _read_array([first, *rest], _name(file))) is not None:
        yield from (Row(number, element, f"element {number}") for number, element in enumerate(elements, 1))
    elif first[0]:
        yield from (Row(number, line, f"line {number}") for number, line in chain([first], rest))


def read_lines(file: str | Path) -> Iterator[tuple[int, str]]:
    """Yield each line of a UTF-8 file with its number from 1.

    Raises:
        InvalidInputError: The file cannot be read, or is not UTF-8.
    """
    with open_binary(file) as stream:
        for number, raw in enumerate(stream, 1):
            yield number, decode_line(raw, number, _name(file))


def decode_line(raw: bytes, number: int, name: str) -> str:
    """Return a line of a file as text, without its end and without a byte order mark.

    Raises:
        InvalidInputError: It is not UTF-8.
    """
    if number == 1 and (raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in raw[:4]):
        raise InvalidInputError(
            f"{name} is UTF-16, expected UTF-8. Convert it first: iconv -f UTF-16 -t UTF-8 INPUT > OUTPUT"
        )
    try:
        return raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise InvalidInputError(f"{name}, line {number}: not UTF-8 (byte {error.start + 1} of the line)") from None


@contextmanager
def open_binary(file: str | Path) -> Iterator[BinaryIO]:
    """Open a file to read its bytes, decompressed if they are gzip. "-" is standard input.

    Raises:
        InvalidInputError: The file cannot be read, or its gzip data is damaged.
    """
    try:
        with nullcontext(sys.stdin.buffer) if str(file) == "-" else Path(file).open("rb") as stream:
            compressed = cast("Any", stream).peek(2)[:2] == b"\x1f\x8b"
            yield cast("BinaryIO", gzip.GzipFile(fileobj=stream) if compressed else stream)
    except (EOFError, gzip.BadGzipFile, zlib.error):
        raise InvalidInputError(f"{_name(file)}: the gzip data is damaged or incomplete") from None
    except OSError as error:
        raise InvalidInputError(f"{_name(file)}: {error.strerror or error}") from None


def parse_object(line: str) -> dict[str, Any] | None:
    """Return the JSON object of a line, or None if the line is something else."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _read_array(lines: list[tuple[int, str]], name: str) -> list[Any] | None:
    """Return the elements of a JSON array, or None if the text is not JSON."""
    text = "\n".join(line for _, line in lines).strip()
    try:
        value, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return None
    if isinstance(value, list) and end < len(text):
        return None  # text such as "[1] First reference"
    if isinstance(value, list) and all(isinstance(element, dict | str) for element in value):
        return value
    raise InvalidInputError(
        f"{name} has JSON of an unexpected shape. Expected one object per line like {SHAPE}, a JSON array of objects "
        "or strings, or one text per line"
    )


def _explain_missing_text(value: Mapping[Any, Any], text_field: str) -> str:
    if value.get(text_field) is not None:
        return f'the text "{text_field}" must be a string, got {type(value[text_field]).__name__}'
    for name in OTHER_TEXT_FIELDS:
        if isinstance(value.get(name), str):
            return f'missing field "{text_field}". Is the text in "{name}"? Then set text_field to "{name}"'
    names = ", ".join(f'"{name}"' for name in list(value)[:10]) or "none"
    return f'missing field "{text_field}" (fields: {names}). Expected a text or an object like {SHAPE}'


def _name(file: str | Path) -> str:
    return "standard input" if str(file) == "-" else str(file)
