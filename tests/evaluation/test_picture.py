import io
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from regolo_rerank import RegoloClient
from regolo_rerank.evaluation import Evaluation, evaluate
from regolo_rerank.plot import Picture, evaluation_summary


def lengths(query: str, documents: list[str]) -> list[float]:
    """Score documents by their length, between 0 and 1."""
    del query
    return [len(document) / 100 for document in documents]


def evaluation(variants: int = 1, relevant: int = 1) -> Evaluation:
    """Return an evaluation of 20 queries, whose longest document is relevant."""
    queries = [{"query": "q", "documents": ["a", "bbb", "cc"], "relevant": [relevant]}] * 20
    client = RegoloClient(base_url="local://", scorer=lengths)
    return evaluate(queries, {f"variant {index} $x$": client for index in range(variants)})


def titles(figure: Figure) -> list[str]:
    """Return the titles of its parts."""
    return [axes.get_title() for axes in figure.axes]


@pytest.mark.parametrize("variants", [1, 2, 7])
def test_the_picture_shows_before_and_after(variants: int) -> None:
    """The measures, the depth and the thresholds of each variant are drawn from the evaluation's numbers."""
    picture = evaluation_summary(evaluation(variants))
    left, middle, right = picture.axes
    assert titles(picture)[2] == ("F1" if variants > 1 else "precision and recall")
    assert [text.get_text() for text in left.get_yticklabels()] == [
        "nDCG@10",
        "MRR",
        "Recall@1",
        "Recall@5",
        "Recall@10",
    ]
    assert len(middle.lines) == 2 * (1 + variants) + 1
    before, after = middle.lines[0], middle.lines[2]
    assert np.asarray(before.get_ydata()).tolist() == [0, 1, 1]
    assert np.asarray(after.get_ydata()).tolist() == [1, 1, 1]
    assert len(right.lines) == (3 if variants == 1 else 2 * variants)
    names = [text.get_text() for text in picture.legends[0].get_texts()]
    assert names[0] == "before"
    assert len(names) == 1 + variants
    assert len(set(names)) == len(names)


def test_a_notebook_and_a_file_get_it() -> None:
    """It is a picture like the others: PNG, small, and not in pyplot's hands."""
    picture = evaluation_summary(evaluation())
    assert isinstance(picture, Picture)
    shown, size = picture._repr_png_()
    assert len(shown) < 60_000
    assert Image.open(io.BytesIO(shown)).width == 2 * size["width"]


def test_nothing_relevant_among_the_candidates_can_be_drawn() -> None:
    """Without a threshold there is an empty part, and no error."""
    queries = [{"query": "q", "documents": [{"id": "a", "text": "a"}], "relevant": ["b"]}] * 2
    found = evaluate(queries, RegoloClient(base_url="local://", scorer=lengths))
    evaluation_summary(found)._repr_png_()


def test_evaluating_does_not_need_matplotlib() -> None:
    """The extra of the pictures is for pictures only."""
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from regolo_rerank import RegoloClient; from regolo_rerank.evaluation import evaluate\n"
        "client = RegoloClient(base_url='local://', scorer=lambda query, documents: [1.0 for _ in documents])\n"
        "print(evaluate([{'query': 'q', 'documents': ['a'], 'relevant': [0]}], client).queries)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "1\n"  # noqa: S603 - our own command
