import sys
import sysconfig
from pathlib import Path

import pytest

from regolo_rerank.evaluation import example_queries
from regolo_rerank.evaluation.examples import documents


def test_the_standard_library_is_read_and_not_run() -> None:
    """There is a document for each documented public module, and no module is imported to read it."""
    before = set(sys.modules)
    found = documents.__wrapped__()
    assert set(sys.modules) == before
    assert len(found) > 100
    assert found["shelve"].startswith("Manage shelves of pickled objects.")
    assert not [name for name in found if name.startswith("_")]


def test_unreadable_modules_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Private, damaged, undocumented and absent modules have no document."""
    for name, source in {
        "abc": b'"""Kept."""',
        "json/__init__": b'# coding: latin-1\n"""caf\xe9"""',
        "_pyio": b'"""Private."""',
        "ast": b'"""Cut',
        "bz2": b'"""\xff"""',
        "cmd": b"x = 1",
        "dis": b'"""' + b"x" * 2_000 + b'"""',
        "mine": b'"""Not in the standard library."""',
    }.items():
        file = tmp_path / f"{name}.py"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(source)
    (tmp_path / "cgi").mkdir()
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    assert documents.__wrapped__() == {"abc": "Kept.", "dis": "x" * 1_000, "json": "café"}


def test_candidates_share_words_with_the_question_the_rarest_first() -> None:
    """BM25 finds at most 50 documents with a word of the question, the ones with rare words first."""
    found = {query["relevant"][0]: [each["id"] for each in query["documents"]] for query in example_queries()}
    assert len(found) > 90
    assert found.keys() <= documents().keys()
    assert found["ftplib"][0] == "ftplib"
    assert max(map(len, found.values())) == 50
    assert all(len(set(names)) == len(names) for names in found.values())
