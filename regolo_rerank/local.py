"""The offline endpoint `local://`: an httpx transport that answers in this process, and its scorer.

The scorer compares meanings by static word vectors (WordLlama). The vectors are part of WordLlama's wheel, so nothing
is ever downloaded. It ignores word order and is meant for first steps and for tests. A cross-encoder reads query and
document together and ranks far better.
"""

import asyncio
import functools
import inspect
import math
import re
import uuid
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import httpx
from pydantic_core import from_json, to_json

from regolo_rerank._forks import loading
from regolo_rerank._version import install_hint
from regolo_rerank.errors import InvalidInputError
from regolo_rerank.options import Scorer

if TYPE_CHECKING:
    import numpy as np
    from tokenizers import Tokenizer

__all__ = ["LocalTransport", "local_scores"]


class LocalTransport(httpx.BaseTransport, httpx.AsyncBaseTransport):
    """Answers each request in this process, in the wire format of the service.

    The scorer comes with the request, in its extension `regolo_rerank.scorer`. Without one, `local_scores` is used.
    """

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Answer in the caller's thread."""
        return _answer(request.read(), request.extensions.get("regolo_rerank.scorer", local_scores))

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Answer in a thread, so that the scorer does not block the event loop."""
        body = await request.aread()
        return await asyncio.to_thread(_answer, body, request.extensions.get("regolo_rerank.scorer", local_scores))


def _answer(body: bytes, scorer: Scorer) -> httpx.Response:
    request = from_json(body)
    query, documents = request["query"], request["documents"]
    scores = _call_scorer(scorer, query, documents)
    best = sorted(range(len(documents)), key=lambda index: -scores[index])[: request.get("top_n")]
    results = [
        {"index": index, "relevance_score": scores[index], "document": {"text": documents[index]}} for index in best
    ]
    reply = {"id": f"local-{uuid.uuid4().hex[:16]}", "results": results, "meta": None}
    return httpx.Response(200, headers={"content-type": "application/json"}, content=to_json(reply))


def _call_scorer(scorer: Scorer, query: str, documents: list[str]) -> list[float]:
    """Return one finite number per document, or raise InvalidInputError."""
    if inspect.iscoroutinefunction(scorer):
        raise InvalidInputError("scorer: must be an ordinary function, not an async one")
    try:
        scores = [float(score) for score in scorer(query, list(documents))]
    except InvalidInputError:
        raise
    except Exception as error:
        raise InvalidInputError(f"scorer: raised {type(error).__name__}: {error}") from error
    if len(scores) != len(documents):
        raise InvalidInputError(f"scorer: must return one score per document, got {len(scores)} for {len(documents)}")
    for index, score in enumerate(scores):
        if not math.isfinite(score):
            raise InvalidInputError(f"scorer: must return finite numbers, got {score} for documents[{index}]")
    return scores


# A logistic regression on 140 questions (100 about Python, 40 about the household), with equal weight for relevant and
# irrelevant documents, gives the slope, and the similarity where both are equally likely.
_SLOPE: Final = 12.0
_EVEN: Final = 0.18

_SENTENCE_END: Final = re.compile(r"(?<=[.!?])\s+|\n\s*\n")
_MAX_PIECE_CHARS: Final = 5_000
"""Longer sentences are cut before they are tokenised: the tokenizer keeps all other threads waiting."""


class _Model(NamedTuple):
    tokenizer: "Tokenizer"
    vectors: "np.ndarray[Any, np.dtype[np.float32]]"
    """32,000 x 256, one row per token."""


def local_scores(query: str, documents: list[str]) -> list[float]:
    """Score documents by their similarity to a query.

    The similarity is the mean of two cosines: of the query with the whole document, and with its closest sentence. A
    logistic function maps it to a score from 0 to 1. Each pair is scored on its own.

    Args:
        query: The query.
        documents: N texts.

    Returns:
        N numbers from 0 to 1, or 0 if the query or the document contains no known token.

    Raises:
        InvalidInputError: WordLlama is not installed.
    """
    with loading:
        model = _load_model()
    wanted = _vector(model, _tokens(model, query))
    return [0.0 if wanted is None else _score(model, wanted, document) for document in documents]


def _score(model: _Model, wanted: Any, document: str) -> float:
    sentences = [_tokens(model, sentence) for sentence in _split_sentences(document)]
    whole = _vector(model, [token for sentence in sentences for token in sentence])
    if whole is None:
        return 0.0
    vectors = (_vector(model, sentence) for sentence in sentences)
    closest = max(wanted @ vector for vector in vectors if vector is not None)
    # Single precision has no more digits, and the last ones differ between machines.
    return round(1 / (1 + math.exp(_SLOPE * (_EVEN - (wanted @ whole + closest) / 2))), 6)


def _split_sentences(document: str) -> Iterator[str]:
    for sentence in _SENTENCE_END.split(document):
        for start in range(0, len(sentence), _MAX_PIECE_CHARS):
            yield sentence[start : start + _MAX_PIECE_CHARS]


def _tokens(model: _Model, text: str) -> list[int]:
    # One text at a time: a batch would start threads, and a process with threads must not be forked.
    return model.tokenizer.encode(text, add_special_tokens=False).ids


def _vector(model: _Model, tokens: list[int]) -> Any:
    """Return the sum of the tokens' vectors, with length 1, or None without tokens.

    A token that occurs n times counts for the square root of n, so that no word fills a document by repetition.
    """
    import numpy as np

    if not tokens:
        return None
    ids, counts = np.unique(tokens, return_counts=True)
    vector = np.sqrt(counts, dtype=np.float32) @ model.vectors[ids]
    return vector / np.linalg.norm(vector)


@functools.cache
def _load_model() -> _Model:
    # WordLlama itself is not imported: it configures the root logger, and its loader searches the network for files.
    try:
        folder = Path(str(distribution("wordllama").locate_file("wordllama")))
        from safetensors.numpy import load_file
        from tokenizers import Tokenizer
    except ImportError:
        raise InvalidInputError(
            f"base_url: local:// needs WordLlama: {install_hint('local')}. Or pass a scorer"
        ) from None
    return _Model(
        Tokenizer.from_file(str(folder / "tokenizers" / "l2_supercat_tokenizer_config.json")),
        load_file(folder / "weights" / "l2_supercat_256.safetensors")["embedding.weight"].astype("float32"),
    )
