from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from regolo_rerank._passages import split_passages
from tests.unit.calls import cases

TEXT = st.lists(
    st.sampled_from(["word", "a", " ", ". ", "? ", '." ', "\n\n", "\n", "。", "x" * 30, "1.5", "\u2003"]), max_size=60
).map("".join)


@given(TEXT, st.integers(1, 60))
@cases(500)
def test_passages_cover_a_text(text: str, max_chars: int) -> None:
    """They fit, come in order, leave no gap, overlap by at most a tenth, and each one gets on."""
    spans = split_passages(text, max_chars)
    assert spans[0][0] == 0
    assert spans[-1][1] == len(text)
    assert all(0 <= end - start <= max_chars for start, end in spans)
    for (start, end), (next_start, next_end) in pairwise(spans):
        assert start < next_start <= end < next_end
        assert end - next_start <= max_chars // 10
        assert end - start > max_chars // 2
    assert len(spans) <= 1 + 3 * len(text) / max_chars


@pytest.mark.parametrize(
    ("text", "max_chars", "passages"),
    [
        ("short", 5, ["short"]),
        ("", 5, [""]),
        ("One sentence. Two. Three and on", 20, ["One sentence. Two. ", "Three and on"]),
        ('He said "go!" Then he left it', 20, ['He said "go!" ', "Then he left it"]),
        ("a paragraph\n\nand another one", 20, ["a paragraph\n\n", "and another one"]),
        ("日本語です。英語です。", 8, ["日本語です。", "英語です。"]),
        ("version 1.5.6 of the program", 20, ["version 1.5.6 of ", "the program"]),
        ("x" * 25, 10, ["x" * 10, "x" * 10, "x" * 7]),
        ("no end but many words here", 10, ["no end ", "but many ", "words here"]),
    ],
)
def test_a_passage_ends_where_a_reader_would_stop(text: str, max_chars: int, passages: list[str]) -> None:
    """At a sentence end or paragraph, else at a space, else after `max_chars` characters with a tenth repeated."""
    assert [text[start:end] for start, end in split_passages(text, max_chars)] == passages


def test_a_passage_begins_with_a_sentence_of_the_last_one() -> None:
    """The overlap starts at the first sentence or word in the last tenth."""
    text = "word " * 19 + "end. Yes. " + "next " * 30
    (_, end), (start, _) = split_passages(text, 105)[:2]
    assert text[:end].endswith("end. Yes. ")
    assert text[start:].startswith("Yes. next")
