"""Tables of results: aligned text for terminals and logs, HTML for notebooks.

Documents are other people's text, so control characters are escaped, and each document is cut to one line.
"""

import unicodedata
from collections.abc import Iterator, Sequence
from html import escape
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from regolo_rerank.results import RerankResult

__all__ = ["html", "printable", "shorten", "text"]

MAX_ROWS: Final = 100
TEXT_COLUMNS: Final = 78
HTML_COLUMNS: Final = 160
BAR_COLUMNS: Final = 10

_ROW: Final = '<tr style="text-align:left">'


def text(results: "Sequence[RerankResult[Any]]", *, ranked: bool = True) -> str:
    """Return results as aligned lines of at most 78 columns, the first 100 of them.

    Args:
        results: The results, best first.
        ranked: Whether each line starts with the rank, from 1.
    """
    if not results:
        return "no results"
    shown = results[:MAX_ROWS]
    index_width = max(len(str(result.index)) for result in shown)
    lines = []
    for rank, (result, share) in enumerate(zip(shown, _shares(shown), strict=True), 1):
        cells = [
            f"{rank:>{len(str(len(shown)))}}" if ranked else "",
            f"[{result.index}]".rjust(index_width + 2),
            f"{result.relevance_score:.4f}",
            "█" * round(share * BAR_COLUMNS) + " " * (BAR_COLUMNS - round(share * BAR_COLUMNS)),
            printable(str(result.document)),
        ]
        lines.append(shorten("  ".join(cells[0 if ranked else 1 :]), TEXT_COLUMNS))
    return "\n".join([*lines, *_more(results)])


def html(results: "Sequence[RerankResult[Any]]", *, ranked: bool = True) -> str:
    """Return results as an HTML table, the first 100 of them. Its colours are those of the page.

    Args:
        results: The results, best first.
        ranked: Whether each row starts with the rank, from 1.
    """
    if not results:
        return "<p>no results</p>"
    shown = results[:MAX_ROWS]
    names = [*(["rank"] if ranked else []), "index", "score", "", "document"]
    rows = []
    for rank, (result, share) in enumerate(zip(shown, _shares(shown), strict=True), 1):
        cells = [*([str(rank)] if ranked else []), str(result.index), f"{result.relevance_score:.4f}"]
        bar = f'<meter min="0" max="1" value="{share:.3f}" style="width:8em"></meter>'
        document = escape(shorten(printable(str(result.document)), HTML_COLUMNS))
        rows.append(
            f"{_ROW}{''.join(f'<td>{cell}</td>' for cell in cells)}<td>{bar}</td>"
            f'<td dir="auto" style="text-align:left">{document}</td></tr>'
        )
    heads = "".join(f'<th scope="col" style="text-align:left">{name}</th>' for name in names)
    return "\n".join(
        [
            f"<table><thead>{_ROW}{heads}</tr></thead><tbody>",
            *rows,
            "</tbody></table>",
            *(f"<p>{line}</p>" for line in _more(results)),
        ]
    )


def printable(document: str) -> str:
    """Return the beginning of a document as one line that a terminal displays and does not interpret."""
    folded = " ".join(document[:4_096].split())
    return "".join(_escape_character(character) for character in folded)


def _escape_character(character: str) -> str:
    if unicodedata.category(character) == "Cf":  # reorders or hides text
        return ""
    return character if character.isprintable() else character.encode("unicode_escape").decode()


def shorten(line: str, columns: int) -> str:
    """Cut a line to some columns, with an ellipsis. East Asian characters take two columns, combining marks none."""
    used, fits = 0, 0
    for position, character in enumerate(line):
        wide = unicodedata.east_asian_width(character) in {"W", "F"}
        used += 0 if unicodedata.combining(character) else 2 if wide else 1
        if used > columns:
            return line[:fits] + "…"
        if used < columns:
            fits = position + 1
    return line


def _more(results: Sequence[object]) -> Iterator[str]:
    if len(results) > MAX_ROWS:
        yield f"and {len(results) - MAX_ROWS:,} more"


def _shares(results: "Sequence[RerankResult[Any]]") -> list[float]:
    """Return how full each bar is: the score itself if all are from 0 to 1, else its place between worst and best."""
    scores = [result.relevance_score for result in results]
    low, high = min(scores), max(scores)
    if low >= 0 and high <= 1:
        return scores
    return [(score - low) / (high - low) if high > low else 1.0 for score in scores]
