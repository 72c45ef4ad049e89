"""IN of `regolo-rerank bulk`: its lines, and the query that each of them holds."""

import codecs
import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import chain, islice
from typing import Any, Final, NamedTuple

from regolo_rerank.errors import InvalidInputError, RegoloError
from regolo_rerank.results import RerankResponse

__all__ = ["Line", "Lines", "Query", "describe", "encode", "is_about_pair", "parse_query"]

_FIRST: Final = 10
"""Lines at the beginning, of which one at least must be a query."""
_PAIR: Final = re.compile(r"^pairs\[\d+\]: ")
"""How the client calls a query; in OUT.errors it has its line's number."""


class Line(NamedTuple):
    """A line of IN that is not blank.

    Attributes:
        number: Which line, from 1.
        end: Bytes of IN up to its end.
        raw: The line itself, without white space around it.
    """

    number: int
    end: int
    raw: bytes

    def digest(self) -> bytes:
        """Return 16 hexadecimal digits that another line, or this one in another place, does not have."""
        return hashlib.blake2b(b"%d %b" % (self.number, self.raw), digest_size=8).hexdigest().encode()

    def read(self) -> Any:
        """Return its JSON object, or its text where it is none; of a line of OUT.errors, what had failed there."""
        return _unwrap(self.raw.decode(errors="backslashreplace"))

    def encode_failure(self, error: RegoloError) -> bytes:
        """Return the line of OUT.errors: this one with its number and error, so that it can be run again."""
        report = {"type": type(error).__name__, "message": describe(error)}
        known = {name: getattr(error, name, None) for name in ("status_code", "request_id")}
        report |= {name: value for name, value in known.items() if value}
        failure = {"line": self.number, "error": report, "input": self.read()}
        try:
            return encode(failure)
        except (ValueError, RecursionError):  # NaN somewhere in it, which Python reads and JSON does not know
            return encode(failure | {"input": self.raw.decode()})


class Query(NamedTuple):
    """A line of IN under way, without the texts, which are the client's now."""

    line: Line
    id: Any = None
    document_ids: list[Any] = []  # noqa: RUF012 - of a line that is refused; nobody changes it
    refusal: InvalidInputError | None = None

    def encode_ranking(self, response: RerankResponse) -> bytes:
        """Return the line of OUT."""
        results = []
        for result in response.results:
            fields = {"index": result.index, "relevance_score": result.relevance_score}
            name = self.document_ids[result.index]
            results.append(fields if name is None else fields | {"id": name})
        return encode({"id": self.id, "results": results})


def encode(fields: dict[str, Any]) -> bytes:
    """Return a line of JSON."""
    # ASCII: no character in it ends a line for any reader, and half a surrogate pair stays what it is.
    return json.dumps(fields, allow_nan=False).encode() + b"\n"


def _unwrap(given: Any) -> Any:
    number: dict[str, Any] = {}
    while True:
        if isinstance(given, str):
            with suppress(ValueError, RecursionError):
                fields = json.loads(given)
                given = fields if isinstance(fields, dict) else given
        if not isinstance(given, dict) or given.keys() != {"line", "error", "input"}:
            return given | number if isinstance(given, dict) and given.get("id") is None else given
        number, given = {"id": given["line"]}, given["input"]


class Lines(Iterator[Line]):
    """The lines of IN that are not blank.

    Attributes:
        name: What IN is called.
        half: Number of the last line where it is still being written, which is left for another run; None as long as
            there is none.

    Raises:
        InvalidInputError: The first lines hold no query, so that IN is something else; or IN is damaged.
    """

    def __init__(self, source: Iterable[bytes], name: str) -> None:
        self.name = name
        self.half: int | None = None
        lines = self._read(source)
        first: list[Line] = []
        for line in islice(lines, _FIRST):
            first.append(line)
            if parse_query(line)[0].refusal is None:
                break
        else:
            if first:
                raise InvalidInputError(
                    f"{name}: none of its first lines is a query; line {first[0].number}: "
                    f'{parse_query(first[0])[0].refusal}; a line must be like {{"query": "...", "documents": ["..."]}}'
                )
        self._lines = chain(first, lines)

    def __next__(self) -> Line:
        return next(self._lines)

    def _read(self, source: Iterable[bytes]) -> Iterator[Line]:
        end = number = 0
        try:
            for raw in source:
                number += 1
                end += len(raw)
                text = raw.removeprefix(codecs.BOM_UTF8 if number == 1 else b"").strip()
                if text and not raw.endswith(b"\n") and not _is_json(text):
                    self.half = number
                elif text:
                    yield Line(number, end, text)
        except EOFError:  # of gzip: its end is not there yet
            self.half = number + 1
        except (gzip.BadGzipFile, zlib.error):
            raise InvalidInputError(f"{self.name}: not gzip, or damaged behind line {number}") from None


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text.decode())
    except (ValueError, RecursionError):
        return False
    return True


def parse_query(line: Line) -> tuple[Query, tuple[str, list[str]]]:
    """Return the query of a line, and what the client ranks; for a line that is refused here, what it refuses too."""
    try:
        fields = _require_object(line.read())
        query, documents = (_require(fields, key) for key in ("query", "documents"))
        texts = _get_texts(documents)
        ids = [document.get("id") if isinstance(document, dict) else None for document in documents]
        _check_id("id", fields.get("id"))
        for index, document_id in enumerate(ids):
            _check_id(f"documents[{index}].id", document_id)
    except InvalidInputError as error:
        return Query(line, refusal=error), ("", [])
    return Query(line, line.number if fields.get("id") is None else fields["id"], ids), (query, texts)


def describe(error: RegoloError) -> str:
    """Return an error's message, without the client's name for the query."""
    return _PAIR.sub("", str(error)) if is_about_pair(error) else str(error)


def is_about_pair(error: RegoloError) -> bool:
    """Return whether the client refused a query before it sent anything; its other refusals are those of an option."""
    return isinstance(error, InvalidInputError) and bool(_PAIR.match(str(error)))


def _require_object(given: Any) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise InvalidInputError("not a JSON object in UTF-8")
    return given


def _require(fields: dict[str, Any], name: str) -> Any:
    if fields.get(name) is None:
        raise InvalidInputError(f'no field "{name}"')
    return fields[name]


def _get_texts(documents: Any) -> list[str]:
    if not isinstance(documents, list):
        raise InvalidInputError("documents: must be a list of strings or objects")
    return [_get_text(index, document) for index, document in enumerate(documents)]


def _get_text(index: int, document: Any) -> str:
    text = document.get("text") if isinstance(document, dict) else document
    if not isinstance(text, str):
        raise InvalidInputError(f'documents[{index}]: must be a string, or an object with a string in its field "text"')
    return text


def _check_id(place: str, value: Any) -> None:
    try:
        json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError):
        raise InvalidInputError(f"{place}: must be JSON, which NaN and Infinity are not") from None
