"""Passages of a long document, for `long_documents="split"`."""

import re
from typing import Final

__all__ = ["split_passages"]

OVERLAP: Final = 0.1
"""Share of a passage that the next one repeats, so that a statement at a border is whole in one of them."""

_SENTENCE_END: Final = re.compile(r"[.!?][\"')\]]*\s+|\n\s*\n|[\u3002\uff01\uff1f]\s*")
"""The end of a sentence in Latin or Chinese and Japanese punctuation, or of a paragraph."""

_SPACE: Final = re.compile(r"\s+")


def split_passages(text: str, max_chars: int) -> list[tuple[int, int]]:
    """Return `(start, end)` of overlapping passages that together cover a text.

    Each passage is as long as `max_chars` allows. It ends at the last sentence end in its second half, otherwise at the
    last space there, otherwise after `max_chars` characters. The next passage starts at the first sentence or word in
    the last tenth of this one, otherwise at the beginning of that tenth.

    Args:
        text: The text.
        max_chars: Maximum number of characters of a passage, at least 1.
    """
    spans = []
    start = 0
    while len(text) - start > max_chars:
        end = _last_break(text, start + max_chars // 2 + 1, start + max_chars)
        spans.append((start, end))
        start = _first_break(text, max(start + 1, end - int(max_chars * OVERLAP)), end)
    spans.append((start, len(text)))
    return spans


def _last_break(text: str, low: int, high: int) -> int:
    """Return the last place from low to high where a passage may end."""
    for pattern in (_SENTENCE_END, _SPACE):
        ends = [found.end() for found in pattern.finditer(text, low - 1, high) if found.end() >= low]
        if ends:
            return ends[-1]
    return high


def _first_break(text: str, low: int, high: int) -> int:
    """Return the first place from low to high where a passage may start."""
    for pattern in (_SENTENCE_END, _SPACE):
        for found in pattern.finditer(text, low, high):
            return found.end()
    return low
