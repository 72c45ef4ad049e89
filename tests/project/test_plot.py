import io
import random
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from langchain_core.documents import Document
from llama_index.core.schema import NodeWithScore, TextNode
from matplotlib import font_manager, rc_context, style
from matplotlib.colors import same_color
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from regolo_rerank import (
    InvalidInputError,
    RegoloClient,
    RerankResponse,
    RerankResult,
    langchain,
    llama_index,
    plot,
)
from regolo_rerank.plot import rank_changes
from tests.conftest import KEY, Rank
from tests.support.inside import limit_pictures_to, write_labels
from tests.support.modes import Call
from tests.support.stub import Stub

TEXTS = ["a score=0.1", "b score=0.9", "a score=0.1", "c score=0.5", "b score=0.9", "d score=0.3", "a score=0.1"]

SHOWN = """
import sys
from IPython.core.formatters import DisplayFormatter
from regolo_rerank.plot import rank_changes
shown, metadata = DisplayFormatter().format(rank_changes(["a", "b"], ["b"]))
assert shown["image/png"].startswith(b"\\x89PNG"), shown.keys()
from io import BytesIO
from PIL import Image
assert abs(Image.open(BytesIO(shown["image/png"])).width - 2 * metadata["image/png"]["width"]) <= 1
assert "matplotlib.pyplot" not in sys.modules
"""


def ends(figure: Figure) -> list[tuple[int, int | None]]:
    """Return where each candidate's line begins and ends, as indices; None for one that is dropped."""
    (axes,) = figure.axes
    return [
        (round(float(y[0])) - 1, round(float(y[-1])) - 1 if x[-1] == 1 else None)
        for x, y in (np.asarray(line.get_data()) for line in axes.lines)
    ]


def order(figure: Figure) -> list[int]:
    """Return the indices of the candidates that are kept, the best first."""
    kept = sorted((after, before) for before, after in ends(figure) if after is not None)
    assert [after for after, _ in kept] == list(range(len(kept)))
    return [before for _, before in kept]


def labels(figure: Figure) -> tuple[list[Text], list[Text]]:
    """Return the labels on both sides."""
    (axes,) = figure.axes
    (right,) = axes.child_axes
    return axes.get_yticklabels(), right.get_yticklabels()


def said(texts: list[Text]) -> list[list[str]]:
    """Return the words of labels, without marks of direction and spaces of any width."""
    return [text.get_text().replace("\u200e", "").split() for text in texts]


def legend(figure: Figure) -> list[str]:
    """Return what the legend says."""
    return [text.get_text() for text in figure.legends[0].get_texts()]


def picture_of(before: Sequence[str], *kept: int, scores: Sequence[float] = (), **arguments: Any) -> plot.Picture:
    """Draw a response that kept these of the texts."""
    values = [*scores, *[0.5] * len(kept)]
    ranked = [RerankResult(index, score, before[index]) for index, score in zip(kept, values, strict=False)]
    return rank_changes(before, RerankResponse(results=ranked), **arguments)


def test_each_candidate_has_a_line_from_its_old_rank_to_its_new_one() -> None:
    """Lines begin and end at the ranks, and labels on both sides say rank and text, scores where they are known."""
    figure = picture_of(["one", "two", "three", "four", "five"], 3, 1, 0, 2, scores=[0.9, 0.5, 0.25, -12.5])
    assert ends(figure) == [(0, 2), (1, 1), (2, 3), (3, 0), (4, None)]
    left, right = map(said, labels(figure))
    assert left == [["one", "1"], ["two", "2"], ["three", "3"], ["four", "4"], ["five", "5"]]
    assert right == [
        ["1", "0.9000", "four"],
        ["2", "0.5000", "two"],
        ["3", "0.2500", "one"],
        ["4", "-12.5000", "three"],
    ]
    assert legend(figure) == ["1 up", "2 down", "1 unchanged", "1 dropped"]


def test_what_became_of_a_candidate_is_told_by_more_than_colour() -> None:
    """Up, down, unchanged and dropped differ in marker or line, and what is dropped has a faded label."""
    figure = picture_of(["one", "two", "three", "four"], 2, 1, 0)
    (axes,) = figure.axes
    assert len({line.get_marker() for line in axes.lines}) == 4
    assert len({line.get_linestyle() for line in axes.lines}) == 3
    assert len({line.get_color() for line in axes.lines}) == 3
    assert [label.get_alpha() for label in labels(figure)[0]] == [1.0, 1.0, 1.0, 0.6]


def test_no_score_is_invented() -> None:
    """Strings have no scores, so the right side shows none."""
    figure = rank_changes(["one", "two"], ["two", "one"])
    assert said(labels(figure)[1]) == [["1", "two"], ["2", "one"]]


@pytest.mark.parametrize("top_n", [None, 4])
def test_both_frameworks_and_the_client_give_the_same_picture(
    top_n: int | None, stub: Stub, client: RegoloClient, call: Call, rank: Rank
) -> None:
    """Copies that the adapters return are found again, among equal texts too, with their scores."""
    response = rank(client, "q", TEXTS, top_n=top_n)
    documents = [Document(text) for text in TEXTS]
    nodes = [NodeWithScore(node=TextNode(text=text), score=0.7) for text in TEXTS]
    by_langchain = langchain.RegoloRerank(api_key=KEY, base_url=stub.url, top_n=top_n)
    by_llama_index = llama_index.RegoloRerank(api_key=KEY, base_url=stub.url, top_n=top_n)
    ranked = call(by_langchain.compress_documents, documents, "q")
    ranked_nodes = call(by_llama_index.postprocess_nodes, nodes, query_str="q")
    figures = [
        rank_changes(TEXTS, response),
        rank_changes(TEXTS, response.results),
        rank_changes(documents, ranked),
        rank_changes(documents, response),
        rank_changes(iter(TEXTS), iter(ranked)),
        rank_changes(nodes, ranked_nodes),
    ]
    assert order(figures[0]) == [result.index for result in response.results]
    assert len({str(ends(figure)) for figure in figures}) == 1
    assert len({str(said(labels(figure)[1])) for figure in figures}) == 1
    assert said(labels(figures[0])[1])[0] == ["1", "0.9000", "b", "score=0.9"]


FIRST, SECOND = Document("same"), Document("same")
TITLED = [Document("same", metadata={"title": title}) for title in "ab"]
TITLED_COPIES = [Document("same", metadata={"title": title, "relevance_score": 0.5}) for title in "ba"]


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (["a", "b", "a"], ["b", "a", "a"], [1, 0, 2]),
        (["a", "b", "a"], ["a"], [0]),
        ([FIRST, SECOND], [SECOND, FIRST], [1, 0]),
        ([FIRST, SECOND], [Document("same")], [0]),
        ([Document("same", id="1"), Document("same", id="2")], [Document("same", id="2")], [1]),
        (TITLED, TITLED_COPIES, [1, 0]),
        ([Document("a", id="x"), Document("b", id="x")], [Document("b", id="x", metadata={"new": 1})], [1]),
        ([Document("a", id="1"), Document("b", id="2")], [Document("b cut", id="2")], [1]),
        ([Document("a", id="1"), Document("b", id="2")], [Document("b")], [1]),
        ([Document("a", id="1"), Document("b", id="2")], [Document("b", id="new")], [1]),
        ([Document("same", id="1"), Document("same", id="2")], [Document("same"), Document("same", id="1")], [1, 0]),
        ([Document("same", id="1"), Document("same")], [Document("same")], [1]),
        (["a", "b"], [Document("b"), "a"], [1, 0]),
        ([TextNode(text=text) for text in "ab"], [NodeWithScore(node=TextNode(text=text)) for text in "ba"], [1, 0]),
        ([TextNode(text="same", id_=i) for i in "xy"], [NodeWithScore(node=TextNode(text="same", id_="y"))], [1]),
    ],
    ids=[
        "equal strings keep their order",
        "the first of equal strings",
        "the object itself",
        "a copy of equal documents",
        "an id",
        "metadata but for the score",
        "a shared id and a text",
        "an id and a changed text",
        "a lost id",
        "a new id",
        "ids before texts",
        "no id before another",
        "mixed kinds",
        "nodes made anew",
        "node ids",
    ],
)
def test_a_candidate_is_recognised_by_the_surest_sign(before: list[Any], after: list[Any], expected: list[int]) -> None:
    """The object itself, then id, text and metadata, then id and text, then either of them; equal ones in order."""
    assert order(rank_changes(before, after)) == expected


@pytest.mark.parametrize("seed", range(5))
def test_copies_are_always_found_and_never_mistaken(seed: int) -> None:
    """Any copies in any order are found, each once, and only in a candidate with their text and id."""
    rng = random.Random(seed)  # noqa: S311 - repeatable cases, no secrets
    candidates = [(rng.choice("abcd"), rng.choice([None, "1", "2", "3"])) for _ in range(40)]
    before = [Document(text, id=name) for text, name in candidates]
    kept = rng.sample(range(40), 30)
    found = order(rank_changes(before, [before[index].model_copy() for index in kept]))
    assert [candidates[index] for index in found] == [candidates[index] for index in kept]
    assert len(set(found)) == 30


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("ab", ["a"], r"before: must be a list of candidates, got str"),
        (["a"], {"a"}, r"after: must be a list of candidates, got set"),
        (["a"], None, r"after: must be a list of candidates, got NoneType"),
        (["a", 7], ["a"], r"before\[1\]: must be a string, .* got int"),
        (["a"], ["a", b"a"], r"after\[1\]: must be a string, .* got bytes"),
        (["a"], [RerankResult(0, 0.5, "a"), "a"], r"after\[0\]: must be a string, .* got RerankResult"),
        (["a", "b"], ["b", "c"], r"after\[1\]: is not in before"),
        (["a", "b"], ["b", "b"], r"after\[1\]: is not in before, or not as often"),
        ([FIRST], [FIRST, FIRST], r"after\[1\]: is not in before, or not as often"),
        (["a"], [RerankResult(1, 0.5, "b")], r"after\[0\]: has index 1, and before holds 1"),
        (["a"], [RerankResult(-1, 0.5, "a")], r"after\[0\]: has index -1"),
        (["a", "b"], [RerankResult(1, 0.5, "a")], r"after\[0\]: is not before\[1\]"),
        (["a"], RerankResponse(results=[RerankResult(0, 0.5, "a")] * 2), r"after: holds an index twice"),
    ],
)
def test_what_cannot_be_drawn_is_refused(before: Any, after: Any, message: str) -> None:
    """Anything that would give a wrong picture is an error that names the argument."""
    with pytest.raises(InvalidInputError, match=message):
        rank_changes(before, after)


def test_documents_may_be_reranked_by_another_text() -> None:
    """A response's indices count where documents were ranked by more than their content, such as their titles."""
    documents = [Document("one", metadata={"title": "A"}), Document("two", metadata={"title": "B"})]
    response = RerankResponse(results=[RerankResult(1, 0.5, "B: two"), RerankResult(0, 0.25, "A: one")])
    assert order(rank_changes(documents, response)) == [1, 0]


def test_labels_take_the_place_of_texts() -> None:
    """Each candidate can have a name of its own, which does not change how it is recognised."""
    documents = [Document("one"), Document("two")]
    figure = rank_changes(documents, documents[::-1], labels=["A", "B"])
    assert list(map(said, labels(figure))) == [[["A", "1"], ["B", "2"]], [["1", "B"], ["2", "A"]]]


@pytest.mark.parametrize(
    ("names", "message"),
    [(["A"], "labels: must be one for each candidate, got 1 for 2"), ("AB", "labels: "), ([1, 2], r"labels\[0\]: ")],
)
def test_wrong_labels_are_refused(names: Any, message: str) -> None:
    """A label too few, a single string and labels that are no strings are errors that name the argument."""
    with pytest.raises(InvalidInputError, match=message):
        picture_of(["one", "two"], 1, labels=names)


def test_the_image_is_small_and_its_background_is_the_styles() -> None:
    """A notebook stores few bytes a picture, and what is white stays white."""
    figure = picture_of([f"candidate {index}" for index in range(30)], *range(29, -1, -1))
    image, _ = figure._repr_png_()
    figure.savefig(full := io.BytesIO(), format="png", dpi=2 * figure.dpi)
    assert len(image) < len(full.getvalue()) / 2
    assert Image.open(io.BytesIO(image)).convert("RGB").getpixel((0, 0)) == (255, 255, 255)


LETTER = "\N{ARMENIAN CAPITAL LETTER AYB}"
HARD = ["costs $5 and $10", r"\frac{1}{$", "a\nb\t\x1b[31m", "W" * 99, "北京是首都" * 20, "한국어", "\u202eb\ud800", ""]


def test_any_text_is_a_line_that_can_be_drawn() -> None:
    """Labels are drawn without a warning as they are, folded and cut."""
    figure = picture_of(HARD, *reversed(range(len(HARD))))
    assert figure._repr_png_()[0].startswith(b"\x89PNG")
    left = said(labels(figure)[0])
    assert [" ".join(words[:-1]) for words in left[:4]] == [HARD[0], HARD[1], r"a b \x1b[31m", "W" * 35 + "…"]
    assert left[-2:] == [["b?", "7"], ["8"]]


def test_no_text_is_a_formula() -> None:
    """Dollars and backslashes are what they are, even where the style has TeX write all text."""
    axes = Figure().add_subplot()
    with rc_context({"text.usetex": True}):
        write_labels(axes, HARD[:2], 9.0)
    assert [label.get_text() for label in axes.get_yticklabels()] == HARD[:2]
    assert not any(label.get_usetex() or label.get_parse_math() for label in axes.get_yticklabels())


def fonts(name: str) -> list[font_manager.FontEntry]:
    """Return the installed fonts of a name."""
    return [font for font in font_manager.fontManager.ttflist if name in font.name]


@pytest.mark.parametrize(
    ("others", "written"),
    [
        (fonts("DejaVu Sans"), LETTER),
        (fonts("Last Resort"), "?"),
        ([font_manager.FontEntry(fname=font_manager.findfont("DejaVu Sans"), name="A Color Emoji")], "?"),
    ],
    ids=["letters", "placeholders", "colour"],
)
def test_another_font_writes_what_the_styles_font_cannot(
    others: list[font_manager.FontEntry], written: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A letter comes from an installed font that has it, or is a question mark: never an empty box or a warning."""
    monkeypatch.setattr(font_manager.fontManager, "ttflist", fonts("STIXGeneral") + others)
    figure = Figure()
    with rc_context({"font.family": ["STIXGeneral"]}):
        write_labels(figure.add_subplot(), [f"{LETTER} and latin"], 9.0)
    (label,) = figure.axes[0].get_yticklabels()
    assert label.get_fontfamily()[0] == "STIXGeneral"
    assert label.get_text() == f"{written} and latin"
    figure.savefig(io.BytesIO())


@pytest.mark.parametrize("texts", [["a", "b"], ["W" * 50, "b"], [f"candidate {number}" for number in range(100)]])
def test_labels_never_squeeze_the_chart_or_leave_the_picture(texts: list[str]) -> None:
    """The chart is as wide with long labels as with short ones, and everything is inside the picture."""
    figure = picture_of(texts, *range(len(texts)))
    figure.draw_without_rendering()
    (axes,) = figure.axes
    assert axes.get_position().width * figure.get_figwidth() == pytest.approx(3.6, abs=0.2)
    for label in [*labels(figure)[0], *labels(figure)[1]]:
        box = label.get_window_extent()
        assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1
        assert label.get_fontsize() == 9
    boxes = [label.get_window_extent() for label in labels(figure)[0]]
    assert all(upper.y0 >= lower.y1 for upper, lower in pairwise(boxes))


@pytest.mark.parametrize(("tallest", "size"), [(1.0, 4.3), (0.1, 2.0)])
def test_a_picture_of_very_many_has_an_end(tallest: float, size: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the tallest picture holds no more candidates, rows and letters are smaller, but never too small to draw."""
    limit_pictures_to(tallest, monkeypatch)
    figure = picture_of([f"candidate {number}" for number in range(10)], 3)
    assert figure.get_figheight() < tallest + 1
    assert [label.get_fontsize() for label in labels(figure)[0]] == pytest.approx([size] * 10, abs=0.1)


def test_the_numbers_beside_a_name_keep_their_place() -> None:
    """Marks of direction around it keep a name that is written from right to left from moving its rank and score."""
    left, right = labels(picture_of(["بكين"], 0))
    assert left[0].get_text() == "\u200eبكين\u200e  1"
    assert right[0].get_text() == "1  0.5000  \u200eبكين\u200e"


@pytest.mark.parametrize(("before", "after"), [([], []), (["a"], []), (["a"], ["a"])])
def test_few_candidates_are_a_picture_too(before: list[str], after: list[str]) -> None:
    """Nothing found, nothing kept and a single candidate are drawn, without a warning."""
    figure = rank_changes(before, after)
    assert figure._repr_png_()[0].startswith(b"\x89PNG")
    assert len(ends(figure)) == len(before)


def test_the_active_style_decides_on_the_colours() -> None:
    """In a dark style the background is dark and the labels are light."""
    with style.context("dark_background"):
        figure = picture_of(["one", "two"], 1, 0)
    assert same_color(figure.get_facecolor(), "black")
    assert all(same_color(label.get_color(), "white") for label in labels(figure)[0])


def test_a_notebook_shows_it_without_pyplot() -> None:
    """IPython gets an image, sharp on dense screens, from a process that never imported `pyplot`."""
    pytest.importorskip("IPython", reason="part of the extra [dev]")
    subprocess.run([sys.executable, "-W", "error", "-c", SHOWN], check=True)  # noqa: S603 - our own command


def test_without_matplotlib_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """What to install is said when it is imported."""
    monkeypatch.delitem(sys.modules, "regolo_rerank.plot")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "regolo_rerank\[plot\]"'):
        __import__("regolo_rerank.plot")
