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
    title: str
    rows: list[list[str]]  # the first one has the headings

    def holds_words(self, column: int) -> bool:
        """Whether a column holds words, which are aligned to the left, or numbers."""
        return self.rows[0][column] in {"", "verdict", "rank", "query"}


def text(evaluation: Evaluation) -> str:
    """Return the report as text in 80 columns."""
    return "\n\n".join(_align(part) if isinstance(part, _Table) else _wrap(part) for part in _report(evaluation))


def html(evaluation: Evaluation) -> str:
    """Return the report as HTML in the colours of the page."""
    return "\n".join(_mark_up(part) for part in _report(evaluation))


def _wrap(sentences: list[str]) -> str:
    return "\n".join(textwrap.fill(sentence, COLUMNS, break_on_hyphens=False) for sentence in sentences)


def _align(table: _Table) -> str:
    widths = [max(map(len, column)) for column in zip(*table.rows, strict=True)]
    lines = [table.title] if table.title else []
    for row in table.rows:
        cells = [
            cell.ljust(widths[column]) if table.holds_words(column) else cell.rjust(widths[column])
            for column, cell in enumerate(row)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _mark_up(table: _Table | list[str]) -> str:
    if not isinstance(table, _Table):
        return f"<p>{'<br>'.join(map(escape, table))}</p>"
    lines = ['<table cellpadding="5" style="color:inherit">']
    if table.title:
        lines.append(f'<caption style="text-align:left">{escape(table.title)}</caption>')
    for number, row in enumerate(table.rows):
        tag = "td" if number else "th"
        sides = ["left" if table.holds_words(column) else "right" for column in range(len(row))]
        cells = [
            f'<{tag} style="text-align:{side}">{escape(cell)}</{tag}>' for side, cell in zip(sides, row, strict=True)
        ]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return "\n".join([*lines, "</table>"])


def _report(evaluation: Evaluation) -> Iterator[_Table | list[str]]:
    """Yield tables and paragraphs, which are lists of sentences."""
    variants = evaluation.variants
    yield list(_describe_input(evaluation))
    if len(variants) > 1:
        yield from _tabulate_variants(variants)
        if compared := [sentence for variant in variants[1:] for sentence in _compare(variant, variants[0])]:
            yield compared
    for variant in variants:
        if variant.same_as is not None:
            continue
        rows = [["", "before", "after", "difference", "95% interval", "verdict"]]
        for name, each in variant.measures.items():
            means = f"{each.before:.3f}", f"{each.after:.3f}", f"{each.difference:+.3f}"
            rows.append([_clean(name, NAME_COLUMNS), *means, _format_interval(each), _format_verdict(each)])
        yield _Table(_clean(variant.name, NAME_COLUMNS) if len(variants) > 1 else "", rows)
        yield list(_describe_savings(variant))
        main, changes = next(iter(variant.measures)), variant.changes
        if better := [change for change in changes if change.after[main] > change.before[main]]:
            yield _tabulate_changes("Most improved (rank of the first relevant document):", better)
        if worse := [change for change in reversed(changes) if change.after[main] < change.before[main]]:
            yield _tabulate_changes("Most degraded:", worse)


def _describe_input(evaluation: Evaluation) -> Iterator[str]:
    total = evaluation.queries + evaluation.others
    forms = [form if count == total else f"{form} ({count:,})" for form, count in evaluation.forms.items()]
    yield f"Queries: {total:,}, candidates: {evaluation.documents:,}, relevant documents read as {', '.join(forms)}."
    if evaluation.titles:
        yield f"Titles scored in front of the text: {evaluation.titles:,}."
    if evaluation.others:
        yield f"Without a relevant document: {evaluation.others:,} (they count for the threshold only)."
    # Only ids can name documents that are not among the candidates.
    if {"ids", "grades by id"} & evaluation.forms.keys():
        share = "less than 1%" if evaluation.missed < 0.005 else f"{evaluation.missed:.0%}"
        yield (
            f"The retriever missed {share} of the relevant documents; no reranker can recover those."
            if evaluation.missed
            else "The retriever found every relevant document."
        )
    if evaluation.skipped:
        count = len(evaluation.skipped)
        yield f"Skipped {count:,} of {total + count:,} queries: {_clean(list_problems(evaluation.skipped))}."


def _tabulate_variants(variants: Sequence[Variant]) -> Iterator[_Table]:
    names, first = list(variants[0].measures), variants[0]
    for start in range(0, len(names), MEASURES_PER_TABLE):
        shown = names[start : start + MEASURES_PER_TABLE]
        rows = [["", *shown], ["before", *(f"{first.measures[name].before:.3f}" for name in shown)]]
        for each in variants:
            rows += [[_clean(each.name, NAME_COLUMNS), *(f"{each.measures[name].after:.3f}" for name in shown)]]
        yield _Table("", rows)


def _compare(variant: Variant, first: Variant) -> Iterator[str]:
    if variant.same_as is not None:
        yield (
            f"{_clean(variant.name)} and {_clean(variant.same_as)}: identical scores for all candidates, so both "
            'variants send the same requests or the server ignores the difference. (The prompt format "plain" ignores '
            "the instruction.)"
        )
    elif over := variant.over_first:
        compared = f"{next(iter(variant.measures))} {over.difference:+.3f} ({_format_interval(over)})"
        yield f"{_clean(variant.name)} compared with {_clean(first.name)}: {compared}, {_format_verdict(over)}."


def _format_interval(measure: Measure) -> str:
    return f"{measure.low:+.3f} to {measure.high:+.3f}"


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
        yield f"Failed queries, excluded: {len(variant.failed):,}. {_clean(list_problems(variant.failed))}."


def _tabulate_changes(title: str, changes: Sequence[QueryResult]) -> _Table:
    shown = changes[:SHOWN_CHANGES]
    rows = [[f"{each.rank_before} -> {each.rank_after}", _clean(each.query, QUERY_COLUMNS)] for each in shown]
    return _Table(title, [["rank", "query"], *rows])


def _clean(given: str, columns: int = 2_000) -> str:
    """Return a text in one line without control characters, cut to a number of columns."""
    printable = "".join(character if character.isprintable() else " " for character in given)
    shown = Text(" ".join(printable.split()))
    shown.truncate(columns, overflow="ellipsis")
    return shown.plain
