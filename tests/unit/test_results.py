import pickle
import re
import unicodedata
from html import unescape
from typing import Any

import pytest

from regolo_rerank import RerankResponse, RerankResult

HOSTILE = [
    "\x1b[31mred\x1b[0m \x1b]0;title\x07 \x9b2J\x7f gone",
    "one\ttwo\u2028three\x0bfour \u202egnp.exe\u202c \u200bend",
    "北京是中华人民共和国的首都" * 12,
    "e\u0301" * 300,
    "a" + "\u0301" * 100_000,
    "❤\ufe0f 👩\u200d👩\u200d👧 " * 40,
    "half a pair \ud800, a long enough text to be cut at any width" * 8,
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</td></tr></table><h1>out</h1>",
    "&lt;b&gt; & &#60;",
    "",
]


TAGS = {f"<{slash}{tag}" for slash in ("", "/") for tag in ("table", "thead", "tbody", "tr", "th", "td", "p", "meter")}


def rows_of(html: str) -> list[list[str]]:
    """Return the cells of a table; any tag that a table does not need fails."""
    assert {*re.findall(r"<[^\s>]*", html)} <= TAGS
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", html)
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in rows]
    return [[unescape(re.sub("<[^>]*>", "", cell)) for cell in row] for row in cells]


def response_of(*documents: object, scores: list[float] | None = None) -> RerankResponse[Any]:
    """Return a response with these documents, the first one best."""
    values = scores or [0.5] * len(documents)
    return RerankResponse(results=[RerankResult(*result) for result in zip(range(9_999), values, documents)])  # noqa: B905 - as many as there are


def columns(line: str) -> int:
    """Return the columns of a line in a terminal."""
    wide = [
        unicodedata.east_asian_width(character) in "WF" for character in line if not unicodedata.combining(character)
    ]
    return len(wide) + sum(wide)


def test_a_response_is_a_sequence() -> None:
    """Length, iteration, indexing and slices are those of the results, and it can be pickled."""
    response = response_of("a", "b", "c")
    assert len(response) == 3
    assert [result.document for result in response] == ["a", "b", "c"]
    assert response[-1].document == "c"
    assert [result.document for result in response[1:]] == ["b", "c"]
    assert not RerankResponse()
    assert pickle.loads(pickle.dumps(response)) == response  # noqa: S301 - our own bytes


def test_a_response_prints_as_aligned_text() -> None:
    """Each result is a line of rank, index, score, bar and document; the plain repr shows everything."""
    response = response_of(*["best\n one", "b"] * 5, scores=[0.95, *[0.1] * 9])
    lines = str(response).splitlines()
    assert lines[0] == " 1  [0]  0.9500  ██████████  best one"
    assert lines[9] == "10  [9]  0.1000  █           b"
    assert repr(response[1]) == "RerankResult(index=1, relevance_score=0.1, document='b', passage=None)"
    assert str(response[0]) == "[0]  0.9500  ██████████  best one"
    assert str(RerankResponse()) == "no results"


def test_a_response_is_a_table_in_a_notebook() -> None:
    """The cells are those of the text, with a bar from 0 to 1; a single result has no rank."""
    html = response_of("best", {"body": "x"}, scores=[0.9, 0.25])._repr_html_()
    assert rows_of(html) == [
        ["rank", "index", "score", "", "document"],
        ["1", "0", "0.9000", "", "best"],
        ["2", "1", "0.2500", "", "{'body': 'x'}"],
    ]
    assert html.count('scope="col"') == 5
    assert rows_of(RerankResult(17, 0.25, "a\nb")._repr_html_()) == [
        ["index", "score", "", "document"],
        ["17", "0.2500", "", "a b"],
    ]
    assert RerankResponse()._repr_html_() == "<p>no results</p>"


@pytest.mark.parametrize(("count", "more"), [(100, []), (101, ["and 1 more"]), (2_600, ["and 2,500 more"])])
def test_a_long_response_shows_its_best_hundred(count: int, more: list[str]) -> None:
    """The last line says how many results are not shown."""
    response = response_of(*["text"] * count)
    lines, html = str(response).splitlines(), response._repr_html_()
    assert lines[99].startswith("100  [99]")
    assert (lines[100:], re.findall("<p>(.*)</p>", html)) == (more, more)
    assert rows_of(html)[-1][:2] == ["100", "99"]


@pytest.mark.parametrize("document", HOSTILE)
def test_no_document_breaks_out(document: str) -> None:
    """Whatever a document is, it stays a harmless line in its own cell, cut to its columns."""
    response = response_of(document, "next")
    first, second = str(response).split("\n")
    assert second.endswith("  next")
    assert columns(first) <= 80
    row, _ = rows_of(response._repr_html_())[1:]
    shown = row[4]
    assert columns(shown) <= 160
    assert (first + shown).isprintable()
    assert len(first) < 5_000
    assert shown[:20].split() == first[28:48].split()  # the beginning is there, as itself
    if document.isascii() and document.isprintable():
        assert shown == document


def test_a_document_is_cut_before_it_is_escaped() -> None:
    """What is cut is the text and not the HTML; wide characters take two columns."""
    assert rows_of(response_of("&" * 999)._repr_html_())[1][4] == "&" * 159 + "…"
    assert rows_of(response_of("北" * 999)._repr_html_())[1][4] == "北" * 79 + "…"
    assert rows_of(response_of("&" * 160)._repr_html_())[1][4] == "&" * 160


@pytest.mark.parametrize(
    ("scores", "bars"),
    [
        ([1.0, 0.5, 0.0], [1.0, 0.5, 0.0]),
        ([0.5, 0.25], [0.5, 0.25]),
        ([6.0, 1.0, -4.0], [1.0, 0.5, 0.0]),
        ([3.5], [1.0]),
        ([-3.5, -3.5], [1.0, 1.0]),
    ],
)
def test_any_scores_have_bars(scores: list[float], bars: list[float]) -> None:
    """Probabilities are bars themselves, other scores are placed between worst and best."""
    response = response_of(*["text"] * len(scores), scores=scores)
    assert [float(value) for value in re.findall(r'value="(.*?)"', response._repr_html_())] == bars
    assert [line.count("█") for line in str(response).splitlines()] == [round(bar * 10) for bar in bars]
