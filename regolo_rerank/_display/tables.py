"""Results as tables: aligned lines of text for terminals and logs, HTML for notebooks.

What is shown is other people's text, so it is folded to a line, cut, and made harmless in both.
"""

import functools
import math
import unicodedata
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from html import escape
from itertools import accumulate
from typing import Final, Protocol

__all__ = ["ELLIPSIS", "align", "clip", "encodable", "harmless", "html", "lines", "shown_score", "text"]

ELLIPSIS: Final = "…"

_BLOCKS: Final = " ▏▎▍▌▋▊▉█"
_NOTHING: Final = "no results"
_SHOWN_CHARACTERS: Final = 4_096
"""Of a text at most: thousands of marks on one letter take no column, but all the time and memory of a terminal."""
_KNOWN_CHARACTERS: Final = 4_096
_SHOWN_RESULTS: Final = 100
_TEXT_COLUMNS: Final = 80
_HTML_COLUMNS: Final = 160
"""Of a document."""

_ROW: Final = '<tr style="text-align:right">'
# JupyterLab drops any colour but a plain one, GitHub all styles: without them a bar is an empty cell below "score".
_BAR: Final = (
    '<td style="text-align:left"><div style="width:8em;background:rgba(128,128,128,0.2)">'
    '<div style="width:{:.1f}%;height:0.8em;background:rgba(50,130,220,0.8)"></div></div></td>'
)
_DOCUMENT: Final = '<td dir="auto" style="text-align:left">{}</td>'
_SCORE_HEADS: Final = (
    '<th scope="col" colspan="2" style="text-align:center">score</th>'
    '<th scope="col" style="text-align:left">document</th>'
)


class Result(Protocol):
    """One document of a ranking, as `RerankResult` is."""

    index: int
    relevance_score: float
    document: str


def text(results: Sequence[Result], *, ranked: bool = True) -> str:
    """Return results as aligned text of 80 columns, the first 100 of them.

    Args:
        results: N results, the best first.
        ranked: Whether each line begins with the result's rank, from 1.
    """
    shown = lines(results[:_SHOWN_RESULTS], _TEXT_COLUMNS, ranked=ranked, indexed=True)
    return "\n".join([*shown, *_more(results)]) or _NOTHING


def html(results: Sequence[Result], *, ranked: bool = True) -> str:
    """Return results as an HTML table, the first 100 of them; it takes its colours from the page.

    Args:
        results: N results, the best first.
        ranked: Whether each row begins with the result's rank, from 1.
    """
    if not results:
        return f"<p>{_NOTHING}</p>"
    shown = results[:_SHOWN_RESULTS]
    names = ["rank", "index"] if ranked else ["index"]
    heads = "".join(f'<th scope="col">{name}</th>' for name in names)
    rows = "\n".join(
        _row([rank, result.index] if ranked else [result.index], result, share)
        for rank, (result, share) in enumerate(zip(shown, _shares(shown), strict=True), 1)
    )
    more = "".join(f"\n<p>{line}</p>" for line in _more(results))
    return (
        f'<table cellpadding="5" style="color:inherit">\n<thead>{_ROW}{heads}{_SCORE_HEADS}</tr></thead>\n'
        f"<tbody>\n{rows}\n</tbody>\n</table>{more}"
    )


def _row(numbers: list[int], result: Result, share: float) -> str:
    name, *others = numbers
    document = escape(clip(harmless(result.document), _HTML_COLUMNS))
    cells = "".join(f"<td>{cell}</td>" for cell in (*others, shown_score(result.relevance_score)))
    return f'{_ROW}<th scope="row">{name}</th>{cells}{_BAR.format(100 * share)}{_DOCUMENT.format(document)}</tr>'


def lines(
    results: Sequence[Result],
    width: int,
    *,
    ranked: bool = True,
    indexed: bool = False,
    encoding: str = "utf-8",
) -> Iterator[str]:
    """Yield one line a result: score, bar and document.

    Args:
        results: N results, the best first.
        width: Columns of a line at most.
        ranked: Whether a line begins with the result's rank, from 1.
        indexed: Whether its index follows, in brackets.
        encoding: What all lines can be encoded in; without blocks in it, bars are hashes.
    """
    unicode = encodable(_BLOCKS + ELLIPSIS, encoding) == _BLOCKS + ELLIPSIS
    blocks, ellipsis = (_BLOCKS, ELLIPSIS) if unicode else (" #", "...")
    columns = [align([shown_score(result.relevance_score) for result in results])]
    if indexed:
        columns.insert(0, align([f"[{result.index}]" for result in results]))
    if ranked:
        columns.insert(0, align([str(rank) for rank, _ in enumerate(results, 1)]))
    for *cells, share, result in zip(*columns, _shares(results), results, strict=True):
        bar = _bar(share, min(20, width // 8), blocks)
        yield clip("  ".join([*cells, bar, harmless(result.document, encoding)]), width, ellipsis)


def shown_score(score: float) -> str:
    """Return a score with four decimals, or four digits where it is large."""
    return f"{score:.4f}" if abs(score) < 10_000 else f"{score:.3e}"


def harmless(text: str, encoding: str = "utf-8") -> str:
    """Return a text in one line that a terminal shows and does not obey."""
    folded = encodable(" ".join(text.split())[:_SHOWN_CHARACTERS], encoding)
    return "".join(_shown_character(character) for character in folded)


def encodable(text: str, encoding: str) -> str:
    """Return a text with a question mark for each character that an encoding does not have."""
    return text.encode(encoding, "replace").decode(encoding)


def clip(line: str, width: int, ellipsis: str = ELLIPSIS) -> str:
    """Cut a line to a number of columns, with an ellipsis where something is lost."""
    ends = [0, *accumulate(map(_columns, line))]
    if ends[-1] <= width:
        return line
    return line[: bisect_right(ends, width - len(ellipsis)) - 1] + ellipsis


def align(cells: list[str], fill: str = " ") -> list[str]:
    """Fill short cells of a column from the left."""
    width = max(map(len, cells), default=0)
    return [cell.rjust(width, fill) for cell in cells]


@functools.lru_cache(_KNOWN_CHARACTERS)
def _columns(character: str) -> int:
    if unicodedata.category(character) in {"Mn", "Me"}:
        return 0
    return 2 if unicodedata.east_asian_width(character) in {"W", "F"} else 1


@functools.lru_cache(_KNOWN_CHARACTERS)
def _shown_character(character: str) -> str:
    # Format characters hide or reorder text, and the emoji selector's width differs from terminal to terminal.
    if unicodedata.category(character) == "Cf" or character == "\ufe0f":
        return ""
    return character if character.isprintable() else character.encode("unicode_escape").decode()


def _more(results: Sequence[Result]) -> list[str]:
    hidden = len(results) - _SHOWN_RESULTS
    return [f"and {hidden:,} more"] if hidden > 0 else []


def _shares(results: Sequence[Result]) -> list[float]:
    """Return how much of its bar each score fills: the score itself, or its place between the worst and the best."""
    scores = [result.relevance_score for result in results]
    if not all(map(math.isfinite, scores)):
        return [0.0] * len(scores)
    low, high = min(scores, default=0.0), max(scores, default=0.0)
    if low >= 0 and high <= 1:
        return scores
    # Halves, because the span of the largest numbers is no number.
    span = high / 2 - low / 2
    return [(score / 2 - low / 2) / span if span else 1.0 for score in scores]


def _bar(share: float, width: int, blocks: str) -> str:
    """Draw a bar in the last of the blocks, its end in one of those between."""
    whole, part = divmod(round(share * width * (len(blocks) - 1)), len(blocks) - 1)
    return f"{blocks[-1] * whole}{blocks[part] if part else ''}".ljust(width)
