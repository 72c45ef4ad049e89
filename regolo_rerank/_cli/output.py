"""What `regolo-rerank bulk` writes: OUT, OUT.errors, and OUT.state, which says what the other two hold.

What is finished is always a beginning of IN. Each of its lines is one line of OUT.state, and one of OUT or OUT.errors,
in IN's order. That of OUT.state is written first: whatever ends a run, it is one line ahead of the others at most.
Between them stand the options by which the lines that follow were made.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any, Final

from regolo_rerank._cli.queries import Line, encode
from regolo_rerank.errors import InvalidInputError, RegoloError

if TYPE_CHECKING:
    from io import FileIO

__all__ = ["Output", "StoppedError"]

_RANKED: Final = b"+"
_FAILED: Final = b"-"
"""How a line of OUT.state begins; the digest of the line of IN follows."""
_OPTIONS: Final = b'{"options": '
_LOST: Final = RegoloError("failed in an earlier run, and what was said then is lost")


class StoppedError(RegoloError):
    """The run ended before its input, because of what no query is to blame for; it goes on when it is run again."""


class Output:
    """OUT with the files beside it.

    Attributes:
        path: OUT.
        errors_path: OUT.errors.

    Args:
        path: OUT.
        options: What rankings depend on, by name, as JSON.
    """

    def __init__(self, path: Path, options: dict[str, Any]) -> None:
        self.path = path
        self.errors_path = Path(f"{path}.errors")
        self._out = _File(path, b'{"id": ')
        self._errors = _File(self.errors_path, b'{"line": ')
        self._state = _File(Path(f"{path}.state"), _OPTIONS, _RANKED, _FAILED)
        self._options = options
        self._made_with: dict[str, Any] | None = None
        # OUT.state is cut last, as it has to know all that the others hold.
        self._files = (self._errors, self._out, self._state)

    @property
    def ranked(self) -> int:
        """How many lines OUT has."""
        return self._out.count

    @property
    def failed(self) -> int:
        """How many lines OUT.errors has."""
        return self._errors.count

    @contextmanager
    def open(self, given: os.stat_result | None) -> Iterator[None]:
        """Keep other runs from the files.

        Args:
            given: The status of IN, where it has one.

        Raises:
            InvalidInputError: OUT is no file, is IN, or is being written.
        """
        for file in self._files:
            if file.path.exists():
                if not file.path.is_file():
                    raise InvalidInputError(f"{file.path}: OUT must be a file")
                if given and os.path.samestat(given, file.path.stat()):
                    raise InvalidInputError(f"{file.path}: is the input too; name another OUT")
        with _lock(self.path):
            try:
                yield
            finally:
                for file in self._files:
                    file.close()

    def skip_finished(self, lines: Iterator[Line], name: str, *, allow_changed_options: bool) -> int:
        """Take the lines that are finished out of IN, and take back what was written by half.

        Args:
            lines: The lines of IN.
            name: What IN is called.
            allow_changed_options: Whether what is finished may have been made with other options.

        Returns:
            The bytes of IN up to the end of what is finished.

        Raises:
            InvalidInputError: The files belong to another IN, to nobody knows which, or to other options; they are not
                touched.
        """
        at = failed = 0
        finished = self._count_finished()
        if not allow_changed_options:
            self._check_options()
        with TemporaryFile() as lost:
            for entry in islice(self._read_state(), finished):
                line = next(lines, None)
                if line is None:
                    raise self._refuse(f"{name}: ends before what is finished")
                if entry[1:-1] != line.digest():
                    raise self._refuse(f"{name}, line {line.number}: is not what stood there before")
                if entry.startswith(_FAILED):
                    failed += 1
                    if failed > self._errors.kept:
                        lost.write(line.encode_failure(_LOST))
                at = line.end
            for file in self._files:
                file.cut()
            lost.seek(0)
            for failure in lost:
                self._errors.add(failure)
        return at

    def _count_finished(self) -> int:
        """Return how many lines of IN are finished, and keep what the files have of them."""
        finished, made_with = 0, None
        entries = {_RANKED: (self._out, self._out.read_lines()), _FAILED: (self._errors, self._errors.read_lines())}
        reach_end = [self._out, self._errors]
        for number, entry in enumerate(self._read_state(), 1):
            file, written = entries[entry[:1]]
            if next(written, None) is not None:
                if self.ranked:  # where OUT was removed, all starts anew
                    finished, made_with = number, self._made_with
                    for each in self._files:
                        each.keep()
            elif file is self._out:
                reach_end.clear()  # failures behind the last ranking are tried again
                break
            elif file in reach_end:
                reach_end.remove(file)
        for file in reach_end:
            if file.goes_on():
                raise InvalidInputError(
                    f"{file.path}, line {file.count + 1}: not in {self._state.path}, so nobody knows what was "
                    f"ranked; name another OUT, or remove what stands there"
                )
        self._made_with = made_with
        return finished

    def _read_state(self) -> Iterator[bytes]:
        """Yield what OUT.state has of lines, and note the options that it has between them."""
        for entry in self._state.read_lines():
            if not entry.startswith(_OPTIONS):
                yield entry
                continue
            try:
                self._made_with = dict(json.loads(entry)["options"])
            except (ValueError, TypeError, RecursionError):
                raise self._state.refuse(self._state.count) from None

    def _check_options(self) -> None:
        changes = [
            f"{name} was {json.dumps(was)}, and is {json.dumps(self._options[name])} now"
            for name, was in (self._made_with or {}).items()
            if name in self._options and self._options[name] != was
        ]
        if changes:
            raise InvalidInputError(
                f"{self.path}: {'; '.join(changes)}; name another OUT, take the same options, or mix them by "
                f"--allow-changed-options"
            )

    def _refuse(self, problem: str) -> InvalidInputError:
        return InvalidInputError(f"{problem}; name another OUT, or remove {self.path} to start anew")

    def add_ranking(self, line: Line, ranking: bytes) -> None:
        """Add a line to OUT."""
        self._add(line, _RANKED, self._out, ranking)

    def add_failure(self, line: Line, failure: bytes) -> None:
        """Add a line to OUT.errors."""
        self._add(line, _FAILED, self._errors, failure)

    def _add(self, line: Line, sign: bytes, file: "_File", written: bytes) -> None:
        if self._made_with != self._options:
            self._state.add(encode({"options": self._options}))
            self._made_with = self._options
        self._state.add(sign + line.digest() + b"\n")
        file.add(written)


class _File:
    """A file of whole lines, to which more are added.

    Attributes:
        path: Where it is.
        count: How many lines were read or added.
        kept: How many of those that were read stay.
    """

    def __init__(self, path: Path, *beginnings: bytes) -> None:
        self.path = path
        self.count = 0
        self.kept = 0
        self._beginnings = beginnings
        self._end = 0
        self._kept_end = 0
        self._file: FileIO | None = None

    def read_lines(self) -> Iterator[bytes]:
        """Yield the whole lines, from the first; half a one at the end is none."""
        self.count = self._end = 0
        with suppress(FileNotFoundError), self.path.open("rb") as file:
            for raw in file:
                if not any(begins.startswith(raw[: len(begins)]) for begins in self._beginnings):
                    raise self.refuse(self.count + 1)
                if raw.endswith(b"\n"):
                    self.count += 1
                    self._end += len(raw)
                    yield raw

    def refuse(self, number: int) -> InvalidInputError:
        """Return what to raise where a line cannot be this command's."""
        return InvalidInputError(f"{self.path}, line {number}: not written by this command; name another OUT")

    def goes_on(self) -> bool:
        """Return whether there is anything behind the lines that were read."""
        return self.path.exists() and self.path.stat().st_size > self._end

    def keep(self) -> None:
        """Remember that what was read so far stays."""
        self.kept, self._kept_end = self.count, self._end

    def cut(self) -> None:
        """Take back all but what stays."""
        self.count, self._end = self.kept, self._kept_end
        if self.goes_on():
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


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Keep other runs from a file, which is there from now on."""
    with path.open("ab") as file:
        with suppress(ImportError, OSError):  # as on Windows, and where a filesystem has no locks
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InvalidInputError(f"{path}: another run is writing it") from None
        yield
