"""The table that `rank` prints: whatever the texts are, it can be read and does no harm."""

import io
import sys
import unicodedata
from pathlib import Path

import pytest

from regolo_rerank._cli.main import main
from tests.cli.conftest import jsonl
from tests.support.stub import Reply, Stub, results

HOSTILE = [
    "\x1b[31mred\x1b[0m \x1b]0;title\x07 \x9b2J\x7f gone",
    "one\ttwo\u2028three\x0bfour \u202egnp.exe\u202c \u200bend",
    "北京是中华人民共和国的首都" * 12,
    "e\u0301" * 300,
    "a" + "\u0301" * 100_000,
    "❤\ufe0f 👩\u200d👩\u200d👧 " * 40,
    "half a pair \ud800, a long enough text to be cut at any width" * 8,
]


def columns(line: str) -> int:
    """Return the columns of a line in a terminal."""
    return sum(
        0 if unicodedata.combining(character) else 1 + (unicodedata.east_asian_width(character) in "WF")
        for character in line
    )


@pytest.mark.parametrize("width", [1, 20, 40, 80, 200])
def test_the_table_fits_the_terminal_and_is_harmless(
    width: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No document gets more than a line of the terminal's width, or a control or format character through."""
    monkeypatch.setenv("COLUMNS", str(width))
    assert main(["rank", "q", jsonl(tmp_path, *HOSTILE), "--local"]) == 0
    lines = capsys.readouterr().out.removesuffix("\n").split("\n")
    assert len(lines) == len(HOSTILE)
    assert all(columns(line) <= width and len(line) < 5_000 for line in lines)
    assert not [c for line in lines for c in line if unicodedata.category(c) in {"Cc", "Cf", "Cs", "Zl", "Zp"}]
    assert not any("\ufe0f" in line for line in lines)


@pytest.mark.parametrize(
    ("document", "shown", "width"),
    [
        ("\x1b[31m red\t\n2", r"\x1b[31m red 2", 34),
        ("\u202egnp\u200b.exe", "gnp.exe", 27),
        ("é" * 80, "é" * 39 + "…", 60),
        ("a北" * 40, "a北" * 13 + "…", 60),
        ("北京" * 40, "北京" * 9 + "北…", 59),
        ("e\u0301" * 40, "e\u0301" * 40, 60),
    ],
    ids=["escape", "format", "narrow", "mixed", "wide", "combining"],
)
def test_hostile_text_can_still_be_read(
    document: str,
    shown: str,
    width: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An escape is spelled out, white space is folded, and what is cut ends in an ellipsis at the terminal's edge."""
    monkeypatch.setenv("COLUMNS", "60")
    assert main(["rank", "q", jsonl(tmp_path, document), "--local"]) == 0
    line = capsys.readouterr().out.removesuffix("\n")
    assert line[20:] == shown
    assert columns(line) == width


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([1.0, 0.5, 0.0], ["█" * 10, "█" * 5, ""]),
        ([0.96, 0.04], ["█" * 9 + "▋", "▍"]),
        ([6.0, 1.0, -4.0], ["█" * 10, "█" * 5, ""]),
        ([3.5, 3.5], ["█" * 10, "█" * 10]),
        ([1.7e308, 0.0, -1.7e308], ["█" * 10, "█" * 5, ""]),
    ],
)
def test_bars_are_scaled_to_the_scores(
    scores: list[float],
    expected: list[str],
    at_stub: Stub,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Probabilities fill their share of the bar, other scores their place between the worst and the best."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n".join(b"%d" % i for i in range(len(scores))))))
    at_stub.always(Reply(results(*enumerate(scores))))
    assert main(["rank", "q"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[-13:-3].rstrip() for line in lines] == expected
    assert all(len(line) <= 30 for line in lines)
