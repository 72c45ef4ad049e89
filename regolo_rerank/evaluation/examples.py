"""100 questions about Python, with the documents that BM25 finds for them in Python's own documentation.

The documents are the docstrings of the standard library's modules in the running Python, the first 1,000 characters of
each. No module is imported to read them. The questions were written by hand without a docstring's words, and none of
them names the module that answers it.
"""

import ast
import functools
import json
import sys
import sysconfig
from importlib.machinery import PathFinder, SourceFileLoader
from importlib.resources import files
from typing import Any, Final

from regolo_rerank.evaluation.readers import bm25_search

__all__ = ["documents", "example_queries", "questions"]

CHARACTERS: Final = 1_000
CANDIDATES: Final = 50


def example_queries() -> list[dict[str, Any]]:
    """Return 100 questions about Python for `evaluate`, each with the 50 documents that BM25 ranks best.

    The documents are the docstrings of the standard library's modules, and their ids are the names of the modules.

    Raises:
        InvalidInputError: bm25s is not installed.
    """
    names, texts = list(documents()), list(documents().values())
    search = bm25_search(texts, CANDIDATES)
    return [
        {
            "query": question,
            "documents": [{"id": names[index], "text": texts[index]} for index in search(question)],
            "relevant": [module],
        }
        for module, question in questions().items()
    ]


@functools.cache
def documents() -> dict[str, str]:
    """Return the docstring of each public module that has one, by the module's name."""
    found = {name: _docstring(name) for name in sorted(sys.stdlib_module_names) if not name.startswith("_")}
    return {name: docstring[:CHARACTERS] for name, docstring in found.items() if docstring}


def questions() -> dict[str, str]:
    """Return the questions that this Python's documentation answers, by module."""
    text = (files("regolo_rerank.evaluation") / "stdlib_questions.jsonl").read_text("utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    return {line["module"]: line["question"] for line in lines if line["module"] in documents()}


def _docstring(name: str) -> str | None:
    spec = PathFinder.find_spec(name, [sysconfig.get_path("stdlib")])
    if spec is None or not isinstance(spec.loader, SourceFileLoader):
        return None
    try:
        return ast.get_docstring(ast.parse(spec.loader.get_data(spec.loader.path)))
    except SyntaxError:
        return None
