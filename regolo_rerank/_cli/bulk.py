"""Rank a file of queries: `regolo-rerank bulk IN OUT`.

What is finished is always a beginning of IN: each of its lines is one line of OUT or of OUT.errors, in IN's order. So
the files themselves say where to go on, and all that is ever taken back is a line that was cut short.
"""

import codecs
import json
import os
import re
import stat
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, NamedTuple

import httpx

from regolo_rerank._display.progress import Advance
from regolo_rerank.client import RegoloClient
from regolo_rerank.errors import (
    APIConnectionError,
    APIStatusError,
    AuthenticationError,
    InvalidInputError,
    NotFoundError,
    RateLimitError,
    RegoloError,
)
from regolo_rerank.results import RerankResponse

if TYPE_CHECKING:
    from io import FileIO

__all__ = ["Bulk", "StoppedError", "resumed"]

_HELD: Final = 8
"""Finished lines held back at most, until it is known whether a failure is the query's own or the service's."""
_PROBE: Final = ("Is this service working?", ["It is."])
_OF_THIS_RUN: Final = re.compile(r"^pairs\[\d+\]: ")
"""How the client calls a query; in OUT.errors it has its line's number."""


class StoppedError(RegoloError):
    """The run ended before its input, because of what no query is to blame for; it goes on when it is run again."""


class _Line(NamedTuple):
    """A line of IN that is not blank.

    Attributes:
        number: Which line, from 1.
        end: Bytes of IN up to its end.
        raw: The line itself, without white space around it.
    """

    number: int
    end: int
    raw: bytes

    def fields(self) -> dict[str, Any]:
        try:
            fields = json.loads(self.raw.decode())
        except (ValueError, RecursionError):
            raise InvalidInputError("not JSON in UTF-8") from None
        if not isinstance(fields, dict):
            raise InvalidInputError("not a JSON object")
        return fields

    def failure(self, error: RegoloError) -> bytes:
        """Return the line of OUT.errors: this one with its number and error, so that it can be run again."""
        try:
            given = self.fields()
        except InvalidInputError:
            given = {"input": self.raw.decode(errors="backslashreplace")}
        words = _OF_THIS_RUN.sub("", str(error)) if isinstance(error, InvalidInputError) else str(error)
        told = {"type": type(error).__name__, "message": words}
        known = {name: getattr(error, name, None) for name in ("status_code", "request_id")}
        told |= {name: value for name, value in known.items() if value}
        # What an earlier run has added gives way.
        kept = {name: value for name, value in given.items() if name not in {"line", "error"}}
        return _encoded({"line": self.number, "error": told, **kept})

    def is_answered_by(self, ranking: dict[str, Any]) -> bool:
        """Return whether a line of OUT has this one's id, and its documents' ids where it names them."""
        try:
            fields = self.fields()
            ids = _document_ids(fields["documents"])
            named = [(result["index"], result.get("id")) for result in ranking["results"]]
            return _same(fields["id"], ranking["id"]) and all(_same(ids[index], name) for index, name in named)
        except (InvalidInputError, LookupError, TypeError, AttributeError):
            return False

    def is_failed_by(self, failure: dict[str, Any]) -> bool:
        """Return whether a line of OUT.errors has this one's id, where there is one."""
        with suppress(InvalidInputError):
            return _same(self.fields().get("id"), failure.get("id"))
        return True


class _Query(NamedTuple):
    """A line of IN under way, without the texts, which are the client's now."""

    line: _Line
    id: Any = None
    document_ids: list[Any] = []  # noqa: RUF012 - of a line that is refused; nobody changes it
    refusal: InvalidInputError | None = None

    def ranking(self, response: RerankResponse) -> bytes:
        """Return the line of OUT."""
        results = []
        for result in response.results:
            told = {"index": result.index, "relevance_score": result.relevance_score}
            name = self.document_ids[result.index]
            results.append(told if name is None else told | {"id": name})
        return _encoded({"id": self.id, "results": results})


def _encoded(fields: dict[str, Any]) -> bytes:
    # ASCII: no character in it ends a line for any reader, and half a surrogate pair stays what it is.
    return json.dumps(fields).encode() + b"\n"


def _same(one: Any, other: Any) -> bool:
    return json.dumps(one) == json.dumps(other)


def _lines(source: BinaryIO) -> Iterator[_Line]:
    end = 0
    for number, raw in enumerate(source, 1):
        end += len(raw)
        if text := raw.removeprefix(codecs.BOM_UTF8 if number == 1 else b"").strip():
            yield _Line(number, end, text)


def _read(line: _Line) -> tuple[_Query, tuple[str, list[str]]]:
    """Return the query of a line, and what the client ranks; for a line that is refused here, what it refuses too."""
    try:
        fields = line.fields()
        name, query, documents = (_field(fields, key) for key in ("id", "query", "documents"))
        texts = _texts(documents)
    except InvalidInputError as error:
        return _Query(line, refusal=error), ("", [])
    return _Query(line, name, _document_ids(documents)), (query, texts)


def _field(fields: dict[str, Any], name: str) -> Any:
    if fields.get(name) is None:
        raise InvalidInputError(f'no field "{name}"')
    return fields[name]


def _texts(documents: Any) -> list[str]:
    if not isinstance(documents, list):
        raise InvalidInputError("documents: must be a list of strings or objects")
    return [_text(index, document) for index, document in enumerate(documents)]


def _text(index: int, document: Any) -> str:
    text = document.get("text") if isinstance(document, dict) else document
    if not isinstance(text, str):
        raise InvalidInputError(f'documents[{index}]: must be a string, or an object with a string in its field "text"')
    return text


def _document_ids(documents: list[Any]) -> list[Any]:
    return [document.get("id") if isinstance(document, dict) else None for document in documents]


class _Finished:
    """OUT or OUT.errors: the whole lines that it has, and those that are added.

    Attributes:
        path: The file.
        count: How many lines there are.
    """

    def __init__(self, path: Path, first: str, second: str) -> None:
        self.path = path
        self.count = 0
        self._begins = f'{{"{first}": '.encode()
        self._second = second
        self._end = 0
        self._is_cut = False
        self._file: FileIO | None = None

    def lines(self) -> Iterator[dict[str, Any]]:
        """Yield the whole lines."""
        with suppress(FileNotFoundError), self.path.open("rb") as file:
            for raw in file:
                self._is_cut = not raw.endswith(b"\n")
                if self._is_cut and self._may_be_ours(raw):
                    return
                yield self._written(raw)
                self.count += 1
                self._end += len(raw)

    def _may_be_ours(self, raw: bytes) -> bool:
        """Return whether what was cut short began as a line of this file."""
        if not raw.startswith(self._begins):
            return self._begins.startswith(raw)
        with suppress(ValueError, RecursionError):  # all but its line feed may be there
            return self._second in json.loads(raw)
        return True

    def _written(self, raw: bytes) -> dict[str, Any]:
        with suppress(ValueError, RecursionError):
            fields = json.loads(raw)
            if isinstance(fields, dict) and not self._is_cut:
                return fields
        raise InvalidInputError(f"{self.path}, line {self.count + 1}: not written by this command; name another OUT")

    def cut(self) -> None:
        """Take back half a line at the end."""
        if self._is_cut:
            os.truncate(self.path, self._end)

    def add(self, line: bytes) -> None:
        """Add a line, in one write as long as there is room for it."""
        try:
            if self._file is None:
                self._file = self.path.open("ab", buffering=0)
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            raise StoppedError(f"{self.path}: {error.strerror}; run again, it goes on where it was") from error
        self.count += 1

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class Bulk:
    """One run over a file of queries.

    Attributes:
        size: Bytes of IN; None where nobody knows.
        at: Bytes of IN that are behind the run.
    """

    def __init__(self, source: BinaryIO, name: str, out: _Finished, errors: _Finished) -> None:
        self._name = name
        self._out = out
        self._errors = errors
        self.at = 0
        self._todo = self._unfinished(_lines(source))
        status = _status(source)
        self.size = status.st_size if status and stat.S_ISREG(status.st_mode) else None
        self._before = (out.count, errors.count)
        self._held: list[tuple[_Finished, _Line, bytes]] = []
        self._doubtful = False
        self._tokens = 0
        self._requests = 0
        self._started = time.monotonic()

    def _unfinished(self, lines: Iterator[_Line]) -> Iterator[_Line]:
        """Walk IN beside what is finished, and return the lines that are not."""
        rankings, failures = self._out.lines(), self._errors.lines()
        failure = next(failures, None)
        for line in lines:
            if failure is not None and failure.get("line") == line.number:
                if not line.is_failed_by(failure):
                    raise self._foreign(self._errors)
                failure = next(failures, None)
            elif (ranking := next(rankings, None)) is None:
                lines = chain([line], lines)
                break
            elif not line.is_answered_by(ranking):
                raise self._foreign(self._out)
            self.at = line.end
        if next(rankings, None) is not None:
            raise self._foreign(self._out)
        if failure is not None:
            raise self._foreign(self._errors)
        self._out.cut()
        self._errors.cut()
        return lines

    def _foreign(self, file: _Finished) -> InvalidInputError:
        return InvalidInputError(
            f"{file.path}, line {file.count + 1}: does not belong to {self._name}; name another OUT, or remove "
            f"{self._out.path} and {self._errors.path} to start anew"
        )

    @property
    def failed(self) -> int:
        """How many lines OUT.errors has."""
        return self._errors.count

    def __str__(self) -> str:
        """Say what has been done."""
        ranked, failed = self._out.count - self._before[0], self._errors.count - self._before[1]
        before = sum(self._before)
        tokens = f" and {self._tokens:,} tokens" if self._tokens else ""
        finished = f", {before:,} finished before" if before else ""
        seen = f" (see {self._errors.path})" if self._errors.count else ""
        return (
            f"{ranked:,} ranked with {self._requests:,} requests{tokens}, {failed:,} failed{seen}{finished}; "
            f"{time.monotonic() - self._started:.1f} s"
        )

    def rank(self, client: RegoloClient, advance: Advance) -> None:
        """Rank what is not finished.

        Args:
            client: Who ranks, with its options.
            advance: Called with the bytes of IN that are finished, and with the rate of queries.

        Raises:
            StoppedError: No query is to blame: the key, the budget, the rate limit, the connection, the service or
                the disk. What is finished is in the files, and the next run goes on there.
            InvalidInputError: An option is wrong.
        """
        waiting: deque[_Query] = deque()

        def pairs() -> Iterator[tuple[str, list[str]]]:
            for line in self._todo:
                query, pair = _read(line)
                waiting.append(query)
                yield pair

        for count, outcome in enumerate(client.rerank_many(pairs(), return_exceptions=True), 1):
            query = waiting.popleft()
            self._finish(query, outcome, client)
            rate = count / (time.monotonic() - self._started)
            advance(query.line.end - self.at, f"{rate:,.1f} queries/s")
            self.at = query.line.end
        if self._held:
            self._probe(client)
            self._write()

    def _finish(self, query: _Query, outcome: RerankResponse | RegoloError, client: RegoloClient) -> None:
        if isinstance(outcome, RerankResponse):
            self._held.append((self._out, query.line, query.ranking(outcome)))
            self._requests += outcome.usage.requests
            self._tokens += outcome.usage.total_tokens or 0
        else:
            error = query.refusal or outcome
            if _would_go_on(error):
                raise self._stopped(error, query.line)
            self._held.append((self._errors, query.line, query.line.failure(error)))
            self._doubtful |= not _is_refused(error, query)
        if self._doubtful and len(self._held) == _HELD:
            self._probe(client)
        if not self._doubtful:
            self._write()

    def _probe(self, client: RegoloClient) -> None:
        """Stop, unless the service answers another query."""
        try:
            client.rerank(*_PROBE)
        except InvalidInputError:
            raise
        except RegoloError as error:
            raise self._stopped(error, self._held[0][1]) from error
        self._doubtful = False

    def _write(self) -> None:
        for file, _, line in self._held:
            file.add(line)
        self._held.clear()

    def _stopped(self, error: RegoloError, line: _Line) -> StoppedError:
        first = self._held[0][1] if self._held else line
        return StoppedError(f"stopped: {error}; run again, it goes on at line {first.number} of {self._name}")


def _is_refused(error: RegoloError, query: _Query) -> bool:
    """Return whether a query was refused before anything was sent; other refusals are those of an option."""
    return query.refusal is not None or (isinstance(error, InvalidInputError) and bool(_OF_THIS_RUN.match(str(error))))


def _would_go_on(error: RegoloError) -> bool:
    """Return whether the next query would surely meet the same failure."""
    if isinstance(error, APIConnectionError):
        return isinstance(error.__cause__, httpx.ConnectError | httpx.ConnectTimeout | httpx.ProxyError)
    if isinstance(error, APIStatusError) and error.type == "budget_exceeded":
        return True
    return isinstance(error, AuthenticationError | NotFoundError | RateLimitError)


def _status(file: BinaryIO) -> os.stat_result | None:
    with suppress(OSError):
        return os.fstat(file.fileno())
    return None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keep other runs from a file, which is there from now on."""
    with path.open("ab") as file:
        with suppress(ImportError, OSError):  # as on Windows, and where a filesystem has no locks
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InvalidInputError(f"{path}: another run is writing it") from None
        yield


@contextmanager
def resumed(client: RegoloClient, source: BinaryIO, name: str, path: Path) -> Iterator[Bulk]:
    """Begin a run, or go on with one that was stopped.

    Args:
        client: Who will rank.
        source: IN: one JSON object a line, with `id`, `query` and `documents`.
        name: What it is called.
        path: OUT; OUT.errors stands beside it.

    Raises:
        InvalidInputError: OUT cannot be written, is being written, is IN, or belongs to another one.
        MissingAPIKeyError: The host demands a key, and there is none.
    """
    client.rerank_many(())  # refuses a key before any file is touched
    out, errors = _Finished(path, "id", "results"), _Finished(Path(f"{path}.errors"), "line", "error")
    given = _status(source)
    with ExitStack() as files:
        try:
            for file in (out, errors):
                if file.path.exists():
                    if not file.path.is_file():
                        raise InvalidInputError(f"{file.path}: OUT must be a file")
                    if given and os.path.samestat(given, file.path.stat()):
                        raise InvalidInputError(f"{file.path}: is the input too; name another OUT")
                files.enter_context(closing(file))
            files.enter_context(_locked(path))
            run = Bulk(source, name, out, errors)
        except OSError as error:
            raise InvalidInputError(f"{error.filename or name}: {error.strerror}") from None
        yield run
