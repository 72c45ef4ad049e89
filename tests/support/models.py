"""A made-up reranking model behind a server: it knows which pairs fit, in the prompt that it was trained on alone."""

import json
import re
import zlib
from collections.abc import Callable

from regolo_rerank._cli.findings import PAIRS
from regolo_rerank.prompts import DEFAULT_INSTRUCTION, PRESETS
from tests.support.stub import Received, Reply

__all__ = ["concatenating", "ranked", "templating", "told", "without"]

_TRAINED = PRESETS["chat"]
_SEEN = re.compile(r"<Instruct>: (?P<task>.*)\n<Query>: (?P<query>.*)\n<Document>: (?P<document>.*)<\|im_end\|>\n")


def judged(prompt: str) -> float:
    """Return the score of a prompt: by the pair where the model can read it, else next to nothing at random."""
    noise = zlib.crc32(prompt.encode()) % 1_000 / 10_000
    seen = _SEEN.search(prompt)
    if seen is None or not prompt.startswith("<|im_start|>system") or "<" in seen["query"] + seen["document"]:
        return noise
    fits = any(seen["query"] == query and seen["document"] in fitting for query, (fitting, _) in PAIRS.items())
    return (0.8 if fits else 0.1) + noise


def ranked(scores: list[float]) -> Reply:
    """Return a reply with these scores, in the shape that a gateway passes on: without the documents."""
    scored = [{"index": index, "relevance_score": score} for index, score in enumerate(scores)]
    return Reply({"id": "stub-1", "results": scored, "meta": None})


def concatenating(request: Received) -> Reply:
    """Answer as vLLM does without a template: query and document are put together, and no other field is read."""
    body = request.json
    return ranked([judged(body["query"] + document) for document in body["documents"]])


def templating(request: Received) -> Reply:
    """Answer as vLLM does with the model's template: the instruction is a field of the request."""
    body = request.json
    task = body.get("instruction", DEFAULT_INSTRUCTION)
    query = _TRAINED.query.replace("{instruction}", task).replace("{query}", body["query"])
    return ranked([judged(query + _TRAINED.document.replace("{document}", text)) for text in body["documents"]])


def without(field: str, answer: Callable[[Received], Reply]) -> Callable[[Received], Reply]:
    """Answer as a server does that refuses a field that it does not know."""

    def reply(request: Received) -> Reply:
        if field in request.json:
            return Reply({"detail": [{"loc": ["body", field], "msg": "Extra inputs are not permitted"}]}, 422)
        return answer(request)

    return reply


def told(answer: Callable[[Received], Reply], **headers: str) -> Callable[[Received], Reply]:
    """Answer with further headers, their underscores dashes."""
    named = {name.replace("_", "-"): text for name, text in headers.items()}
    return lambda request: Reply(json.loads(answer(request).encoded()), headers=named)
