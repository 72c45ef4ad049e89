import ast
import json
import re
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

PATH = Path(__file__).parents[2] / "regolo_rerank" / "_examples" / "stdlib_questions.jsonl"
HOUSEHOLD_PATH = Path(__file__).parents[2] / "notebooks" / "data" / "household.jsonl"


def read(path: Path) -> list[dict[str, Any]]:
    """Return the objects of a file, one a line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


QUESTIONS = read(PATH)
HOUSEHOLD = read(HOUSEHOLD_PATH)


def docstrings(module: str) -> list[str]:
    """Return what the files of a module of this Python's standard library say about it."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    paths = [path for path in (stdlib / f"{module}.py", stdlib / module / "__init__.py") if path.is_file()]
    return [docstring for path in paths if (docstring := ast.get_docstring(ast.parse(path.read_bytes())))]


def test_there_are_enough_to_measure_with() -> None:
    """There are at least 60 questions, each with an id, a text and a module of its own."""
    assert len(QUESTIONS) >= 60
    for name in ("id", "question", "module"):
        values = [question[name] for question in QUESTIONS]
        assert all(isinstance(value, str) and value.strip() for value in values)
        assert len(set(values)) == len(values)


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda question: question["module"])
def test_a_question_can_be_answered_and_does_not_answer_itself(question: dict[str, Any]) -> None:
    """A question is about one public module that this Python documents, and does not name it."""
    assert question.keys() == {"id", "question", "module"}
    module = question["module"]
    assert module in sys.stdlib_module_names
    assert not module.startswith("_")
    assert len(docstrings(module)) == 1
    assert not re.search(rf"\b{module}s?\b", question["question"], re.IGNORECASE)


def test_the_household_has_40_paragraphs_and_a_question_for_each() -> None:
    """Ids, texts and questions are there once each, and a text is a short paragraph."""
    assert len(HOUSEHOLD) == 40
    for name in ("id", "text", "question"):
        assert len({each[name] for each in HOUSEHOLD}) == 40
    assert all(each.keys() == {"id", "text", "question"} and 100 < len(each["text"]) < 400 for each in HOUSEHOLD)


@pytest.mark.parametrize("each", HOUSEHOLD, ids=lambda each: each["id"])
def test_a_household_question_does_not_borrow_its_answers_words(each: dict[str, str]) -> None:
    """A question shares at most two words of four letters or more with the paragraph that answers it."""
    question, text = (set(re.findall(r"\w{4,}", each[name].lower())) for name in ("question", "text"))
    assert len(question & text) <= 2
