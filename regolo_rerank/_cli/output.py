"""OUT and OUT.errors of `regolo-rerank bulk`: how far they reach, and what is added to them.

What is finished is always a beginning of IN: each of its lines is one line of OUT or of OUT.errors, in IN's order. So
the files themselves say where to go on, and all that is ever taken back is a line that was cut short.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regolo_rerank._cli.queries import Line
from regolo_rerank.errors import InvalidInputError, RegoloError

if TYPE_CHECKING:
    from io import FileIO

__all__ = ["OutputFile", "StoppedError", "lock", "skip_finished"]


class StoppedError(RegoloError):
    """The run ended before its input, because of what no query is to blame for; it goes on when it is run again."""


class OutputFile:
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

    def read_lines(self) -> Iterator[dict[str, Any]]:
        """Yield the whole lines."""
        with suppress(FileNotFoundError), self.path.open("rb") as file:
            for raw in file:
                self._is_cut = not raw.endswith(b"\n")
                if self._is_cut and self._may_be_ours(raw):
                    return
                yield self._parse(raw)
                self.count += 1
                self._end += len(raw)

    def _may_be_ours(self, raw: bytes) -> bool:
        """Return whether what was cut short began as a line of this file."""
        if not raw.startswith(self._begins):
            return self._begins.startswith(raw)
        with suppress(ValueError, RecursionError):  # all but its line feed may be there
            return self._second in json.loads(raw)
        return True

    def _parse(self, raw: bytes) -> dict[str, Any]:
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
        """Close the file, if anything was added."""
        if self._file is not None:
            self._file.close()


def skip_finished(lines: Iterator[Line], name: str, out: OutputFile, errors: OutputFile) -> tuple[int, Iterator[Line]]:
    """Walk IN beside what is finished.

    Args:
        lines: The lines of IN.
        name: What IN is called.
        out: OUT; half a line at its end is taken back.
        errors: OUT.errors, just the same.

    Returns:
        The bytes of IN that are finished, and the lines that are not.

    Raises:
        InvalidInputError: The files belong to another IN; they are not touched.
    """

    def refuse(file: OutputFile) -> InvalidInputError:
        return InvalidInputError(
            f"{file.path}, line {file.count + 1}: does not belong to {name}; name another OUT, or remove {out.path} "
            f"and {errors.path} to start anew"
        )

    at = 0
    rankings, failures = out.read_lines(), errors.read_lines()
    failure = next(failures, None)
    for line in lines:
        if failure is not None and failure.get("line") == line.number:
            if not line.is_reported_by(failure):
                raise refuse(errors)
            failure = next(failures, None)
        elif (ranking := next(rankings, None)) is None:
            lines = chain([line], lines)
            break
        elif not line.is_answered_by(ranking):
            raise refuse(out)
        at = line.end
    if next(rankings, None) is not None:
        raise refuse(out)
    if failure is not None:
        raise refuse(errors)
    out.cut()
    errors.cut()
    return at, lines


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Keep other runs from a file, which is there from now on."""
    with path.open("ab") as file:
        with suppress(ImportError):  # as on Windows
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InvalidInputError(f"{path}: another run is writing it") from None
        yield
