import os
import pty
import subprocess
import sys
import termios
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from regolo_rerank import InvalidInputError, RegoloClient
from tests.support.many import Many, smalls
from tests.support.notebooks import fresh_kernels, ran
from tests.support.processes import ROOT, own_process
from tests.support.stub import Stub

SHOWS = """
import asyncio, sys
from regolo_rerank import RegoloClient
client = RegoloClient(base_url="local://", scorer=lambda query, documents: [0.5] * len(documents))
pairs = [("q", ["a"])] * 3
way, stop, sized = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "sized"
def source():
    return pairs if sized else iter(pairs)
async def consume():
    ranked, number = client.arerank_many(source(), show_progress=True), 0
    async for response in ranked:
        number += 1
        if number == stop:
            break
    await ranked.aclose()
if way == "sync":
    for number, response in enumerate(client.rerank_many(source(), show_progress=True), 1):
        if number == stop:
            break
else:
    asyncio.run(consume())
"""


def screen(way: str, stop: int, sized: str) -> str:
    """Return what a terminal gets to see."""
    reader, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 100))
    with own_process(SHOWS, way, str(stop), sized, stderr=terminal) as process:
        os.close(terminal)
        shown = b""
        with suppress(OSError):  # how Linux tells that the other side is closed
            while chunk := os.read(reader, 65_536):
                shown += chunk
    os.close(reader)
    assert process.returncode == 0, shown
    return shown.decode()


@pytest.mark.parametrize(
    ("way", "stop", "sized", "words"),
    [
        ("sync", 9, "sized", "3/3 ["),
        ("sync", 1, "sized", "1/3 ["),
        ("async", 1, "sized", "1/3 ["),
        ("async", 9, "", "3query ["),
    ],
)
def test_a_terminal_shows_a_bar(way: str, stop: int, sized: str, words: str) -> None:
    """On a terminal a bar counts the rankings, of a total where there is one, and is closed when the loop ends."""
    shown = screen(way, stop, sized)
    assert words in shown.splitlines()[-1]
    assert shown.endswith("\n")
    assert "Error" not in shown


@pytest.mark.parametrize("way", ["sync", "async"])
def test_a_file_gets_no_bar(way: str) -> None:
    """Where standard error is no terminal, as in a log, nothing is written."""
    with own_process(SHOWS, way, "9", "sized", stderr=subprocess.PIPE) as process:
        assert process.communicate(timeout=20)[1] == ""
    assert process.returncode == 0


def test_a_notebook_shows_a_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a Jupyter kernel a bar counts the rankings to the end."""
    fresh_kernels(tmp_path, monkeypatch)
    prelude = (
        'from regolo_rerank import RegoloClient\nclient = RegoloClient(base_url="local://")\npairs = [("q", ["a"])] * 3'
    )
    cells = [
        prelude,
        "for response in client.rerank_many(pairs, show_progress=True): pass",
        "async for response in client.arerank_many(pairs, show_progress=True): pass",
    ]
    for cell in ran(cells, ROOT)[1:]:
        assert "3/3" in str(cell.outputs)


def test_a_bar_without_tqdm_says_what_to_install(
    many: Many, client: RegoloClient, stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without tqdm the error names the argument and the extra, and nothing is sent; without a bar nobody needs it."""
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(InvalidInputError, match=r"show_progress: .* pip install \"regolo_rerank\[progress\]\""):
        many(client, smalls(3), show_progress=True)
    assert not stub.received
    assert len(many(client, smalls(3))) == 3


class Unsized(list[Any]):
    """A list with a length that nobody knows, as that of a dataset may be, or of tqdm around a generator."""

    def __len__(self) -> int:
        raise TypeError("object of type 'Unsized' has no len()")


@pytest.mark.parametrize("shown", [True, False])
def test_a_length_that_raises_is_none(many: Many, *, shown: bool) -> None:
    """With or without a bar, what has no length is ranked."""
    client = RegoloClient(base_url="local://")
    assert len(many(client, Unsized(smalls(3)), show_progress=shown)) == 3


def test_without_a_stderr_there_is_no_bar(many: Many, monkeypatch: pytest.MonkeyPatch) -> None:
    """A service without a standard error ranks as any other."""
    monkeypatch.setattr("sys.stderr", None)
    assert len(many(RegoloClient(base_url="local://"), smalls(3), show_progress=True)) == 3
