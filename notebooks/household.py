"""Search the 40 household tips in data/household.jsonl by BM25."""

import json
from pathlib import Path

from regolo_rerank.evaluation.readers import bm25_search

_FILE = Path(__file__).parent / "data" / "household.jsonl"

TIPS: list[dict[str, str]] = [
    json.loads(line) for line in _FILE.read_text("utf-8").splitlines()
]
"""Each tip has an `id`, a `text`, and a `question` that it answers."""

_find = bm25_search([tip["text"] for tip in TIPS], 15)


def search(question: str) -> list[dict[str, str]]:
    """Return up to 15 tips, best first."""
    return [TIPS[index] for index in _find(question)]
