import math
import re
from html.parser import HTMLParser
from typing import Any

import pytest

from regolo_rerank import RegoloClient, RerankResponse, RerankResult
from tests.cli.test_tables import HOSTILE, columns
from tests.conftest import Rank
from tests.support.stub import Reply, Stub, results

DOCUMENTS = ["low score=0.1", "best\n  score=0.9", "middle score=0.5"]

MARKUP = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</td></tr></table><h1>out</h1>",
    "&lt;b&gt; & &#60;",
    "<!-- <![CDATA[ <style>*{display:none}</style>",
]

ATTRIBUTES = {"cellpadding", "colspan", "dir", "scope", "style"}


class Table(HTMLParser):
    """Reads a table; any tag, attribute or style that it does not need fails."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.scopes: list[str | None] = []
        self.styles: list[str] = []
        self.around: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in {"table", "thead", "tbody", "tr", "th", "td", "div", "p"}
        assert dict(attrs).keys() <= ATTRIBUTES
        self.open.append(tag)
        self.styles.append(dict(attrs).get("style") or "")
        if tag == "tr":
            self.rows.append([])
        if tag in {"th", "td"}:
            self.rows[-1].append("")
        if tag == "th":
            self.scopes.append(dict(attrs)["scope"])

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"th", "td"} & set(self.open):
            self.rows[-1][-1] += data
        else:
            self.around.append(data.strip())

    def handle_comment(self, data: str) -> None:
        pytest.fail(data)

    def handle_decl(self, decl: str) -> None:
        pytest.fail(decl)

    @property
    def bars(self) -> list[float]:
        """How much of its track each bar fills, in percent."""
        return [float(found[1]) for style in self.styles if (found := re.match(r"width:([\d.]+)%", style))]


def response_of(*documents: str, scores: list[float] | None = None) -> RerankResponse:
    """Return a response with these documents, the first one best."""
    values = [0.5] * len(documents) if scores is None else scores
    return RerankResponse(results=[RerankResult(*found) for found in zip(range(99), values, documents, strict=False)])


def test_a_response_prints_as_aligned_text(client: RegoloClient, rank: Rank) -> None:
    """Each result is a line of rank, index, score, bar and document, and `repr` stays what Python makes it."""
    response = rank(client, "q", DOCUMENTS * 4, top_n=10)
    assert str(response).splitlines() == [
        " 1   [1]  0.9000  █████████   best score=0.9",
        " 2   [4]  0.9000  █████████   best score=0.9",
        " 3   [7]  0.9000  █████████   best score=0.9",
        " 4  [10]  0.9000  █████████   best score=0.9",
        " 5   [2]  0.5000  █████       middle score=0.5",
        " 6   [5]  0.5000  █████       middle score=0.5",
        " 7   [8]  0.5000  █████       middle score=0.5",
        " 8  [11]  0.5000  █████       middle score=0.5",
        " 9   [0]  0.1000  █           low score=0.1",
        "10   [3]  0.1000  █           low score=0.1",
    ]
    assert repr(response.results[4]) == "RerankResult(index=2, relevance_score=0.5, document='middle score=0.5')"
    assert repr(response).startswith("RerankResponse(id='local-")


def test_a_response_shows_as_a_table_in_a_notebook(client: RegoloClient, rank: Rank) -> None:
    """A notebook gets rank, index, score, bar and document under accessible heads, and the plain repr beside it."""
    ipython: Any = pytest.importorskip("IPython.core.formatters", reason="part of the extra [dev]")
    response = rank(client, "q", DOCUMENTS)
    shown, _ = ipython.DisplayFormatter().format(response)
    table = Table(shown["text/html"])
    assert table.rows == [
        ["rank", "index", "score", "document"],
        ["1", "1", "0.9000", "", "best score=0.9"],
        ["2", "2", "0.5000", "", "middle score=0.5"],
        ["3", "0", "0.1000", "", "low score=0.1"],
    ]
    assert table.scopes == ["col"] * 4 + ["row"] * 3
    assert table.bars == [90.0, 50.0, 10.0]
    assert 'colspan="2"' in shown["text/html"]
    assert shown["text/plain"].startswith("RerankResponse(")


def test_a_single_result_shows_by_its_index() -> None:
    """A result of its own has no rank; its line and its row begin with the index."""
    result = RerankResult(17, 0.25, "a\nb")
    assert str(result) == "[17]  0.2500  ██▌         a b"
    assert Table(result._repr_html_()).rows == [["index", "score", "document"], ["17", "0.2500", "", "a b"]]


def test_an_empty_response_says_so() -> None:
    """No results are told from silence, in text and in HTML."""
    assert str(RerankResponse()) == "no results"
    assert Table(RerankResponse()._repr_html_()).around == ["no results"]


@pytest.mark.parametrize(("count", "more"), [(100, []), (101, ["and 1 more"]), (2_600, ["and 2,500 more"])])
def test_a_long_response_shows_its_best_hundred(count: int, more: list[str]) -> None:
    """The first hundred results are shown, and how many are not."""
    response = RerankResponse(results=[RerankResult(index, 1 / (index + 1), "text") for index in range(count)])
    assert str(response).splitlines()[100:] == more
    assert str(response).splitlines()[99].startswith("100")
    table = Table(response._repr_html_())
    assert [text for text in table.around if text] == more
    assert table.rows[-1][:2] == ["100", "99"]


@pytest.mark.parametrize("document", [*HOSTILE, *MARKUP, "long " * 100, ""])
def test_no_document_breaks_out(document: str) -> None:
    """Whatever a document holds stays a harmless line of text in its own cell, within its columns."""
    response = response_of(document, "next")
    first, second = str(response).split("\n")
    assert second.endswith("  next")
    assert columns(first) <= 80
    assert first.isprintable()
    table = Table(response._repr_html_())
    assert [len(row) for row in table.rows] == [4, 5, 5]
    shown = table.rows[1][4]
    assert columns(shown) <= 160
    assert shown.isprintable()
    # The beginning is there, as itself.
    assert shown[:20].split() == str(response.results[0])[25:45].split()


@pytest.mark.parametrize("document", MARKUP)
def test_markup_is_shown_as_it_is(document: str) -> None:
    """Tags, quotes and entities in a document are read by people, not by the browser."""
    assert Table(response_of(document)._repr_html_()).rows[1][4] == document


def test_a_document_is_cut_before_it_is_escaped() -> None:
    """What is cut is the text and not the HTML, so an entity is whole and counts as what it shows."""
    assert Table(response_of("&" * 999)._repr_html_()).rows[1][4] == "&" * 159 + "…"


@pytest.mark.parametrize(
    ("scores", "bars"),
    [
        ([1.0, 0.5, 0.0], [100.0, 50.0, 0.0]),
        ([6.0, 1.0, -4.0], [100.0, 50.0, 0.0]),
        ([1.7e308, 0.0, -1.7e308], [100.0, 50.0, 0.0]),
        ([3.5], [100.0]),
        ([math.inf, 0.5, -math.inf], [0.0, 0.0, 0.0]),
        ([math.nan], [0.0]),
    ],
)
def test_any_scores_have_bars(scores: list[float], bars: list[float]) -> None:
    """Bars are scaled as on the command line, and results made by hand show even where a score is no number."""
    response = response_of(*["text"] * len(scores), scores=scores)
    assert Table(response._repr_html_()).bars == bars
    widths = [line.count("█") for line in str(response).splitlines()]
    assert widths == [round(bar / 10) for bar in bars]


def test_the_table_takes_its_colours_from_the_page() -> None:
    """Text inherits its colour, and only bars have one: translucent, and spelt as JupyterLab lets it pass."""
    declared = [
        tuple(declaration.split(":"))
        for style in Table(response_of("text")._repr_html_()).styles
        for declaration in filter(None, style.split(";"))
    ]
    assert {value for name, value in declared if name == "color"} == {"inherit"}
    backgrounds = [value for name, value in declared if "background" in name]
    assert len(backgrounds) == 2
    assert all(re.fullmatch(r"rgba\(\d+,\d+,\d+,0\.\d+\)", value) for value in backgrounds)


def test_a_response_of_any_server_shows(client: RegoloClient, stub: Stub, rank: Rank) -> None:
    """Scores of any size keep their column, in text and HTML."""
    stub.always(Reply(results((0, 123_456.7), (1, -3.25), (2, -9_876_543.0))))
    response = rank(client, "q", ["a", "b", "c"])
    lines = [line.split()[2] for line in str(response).splitlines()]
    assert lines == ["1.235e+05", "-3.2500", "-9.877e+06"]
    assert (
        len({line.index("  a") if line.endswith("  a") else len(line) - 3 for line in str(response).split("\n")}) == 1
    )
    assert [row[2] for row in Table(response._repr_html_()).rows[1:]] == lines
