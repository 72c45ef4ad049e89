import io
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from langchain_core.documents import Document
from llama_index.core.schema import NodeWithScore, TextNode
from matplotlib import font_manager, rc_context
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Annotation, Text
from PIL import Image

from regolo_rerank import InvalidInputError, RegoloClient, RerankResponse, RerankResult
from regolo_rerank.evaluation import evaluate
from regolo_rerank.plot import evaluation_summary, rank_changes

VERDICTS = "better", "worse", "inconclusive"
GREY, TEAL, ORANGE = "#747b84", "#0c8599", "#c2570c"

IN_A_NOTEBOOK = """
import sys
from IPython.core.formatters import DisplayFormatter
from regolo_rerank.plot import rank_changes
shown, metadata = DisplayFormatter().format(rank_changes(["a", "b"], ["b"]))
assert shown["image/png"].startswith(b"\\x89PNG"), shown.keys()
assert "matplotlib.pyplot" not in sys.modules
"""


def ranked(before: list[Any], *kept: int) -> RerankResponse[Any]:
    """Return the response of a reranker that kept these documents, with scores of 0.907, 0.407, -0.093 and so on."""
    return RerankResponse(results=[RerankResult(i, 0.907 - 0.5 * rank, before[i]) for rank, i in enumerate(kept)])


def moves(figure: Figure) -> list[tuple[int, int | None]]:
    """Return where the line of each candidate starts and ends, from 0. None: it is not kept."""
    lines = [np.asarray(line.get_data()) for line in figure.axes[0].lines]
    return [(round(y[0]) - 1, round(y[-1]) - 1 if x[-1] == 1 else None) for x, y in lines]


def order(figure: Figure) -> list[int]:
    """Return the indices of the kept candidates, the best one first."""
    kept = sorted((after, before) for before, after in moves(figure) if after is not None)
    assert [after for after, _ in kept] == list(range(len(kept)))
    return [before for _, before in kept]


def cells(figure: Figure) -> list[Annotation]:
    """Return the texts beside the chart."""
    return [text for text in figure.axes[0].texts if isinstance(text, Annotation) and text.get_text()]


def rows(figure: Figure, side: int) -> list[str]:
    """Return what the left (0) or the right (1) side says, row by row from its heading."""
    found: dict[float, list[Annotation]] = {}
    for cell in cells(figure):
        if cell.xy[0] == side:
            found.setdefault(cell.xy[1], []).append(cell)
    figure.draw_without_rendering()
    return [
        "|".join(cell.get_text() for cell in sorted(row, key=lambda cell: cell.get_window_extent().x0))
        for _, row in sorted(found.items())
    ]


def test_lines_lead_from_old_ranks_to_new_ones_between_two_tables() -> None:
    """Headings are above the columns, scores have two decimals, and a dropped candidate is counted."""
    before = ["one", "two", "three", "four", "five"]
    figure = rank_changes(before, ranked(before, 3, 1, 0, 2))
    assert moves(figure) == [(0, 2), (1, 1), (2, 3), (3, 0), (4, None)]
    assert rows(figure, 0) == ["before reranking", "one|1", "two|2", "three|3", "four|4", "five|5"]
    right = ["1|0.91|four", "2|0.41|two", "3|-0.09|one", "4|-0.59|three"]
    assert rows(figure, 1) == ["after reranking", *right, "1 not kept"]


DOCUMENTS = [Document(text, id=f"id {text}") for text in ("one", "two", "three")]


@pytest.mark.parametrize(("highlight", "expected"), [(None, 2), (0, 0), (np.int64(1), 1), ("id two", 1), ("C", 2)])
def test_one_candidate_is_in_colour(highlight: Any, expected: int) -> None:
    """Its line and its row on both sides are in colour and bold, the others are grey."""
    figure = rank_changes(DOCUMENTS, ranked(DOCUMENTS, 2, 1, 0), highlight=highlight, labels=["A", "B", "C"])
    colours = [to_hex(line.get_color()) for line in figure.axes[0].lines]
    assert colours == [TEAL if index == expected else GREY for index in range(3)]
    coloured = {cell.get_text() for cell in cells(figure) if to_hex(cell.get_color()) == TEAL}
    assert coloured == {str(expected + 1), str(3 - expected), ["-0.09", "0.41", "0.91"][expected], "ABC"[expected]}
    bold = {cell.get_text() for cell in cells(figure) if cell.get_fontweight() == "bold"}
    assert bold == {*coloured, "before reranking", "after reranking"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"highlight": 3}, "highlight: no candidate has the index, id or label 3"),
        ({"highlight": -1}, "highlight: .* -1"),
        ({"highlight": "four"}, "highlight: .* 'four'"),
        ({"labels": ["A"]}, r"labels: expected one per candidate \(3\), got 1"),
    ],
)
def test_options_that_do_not_fit_are_errors(arguments: Any, message: str) -> None:
    """The error is for that option."""
    with pytest.raises(InvalidInputError, match=message):
        rank_changes(DOCUMENTS, DOCUMENTS, **arguments)


SAME, ALSO_SAME = Document("same"), Document("same")
TITLED = [Document("same", metadata={"title": title}) for title in "ab"]
TITLED_COPIES = [Document("same", metadata={"title": title, "relevance_score": 0.5}) for title in "ba"]


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (["a", "b", "a"], ["b", "a", "a"], [1, 0, 2]),
        ([SAME, ALSO_SAME], [ALSO_SAME, SAME], [1, 0]),
        (TITLED, TITLED_COPIES, [1, 0]),
        ([Document("a", id="x"), Document("b", id="x")], [Document("b", id="x", metadata={"new": 1})], [1]),
        ([Document("a", id="1"), Document("b", id="2")], [Document("b cut", id="2")], [1]),
        ([Document("a", id="1"), Document("b", id="2")], [Document("b", id="new")], [1]),
        ([Document("same", id="1"), Document("same")], [Document("same")], [1]),
        ([TextNode(text=text) for text in "ab"], [NodeWithScore(node=TextNode(text=text)) for text in "ba"], [1, 0]),
        ([TextNode(text="same", id_=i) for i in "xy"], [NodeWithScore(node=TextNode(text="same", id_="y"))], [1]),
        ([{"text": "a", "id": 1}, {"text": "b"}], ["b", {"text": "a", "id": 1}], [1, 0]),
        (DOCUMENTS, [RerankResult(1, 0.5, "title: two"), RerankResult(0, 0.25, "title: one")], [1, 0]),
    ],
)
def test_a_copy_is_recognised(before: list[Any], after: list[Any], expected: list[int]) -> None:
    """The object itself comes first, then id, text and metadata, then id or text. Results have an index."""
    assert order(rank_changes(before, after)) == expected


def test_scores_come_from_documents_and_nodes() -> None:
    """They are where the adapters put them. Strings have none."""
    document = Document("a", metadata={"relevance_score": 0.25})
    for scored in (document, NodeWithScore(node=TextNode(text="a"), score=0.25)):
        assert rows(rank_changes(["a"], [scored]), 1)[1] == "1|0.25|a"
    assert rows(rank_changes(["a"], ["a"]), 1)[1] == "1|a"


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("ab", ["a"], r"before: must be a list, got str"),
        (["a"], {"a"}, r"after: must be a list, got set"),
        (["a", 7], ["a"], r"before\[1\]: must be a string, .* got int"),
        (["a"], [RerankResult(0, 0.5, "a"), "a"], r"after\[0\]: must be a string, .* got RerankResult"),
        (["a", "b"], ["b", "c"], r"after\[1\]: is not in before"),
        ([SAME], [SAME, SAME], r"after\[1\]: is not in before, or not as often"),
        (["a"], [RerankResult(1, 0.5, "b")], r"after\[0\]: has index 1, but before has 1"),
        (["a"], [RerankResult(-1, 0.5, "a")], r"after\[0\]: has index -1"),
        (["a", "b"], [RerankResult(1, 0.5, "a")], r"after\[0\]: is not before\[1\]"),
        (["a"], RerankResponse(results=[RerankResult(0, 0.5, "a")] * 2), r"after: has the same index twice"),
    ],
)
def test_arguments_that_would_give_a_wrong_chart_are_errors(before: Any, after: Any, message: str) -> None:
    """The error is for that argument."""
    with pytest.raises(InvalidInputError, match=message):
        rank_changes(before, after)


@pytest.mark.parametrize("width", ["narrow", "W" * 99])
def test_everything_is_inside_the_picture_and_rows_do_not_overlap(width: str) -> None:
    """The picture has 1,400 pixels, or more if labels need them, and the lines keep a part of it."""
    before = [f"{width} {number}" for number in range(40)]
    figure = rank_changes(before, before, "How wide is it?\n" + "a long title " * 20)
    figure.draw_without_rendering()
    assert figure.bbox.width == 1400 if width == "narrow" else figure.bbox.width > 1400
    assert figure.axes[0].get_window_extent().width >= 390
    boxes = [text.get_window_extent() for text in [*cells(figure), *figure.texts]]
    assert all(0 <= box.x0 < box.x1 <= figure.bbox.x1 and 0 <= box.y0 < box.y1 <= figure.bbox.y1 for box in boxes)
    names = [cell.get_window_extent() for cell in cells(figure) if cell.xy[0] == 0 and width[:6] in cell.get_text()]
    assert len(names) == 40
    assert all(upper.y0 >= lower.y1 for upper, lower in pairwise(names))
    assert {cell.get_fontsize() for cell in cells(figure)} == {9}
    assert figure.texts[0].get_window_extent().y0 > max(cell.get_window_extent().y1 for cell in cells(figure))


def test_any_text_can_be_drawn() -> None:
    """Formulas and control characters are not obeyed, and line breaks are folded."""
    hard = ["costs $5 and $10", r"\frac{1}{$", "a\nb\t\x1b[31m", "\u202eb\ud800", ""]
    with rc_context({"text.usetex": True}):
        figure = rank_changes(hard, hard, "$5 or $\n6?")
    assert rows(figure, 0)[1:] == ["costs $5 and $10|1", r"\frac{1}{$|2", "a b [31m|3", "b|4", "5"]
    assert figure.texts[0].get_text() == "$5 or $\n6?"
    assert figure._repr_png_()[0].startswith(b"\x89PNG")


def test_an_installed_font_draws_chinese(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such fonts follow those of the style."""
    installed = font_manager.fontManager.get_font_names()
    monkeypatch.setattr(font_manager.fontManager, "get_font_names", lambda: [*installed, "Noto Sans CJK JP"])
    with rc_context({"font.family": ["STIXGeneral"]}):
        families = cells(rank_changes(["a"], ["a"]))[0].get_fontfamily()
    assert families == ["STIXGeneral", "Noto Sans CJK JP"]


def test_hundreds_of_candidates_fit_into_a_png() -> None:
    """The rows become lower, because Matplotlib draws at most 65,536 pixels on a side."""
    assert rank_changes([f"candidate {number}" for number in range(250)], ["candidate 3"]).bbox.height < 9_000


@pytest.mark.parametrize(("before", "after"), [([], []), (["a"], []), (["a"], ["a"])])
def test_few_candidates_are_a_chart_too(before: list[str], after: list[str]) -> None:
    """So is an empty one."""
    figure = rank_changes(before, after)
    assert figure._repr_png_()[0].startswith(b"\x89PNG")
    assert len(moves(figure)) == len(before)


CURVE = [SimpleNamespace(threshold=x, precision=x, recall=1 - x, f1=x * (1 - x)) for x in (0.8, 0.5, 0.2)]


def evaluation(*verdicts: str, variants: int = 1, before: int = 39, after: int = 14) -> Any:
    """Return made-up results whose measures have these verdicts."""
    gain = {"before": 0.31, "after": 0.45, "difference": 0.14, "low": 0.09, "high": 0.21}
    looks = {
        "measures": {f"M{index}": SimpleNamespace(**gain, verdict=each) for index, each in enumerate(verdicts)},
        "top_n": SimpleNamespace(before=before, after=after, recall_before=[0, 1, 1], recall_after=[1, 1, 1]),
        "thresholds": CURVE,
        "best_threshold": CURVE[1],
    }
    return SimpleNamespace(variants=[SimpleNamespace(name=f"variant {i} $x$", **looks) for i in range(variants)])


def spans(axes: Axes) -> list[Line2D]:
    """Return the intervals of the gains."""
    return [line for line in axes.lines if line.get_linewidth() == 5]


def test_a_gain_stands_beside_a_zero_line_with_its_interval() -> None:
    """The interval is that of the gain, and the label has both measures."""
    gains = evaluation_summary(evaluation(*VERDICTS)).axes[0]
    assert np.asarray(gains.lines[0].get_xdata()).tolist() == [0, 0]
    assert [np.asarray(line.get_xdata()).tolist() for line in spans(gains)] == [[0.09, 0.21]] * 3
    assert [to_hex(line.get_color()) for line in spans(gains)] == [TEAL, ORANGE, GREY]
    assert [text.get_text() for text in gains.texts] == ["0.31 → 0.45"] * 3
    assert [text.get_text() for text in gains.get_yticklabels()] == ["M0", "M1", "M2"]


@pytest.mark.parametrize(
    ("verdicts", "title"),
    [
        (["better"] * 2, "Better on every measure"),
        ([*VERDICTS], "Better on 1 of 3, worse on 1 of 3"),
        (["inconclusive"], "No clear gain"),
    ],
)
def test_the_first_title_is_the_verdict(verdicts: list[str], title: str) -> None:
    """It claims only what the intervals show."""
    assert evaluation_summary(evaluation(*verdicts)).axes[0].get_title(loc="left") == title


@pytest.mark.parametrize(
    ("before", "after", "title"),
    [
        (39, 14, "14 documents keep what took 39"),
        (39, 1, "1 document keeps what took 39"),
        (5, 9, "9 documents keep 95%, 5 before"),
    ],
)
def test_the_second_title_says_how_few_documents_are_enough(before: int, after: int, title: str) -> None:
    """The labels at the lines say it too, and the curves are the measured ones."""
    kept = evaluation_summary(evaluation("better", before=before, after=after)).axes[1]
    assert [np.asarray(line.get_ydata()).tolist() for line in kept.lines[:2]] == [[0, 1, 1], [1, 1, 1]]
    assert kept.get_title(loc="left") == title
    assert {f" before: {before} ", f" after: {after} "} < {text.get_text() for text in kept.texts}


@pytest.mark.parametrize("variants", [1, 3])
def test_thresholds_are_drawn_only_on_request(variants: int) -> None:
    """One variant has precision and recall, several have their F1."""
    measured = evaluation("better", variants=variants)
    assert len(evaluation_summary(measured).axes) == 2
    panel = evaluation_summary(measured, thresholds=True).axes[2]
    drawn = [np.asarray(line.get_ydata()).tolist() for line in panel.lines if line.get_linestyle() == "-"]
    names = ["precision", "recall"] if variants == 1 else ["f1"] * variants
    assert drawn == [[getattr(each, name) for each in CURVE] for name in names]
    assert {text.get_text() for text in panel.texts} == {"best F1 at 0.50 "}


def test_variants_have_colours_of_their_own_and_a_legend() -> None:
    """Their names are not formulas."""
    figure = evaluation_summary(evaluation("better", "better", variants=3))
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["before reranking", "variant 0 $x$", "variant 1 $x$", "variant 2 $x$"]
    lines = [to_hex(line.get_color()) for line in figure.legends[0].get_lines()]
    assert len(set(lines)) == 4
    assert [to_hex(line.get_color()) for line in spans(figure.axes[0])[::2]] == lines[1:]


@pytest.mark.parametrize("relevant", ["a", "missed"])
def test_the_result_of_evaluate_is_drawn(relevant: str) -> None:
    """If the retriever missed all relevant documents, the best threshold is None."""
    queries = [{"query": "q", "documents": [{"id": "a", "text": "a"}], "relevant": [relevant]}] * 2
    client = RegoloClient(base_url="local://", scorer=lambda _, documents: [0.5 for _ in documents])
    assert evaluation_summary(evaluate(queries, client), thresholds=True)._repr_png_()[0].startswith(b"\x89PNG")


def contrast(*colours: Any) -> float:
    """Return the contrast of two colours, as WCAG defines it."""
    low, high = sorted(float(np.dot([0.2126, 0.7152, 0.0722], np.power(to_rgb(each), 2.2))) for each in colours)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("page", ["#ffffff", "#0d1117"], ids=["white", "dark GitHub"])
def test_a_chart_is_legible_on_any_page(page: str) -> None:
    """The background is transparent, also that of the stored image, and all text has a contrast of 3.9 or more."""
    variants = evaluation_summary(evaluation(*VERDICTS, variants=6), thresholds=True)
    for figure in (
        rank_changes(["a", "b"], ["b", "a"], "A title"),
        variants,
        evaluation_summary(evaluation(*VERDICTS)),
    ):
        stored = Image.open(io.BytesIO(figure._repr_png_()[0])).convert("RGBA")
        assert stored.getpixel((0, 0))[3] == 0  # type: ignore[index]  # red, green, blue and alpha
        for text in figure.findobj(Text):
            assert contrast(text.get_color(), page) >= 3.9


def test_a_stored_chart_is_small_and_as_wide_as_a_readme() -> None:
    """Notebooks are stored with their charts, at two pixels for each one of the page."""
    before = [f"candidate {index}" for index in range(15)]
    figure = rank_changes(before, before[::-1])
    image, place = figure._repr_png_()
    figure.savefig(full := io.BytesIO(), format="png")
    assert len(image) < len(full.getvalue()) / 3
    assert place == {"width": 700}
    assert Image.open(io.BytesIO(image)).width == Image.open(full).width == 1400


def test_a_notebook_shows_it_without_pyplot(tmp_path: Path) -> None:
    """IPython gets an image from a process that never imported `pyplot`."""
    pytest.importorskip("IPython", reason="part of the extra [dev]")
    subprocess.run([sys.executable, "-W", "error", "-c", IN_A_NOTEBOOK], check=True, cwd=tmp_path)  # noqa: S603 - our own command


def test_the_error_without_matplotlib_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """It appears when the module is imported."""
    monkeypatch.delitem(sys.modules, "regolo_rerank.plot")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install .*\[evaluate\]"):
        __import__("regolo_rerank.plot")
