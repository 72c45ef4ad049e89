"""The embedded endpoint: an httpx transport that answers `base_url="local://"` in this process.

It speaks the wire format of the service and needs no key and no network. Its scorer knows something of meaning, and is
for trying things and for tests; a cross-encoder reads query and document together and knows far more.
"""

import asyncio
import inspect
import math
import uuid
from collections.abc import Sequence
from typing import Final

import httpx
from pydantic import ValidationError

from regolo_rerank._transports.scorer import embedded_scores
from regolo_rerank._wire.endpoint import Scorer
from regolo_rerank._wire.messages import Request, encode
from regolo_rerank.errors import InvalidInputError

__all__ = ["SCORER_EXTENSION", "EmbeddedTransport", "answer"]

SCORER_EXTENSION: Final = "regolo_rerank.scorer"
"""Key of the request's extension that holds a scorer to use in place of the embedded one."""


def answer(body: bytes, scorer: Scorer | None = None) -> tuple[int, bytes]:
    """Answer the JSON of a request as the service does.

    Args:
        body: The request's body.
        scorer: (query, documents) -> one finite number a document; None takes `embedded_scores`.

    Returns:
        The HTTP status and the body of the reply.

    Raises:
        InvalidInputError: The scorer failed, or gave something other than one finite number a document.
    """
    try:
        request = Request.model_validate_json(body)
    except ValidationError as error:
        detail = [{"loc": ["body", *line["loc"]], "msg": line["msg"]} for line in error.errors()]
        return 422, encode({"detail": detail})
    scores = _scores(scorer or embedded_scores, request.query, request.documents)
    best = sorted(range(len(scores)), key=lambda index: -scores[index])[: request.top_n or None]
    results = [
        {"index": index, "relevance_score": scores[index], "document": {"text": request.documents[index]}}
        for index in best
    ]
    return 200, encode({"id": f"local-{uuid.uuid4().hex[:16]}", "results": results, "meta": None})


def _scores(scorer: Scorer, query: str, documents: list[str]) -> Sequence[float]:
    if inspect.iscoroutinefunction(scorer):
        raise InvalidInputError("scorer: must be an ordinary function, not an async one")
    try:
        scores = [float(score) for score in scorer(query, list(documents))]  # it may sort them, say
    except InvalidInputError:
        raise
    except Exception as error:
        raise InvalidInputError(f"scorer: it raised {type(error).__name__}: {error}") from error
    if len(scores) != len(documents):
        problem = f"{len(scores)} scores for {len(documents)}"
    elif not all(map(math.isfinite, scores)):
        index = next(index for index, score in enumerate(scores) if not math.isfinite(score))
        problem = f"{scores[index]} for documents[{index}] of the request"
    else:
        return scores
    raise InvalidInputError(f"scorer: must give one finite number a document, gave {problem}")


class EmbeddedTransport(httpx.BaseTransport, httpx.AsyncBaseTransport):
    """Answers every request in this process; the scorer comes with the request."""

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        """Answer in the caller's thread."""
        return self._response(*answer(request.read(), request.extensions.get(SCORER_EXTENSION)))

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Answer in a thread, so that a scorer that computes does not block the event loop."""
        body = await request.aread()
        return self._response(*await asyncio.to_thread(answer, body, request.extensions.get(SCORER_EXTENSION)))

    @staticmethod
    def _response(status_code: int, body: bytes) -> httpx.Response:
        return httpx.Response(status_code, headers={"content-type": "application/json"}, content=body)
