"""A progress bar where somebody sees it: on a terminal and in a notebook."""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from regolo_rerank.errors import InvalidInputError

__all__ = ["Advance", "progress"]


class Advance(Protocol):
    """Moves a bar on."""

    def __call__(self, count: int = 1, note: str = "", /) -> None:
        """Tell how many things more are done, and what to say behind the bar."""


@contextmanager
def progress(total: int | None, *, unit: str, initial: int = 0, shown: bool = True) -> Iterator[Advance]:
    """Give a function to call for what is done, and show rate and time left on standard error meanwhile.

    Args:
        total: How many things there are; None where nobody knows.
        unit: What one of them is called; "B" for bytes, which are shown in thousands and millions.
        initial: How many of them were done before.
        shown: Whether there is a bar at all. Where nobody sees it, as in a log file or a service, there is none either.

    Raises:
        InvalidInputError: tqdm is not installed.
    """
    if not shown or sys.stderr is None:
        yield lambda *_: None
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # in a notebook without widgets it falls back to text, and says so
            from tqdm.auto import tqdm
    except ImportError:
        raise InvalidInputError(
            'show_progress: a bar needs tqdm: pip install "regolo_rerank[progress]", or leave it out'
        ) from None
    in_a_notebook = "ipykernel" in sys.modules
    hidden = False if in_a_notebook else None
    with tqdm(total=total, unit=unit, unit_scale=unit == "B", initial=initial, disable=hidden) as bar:

        def advance(count: int = 1, note: str = "", /) -> None:
            bar.set_postfix_str(note, refresh=False)
            bar.update(count)

        yield advance
