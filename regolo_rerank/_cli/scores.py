"""Scores in a file, so that an evaluation that was interrupted goes on where it was."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from regolo_rerank.errors import InvalidInputError

__all__ = ["ScoreFile", "kept_scores"]


class ScoreFile:
    """As much of a mapping from pairs to scores as the option `cache` asks for."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database
        database.execute("PRAGMA synchronous = OFF")  # what a power cut takes is asked for again
        database.execute("CREATE TABLE IF NOT EXISTS scores (pair TEXT PRIMARY KEY, score REAL) WITHOUT ROWID")

    def get(self, pair: str, default: float | None = None) -> float | None:
        """Return the score of a pair, or the default where there is none."""
        row = self._database.execute("SELECT score FROM scores WHERE pair = ?", (pair,)).fetchone()
        return default if row is None else float(row[0])

    def __getitem__(self, pair: str) -> float:
        score = self.get(pair)
        if score is None:
            raise KeyError(pair)
        return score

    def __setitem__(self, pair: str, score: float) -> None:
        self._database.execute("INSERT OR REPLACE INTO scores VALUES (?, ?)", (pair, score))


@contextmanager
def kept_scores(path: Path) -> Iterator[ScoreFile]:
    """Open a file of scores, which is made where there is none; each score is in it as soon as it is set.

    Raises:
        InvalidInputError: It cannot be opened, or is something else.
    """
    try:
        with closing(sqlite3.connect(path, isolation_level=None)) as database:
            yield ScoreFile(database)
    except sqlite3.Error as error:
        raise InvalidInputError(f"{path}: not a file of scores: {error}") from None
