"""A progress bar where somebody sees it: on a terminal and in a notebook."""

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from regolo_rerank.errors import InvalidInputError

__all__ = ["progress"]


@contextmanager
def progress(total: int | None, *, unit: str, initial: int = 0, shown: bool = True) -> Iterator[Callable[[], object]]:
    """Give a function to call for each thing done, and show rate and time left on standard error meanwhile.

    Args:
        total: How many things there are; None where nobody knows.
        unit: What one of them is called.
        initial: How many of them were done before.
        shown: Whether there is a bar at all. Where nobody sees it, as in a log file, there is none either.

    Raises:
        InvalidInputError: tqdm is not installed.
    """
    if not shown:
        yield lambda: None
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
    with tqdm(total=total, unit=unit, initial=initial, disable=False if in_a_notebook else None) as bar:
        yield bar.update
