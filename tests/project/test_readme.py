"""The README: its length, its order, its links and its figures. Its examples run in test_docs.py."""

import re
import sys
from pathlib import Path

import pytest

from regolo_rerank import RegoloClient

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text("utf-8")


def test_it_is_short_and_has_the_two_commands() -> None:
    """At most 120 lines; the blocks of bash are the demo and the tests, one line each."""
    assert len(README.splitlines()) <= 120
    demo, tests = re.findall(r"```bash\n(.*)\n```", README)
    assert demo.endswith("regolo-rerank demo")
    assert tests.endswith("pytest")


def test_its_links_and_pictures_exist() -> None:
    """Every relative link is a file of the repository, and pictures have a description."""
    targets = re.findall(r"\]\(([^)]+)\)", README)
    missing = [each for each in targets if not each.startswith("https://") and not (ROOT / each).is_file()]
    assert targets
    assert missing == []
    assert all(len(words) > 10 for words in re.findall(r"!\[(.*?)\]", README))


def test_the_gain_is_the_measured_one() -> None:
    """README and front page name the measured number of questions whose right module is first."""
    pytest.importorskip("bm25s")
    examples = pytest.importorskip("regolo_rerank.evaluation")
    home = (ROOT / "docs" / "index.md").read_text("utf-8")
    gains = re.findall(r"first for (\d+) questions instead of (\d+)", README + home)
    assert len(gains) == 2
    if sys.version_info[:2] != (3, 11):
        pytest.skip("the documents are the docstrings of Python 3.11")
    queries = examples.example_queries()
    pairs = ((query["query"], query["documents"]) for query in queries)
    rankings = list(RegoloClient(base_url="local://").rerank_many(pairs, text="text", top_n=1))
    before = sum(query["documents"][0]["id"] in query["relevant"] for query in queries)
    after = sum(best[0].document["id"] in query["relevant"] for query, best in zip(queries, rankings, strict=True))
    assert gains == [(str(after), str(before))] * 2
