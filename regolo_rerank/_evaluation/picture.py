"""The picture of an evaluation: what reranking brings, how few documents are enough, and where to cut."""

from typing import Final

from matplotlib.axes import Axes

from regolo_rerank._display.picture import Picture
from regolo_rerank._display.tables import clip, harmless
from regolo_rerank._evaluation.figures import Figures, Variant

__all__ = ["evaluation_summary"]

_SIZE: Final = 10.5, 3.1
"""Inches."""
_BEFORE: Final = "#808080"
_COLOURS: Final = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
"""Told apart by every eye; the seventh variant has the first one's again."""
_LABEL_COLUMNS: Final = 40
_SHARE: Final = 0.95


def evaluation_summary(evaluation: Figures) -> Picture:
    """Draw an evaluation.

    On the left each measure before and after reranking, with the 95 % interval of the difference around the latter; in
    the middle how much of what is relevant is among the first n documents; on the right precision and recall over the
    score threshold, or F1 where there are several variants.

    Args:
        evaluation: The `Evaluation` that `evaluate` gave.

    Returns:
        A Matplotlib figure, which a notebook shows and `savefig` writes; it is not registered with `pyplot`.
    """
    figure = Picture(figsize=_SIZE, layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    _measures(left, evaluation.variants)
    _depth(middle, evaluation.variants)
    _thresholds(right, evaluation.variants)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False)
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _colour(variants: list[Variant]) -> list[tuple[str, Variant]]:
    return [(_COLOURS[index % len(_COLOURS)], variant) for index, variant in enumerate(variants)]


def _measures(axes: Axes, variants: list[Variant]) -> None:
    names = list(variants[0].measures)
    before = [measure.before for measure in variants[0].measures.values()]
    axes.scatter(before, range(len(names)), color=_BEFORE, zorder=3, label="before")
    for index, (colour, variant) in enumerate(_colour(variants)):
        label = clip(harmless(variant.name), _LABEL_COLUMNS)
        for place, measure in enumerate(variant.measures.values()):
            y = place + 0.6 * index / len(variants)
            axes.plot([measure.before, measure.after], [y, y], color=colour, alpha=0.5)
            axes.errorbar(
                measure.after,
                y,
                xerr=[[max(0, measure.difference - measure.low)], [max(0, measure.high - measure.difference)]],
                fmt="o",
                color=colour,
                capsize=2,
                elinewidth=0.8,
                label=None if place else label,
            )
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_title("what it brings")


def _depth(axes: Axes, variants: list[Variant]) -> None:
    first = variants[0].top_n
    curves = [(_BEFORE, first.recall_before, first.before)]
    curves += [(colour, each.top_n.recall_after, each.top_n.after) for colour, each in _colour(variants)]
    for colour, recall, top_n in curves:
        axes.plot(range(1, len(recall) + 1), recall, color=colour)
        axes.plot([top_n, top_n], [0, _SHARE], color=colour, linestyle="dotted")
    axes.axhline(_SHARE, color=_BEFORE, linewidth=0.8, linestyle="dotted")
    axes.set(ylim=(0, 1.02), xlabel="top_n", title="relevant documents that are kept")


def _thresholds(axes: Axes, variants: list[Variant]) -> None:
    for colour, variant in _colour(variants):
        thresholds = [each.threshold for each in variant.thresholds]
        if len(variants) == 1:
            axes.plot(thresholds, [each.precision for each in variant.thresholds], color=colour, label="precision")
            recall = [each.recall for each in variant.thresholds]
            axes.plot(thresholds, recall, color=colour, linestyle="dashed", label="recall")
            axes.legend(frameon=False)
        else:
            axes.plot(thresholds, [each.f1 for each in variant.thresholds], color=colour)
        if variant.best_threshold:
            axes.axvline(variant.best_threshold.threshold, color=colour, linewidth=0.8, linestyle="dotted")
    title = "precision and recall" if len(variants) == 1 else "F1"
    axes.set(ylim=(0, 1.02), xlabel="score_threshold", title=title)
