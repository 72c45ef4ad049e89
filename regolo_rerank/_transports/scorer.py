"""The embedded scorer: how near a query and a document are in meaning, by WordLlama's static word vectors.

The vectors come inside WordLlama's wheel, so nothing is ever downloaded. A text's vector is the sum of its tokens'
vectors, a token that comes n times counting for the square root of n, so that no word fills a document by repetition.
"""

import functools
import inspect
import logging
import math
import re
import threading
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from regolo_rerank.errors import InvalidInputError

if TYPE_CHECKING:
    from wordllama.inference import WordLlamaInference

__all__ = ["embedded_scores"]

_SENTENCE_END: Final = re.compile(r"(?<=[.!?])\s+|\n\s*\n")

_SLOPE: Final = 12.0
_EVEN: Final = 0.18
"""A logistic regression on 140 questions, 100 about Python and 40 about the household, with as much weight on the
documents that answer as on all others: at this similarity a document is as likely to be of either kind."""

_loading: Final = threading.Lock()


def embedded_scores(query: str, documents: list[str]) -> list[float]:
    """Score documents by how near they are to the query in meaning.

    The similarity is the mean of two cosines, that of the query with the whole document and that with the document's
    nearest sentence. A logistic function of it puts the score between 0 and 1, 0.5 where a document that answers and
    one that does not are equally likely. A score does not depend on the other documents.

    Args:
        query: The query.
        documents: N texts.

    Returns:
        N numbers from 0 to 1; 0 where the query or the document holds no token that has a vector.

    Raises:
        InvalidInputError: WordLlama is not installed.
    """
    with _loading:
        model = _model()
    wanted = _vector(model, _tokens(model, query))
    return [0.0 if wanted is None else _score(model, wanted, document) for document in documents]


def _score(model: "WordLlamaInference", wanted: Any, document: str) -> float:
    """Return the score of one document for a query's vector of length 1."""
    sentences = [_tokens(model, sentence) for sentence in _SENTENCE_END.split(document)]
    whole = _vector(model, list(chain.from_iterable(sentences)))
    if whole is None:
        return 0.0
    vectors = (_vector(model, sentence) for sentence in sentences)
    nearest = max(wanted @ vector for vector in vectors if vector is not None)
    # Single precision holds no more digits, and the last ones differ from machine to machine.
    return round(1 / (1 + math.exp(_SLOPE * (_EVEN - (wanted @ whole + nearest) / 2))), 6)


def _tokens(model: "WordLlamaInference", text: str) -> list[int]:
    ids: list[int] = model.tokenizer.encode(text, add_special_tokens=False).ids
    return ids


def _vector(model: "WordLlamaInference", tokens: list[int]) -> Any:
    """Return the vector of a text, of length 1, or None for one that has none."""
    import numpy as np

    ids, counts = np.unique(np.asarray(tokens, dtype=np.intp), return_counts=True)
    vector = np.sqrt(counts, dtype=np.float32) @ model.embedding[ids]
    length = np.linalg.norm(vector)
    return vector / length if length else None


@functools.cache
def _model() -> "WordLlamaInference":
    """Read the vectors, which takes up to half a second."""
    # WordLlama sets up the root logger when it is imported, which is the program's business, unless it has a handler.
    root, handler = logging.getLogger(), logging.NullHandler()
    root.addHandler(handler)
    try:
        from wordllama import WordLlama
    except ImportError:
        raise InvalidInputError(
            'base_url="local://" scores with WordLlama: pip install "regolo_rerank[local]", or pass a scorer'
        ) from None
    finally:
        root.removeHandler(handler)
    # It looks for the tokenizer, which lies beside the weights in its wheel, in the folder of downloads only.
    folder = Path(inspect.getfile(WordLlama)).parent
    return WordLlama.load(cache_dir=folder, disable_download=True)
