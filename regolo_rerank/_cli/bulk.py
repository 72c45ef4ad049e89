"""Rank a file of queries: `regolo-rerank bulk IN OUT`."""

import os
import stat
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Final

import httpx

from regolo_rerank._cli.output import Output, StoppedError
from regolo_rerank._cli.queries import Line, Lines, Query, is_about_pair, parse_query
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

__all__ = ["BulkRun", "resume"]

_HELD: Final = 8
"""Finished lines held back at most, until it is known whether a failure is the query's own or the service's."""
_OPTIONS: Final = {"model", "top_n", "score_threshold", "instruction", "prompt_format", "max_document_chars"}
"""What rankings depend on, beside the server."""
_PROBE: Final = ("Is this service working?", ["It is."])


class BulkRun:
    """One run over a file of queries.

    Attributes:
        size: Bytes of IN; None where nobody knows.
        at: Bytes of IN that are behind the run.
    """

    def __init__(self, source: BinaryIO, name: str, output: Output, *, allow_changed_options: bool) -> None:
        self._name = name
        self._output = output
        self._lines = Lines(source)
        self.at = output.skip_finished(self._lines, name, allow_changed_options=allow_changed_options)
        status = _stat(source)
        self.size = status.st_size if status and stat.S_ISREG(status.st_mode) else None
        self._before = (output.ranked, output.failed)
        self._held: list[tuple[Callable[[Line, bytes], None], Line, bytes]] = []
        self._doubtful = False
        self._tokens = 0
        self._requests = 0
        self._started = time.monotonic()

    @property
    def is_complete(self) -> bool:
        """Whether each line that was read has its ranking."""
        return not self._output.failed and self._lines.half is None

    def __str__(self) -> str:
        """Say what has been done."""
        ranked, failed = self._output.ranked - self._before[0], self._output.failed - self._before[1]
        before = sum(self._before)
        tokens = f" and {self._tokens:,} tokens" if self._tokens else ""
        finished = f", {before:,} finished before" if before else ""
        seen = f" (see {self._output.errors_path})" if self._output.failed else ""
        half = self._lines.half
        left = f"; line {half} of {self._name} is not complete, and left for another run" if half else ""
        return (
            f"{ranked:,} ranked with {self._requests:,} requests{tokens}, {failed:,} failed{seen}{finished}; "
            f"{time.monotonic() - self._started:.1f} s{left}"
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
        waiting: deque[Query] = deque()

        def pairs() -> Iterator[tuple[str, list[str]]]:
            for line in self._lines:
                query, pair = parse_query(line)
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

    def _finish(self, query: Query, outcome: RerankResponse | RegoloError, client: RegoloClient) -> None:
        if isinstance(outcome, RerankResponse):
            self._held.append((self._output.add_ranking, query.line, query.encode_ranking(outcome)))
            self._requests += outcome.usage.requests
            self._tokens += outcome.usage.total_tokens or 0
        else:
            error = query.refusal or outcome
            if _would_recur(error):
                raise self._stop(error, query.line)
            self._held.append((self._output.add_failure, query.line, query.line.encode_failure(error)))
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
            raise self._stop(error, self._held[0][1]) from error
        self._doubtful = False

    def _write(self) -> None:
        for add, line, written in self._held:
            add(line, written)
        self._held.clear()

    def _stop(self, error: RegoloError, line: Line) -> StoppedError:
        first = self._held[0][1] if self._held else line
        return StoppedError(f"stopped: {error}; run again, it goes on at line {first.number} of {self._name}")


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


def _stat(file: BinaryIO) -> os.stat_result | None:
    with suppress(OSError):
        return os.fstat(file.fileno())
    return None


@contextmanager
def resume(
    client: RegoloClient, source: BinaryIO, name: str, path: Path, *, allow_changed_options: bool = False
) -> Iterator[BulkRun]:
    """Begin a run, or go on with one that was stopped.

    Args:
        client: Who will rank.
        source: IN: one JSON object a line, with `id`, `query` and `documents`.
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
            files.enter_context(output.open(_stat(source)))
            run = BulkRun(source, name, output, allow_changed_options=allow_changed_options)
        except OSError as error:
            raise InvalidInputError(f"{error.filename or name}: {error.strerror}") from None
        yield run
