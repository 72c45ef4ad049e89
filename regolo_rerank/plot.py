"""Charts of rankings and evaluations, drawn by Matplotlib.

The background is transparent, and all colours are legible on a white and on a dark page.
"""

from collections import defaultdict, deque
from collections.abc import Hashable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager
from io import BytesIO
from itertools import cycle
from numbers import Real
from operator import attrgetter
from textwrap import fill
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from regolo_rerank._version import install_hint

try:
    import numpy as np
    from matplotlib import rc_context, rcParams
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.font_manager import fontManager
    from PIL import Image
    from rich.cells import cell_len, chop_cells
except ImportError as error:
    raise ImportError(f"regolo_rerank.plot needs Matplotlib and rich: {install_hint('evaluate')}") from error

from regolo_rerank.errors import InvalidInputError
from regolo_rerank.results import RerankResponse, RerankResult

if TYPE_CHECKING:
    from regolo_rerank.evaluation import Evaluation, Variant

__all__ = ["Picture", "evaluation_summary", "rank_changes"]

# The contrast of each colour is about 4.3 on white and on GitHub's dark background, and no grey has more on both.
_GREY: Final = "#747b84"
_BETTER, _WORSE = "#0c8599", "#c2570c"
_VARIANTS: Final = _BETTER, _WORSE, "#8a6fd1", "#0b8a66", "#b0558b", "#9a7400"

# Inches: the chart, its lines between long labels, one row, and all rows together. Text of 9 points is then about 12
# pixels high in a picture that is shown 700 pixels wide.
_WIDTH, _NARROWEST, _ROW, _TALLEST = 7.0, 2.0, 0.22, 40.0
_DPI: Final = 200
_LABEL_COLUMNS: Final = 32

_STYLE: Final[Any] = {
    "axes.facecolor": "none",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "figure.dpi": _DPI,
    "figure.facecolor": "none",
    "figure.titlesize": 11,
    "font.size": 9,
    "legend.frameon": False,
    "text.parse_math": False,
    "text.usetex": False,
    **dict.fromkeys(("axes.edgecolor", "axes.labelcolor", "text.color", "xtick.color", "ytick.color"), _GREY),
}
_MARKED_LINE: Final[Any] = {"color": _BETTER, "linewidth": 2.8, "zorder": 3}
_OTHER_LINE: Final[Any] = {"color": _GREY, "linewidth": 1.0, "alpha": 0.45}
# Fonts of Linux, macOS and Windows with characters that Matplotlib's own fonts lack.
_FONTS: Final = "Noto Sans CJK JP", "WenQuanYi Zen Hei", "Arial Unicode MS", "Microsoft YaHei", "Malgun Gothic"


class Picture(Figure):
    """A Matplotlib figure that a notebook shows as an image, even if the notebook never imports `pyplot`."""

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        # Notebooks are stored with their charts, and a palette takes a third of the bytes.
        full, small = BytesIO(), BytesIO()
        self.savefig(full, format="png", dpi=_DPI)
        image = Image.open(full).quantize(128, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
        image.save(small, "png", optimize=True)
        return small.getvalue(), {"width": round(self.get_figwidth() * _DPI / 2)}


class _Candidate(NamedTuple):
    text: str
    id: str | None = None
    metadata: str = ""
    identity: int | None = None  # of the object, or None for a string
    score: object = None


def rank_changes(
    before: Iterable[Any],
    after: Iterable[Any] | RerankResponse[Any],
    title: str | None = None,
    highlight: int | str | None = None,
    *,
    labels: Iterable[str] | None = None,
) -> Picture:
    """Draw how reranking moves the candidates, with one of them highlighted.

    The left side shows the ranks before reranking, the right side the ranks and scores after reranking. Copies of a
    document are recognised by id and text. The fonts are those of the active Matplotlib style.

    Args:
        before: The retriever's candidates, in its order: strings, LangChain documents, LlamaIndex nodes or mappings
            with `text`.
        after: The reranked candidates, or a `RerankResponse` or its results for the candidates in `before`.
        title: Title of the chart, such as the query.
        highlight: Index in `before`, id or label of the candidate to draw in colour. Several candidates may share an id
            or a label. The default is the first candidate after reranking.
        labels: Names of the candidates, in the order of `before`. The default is the start of their texts.

    Returns:
        A Matplotlib figure. A notebook shows it, and `savefig` writes it to a file.

    Raises:
        InvalidInputError: An argument is not a list of candidates, `after` has a candidate that is not in `before`, or
            `highlight` or `labels` do not match the candidates.

    Examples:
        >>> before = ["Rome is in Italy.", "Beijing is the capital of China."]
        >>> chart = rank_changes(before, before[::-1], title="What is the capital of China?")
    """
    candidates = [_read_candidate(item, f"before[{index}]") for index, item in enumerate(_list(before, "before"))]
    kept = _find_kept(candidates, _list(after.results if isinstance(after, RerankResponse) else after, "after"))
    names = [item.text for item in candidates] if labels is None else [str(label) for label in _list(labels, "labels")]
    if len(names) != len(candidates):
        raise InvalidInputError(f"labels: expected one per candidate ({len(candidates)}), got {len(names)}")
    marked = list(kept)[:1]
    if highlight is not None:
        rows = enumerate(zip(candidates, names, strict=True))
        marked = [index for index, (candidate, name) in rows if highlight in (index, candidate.id, name)]
        if not marked:
            raise InvalidInputError(f"highlight: no candidate has the index, id or label {highlight!r}")
    return _draw_changes([_shorten(name) for name in names], kept, marked, title or "")


def evaluation_summary(evaluation: "Evaluation", *, thresholds: bool = False) -> Picture:
    """Draw the results of `evaluate`.

    The first panel shows the gain of each measure with its 95 % interval, and the measure before and after reranking.
    The second panel shows how many documents per query keep 95 % of the relevant candidates.

    Args:
        evaluation: The result of `evaluate`.
        thresholds: Add a panel with precision and recall for each `score_threshold`, or with F1 if there are several
            variants.

    Returns:
        A Matplotlib figure. A notebook shows it, and `savefig` writes it to a file.
    """
    variants = list(zip(cycle(_VARIANTS), evaluation.variants, strict=False))
    names = [_shorten(variant.name) for _, variant in variants]
    rows = len(variants[0][1].measures) * (len(variants) + 0.5)
    heights = [max(2.6, 0.9 + 0.18 * rows), 2.2][: 1 + thresholds]
    with _style():
        figure = Picture(figsize=(_WIDTH, sum(heights)), layout="constrained")
        panels: Any = [["gains", "kept"], ["thresholds", "thresholds"]][: 1 + thresholds]
        axes = figure.subplot_mosaic(panels, height_ratios=heights)
        _draw_gains(axes["gains"], variants)
        lines = _draw_kept(axes["kept"], variants)
        if thresholds:
            _draw_thresholds(axes["thresholds"], variants)
        if len(variants) > 1:
            figure.legend(lines, ["before reranking", *names], loc="outside upper left", ncols=2)
        figure.draw_without_rendering()  # makes the ticks while the style is active
    return figure


def _style() -> AbstractContextManager[None]:
    fonts = [font for font in _FONTS if font in fontManager.get_font_names()]
    return rc_context({**_STYLE, "font.family": [*rcParams["font.family"], *fonts]})


def _list(items: Iterable[Any], name: str) -> list[Any]:
    if isinstance(items, (str, bytes, Mapping, AbstractSet)) or not isinstance(items, Iterable):
        raise InvalidInputError(f"{name}: must be a list, got {type(items).__name__}")
    return list(items)


def _read_candidate(item: Any, place: str) -> _Candidate:
    if isinstance(item, str):
        return _Candidate(item)
    if hasattr(item, "page_content"):
        metadata = dict(item.metadata)
        score = metadata.pop("relevance_score", None)
        return _Candidate(item.page_content, item.id, repr(metadata), id(item), score)
    if hasattr(item, "node_id"):
        return _Candidate(item.get_content(), item.node_id, "", id(item), getattr(item, "score", None))
    if isinstance(item, Mapping) and isinstance(item.get("text"), str):
        return _Candidate(item["text"], None if item.get("id") is None else str(item["id"]), "", id(item))
    kinds = "a string, a LangChain Document, a LlamaIndex node or a mapping with 'text'"
    raise InvalidInputError(f"{place}: must be {kinds}, got {type(item).__name__}")


def _find_kept(before: list[_Candidate], after: list[Any]) -> dict[int, object]:
    """Return the scores of the kept candidates by their index in `before`, in the order of `after`."""
    if not all(isinstance(item, RerankResult) for item in after):
        candidates = [_read_candidate(item, f"after[{rank}]") for rank, item in enumerate(after)]
        return dict(zip(_match(before, candidates), (each.score for each in candidates), strict=True))
    for rank, result in enumerate(after):
        if not 0 <= result.index < len(before):
            raise InvalidInputError(f"after[{rank}]: has index {result.index}, but before has {len(before)} candidates")
        # Only strings must be equal: other documents may have been scored with their titles.
        candidate = before[result.index]
        if candidate.identity is None and isinstance(result.document, str) and candidate.text != result.document:
            raise InvalidInputError(f"after[{rank}]: is not before[{result.index}]; pass the reranked list as before")
    kept = {result.index: result.relevance_score for result in after}
    if len(kept) < len(after):
        raise InvalidInputError("after: has the same index twice")
    return kept


# Ids may be lost or shared, and texts changed or equal, so we start with the most reliable key.
_KEYS: Final = ("identity",), ("id", "text", "metadata"), ("id", "text"), ("id",), ("text",)


def _match(before: list[_Candidate], after: list[_Candidate]) -> list[int]:
    """Return the index in `before` of each candidate in `after`. Equal candidates keep their order."""
    found: dict[int, int] = {}
    for key in (attrgetter(*names) for names in _KEYS):
        taken = set(found.values())
        free: defaultdict[Hashable, deque[int]] = defaultdict(deque)
        for index, candidate in enumerate(before):
            if index not in taken and key(candidate) is not None:
                free[key(candidate)].append(index)
        for rank, candidate in enumerate(after):
            if rank not in found and free[key(candidate)]:
                found[rank] = free[key(candidate)].popleft()
    if missing := [rank for rank in range(len(after)) if rank not in found]:
        raise InvalidInputError(f"after[{missing[0]}]: is not in before, or not as often")
    return [found[rank] for rank in range(len(after))]


def _shorten(text: str) -> str:
    """Return the start of a text, in one line and without control characters."""
    line = "".join(filter(str.isprintable, " ".join(text.split())))[: 2 * _LABEL_COLUMNS]
    return line if cell_len(line) <= _LABEL_COLUMNS else chop_cells(line, _LABEL_COLUMNS - 1)[0] + "…"


def _draw_changes(names: list[str], kept: dict[int, object], marked: list[int], title: str) -> Picture:
    rows = max(len(names), 1)
    row = min(_ROW, _TALLEST / rows)
    with _style():
        # The figure is wide enough for any labels at first. The layout then tells how much room they need.
        figure = Picture(figsize=(3 * _WIDTH, row * (rows + 2)), layout="constrained")
        axes = figure.add_subplot(xlim=(0, 1), ylim=(rows + 0.5, -0.5))
        axes.set_axis_off()
        _write_columns(axes, names, kept, marked, max(2.0, min(9.0, 41 * row)))
        ranks = {index: rank for rank, index in enumerate(kept, 1)}
        for index in range(len(names)):
            # A candidate that is not kept has a short dotted line. The other lines are level at both ends.
            rank = ranks.get(index, index + 1)
            x = np.linspace(0, 1 if index in ranks else 0.08, 50)
            y = index + 1 + (rank - index - 1) * x**2 * (3 - 2 * x)
            look = _MARKED_LINE if index in marked else _OTHER_LINE
            axes.plot(x, y, linestyle="solid" if index in ranks else "dotted", clip_on=False, **look)
        figure.draw_without_rendering()
        figure.set_figwidth(max(_WIDTH, 3 * _WIDTH * (1 - axes.get_position().width) + _NARROWEST))
        # Chinese characters, for example, are two columns wide.
        if title := "\n".join(fill(line, 40 if cell_len(line) > len(line) else 80) for line in title.splitlines()):
            figure.suptitle(title, x=0.01, ha="left")
            figure.set_figheight(figure.get_figheight() + 0.2 * (1 + title.count("\n")))
    return figure


def _write_columns(axes: Axes, names: list[str], kept: dict[int, object], marked: list[int], size: float) -> None:
    """Write names and ranks on the left, and ranks, scores and names on the right, below a heading each."""
    scores = [f"{float(score):.2f}" if isinstance(score, Real) else "" for score in kept.values()]
    ranks = [str(rank) for rank in range(1, len(names) + 1)]
    digit, gap = 0.7 * size, 8.0  # points
    rank_end = gap + digit * len(str(len(names)))
    score_end = rank_end + digit * max(map(len, scores), default=0) + (size if any(scores) else 0)
    dropped = len(names) - len(kept)
    columns: list[tuple[int, float, str, Iterable[int], list[str]]] = [
        (0, -gap, "right", range(len(names)), ["before reranking", *ranks]),
        (0, -rank_end - size, "right", range(len(names)), ["", *names]),
        (1, gap, "left", kept, ["after reranking", *ranks[: len(kept)], f"{dropped} not kept" if dropped else ""]),
        (1, score_end, "right", kept, ["", *scores]),
        (1, score_end + size, "left", kept, ["", *(names[index] for index in kept)]),
    ]
    for x, offset, side, indices, texts in columns:
        for row, (index, text) in enumerate(zip(["heading", *indices, "note"], texts, strict=False)):
            look: dict[str, Any] = {"size": size, "weight": "bold" if index in ["heading", *marked] else "normal"}
            look |= {"ha": side, "va": "center", "color": _BETTER if index in marked else _GREY}
            axes.annotate(text, (x, row), (offset, 0), textcoords="offset points", **look)


def _draw_gains(axes: Axes, variants: "list[tuple[str, Variant]]") -> None:
    """Draw each measure's gain and interval beside a zero line, in a row per measure and variant."""
    names = list(variants[0][1].measures)
    every = [measure for _, variant in variants for measure in variant.measures.values()]
    low, high = min(0.0, *(each.low for each in every)), max(0.0, *(each.high for each in every))
    span = high - low or 1.0
    axes.axvline(0, color=_GREY, linewidth=1.0)
    for index, (colour, variant) in enumerate(variants):
        for row, each in enumerate(variant.measures.values()):
            y = row + 0.8 * ((index + 0.5) / len(variants) - 0.5)
            if len(variants) == 1:
                colour = {"better": _BETTER, "worse": _WORSE}.get(each.verdict, _GREY)  # noqa: PLW2901
            axes.plot([each.low, each.high], [y, y], color=colour, alpha=0.4, linewidth=5, solid_capstyle="butt")
            axes.plot(each.difference, y, "o", color=colour, markersize=5)
            end, text = max(each.high, 0) + 0.04 * span, f"{each.before:.2f} → {each.after:.2f}"
            axes.text(end, y, text, va="center", color=colour)
    axes.set_yticks(range(len(names)), names)
    axes.set(xlim=(low - 0.06 * span, high + 0.5 * span), ylim=(len(names) - 0.5, -0.5))
    axes.locator_params(axis="x", nbins=5)
    axes.set(xlabel="gain with its 95% interval", title="Gain")
    if len(variants) == 1:
        counts = {word: sum(each.verdict == word for each in every) for word in ("better", "worse")}
        parts = [f"{word} on {count} of {len(every)}" for word, count in counts.items() if count]
        title = ", ".join(parts).capitalize() or "No clear gain"
        axes.set_title(title.replace(f"{len(every)} of {len(every)}", "every measure"))


def _draw_kept(axes: Axes, variants: "list[tuple[str, Variant]]") -> list[Any]:
    """Draw the share of the relevant candidates among the first n documents, and return the lines for a legend."""
    first = variants[0][1].top_n
    curves = [("before", _GREY, first.recall_before, first.before)]
    curves += [("after", colour, each.top_n.recall_after, each.top_n.after) for colour, each in variants]
    lines = []
    for row, (name, colour, shares, count) in enumerate(curves):
        lines += axes.plot(range(1, len(shares) + 1), shares, color=colour, linewidth=2)
        axes.vlines(count, 0, 0.95, colour, linestyle="dotted")
        # The labels have different heights, so that those of close numbers do not overlap.
        side = "left" if count <= 0.7 * len(shares) else "right"
        text = f" {name}: {count} " if len(variants) == 1 else f" {count} "
        axes.text(count, 0.02 + 0.1 * row, text, ha=side, color=colour, weight="bold")
    axes.axhline(0.95, color=_GREY, linewidth=0.8, linestyle="dotted")
    axes.text(0, 0.955, " 95%", size=8)
    axes.set(xlim=(0, None), ylim=(0, 1.03), xlabel="documents kept (top_n)", ylabel="relevant candidates kept")
    axes.locator_params(axis="x", integer=True)
    title = "Documents that keep 95%"
    if len(variants) == 1:
        keep = "1 document keeps" if first.after == 1 else f"{first.after} documents keep"
        title = f"{keep} " + (
            f"what took {first.before}" if first.after < first.before else f"95%, {first.before} before"
        )
    axes.set_title(title)
    return lines


def _draw_thresholds(axes: Axes, variants: "list[tuple[str, Variant]]") -> None:
    """Draw precision and recall over the threshold, or the F1 of several variants."""
    for index, (colour, variant) in enumerate(variants):
        looks = {"f1": colour} if len(variants) > 1 else {"precision": colour, "recall": _GREY}
        for name, look in looks.items():
            y = [getattr(each, name) for each in variant.thresholds]
            axes.plot([each.threshold for each in variant.thresholds], y, color=look, label=name)
        if variant.best_threshold:
            x = variant.best_threshold.threshold
            axes.axvline(x, color=colour, linestyle="dotted")
            axes.text(x, 0.9 - 0.1 * index, f"best F1 at {x:.2f} ", ha="right", color=colour, weight="bold")
    axes.set(ylim=(0, 1.03), xlabel="score_threshold", title="F1" if len(variants) > 1 else "Precision and recall")
    if len(variants) == 1:
        axes.legend()
