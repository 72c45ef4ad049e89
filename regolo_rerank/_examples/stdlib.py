"""100 questions that people ask about Python, and what a keyword search finds for them in its own documentation.

The documents are the docstrings of the standard library's modules, the first 1,000 characters of each, as this Python
has them; no module is imported for it. The questions were written by hand without borrowing a docstring's words, and
none names the module that answers it.
"""

import ast
import functools
import json
import sys
import sysconfig
import warnings
from importlib.machinery import PathFinder, SourceFileLoader
from importlib.resources import files
from typing import Any, Final

from regolo_rerank.errors import InvalidInputError

__all__ = ["documents", "queries", "questions"]

_CHARACTERS: Final = 1_000
_CANDIDATES: Final = 50


@functools.cache
def documents() -> dict[str, str]:
    """Return the docstring of each public module that has one, by name."""
    found = {name: _docstring(name) for name in sorted(sys.stdlib_module_names) if not name.startswith("_")}
    return {name: docstring[:_CHARACTERS] for name, docstring in found.items() if docstring}


def _docstring(name: str) -> str | None:
    spec = PathFinder.find_spec(name, [sysconfig.get_path("stdlib")])
    if spec is None or not isinstance(spec.loader, SourceFileLoader):
        return None
    try:
        return ast.get_docstring(ast.parse(spec.loader.get_data(spec.loader.path)))
    except SyntaxError:
        return None


def questions() -> dict[str, str]:
    """Return the questions whose module this Python documents, by that module."""
    text = (files("regolo_rerank._examples") / "stdlib_questions.jsonl").read_text("utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    return {line["module"]: line["question"] for line in lines if line["module"] in documents()}


def queries() -> list[dict[str, Any]]:
    """Return each question with the 50 documents that BM25 finds, at most, as `evaluate` reads them.

    Raises:
        InvalidInputError: bm25s is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # in a notebook without widgets, its progress bar has something to say
            import bm25s
    except ImportError:
        raise InvalidInputError('the examples need a keyword search: pip install "regolo_rerank[demo]"') from None
    names, texts = list(documents()), list(documents().values())
    search = bm25s.BM25()
    search.index(bm25s.tokenize(texts, stopwords=None, show_progress=False), show_progress=False)

    def candidates(question: str) -> list[dict[str, str]]:
        (words,) = bm25s.tokenize(question, stopwords=None, return_ids=False, show_progress=False)
        scores = search.get_scores(words)
        best = (-scores).argsort(kind="stable")[:_CANDIDATES]
        return [{"id": names[index], "text": texts[index]} for index in best if scores[index] > 0]

    return [
        {"query": question, "documents": candidates(question), "relevant": [module]}
        for module, question in questions().items()
    ]
