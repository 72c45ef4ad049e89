"""The embedded scorer: how near a query and a document are in meaning, by WordLlama's static word vectors.

The vectors come inside WordLlama's wheel, so nothing is ever downloaded. A text's vector is the sum of its tokens'
vectors, a token that comes n times counting for the square root of n, so that no word fills a document by repetition.
"""

import functools
import math
import re
import threading
from importlib.metadata import distribution
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from regolo_rerank.errors import InvalidInputError

if TYPE_CHECKING:
    import numpy as np
    from tokenizers import Tokenizer

__all__ = ["embedded_scores"]

_SENTENCE_END: Final = re.compile(r"(?<=[.!?])\s+|\n\s*\n")

_SLOPE: Final = 12.0
_EVEN: Final = 0.18
"""A logistic regression on 140 questions, 100 about Python and 40 about the household, with as much weight on the
documents that answer as on all others: at this similarity a document is as likely to be of either kind."""

_loading: Final = threading.Lock()


class _Model(NamedTuple):
    tokenizer: "Tokenizer"
    vectors: "np.ndarray[Any, np.dtype[np.float32]]"
    """32,000 x 256: a row for each token."""


def embedded_scores(query: str, documents: list[str]) -> list[float]:
    """Score documents by how near they are to the query in meaning.

    The similarity is the mean of two cosines, that of the query with the whole document and that with the document's
    nearest sentence. A logistic function of it puts the score between 0 and 1, 0.5 where a document that answers and
    one that does not are equally likely. A score does not depend on the other documents.

    Args:
        query: The query.
        documents: N texts.

    Returns:
        N numbers from 0 to 1; 0 where the query or the document holds no token.

    Raises:
        InvalidInputError: WordLlama is not installed.
    """
    with _loading:
        model = _model()
    wanted = _vector(model, _tokens(model, query))
    return [0.0 if wanted is None else _score(model, wanted, document) for document in documents]


def _score(model: _Model, wanted: Any, document: str) -> float:
    """Return the score of one document for a query's vector."""
    sentences = [_tokens(model, sentence) for sentence in _SENTENCE_END.split(document)]
    whole = _vector(model, list(chain.from_iterable(sentences)))
    if whole is None:
        return 0.0
    vectors = (_vector(model, sentence) for sentence in sentences)
    nearest = max(wanted @ vector for vector in vectors if vector is not None)
    # Single precision holds no more digits, and the last ones differ from machine to machine.
    return round(1 / (1 + math.exp(_SLOPE * (_EVEN - (wanted @ whole + nearest) / 2))), 6)


def _tokens(model: _Model, text: str) -> list[int]:
    # One text at a time: a batch would start threads, after which a process must not be forked.
    return model.tokenizer.encode(text, add_special_tokens=False).ids


def _vector(model: _Model, tokens: list[int]) -> Any:
    """Return the vector of a text, of length 1, or None for one without tokens."""
    import numpy as np

    if not tokens:
        return None
    ids, counts = np.unique(tokens, return_counts=True)
    vector = np.sqrt(counts, dtype=np.float32) @ model.vectors[ids]
    return vector / np.linalg.norm(vector)


@functools.cache
def _model() -> _Model:
    """Read the vectors, once in a process."""
    # WordLlama itself is not imported: that sets up the root logger, and its loader looks for files on the network.
    try:
        folder = Path(str(distribution("wordllama").locate_file("wordllama")))
        from safetensors.numpy import load_file
        from tokenizers import Tokenizer
    except ImportError:
        raise InvalidInputError(
            'base_url="local://" scores with WordLlama: pip install "regolo_rerank[local]", or pass a scorer'
        ) from None
    return _Model(
        Tokenizer.from_file(str(folder / "tokenizers" / "l2_supercat_tokenizer_config.json")),
        load_file(folder / "weights" / "l2_supercat_256.safetensors")["embedding.weight"].astype("float32"),
    )
