"""Rank the documents of many queries: `regolo-rerank bulk IN OUT`.

OUT is the only state of a run. Each line of IN that is not blank becomes one line of OUT, in the same order, with a
digest of the line and of the options. To resume, the command compares the digests, discards a last line of OUT that is
incomplete, and continues with the next line of IN.
"""

import json
import os
import re
import shutil
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import IO, Any, Final

from regolo_rerank._files import Document, decode_line, open_binary, parse_object, read_document, read_id
from regolo_rerank.cli.options import UsageError, open_client, server_of, shell_words
from regolo_rerank.cli.terminal import announce_input, err, progress_bar, say
from regolo_rerank.client import RegoloClient
from regolo_rerank.errors import ContextLengthError, InvalidInputError, RegoloError
from regolo_rerank.results import RerankResponse

__all__ = ["run"]

Outcome = RerankResponse[Document] | RegoloError

_FIRST: Final = 10
"""At least one of this many first lines must be a query, or the command assumes that IN is something else."""
_PROBE: Final = ("Is this service working?", ["It is."])
_OPTIONS: Final = "extra_body instruction max_document_chars model prompt_format score_threshold top_n"
"""Options that determine a ranking, together with the server."""


@dataclass(frozen=True, slots=True)
class _Line:
    """A line of IN that is not blank: a query or, if `problem` is set, something else."""

    number: int
    text: str
    id: str | int
    query: str = ""
    documents: list[Document] = field(default_factory=list)
    problem: InvalidInputError | None = None

    def encode(self, outcome: Outcome, options: str) -> bytes:
        """Return the line of OUT, with a digest of this line and of the options."""
        digest = {"digest": f"{_digest(self.text)}-{options}"}
        if isinstance(outcome, RerankResponse):
            results = []
            for result in outcome.results:
                name = {} if result.document.id is None else {"id": result.document.id}
                results.append({"index": result.index, "relevance_score": result.relevance_score} | name)
            return _encode({"id": self.id, "results": results} | digest)
        error = {"type": type(outcome).__name__, "message": _message(outcome)}
        known = {name: getattr(outcome, name, None) for name in ("status_code", "request_id")}
        error |= {name: value for name, value in known.items() if value}
        failure = {"id": self.id, "error": error, "input": parse_object(self.text) or self.text} | digest
        try:
            return _encode(failure)
        except ValueError:  # the input contains NaN, which is not JSON
            return _encode(failure | {"input": self.text})


@dataclass(slots=True)
class _Tally:
    """Results of a run so far.

    Attributes:
        source: Name of IN.
        digest: Digest of the options.
        before: Number of rankings in OUT that earlier runs made.
        titles: Whether a title was scored in front of a text.
        incomplete: Number of a last line of IN that is still being written.
        next_line: Where a run would resume.
    """

    source: str
    digest: str = ""
    ranked: int = 0
    failed: int = 0
    before: int = 0
    requests: int = 0
    tokens: int = 0
    cost: float = 0.0
    titles: bool = False
    incomplete: int | None = None
    next_line: int = 1
    reasons: Counter[str] = field(default_factory=Counter)
    started: float = field(default_factory=time.monotonic)

    def add(self, line: _Line, outcome: Outcome) -> None:
        self.next_line = line.number + 1
        if isinstance(outcome, RerankResponse):
            self.ranked += 1
            self.requests += outcome.usage.requests
            self.tokens += outcome.usage.total_tokens or 0
            self.cost += outcome.usage.cost or 0.0
        else:
            self.failed += 1
            reason = re.sub(r", request .*", "", _message(outcome))[:300]
            # A message may contain a number, so there could be as many reasons as lines.
            self.reasons[reason if len(self.reasons) < 100 or reason in self.reasons else "other reasons"] += 1

    def print(self) -> None:
        before = f", {self.before:,} finished before" if self.before else ""
        tokens = f", {self.tokens:,} tokens" if self.tokens else ""
        cost = f", cost {self.cost:,.6f}" if self.cost else ""
        spent = f"{self.requests:,} requests{tokens}{cost}, {time.monotonic() - self.started:.1f} s"
        titles = ". Titles were scored in front of the texts" if self.titles else ""
        say(f"{self.ranked:,} ranked, {self.failed:,} failed{before} ({spent}){titles}")
        for reason, count in self.reasons.most_common(3):
            say(f"{count:,} {'query' if count == 1 else 'queries'} failed: {reason}")
        if self.incomplete:
            say(f"line {self.incomplete} of {self.source} is incomplete. The next run will rank it.")


_Done = tuple[_Line, bool, int]
"""A line of IN that OUT has, whether it failed, and the end of its line of OUT in bytes."""


def run(source: str, out: str, *, retry_errors: bool, text_field: str, title_field: str, **options: Any) -> int:
    """Run the command and return its exit status."""
    path, tally = Path(out), _Tally(source)
    if out == "-":
        raise UsageError("OUT must be a file, so that a stopped run can resume")
    if retry_errors and not path.exists():
        raise UsageError(f"{out} does not exist. Run the command without --retry-errors first")
    announce_input(source, "queries, one per line")
    with open_client(options) as client, open_binary(source) as stream, _lock(path, source):
        determining = client.options.model_dump(mode="json", include=set(_OPTIONS.split()))
        tally.digest = _digest(json.dumps([server_of(options), text_field, title_field, determining], sort_keys=True))
        lines = _read(stream, source, text_field, title_field, tally)
        finished = _finished(path, lines, source, tally.digest)
        try:
            if retry_errors:
                _retry(client, path, finished, tally)
            else:
                _resume(client, path, finished, lines, tally)
        except InvalidInputError:
            raise
        except (KeyboardInterrupt, RegoloError) as error:
            tally.print()
            resume = f"Repeat the same command to resume at line {tally.next_line}."
            if isinstance(error, RegoloError):
                raise RegoloError(f"stopped: {error}. {resume}") from error
            say(f"interrupted. {resume}")
            raise
        tally.print()
    return 1 if tally.failed or tally.incomplete else 0


def _resume(client: RegoloClient, path: Path, finished: Iterator[_Done], lines: Iterator[_Line], tally: _Tally) -> None:
    """Rank the lines of IN that OUT does not have yet."""
    end = count = failed = 0
    for count, (line, has_failed, end) in enumerate(finished, 1):  # noqa: B007 - the last values are used below
        failed += has_failed
        tally.before += not has_failed
        tally.next_line = line.number + 1
    if path.stat().st_size > end:
        os.truncate(path, end)
    # Without a buffer, each finished line reaches the file even if the process is killed.
    with path.open("ab", buffering=0) as file, progress_bar() as bar:
        task = bar.add_task("", total=_count(tally.source), completed=count)
        for line, outcome in _rank(client, lines):
            _write(file, line.encode(outcome, tally.digest))
            tally.add(line, outcome)
            words = f"{tally.before + tally.ranked:,} ranked, {failed + tally.failed:,} failed"
            bar.update(task, advance=1, description=words)
    if failed:
        tally.failed += failed
        say(f"{failed:,} queries failed in earlier runs. Add --retry-errors to rank them again.")


def _retry(client: RegoloClient, path: Path, finished: Iterator[_Done], tally: _Tally) -> None:
    """Rank the failed lines of OUT again, and replace them."""
    positions: deque[int] = deque()

    def failed() -> Iterator[_Line]:
        for position, (line, has_failed, _) in enumerate(finished):
            tally.before += not has_failed
            if has_failed:
                positions.append(position)
                yield line

    replaced: dict[int, bytes] = {}
    try:
        for line, outcome in _rank(client, failed()):
            replaced[positions.popleft()] = line.encode(outcome, tally.digest)
            tally.add(line, outcome)
    finally:
        new = path.with_name(f"{path.name}.new")
        with path.open("rb") as old, new.open("wb") as file:
            for position, raw in enumerate(old):
                _write(file, replaced.get(position, raw))
            file.flush()
            os.fsync(file.fileno())
        shutil.copymode(path, new)
        new.replace(path)


def _rank(client: RegoloClient, lines: Iterable[_Line]) -> Iterator[tuple[_Line, Outcome]]:
    """Yield the outcome of each line, in order.

    Raises:
        RegoloError: A query failed, and so did the small request that was sent to see if the service works.
    """
    waiting: deque[_Line] = deque()

    def pairs() -> Iterator[tuple[str, list[Document]]]:
        for line in lines:
            waiting.append(line)
            yield line.query, line.documents

    ranked = client.rerank_many(pairs(), text=lambda document: document.text, return_exceptions=True)
    with closing(ranked) as outcomes:
        for outcome in outcomes:
            line = waiting.popleft()
            if isinstance(outcome, RegoloError) and not (line.problem or isinstance(outcome, ContextLengthError)):
                client.rerank(*_PROBE)
            yield line, line.problem or outcome


def _read(stream: IO[bytes], source: str, text_field: str, title_field: str, tally: _Tally) -> Iterator[_Line]:
    """Yield the lines of IN that are not blank.

    Raises:
        InvalidInputError: The first lines are not queries.
    """

    def read() -> Iterator[_Line]:
        for number, raw in enumerate(stream, 1):
            # A byte that is not UTF-8 becomes an escape that JSON does not have, so only its line is rejected.
            text = (decode_line(raw, 1, source) if number == 1 else raw.decode(errors="backslashreplace")).strip()
            if text and not raw.endswith(b"\n") and parse_object(text) is None:
                tally.incomplete = number
            elif text:
                line = _parse(_Line(number, text, number), text_field, title_field)
                tally.titles |= any(document.title for document in line.documents)
                yield line

    lines = read()
    first: list[_Line] = []
    while (line := next(lines, None)) and len(first) < _FIRST:
        first.append(line)
        if not line.problem:
            yield from chain(first, lines)
            return
    if first:
        shape = '{"query": "...", "documents": ["..."]}'
        raise InvalidInputError(f"{source}, line {first[0].number}: {first[0].problem}. Expected a line like {shape}")


def _parse(line: _Line, text_field: str, title_field: str) -> _Line:
    """Return a line with its query, or with its problem."""
    fields = parse_object(line.text)
    try:
        name = read_id(fields or {})
        line = replace(line, id=line.number if name is None else name)
        query, values = _check_query(fields)
        documents = [read_document(value, text_field=text_field, title_field=title_field) for value in values]
    except InvalidInputError as error:
        return replace(line, problem=error)
    return replace(line, query=query, documents=documents)


def _check_query(fields: dict[str, Any] | None) -> tuple[str, list[Any]]:
    if fields is None:
        raise InvalidInputError("not a JSON object")
    query, documents = fields.get("query"), fields.get("documents")
    if not isinstance(query, str) or not query.strip():
        raise InvalidInputError('"query" must be a string that is not blank')
    if not isinstance(documents, list):
        raise InvalidInputError('"documents" must be a list')
    return query, documents


def _finished(path: Path, lines: Iterator[_Line], source: str, options: str) -> Iterator[_Done]:
    """Yield the lines of IN that OUT has.

    Raises:
        InvalidInputError: OUT belongs to another IN or to other options.
    """
    end = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if not raw.endswith(b"\n"):
                return
            entry = parse_object(raw.decode(errors="replace")) or {}
            digest, _, made_with = str(entry.get("digest")).partition("-")
            if not made_with:
                raise InvalidInputError(f"{path}, line {number}: `bulk` did not write it. Choose another OUT")
            if made_with != options:
                advice = "Repeat the command with the same options, or choose another OUT"
                raise InvalidInputError(f"{path} was made with another server, model or other options. {advice}")
            line = next(lines, None)
            if line is None:
                raise InvalidInputError(f"{source} has fewer lines than {path}. Choose another OUT")
            if digest != _digest(line.text):
                change = f"{source}, line {line.number} has changed since it was ranked"
                raise InvalidInputError(f"{change}. Choose another OUT, or delete {path}")
            end += len(raw)
            yield line, "error" in entry, end


def _write(file: IO[bytes], raw: bytes) -> None:
    """Write a line. If the disk is full, the file may get a part of it, which the next run discards."""
    try:
        while raw:
            raw = raw[file.write(raw) :]
    except OSError as error:
        raise RegoloError(f"{file.name}: {error.strerror}") from error


@contextmanager
def _lock(path: Path, source: str) -> Iterator[None]:
    """Create OUT if it does not exist, and keep other runs away from it."""
    try:
        if path.exists() and not path.is_file():
            raise UsageError(f"{path} must be a file, so that a stopped run can resume")
        if source != "-" and path.exists() and path.samefile(source):
            raise UsageError(f"{path} is the input too. Choose another OUT")
        file = path.open("ab")
    except OSError as error:
        raise InvalidInputError(f"{error.filename}: {error.strerror}") from None
    with file:
        with suppress(ImportError):  # Windows has no fcntl
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InvalidInputError(f"{path}: another run is writing it") from None
        yield


def _count(source: str) -> int | None:
    """Return the number of lines of IN that are not blank, for the progress bar."""
    if not (Path(source).is_file() and err().is_terminal):
        return None
    with open_binary(source) as stream:
        return sum(1 for raw in stream if raw.strip())


def _digest(text: str) -> str:
    return blake2b(text.encode(errors="surrogatepass"), digest_size=6).hexdigest()


def _encode(fields: dict[str, Any]) -> bytes:
    # In ASCII, a line of JSON has no character that a reader could take for the end of a line.
    return json.dumps(fields, allow_nan=False).encode() + b"\n"


def _message(error: RegoloError) -> str:
    return shell_words(re.sub(r"^pairs\[\d+\]: ", "", str(error)))
