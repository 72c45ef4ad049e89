"""Reads the files that people have: JSON Lines, a JSON array or one text per line, compressed or not.

The content decides, not the file's name:

- If the first line that is not blank is a JSON object, the file is JSON Lines.
- A JSON array of objects or strings is read as such.
- Everything else is one text per line.

    for document in read_documents("corpus.jsonl.gz"):
        print(document.number, document.id, document.text)
"""

import codecs
import gzip
import json
import sys
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain
from numbers import Integral
from pathlib import Path
from typing import IO, Any, Final, NoReturn, cast

from regolo_rerank.errors import InvalidInputError

__all__ = [
    "Document",
    "Row",
    "open_binary",
    "parse_object",
    "read_document",
    "read_documents",
    "read_lines",
    "read_rows",
]

ID_FIELDS: Final = "_id", "id", "docid", "doc_id"
OTHER_TEXT_FIELDS: Final = "contents", "content", "page_content", "passage", "body", "document"
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
    """A document as people write it.

    Attributes:
        text: The text to score: the title, if there is one, a space, and the text.
        id: Its id as in the file, or None.
        title: Its title, or None.
        number: Number of its line or element, from 1. 0 if it is not from a file.
    """

    text: str
    id: str | int | None = None
    title: str | None = None
    number: int = 0


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
        yield Document(document.text, document.id, document.title, row.number)


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
    text = value.get(text_field)
    if not isinstance(text, str):
        raise InvalidInputError(_explain_missing_text(value, text_field))
    title = value.get(title_field) if title_field else None
    if title is not None and not isinstance(title, str):
        raise InvalidInputError(f'the title "{title_field}" must be a string, got {type(title).__name__}')
    if not title or not title.strip():
        return Document(text, read_id(value))
    return Document(f"{title} {text}", read_id(value), title)


def read_id(value: Mapping[Any, Any]) -> str | int | None:
    """Return the id of an object, from the first of `ID_FIELDS` that it has.

    Raises:
        InvalidInputError: The id is not a string or an integer.
    """
    name = next((name for name in ID_FIELDS if value.get(name) is not None), None)
    if name is None:
        return None
    found = value[name]
    if isinstance(found, bool) or not isinstance(found, str | Integral):
        raise InvalidInputError(f'the id "{name}" must be a string or an integer, got {type(found).__name__}')
    return found if isinstance(found, str) else int(found)


def read_rows(file: str | Path) -> Iterator[Row]:
    """Yield the entries of a file, "-" for standard input. JSON Lines and plain lines are read as needed.

    Raises:
        InvalidInputError: The file cannot be read, or its JSON has another shape.
    """
    lines = ((number, line) for number, line in read_lines(file) if line.strip())
    first = next(lines, None)
    if first is None:
        return
    everything = chain([first], lines)
    if parse_object(first[1]) is not None:
        for number, line in everything:
            yield Row(number, parse_object(line), f"line {number}")
        return
    # A JSON array, or an object in several lines, must be read whole to tell it from text that begins with a bracket.
    if first[1].lstrip()[0] in "[{":
        collected = list(everything)
        elements = _read_array("\n".join(line for _, line in collected), _name(file))
        if elements is not None:
            for number, element in enumerate(elements, 1):
                yield Row(number, element, f"element {number}")
            return
        everything = chain(collected)
    for number, line in everything:
        yield Row(number, line, f"line {number}")


def read_lines(file: str | Path) -> Iterator[tuple[int, str]]:
    """Yield each line of a UTF-8 file without its end, with its number from 1.

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
def open_binary(file: str | Path) -> Iterator[IO[bytes]]:
    """Open a file to read its bytes, decompressed if they are gzip. "-" is standard input.

    Raises:
        InvalidInputError: The file cannot be read, or its gzip data is damaged.
    """
    try:
        with nullcontext(sys.stdin.buffer) if str(file) == "-" else Path(file).open("rb") as stream:
            compressed = cast("Any", stream).peek(2)[:2] == b"\x1f\x8b"
            yield cast("IO[bytes]", gzip.GzipFile(fileobj=stream)) if compressed else stream
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


def _read_array(text: str, name: str) -> list[Any] | None:
    """Return the elements of a JSON array, or None if the text is not JSON."""
    try:
        value, end = json.JSONDecoder().raw_decode(text.lstrip())
    except (ValueError, RecursionError):
        return None
    if isinstance(value, dict):
        _refuse_shape(name, "a JSON object in several lines")
    if text.lstrip()[end:].strip():
        return None  # text such as "[1] First reference"
    if not isinstance(value, list) or not all(isinstance(element, dict | str) for element in value):
        _refuse_shape(name, "a JSON array with other elements than objects or strings")
    return value


def _refuse_shape(name: str, found: str) -> NoReturn:
    raise InvalidInputError(
        f"{name} is {found}. Expected one object per line like {SHAPE}, a JSON array of objects or strings, or one "
        "text per line"
    )


def _explain_missing_text(value: Mapping[Any, Any], text_field: str) -> str:
    if text_field in value:
        return f'the text "{text_field}" must be a string, got {type(value[text_field]).__name__}'
    other = next((name for name in ("text", *OTHER_TEXT_FIELDS) if isinstance(value.get(name), str)), None)
    if other:
        return f'missing field "{text_field}". Is the text in "{other}"? Then set text_field to "{other}"'
    names = ", ".join(f'"{name}"' for name in list(value)[:10]) or "none"
    return f'missing field "{text_field}" (fields: {names}). Expected a text or an object like {SHAPE}'


def _name(file: str | Path) -> str:
    return "standard input" if str(file) == "-" else str(file)
