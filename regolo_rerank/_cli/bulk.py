"""Rank a file of queries: `regolo-rerank bulk IN OUT`."""

import gzip
import os
import re
import stat
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Final

import httpx

from regolo_rerank._cli.output import Output, StoppedError
from regolo_rerank._cli.queries import Line, Lines, Query, describe, is_about_pair, parse_query
from regolo_rerank._display.progress import Advance
from regolo_rerank._display.tables import clip
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

__all__ = ["BulkRun", "resume", "tell_each_minute"]

_HELD: Final = 8
"""Finished lines held back at most, until it is known whether a failure is the query's own or the service's."""
_SHOWN_REASONS: Final = 3
_KNOWN_REASONS: Final = 100
_OPTIONS: Final = {"model", "top_n", "score_threshold", "instruction", "prompt_format", "max_document_chars"}
"""What rankings depend on, beside the server."""
_PROBE: Final = ("Is this service working?", ["It is."])


class BulkRun:
    """One run over a file of queries.

    Args:
        lines: IN.
        size: Its bytes; None where nobody knows.
        output: OUT.
        allow_changed_options: Whether OUT may be continued with other options than it was made with.

    Attributes:
        size: Bytes of IN; None where nobody knows.
        at: Bytes of IN that are behind the run.
    """

    def __init__(self, lines: Lines, size: int | None, output: Output, *, allow_changed_options: bool) -> None:
        self._lines = lines
        self._output = output
        self.size = size
        self.at = output.skip_finished(lines, lines.name, allow_changed_options=allow_changed_options)
        self._before = (output.ranked, output.failed)
        self._held: list[tuple[Line, bytes, RegoloError | None]] = []
        self._doubtful = False
        self._reasons: Counter[tuple[type, str]] = Counter()
        self._examples: dict[tuple[type, str], str] = {}
        self._tokens = 0
        self._cost = 0.0
        self._requests = 0
        self._started = time.monotonic()

    @property
    def is_complete(self) -> bool:
        """Whether each line that was read has its ranking."""
        return not self._output.failed and self._lines.half is None

    def summarize(self) -> list[str]:
        """Return in some lines what has been done, and why queries failed."""
        ranked, failed = self._output.ranked - self._before[0], self._output.failed - self._before[1]
        before = sum(self._before)
        tokens = f", {self._tokens:,} tokens" if self._tokens else ""
        cost = f", {self._cost:,.6f} US dollars" if self._cost else ""
        finished = f", {before:,} finished before" if before else ""
        seen = f" (see {self._output.errors_path})" if self._output.failed else ""
        summary = (
            f"{ranked:,} ranked with {self._requests:,} requests{tokens}{cost}, {failed:,} failed{seen}{finished}; "
            f"{time.monotonic() - self._started:.1f} s"
        )
        commonest = self._reasons.most_common(_SHOWN_REASONS)
        reasons = [f"{count:,} failed like this: {clip(self._examples[reason], 200)}" for reason, count in commonest]
        half = self._lines.half
        left = [f"line {half} of {self._lines.name} is not complete, and left for another run"] if half else []
        return [summary, *reasons, *left]

    def rank(self, client: RegoloClient, advance: Advance) -> None:
        """Rank what is not finished.

        Args:
            client: Who ranks, with its options.
            advance: Called with the bytes of IN that are finished, and with queries, failures and rate in words.

        Raises:
            StoppedError: No query is to blame: the key, the budget, the rate limit, the connection, the service or
                the disk. What is finished is in the files, and the next run goes on there.
            InvalidInputError: An option is wrong.
        """
        waiting: deque[Query] = deque()

        def pairs() -> Iterator[tuple[str, list[str]]]:
            for line in self._lines:
                query, pair = parse_query(line)
                waiting.append(query)
                yield pair

        for count, outcome in enumerate(client.rerank_many(pairs(), return_exceptions=True), 1):
            query = waiting.popleft()
            self._finish(query, outcome, client)
            advanced, self.at = query.line.end - self.at, query.line.end
            advance(advanced, self._describe_progress(count))
        if self._held:
            self._probe(client)
            self._write()

    def _describe_progress(self, count: int) -> str:
        rate = count / (time.monotonic() - self._started)
        return f"{sum(self._before) + count:,} queries, {self._output.failed:,} failed, {rate:,.1f}/s"

    def _finish(self, query: Query, outcome: RerankResponse | RegoloError, client: RegoloClient) -> None:
        if isinstance(outcome, RerankResponse):
            self._held.append((query.line, query.encode_ranking(outcome), None))
            self._requests += outcome.usage.requests
            self._tokens += outcome.usage.total_tokens or 0
            self._cost += outcome.usage.cost or 0.0
        else:
            error = query.refusal or outcome
            if _would_recur(error):
                raise self._stop(error, query.line)
            self._held.append((query.line, query.line.encode_failure(error), error))
            self._doubtful |= query.refusal is None and not is_about_pair(error)
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
            raise self._stop(error, self._held[0][0]) from error
        self._doubtful = False

    def _write(self) -> None:
        for line, written, error in self._held:
            if error is None:
                self._output.add_ranking(line, written)
            else:
                self._output.add_failure(line, written)
                self._count_reason(error)
        self._held.clear()

    def _count_reason(self, error: RegoloError) -> None:
        """Count why a query failed; the same words with other numbers are the same reason."""
        message = describe(error)
        reason = (type(error), re.sub(r"\d+|, request .*", "", message))
        if reason in self._reasons or len(self._reasons) < _KNOWN_REASONS:
            self._reasons[reason] += 1
            self._examples.setdefault(reason, message)

    def _stop(self, error: RegoloError, line: Line) -> StoppedError:
        first = self._held[0][0] if self._held else line
        return StoppedError(f"stopped: {error}; run again, it goes on at line {first.number} of {self._lines.name}")


def _would_recur(error: RegoloError) -> bool:
    """Return whether the next query would surely meet the same failure."""
    if isinstance(error, APIConnectionError):
        return isinstance(error.__cause__, httpx.ConnectError | httpx.ConnectTimeout | httpx.ProxyError)
    if isinstance(error, APIStatusError) and error.type == "budget_exceeded":
        return True
    return isinstance(error, AuthenticationError | NotFoundError | RateLimitError)


def _get_options(client: RegoloClient) -> dict[str, Any]:
    """Return what rankings depend on; a query of the URL, which might hold a key, is left out."""
    server = client.endpoint().url.copy_with(query=None)
    return client.model_dump(mode="json", include=_OPTIONS) | {"base_url": str(server)}


def _stat(file: "BinaryIO | gzip.GzipFile") -> os.stat_result | None:
    with suppress(OSError):
        return os.fstat(file.fileno())
    return None


@contextmanager
def resume(
    client: RegoloClient,
    source: "BinaryIO | gzip.GzipFile",
    name: str,
    path: Path,
    *,
    allow_changed_options: bool = False,
) -> Iterator[BulkRun]:
    """Begin a run, or go on with one that was stopped.

    Args:
        client: Who will rank.
        source: IN: one JSON object a line, with `query`, `documents` and, if given, `id`.
        name: What it is called.
        path: OUT; OUT.errors and OUT.state stand beside it.
        allow_changed_options: Whether OUT may be continued with other options than it was made with.

    Raises:
        InvalidInputError: OUT cannot be written, is being written, is IN, belongs to another one, or was made with
            other options.
        MissingAPIKeyError: The host demands a key, and there is none.
    """
    client.rerank_many(())  # refuses a key before any file is touched
    output = Output(path, _get_options(client))
    with ExitStack() as files:
        try:
            lines, status = Lines(source, name), _stat(source)
            files.enter_context(output.open(status))
            is_sized = status and stat.S_ISREG(status.st_mode) and not isinstance(source, gzip.GzipFile)
            size = status.st_size if status and is_sized else None
            run = BulkRun(lines, size, output, allow_changed_options=allow_changed_options)
        except OSError as error:
            raise InvalidInputError(f"{error.filename or name}: {error.strerror}") from None
        yield run


def tell_each_minute(run: BulkRun, tell: Callable[[str], None]) -> Advance:
    """Return what to call in place of a bar where nobody would see one.

    Args:
        run: What goes on.
        tell: Called once a minute with how far it is.
    """
    due = time.monotonic() + 60

    def advance(_count: int = 1, note: str = "", /) -> None:
        nonlocal due
        if time.monotonic() >= due:
            due = time.monotonic() + 60
            tell(f"{run.at / run.size:.0%} of IN, {note}" if run.size else note)

    return advance
