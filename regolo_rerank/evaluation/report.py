"""The report of an evaluation: text in 80 columns and HTML, with the same words and figures."""

import textwrap
from collections.abc import Iterator, Sequence
from html import escape
from typing import Final, NamedTuple

from rich.text import Text

from regolo_rerank.evaluation.figures import Evaluation, Measure, QueryResult, Variant
from regolo_rerank.evaluation.queries import list_problems

__all__ = ["html", "text"]

COLUMNS: Final = 80
NAME_COLUMNS: Final = 24
QUERY_COLUMNS: Final = 64
MEASURES_PER_TABLE: Final = 5
SHOWN_CHANGES: Final = 3
CHARACTERS_PER_TOKEN: Final = 4


class _Table(NamedTuple):
    """A table with its headings in the first row. The first and the last column hold words, the others numbers."""

    title: str
    rows: list[list[str]]
    last_is_words: bool = True


def text(evaluation: Evaluation) -> str:
    """Return the report as text in 80 columns."""
    return "\n\n".join(
        "\n".join(_align(part)) if isinstance(part, _Table) else textwrap.fill(part, COLUMNS)
        for part in _report(evaluation)
    )


def html(evaluation: Evaluation) -> str:
    """Return the report as HTML in the colours of the page."""
    return "\n".join(
        _format_html(part) if isinstance(part, _Table) else f"<p>{escape(part)}</p>" for part in _report(evaluation)
    )


def _report(evaluation: Evaluation) -> Iterator[_Table | str]:
    variants = evaluation.variants
    yield " ".join(_describe_input(evaluation))
    if len(variants) > 1:
        yield from _compare_variants(variants)
    for variant in variants:
        yield _tabulate_measures(variant, _clean(variant.name, NAME_COLUMNS) if len(variants) > 1 else "")
        yield " ".join(_describe_savings(variant))
        main, changes = next(iter(variant.measures)), variant.changes
        better = [change for change in changes if change.after[main] > change.before[main]]
        worse = [change for change in reversed(changes) if change.after[main] < change.before[main]]
        if better:
            yield _tabulate_changes("Most improved (rank of the first relevant document):", better)
        if worse:
            yield _tabulate_changes("Most degraded:", worse)


def _describe_input(evaluation: Evaluation) -> Iterator[str]:
    total = evaluation.queries + evaluation.others
    forms = ", ".join(form if count == total else f"{form} ({count:,})" for form, count in evaluation.forms.items())
    yield f"{total:,} queries, {evaluation.documents:,} candidates, relevant documents read as {forms}."
    if evaluation.others:
        yield f"{evaluation.others:,} queries have no relevant document and count for the threshold only."
    # Only ids can name documents that are not among the candidates.
    if {"ids", "grades by id"} & evaluation.forms.keys():
        if evaluation.missed:
            share = "less than 1%" if evaluation.missed < 0.005 else f"{evaluation.missed:.0%}"
            yield f"The retriever missed {share} of the relevant documents; no reranker can recover those."
        else:
            yield "The retriever found every relevant document."
    if evaluation.skipped:
        count = len(evaluation.skipped)
        yield f"Skipped {count:,} of {total + count:,} queries: {_clean(list_problems(evaluation.skipped))}."


def _compare_variants(variants: Sequence[Variant]) -> Iterator[_Table | str]:
    names = list(variants[0].measures)
    for start in range(0, len(names), MEASURES_PER_TABLE):
        shown = names[start : start + MEASURES_PER_TABLE]
        rows = [["", *shown], ["before", *(f"{variants[0].measures[name].before:.3f}" for name in shown)]]
        rows += [
            [_clean(each.name, NAME_COLUMNS), *(f"{each.measures[name].after:.3f}" for name in shown)]
            for each in variants
        ]
        yield _Table("", rows, last_is_words=False)
    for variant in variants[1:]:
        name = _clean(variant.name)
        if variant.same_as is not None:
            yield (
                f"{name} and {_clean(variant.same_as)}: identical scores for all candidates, so both variants send the "
                'same requests or the server ignores the difference. (The prompt format "plain" ignores the '
                "instruction.)"
            )
        elif over := variant.over_first:
            yield (
                f"{name} compared with {_clean(variants[0].name)}: {names[0]} {over.difference:+.3f} "
                f"({over.low:+.3f} to {over.high:+.3f}), {_format_verdict(over)}."
            )


def _tabulate_measures(variant: Variant, title: str) -> _Table:
    rows = [["", "before", "after", "difference", "95% interval", "verdict"]]
    for name, each in variant.measures.items():
        interval = f"{each.low:+.3f} to {each.high:+.3f}"
        values = f"{each.before:.3f}", f"{each.after:.3f}", f"{each.difference:+.3f}", interval
        rows.append([_clean(name, NAME_COLUMNS), *values, _format_verdict(each)])
    return _Table(title, rows)


def _format_verdict(measure: Measure) -> str:
    return measure.verdict + (f" (~{measure.queries_needed:,})" if measure.queries_needed else "")


def _describe_savings(variant: Variant) -> Iterator[str]:
    if any(measure.queries_needed for measure in variant.measures.values()):
        yield "(~N) is roughly how many queries would settle it at this difference."
    if best := variant.best_threshold:
        top_n = variant.top_n
        saved = round((top_n.characters_before - top_n.characters_after) / CHARACTERS_PER_TOKEN)
        yield (
            f"To keep 95% of the relevant candidates you need the top {top_n.before} before reranking, the top "
            f"{top_n.after} after: about {abs(saved):,} {'more' if saved < 0 else 'fewer'} tokens per query for the "
            "LLM."
        )
        held_out = "" if variant.held_out_f1 is None else f"; {variant.held_out_f1:.2f} cross-validated"
        yield (
            f"Best score_threshold by F1: {best.threshold:.4g} (precision {best.precision:.2f}, recall "
            f"{best.recall:.2f}, F1 {best.f1:.2f}{held_out})."
        )
    tokens = "" if variant.total_tokens is None else f", {variant.total_tokens:,} tokens"
    cost = "" if variant.cost is None else f", cost {variant.cost:,.4f}"
    yield f"Usage: {variant.requests:,} requests{tokens}{cost}, {variant.seconds:,.1f} seconds."
    if variant.failed:
        yield f"Failed and excluded: {len(variant.failed):,} queries: {_clean(list_problems(variant.failed))}."


def _tabulate_changes(title: str, changes: Sequence[QueryResult]) -> _Table:
    rows = [
        [f"{change.rank_before} -> {change.rank_after}", _clean(change.query, QUERY_COLUMNS)]
        for change in changes[:SHOWN_CHANGES]
    ]
    return _Table(title, [["rank", "query"], *rows])


def _clean(given: str, columns: int = 2_000) -> str:
    """Return a text in one line without control characters, cut to a number of columns."""
    printable = "".join(character if character.isprintable() else " " for character in given)
    shown = Text(" ".join(printable.split()))
    shown.truncate(columns, overflow="ellipsis")
    return shown.plain


def _align(table: _Table) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*table.rows, strict=True)]
    lines = [table.title] if table.title else []
    for row in table.rows:
        cells = [
            cell.ljust(width) if _holds_words(table, column) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def _format_html(table: _Table) -> str:
    def format_row(row: list[str], tag: str) -> str:
        sides = ["left" if _holds_words(table, column) else "right" for column in range(len(row))]
        cells = (
            f'<{tag} style="text-align:{side}">{escape(cell)}</{tag}>' for cell, side in zip(row, sides, strict=True)
        )
        return f"<tr>{''.join(cells)}</tr>"

    head, *rows = table.rows
    caption = f'<caption style="text-align:left">{escape(table.title)}</caption>\n' if table.title else ""
    body = "\n".join(format_row(row, "td") for row in rows)
    return (
        f'<table cellpadding="5" style="color:inherit">\n{caption}<thead>{format_row(head, "th")}</thead>\n'
        f"<tbody>\n{body}\n</tbody>\n</table>"
    )


def _holds_words(table: _Table, column: int) -> bool:
    return column == 0 or (table.last_is_words and column == len(table.rows[0]) - 1)
