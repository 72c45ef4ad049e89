"""Bounds of the measures, and the comparison with the results."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from statistics import median, quantiles

from benchmarks.measured import Measured

__all__ = ["BOUNDS", "MARGIN", "Bound", "Result", "judged"]

MARGIN = 1.25
"""By which the short form lets a bound be missed: it runs on shared machines, beside other work."""


@dataclass(frozen=True)
class Bound:
    """A bound for one subject of a measure.

    Attributes:
        measure: The measure's name.
        subject: The subject.
        limit: The ratio to another subject, or the value itself where the measure has no baseline.
        against: The other subject, or None for the measure's baseline.
        at_least: Whether more is better.
        short: Whether the short form judges it.
    """

    measure: str
    subject: str
    limit: float
    against: str | None = None
    at_least: bool = False
    short: bool = False


BOUNDS = (
    Bound("top5", "RegoloClient", 3.1, short=True),
    Bound("top5", "LangChain RegoloRerank", 3.4, short=True),
    Bound("top5", "LangChain RegoloRerank", 1.0, "LangChain CohereRerank"),
    Bound("top5", "LangChain RegoloRerank", 1.0, "LangChain NVIDIARerank"),
    Bound("top5", "LangChain RegoloRerank", 1.0, "LangChain VoyageAIRerank"),
    Bound("top5", "LlamaIndex RegoloRerank", 1.0, "LlamaIndex CohereRerank"),
    Bound("top5", "LlamaIndex RegoloRerank", 1.0, "LlamaIndex JinaRerank"),
    Bound("top5", "LlamaIndex RegoloRerank", 1.0, "LlamaIndex NVIDIARerank"),
    Bound("top5", "LlamaIndex RegoloRerank", 1.0, "LlamaIndex SiliconFlowRerank"),
    Bound("all", "LangChain RegoloRerank", 1.0, "LangChain CohereRerank"),
    Bound("burst", "RegoloClient, async", 1.6),
    Bound("service", "LangChain RegoloRerank", 1.0, "LangChain VoyageAIRerank", at_least=True),
    Bound("batches", "RegoloClient", 1.1),
    Bound("batches", "RegoloClient, async", 1.1),
    Bound("import", "regolo_rerank", 15.0, short=True),
    Bound("import-langchain", "LangChain RegoloRerank and its first request", 1.5, short=True),
    Bound("idle", "RegoloClient", 0.0),
    Bound("idle", "RegoloClient, async", 0.0),
    Bound("memory-top5", "RegoloClient", 1.0),
    Bound("memory-top5", "RegoloClient, async", 1.0),
    Bound("memory-all", "RegoloClient", 1.0),
    Bound("memory-all", "RegoloClient, async", 1.0),
)


@dataclass(frozen=True)
class Result:
    """One subject of a measure, over another one: the median of the ratios within each round, and their quartiles.

    Attributes:
        measure: The measure's name.
        subject: The subject.
        against: The other subject, or None if the values are absolute.
        ratio: The median, or None if the subject could not be measured.
        quartiles: The first and the third.
        value: The median of the subject's own values.
        unit: Their unit.
        limit: The bound of the ratio, or None.
        at_least: Whether more is better.
        verdict: "ok", "MISSED", "NOT MEASURED", or "" where nothing is asked.
        note: Why it could not be measured.
    """

    measure: str
    subject: str
    against: str | None
    ratio: float | None
    quartiles: tuple[float, float] | None
    value: float | None
    unit: str
    limit: float | None
    at_least: bool
    verdict: str
    note: str = ""


def judged(measured: Measured, bounds: Iterable[Bound], margin: float = 1.0) -> Iterator[Result]:
    """Yield each subject's result over the baseline, and one more for each bound against another subject."""
    asked = {
        (bound.subject, bound.against or measured.baseline): bound for bound in bounds if bound.measure == measured.name
    }
    subjects = [*measured.rounds, *measured.missing]
    plain = {(subject, measured.baseline): None for subject in subjects}
    for subject, against in plain | asked:
        yield _result(measured, subject, against, asked.get((subject, against)), margin)


def _result(measured: Measured, subject: str, against: str | None, bound: Bound | None, margin: float) -> Result:
    limit, at_least = (bound.limit, bound.at_least) if bound else (None, False)
    lacking = next((name for name in (subject, against) if name is not None and name not in measured.rounds), None)
    if lacking is not None:
        note = f"{lacking}: {measured.missing.get(lacking, 'no such subject')}"
        verdict = "NOT MEASURED" if bound else ""
        return Result(measured.name, subject, against, None, None, None, measured.unit, limit, at_least, verdict, note)
    values = measured.rounds[subject]
    ratios = (
        values
        if against is None
        else [ours / theirs for ours, theirs in zip(values, measured.rounds[against], strict=True)]
    )
    ratio = median(ratios)
    low, _, high = quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    verdict = ""
    if limit is not None:
        reached = ratio >= limit / margin if at_least else ratio <= limit * margin
        verdict = "ok" if reached else "MISSED"
    return Result(
        measured.name, subject, against, ratio, (low, high), median(values), measured.unit, limit, at_least, verdict
    )
