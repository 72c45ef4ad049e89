"""An evaluation as text for terminals and as tables for notebooks: the same words and numbers in both."""

import textwrap
from collections.abc import Iterator, Sequence
from html import escape
from typing import Final, NamedTuple

from regolo_rerank._display.tables import clip, encodable, harmless
from regolo_rerank._evaluation.figures import Figures, Measure, QueryChange, Variant

__all__ = ["html", "text"]

_COLUMNS: Final = 80
_QUERY_COLUMNS: Final = 64
_SHOWN_CHANGES: Final = 3
"""Queries at either end."""
_CHARACTERS_A_TOKEN: Final = 4


class _Table(NamedTuple):
    title: str
    rows: list[list[str]]
    """Heads first. The first and the last column hold words, all others numbers."""


def text(evaluation: Figures, encoding: str = "utf-8") -> str:
    """Return an evaluation as text of 80 columns.

    Args:
        evaluation: What is shown.
        encoding: What all of it can be encoded in.
    """
    parts = (
        "\n".join(_line(part)) if isinstance(part, _Table) else textwrap.fill(part, _COLUMNS)
        for part in _parts(evaluation)
    )
    return encodable("\n\n".join(parts), encoding)


def html(evaluation: Figures) -> str:
    """Return an evaluation as HTML tables, which take their colours from the page."""
    parts = _parts(evaluation)
    return "\n".join(_html(part) if isinstance(part, _Table) else f"<p>{escape(part)}</p>" for part in parts)


def _parts(evaluation: Figures) -> Iterator[_Table | str]:
    variants = evaluation.variants
    yield (
        f"{evaluation.queries:,} queries with something relevant, {evaluation.documents:,} candidates. The retriever "
        f"has missed {evaluation.missed:.0%} of what is relevant, and no reranker can bring that back."
    )
    if len(variants) > 1:
        yield _side_by_side(variants)
        for variant in variants[1:]:
            if variant.over_first:
                yield f"{harmless(variant.name)} beside {harmless(variants[0].name)}: {_told(variant.over_first)}."
    for variant in variants:
        yield _measure(variant, harmless(variant.name) if len(variants) > 1 else "")
        yield " ".join(_sentences(variant))
        better = [change for change in variant.changes if change.after > change.before][:_SHOWN_CHANGES]
        worse = [change for change in reversed(variant.changes) if change.after < change.before][:_SHOWN_CHANGES]
        if better:
            yield _change("Better the most, by the place of the first relevant document:", better)
        if worse:
            yield _change("Worse the most:", worse)


def _side_by_side(variants: Sequence["Variant"]) -> _Table:
    first = variants[0].measures
    before = ["before", *(f"{each.before:.3f}" for each in first.values())]
    after = (
        [harmless(each.name), *(f"{measure.after:.3f}" for measure in each.measures.values())] for each in variants
    )
    return _Table("", [["", *first], before, *after])


def _measure(variant: "Variant", title: str) -> _Table:
    rows = [
        [
            name,
            f"{each.before:.3f}",
            f"{each.after:.3f}",
            f"{each.difference:+.3f}",
            f"{each.low:+.3f} to {each.high:+.3f}",
            _verdict(each),
        ]
        for name, each in variant.measures.items()
    ]
    return _Table(title, [["", "before", "after", "difference", "95 % interval", "verdict"], *rows])


def _verdict(measure: "Measure") -> str:
    needed = f" (~{measure.queries_needed:,})" if measure.queries_needed else ""
    return measure.verdict + needed


def _told(measure: "Measure") -> str:
    interval = f"{measure.low:+.3f} to {measure.high:+.3f}"
    return f"nDCG@10 {measure.difference:+.3f} ({interval}), {_verdict(measure)}"


def _sentences(variant: "Variant") -> Iterator[str]:
    if any(measure.queries_needed for measure in variant.measures.values()):
        yield "In brackets: about how many queries it would take to tell, if the difference stays as it is."
    top_n = variant.top_n
    saved = top_n.characters_before - top_n.characters_after
    yield (
        f"95 % of what is relevant is within a top_n of {top_n.before} before and {top_n.after} after: for the LLM "
        f"about {abs(saved) / _CHARACTERS_A_TOKEN:,.0f} tokens {'less' if saved >= 0 else 'more'} a query "
        f"({abs(saved):,.0f} characters)."
    )
    if best := variant.best_threshold:
        f1 = variant.held_out_f1
        held_out = "" if f1 is None else f" ({f1:.2f} on queries it was not chosen on)"
        yield (
            f"The score_threshold of the best F1 is {best.threshold:.4g}: precision {best.precision:.2f}, recall "
            f"{best.recall:.2f}, F1 {best.f1:.2f}{held_out}."
        )
    tokens = "" if variant.total_tokens is None else f", {variant.total_tokens:,} tokens"
    cost = "" if variant.cost is None else f", {variant.cost:,.4f} US dollars"
    yield f"{variant.requests:,} requests{tokens}{cost}, {variant.seconds:,.1f} seconds."
    if variant.failed:
        index, problem = next(iter(variant.failed.items()))
        yield f"{len(variant.failed):,} queries failed and count nowhere; queries[{index}]: {harmless(problem)}."


def _change(title: str, changes: Sequence["QueryChange"]) -> _Table:
    rows = [
        [f"{change.place_before} to {change.place_after}", clip(harmless(change.query), _QUERY_COLUMNS)]
        for change in changes
    ]
    return _Table(title, [["place", "query"], *rows])


def _line(table: _Table) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table.rows, strict=True)]
    lines = [table.title] if table.title else []
    for first, *numbers, last in table.rows:
        cells = [cell.rjust(width) for cell, width in zip(numbers, widths[1:-1], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells, last]).rstrip())
    return lines


def _html(table: _Table) -> str:
    head, *rows = table.rows
    caption = f'<caption style="text-align:left">{escape(table.title)}</caption>\n' if table.title else ""
    heads = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "\n".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return (
        f'<table cellpadding="5" style="color:inherit">\n{caption}<thead><tr>{heads}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody>\n</table>"
    )
