"""Calls in memory: settings, replies, and a server that is a function."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from hypothesis import HealthCheck, settings

from regolo_rerank._call import Batch, Call
from regolo_rerank._protocol import Reply
from regolo_rerank.cache import QueryCache
from regolo_rerank.options import Options, resolve

__all__ = ["KEY", "URL", "begin", "cases", "join_surrogates", "rank", "reply_of", "results_of", "score_of"]

KEY: Final = "sk-canary-4f1d"
URL: Final = "https://rerank.example/rerank"


def cases(count: int) -> settings:
    """Return how hypothesis tries a property: the same cases in every run, without a time limit for each."""
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    return settings(
        max_examples=count, deadline=None, derandomize=True, database=None, print_blob=False, suppress_health_check=slow
    )


def reply_of(body: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Reply:
    """Return a reply; a body that is not a string is written as JSON."""
    text = body if isinstance(body, str) else json.dumps(body)
    return Reply(status, dict(headers or {}), text, 0.01)


def results_of(*scores: tuple[int, float], **fields: Any) -> dict[str, Any]:
    """Return the JSON of a ranking, from index and score of each result."""
    return {"results": [{"index": index, "relevance_score": score} for index, score in scores], **fields}


def join_surrogates(text: str) -> str:
    """Return a text as UTF-8 can represent it."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def score_of(text: str) -> float:
    """Return a score that depends on the text only: from -0.5 to 0.75, with many ties."""
    return sum(text.encode()) % 11 / 8 - 0.5


def begin(
    texts: Sequence[str], query: str = "q", *, cache: QueryCache | None = None, index: int | None = None, **options: Any
) -> Call:
    """Return a call with plain texts on a server that needs no key."""
    own = Options(**{"api_key": KEY, "base_url": "https://rerank.example", "prompt_format": "plain", **options})
    call = Call(resolve(own, is_async=False), query, list(texts), list(texts), cache)
    call.index = index
    return call


def rank(request: Mapping[str, Any]) -> dict[str, Any]:
    """Answer a request as the service does: sorted, cut to `top_n`, with the texts."""
    documents = request["documents"]
    order = sorted(range(len(documents)), key=lambda index: -score_of(documents[index]))[: request["top_n"]]
    results = [
        {"index": index, "relevance_score": score_of(documents[index]), "document": {"text": documents[index]}}
        for index in order
    ]
    return {"id": "rerank-1", "results": results, "meta": None}


def answer(call: Call, batch: Batch) -> None:
    """Give a batch the right reply."""
    call.accept(batch, reply_of(rank(json.loads(call.request_body(batch)))))
