"""Pictures of rankings, by Matplotlib."""

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Hashable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from numbers import Real
from typing import Any, Final, NamedTuple

try:
    import numpy as np
    from matplotlib import rcParams
    from matplotlib.axes import Axes
    from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font
    from matplotlib.lines import Line2D

    from regolo_rerank._display.picture import Picture
    from regolo_rerank._evaluation.picture import evaluation_summary
except ImportError as error:
    raise ImportError('regolo_rerank.plot needs Matplotlib: pip install "regolo_rerank[plot]"') from error

from regolo_rerank._display.tables import align, clip, harmless, shown_score
from regolo_rerank._wire.inputs import check_documents
from regolo_rerank.errors import InvalidInputError
from regolo_rerank.results import RerankResponse, RerankResult

__all__ = ["Picture", "evaluation_summary", "rank_changes"]

_LABEL_COLUMNS: Final = 36
_CHART: Final = 3.6
_ROW: Final = 0.21
_MARGIN: Final = 0.9
_TALLEST: Final = 60.0
"""Inches, as are the chart's width, row and margin: with more candidates than fit, the rows are lower."""

_FIGURE_SPACE: Final = "\N{FIGURE SPACE}"
"""As wide as a digit."""
_LEFT_TO_RIGHT: Final = "\N{LEFT-TO-RIGHT MARK}"
"""Around a name, so that one in Arabic or Hebrew keeps the numbers beside it in their place."""
_NO_CHARACTER: Final = 0x10FFFF
"""Only a font of placeholders has a glyph for it."""


_LOOKS: Final[dict[str, dict[str, Any]]] = {
    "up": {"color": "#0072B2", "linestyle": "-", "marker": "^", "linewidth": 1.8},
    "down": {"color": "#D55E00", "linestyle": "--", "marker": "v", "linewidth": 1.2},
    "unchanged": {"color": "#808080", "linestyle": "-", "marker": "o", "linewidth": 1.0},
    "dropped": {"color": "#808080", "linestyle": ":", "marker": "x", "linewidth": 1.0},
}
"""By what became of a candidate: told by line and marker too, in a blue and an orange that every eye tells apart."""


class _Candidate(NamedTuple):
    text: str
    id: str | None = None
    metadata: str = ""
    identity: int | None = None
    """Of the object; None for a string, which is what it says and nothing else."""
    score: object = None


class _Kept(NamedTuple):
    before: int
    """Index into the candidates before."""
    score: object


def rank_changes(
    before: Iterable[Any],
    after: Iterable[Any] | RerankResponse,
    *,
    labels: Iterable[str] | None = None,
) -> Picture:
    """Draw how reranking moved the candidates: their ranks before on the left, after on the right.

    Copies are recognised by id, where they have one, and by text; equal ones keep their order. Colours and fonts are
    those of the active Matplotlib style.

    Args:
        before: N candidates as the retriever ranked them: strings, LangChain documents or LlamaIndex nodes.
        after: Those that were kept, in their new order: candidates again, copies included, or a response or its
            results, whose indices point into `before`. Scores are shown where it has them.
        labels: What to call the N candidates, such as their titles; None takes their texts.

    Returns:
        A Matplotlib figure, which a notebook shows and `savefig` writes; it is not registered with `pyplot`.

    Raises:
        InvalidInputError: An argument is no sequence of candidates, `after` holds what is not in `before`, or there
            are not as many labels as candidates.

    Examples:
        >>> before = ["Rome is in Italy.", "Beijing is the capital of China."]
        >>> picture = rank_changes(before, before[::-1])
    """
    candidates = [_candidate(item, f"before[{index}]") for index, item in enumerate(_list(before, "before"))]
    kept = _find_kept(candidates, _list(after.results if isinstance(after, RerankResponse) else after, "after"))
    names = [item.text for item in candidates] if labels is None else check_documents(labels, str, name="labels")
    if len(names) != len(candidates):
        raise InvalidInputError(f"labels: must be one for each candidate, got {len(names)} for {len(candidates)}")
    return _draw_picture(
        [_LEFT_TO_RIGHT + clip(harmless(name), _LABEL_COLUMNS) + _LEFT_TO_RIGHT for name in names], kept
    )


def _list(items: Iterable[Any], name: str) -> list[Any]:
    if isinstance(items, (str, bytes, Mapping, AbstractSet)) or not isinstance(items, Iterable):
        raise InvalidInputError(f"{name}: must be a list of candidates, got {type(items).__name__}")
    return list(items)


def _candidate(item: Any, place: str) -> _Candidate:
    """Read a string, a LangChain document, or a LlamaIndex node with or without a score."""
    if isinstance(item, str):
        return _Candidate(item)
    if hasattr(item, "page_content"):
        metadata = dict(item.metadata)
        score = metadata.pop("relevance_score", None)
        return _Candidate(item.page_content, item.id, repr(metadata), id(item), score)
    if hasattr(item, "node_id"):
        return _Candidate(item.get_content(), item.node_id, "", id(item), getattr(item, "score", None))
    raise InvalidInputError(
        f"{place}: must be a string, a LangChain Document or a LlamaIndex node, got {type(item).__name__}"
    )


def _find_kept(before: list[_Candidate], after: list[Any]) -> list[_Kept]:
    if all(isinstance(item, RerankResult) for item in after):
        return _by_index(before, after)
    candidates = [_candidate(item, f"after[{rank}]") for rank, item in enumerate(after)]
    places = _match(before, candidates)
    return [_Kept(place, candidate.score) for place, candidate in zip(places, candidates, strict=True)]


def _by_index(before: list[_Candidate], results: list[RerankResult]) -> list[_Kept]:
    for rank, result in enumerate(results):
        if not 0 <= result.index < len(before):
            raise InvalidInputError(f"after[{rank}]: has index {result.index}, and before holds {len(before)}")
        candidate = before[result.index]
        if candidate.identity is None and candidate.text != result.document:
            raise InvalidInputError(
                f"after[{rank}]: is not before[{result.index}]; pass what was reranked, in its order"
            )
    if len({result.index for result in results}) < len(results):
        raise InvalidInputError("after: holds an index twice")
    return [_Kept(result.index, result.relevance_score) for result in results]


_SIGNS: Final[tuple[Callable[[_Candidate], Hashable], ...]] = (
    lambda candidate: candidate.identity,
    lambda candidate: (candidate.id, candidate.text, candidate.metadata),
    lambda candidate: (candidate.id, candidate.text),
    lambda candidate: candidate.id,
    lambda candidate: candidate.text,
)
"""What a candidate is recognised by, the surest first: ids may be lost or shared, texts changed or equal."""


def _match(before: list[_Candidate], after: list[_Candidate]) -> list[int]:
    """Return the index in `before` of each candidate in `after`: each index once, equals in order."""
    found: dict[int, int] = {}
    for sign in _SIGNS:
        taken = set(found.values())
        free: defaultdict[Hashable, deque[int]] = defaultdict(deque)
        for index, candidate in enumerate(before):
            if index not in taken and sign(candidate) is not None:
                free[sign(candidate)].append(index)
        for rank, candidate in enumerate(after):
            if rank not in found and free[sign(candidate)]:
                found[rank] = free[sign(candidate)].popleft()
    for rank in range(len(after)):
        if rank not in found:
            raise InvalidInputError(f"after[{rank}]: is not in before, or not as often")
    return [found[rank] for rank in range(len(after))]


def _draw_picture(names: list[str], kept: list[_Kept]) -> Picture:
    """Draw the chart; ranks count from 1 and downwards."""
    rows = max(len(names), 1)
    row = min(_ROW, _TALLEST / rows)
    figure = Picture(figsize=(3 * _CHART, row * rows + _MARGIN), layout="constrained")
    axes = figure.add_subplot(xlim=(0, 1), ylim=(rows + 0.5, 0.5), xticks=[])
    axes.set_title("before", loc="left")
    axes.set_title("after", loc="right")
    size = max(2.0, min(9.0, 0.6 * 72 * row))
    _label(axes, _before(names), size)
    _label(axes.secondary_yaxis("right"), _after(names, kept), size)

    new_ranks = {place: rank for rank, (place, _) in enumerate(kept, 1)}
    ways: Counter[str] = Counter()
    for rank, label in enumerate(axes.get_yticklabels(), 1):
        way = _draw(axes, rank, new_ranks.get(rank - 1))
        label.set_alpha(0.6 if way == "dropped" else 1.0)
        ways[way] += 1
    handles = [Line2D([], [], **look, label=f"{ways[way]} {way}") for way, look in _LOOKS.items() if ways[way]]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(_LOOKS), frameon=False)
    figure.draw_without_rendering()
    # However long the labels, the chart keeps its width.
    figure.set_figwidth(figure.get_figwidth() * (1 - axes.get_position().width) + _CHART)
    return figure


def _before(names: list[str]) -> list[str]:
    return [f"{name}  {rank}" for name, rank in zip(names, _ranks(len(names)), strict=True)]


def _after(names: list[str], kept: list[_Kept]) -> list[str]:
    scores = align([shown_score(float(score)) if isinstance(score, Real) else "" for _, score in kept], _FIGURE_SPACE)
    return [
        "  ".join(filter(None, (rank, score, names[place])))
        for rank, score, (place, _) in zip(_ranks(len(kept)), scores, kept, strict=True)
    ]


def _draw(axes: Axes, before: int, after: int | None) -> str:
    """Draw a candidate's way, level at both ends so that it leads to its labels, and return what became of it."""
    if after is None:
        way, after, end = "dropped", before, 0.1
    else:
        way, end = "up" if after < before else "down" if after > before else "unchanged", 1.0
    x = np.linspace(0, end, 50)
    y = before + (after - before) * x**2 * (3 - 2 * x)
    axes.plot(x, y, **_LOOKS[way], markevery=[-1], markersize=5, clip_on=False)
    return way


def _ranks(count: int) -> list[str]:
    return align([str(rank) for rank in range(1, count + 1)], _FIGURE_SPACE)


def _label(axes: Any, labels: list[str], size: float) -> None:
    """Write the labels at the ranks, as they are and in fonts that have their characters."""
    families, missing = _families(set().union(*labels))
    shown = [label.translate(dict.fromkeys(map(ord, missing), "?")) for label in labels]
    axes.set_yticks(range(1, len(shown) + 1), shown, parse_math=False, usetex=False, fontfamily=families, fontsize=size)
    axes.tick_params(length=0, pad=8)
    axes.spines[:].set_visible(False)


def _families(characters: set[str]) -> tuple[list[str], set[str]]:
    """Return font families, the style's own first, and the characters that no installed font has."""
    families = list(rcParams["font.family"])
    missing = _without(findfont(FontProperties()), characters)
    for font in sorted(fontManager.ttflist, key=lambda font: ("Sans" not in font.name, font.name)):
        if not missing:
            break
        # Matplotlib draws no colour fonts, and a font of placeholders has everything.
        if "Color" in font.name or not _without(font.fname, {chr(_NO_CHARACTER)}):
            continue
        if (left := _without(font.fname, missing)) < missing:
            families.append(font.name)
            missing = left
    return families, missing


def _without(font: str, characters: set[str]) -> set[str]:
    face = get_font(font)
    return {character for character in characters if not face.get_char_index(ord(character))}
