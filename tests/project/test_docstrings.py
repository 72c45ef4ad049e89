"""Examples in docstrings."""

import doctest
from importlib import import_module

import pytest


@pytest.mark.parametrize("name", ["cache", "client", "langchain", "llama_index", "prompts"])
def test_examples_in_docstrings_run(name: str) -> None:
    """Each example prints what it says."""
    outcome = doctest.testmod(import_module(f"regolo_rerank.{name}"))
    assert outcome.attempted > 0
    assert outcome.failed == 0
