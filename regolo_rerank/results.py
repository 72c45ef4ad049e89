"""Results of a call: a ranking, its documents and the usage."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, SupportsIndex, TypeVar, overload

from regolo_rerank import _display

__all__ = ["RerankResponse", "RerankResult", "Usage"]

T = TypeVar("T")


@dataclass(slots=True)
class RerankResult(Generic[T]):
    """One document of a ranking.

    Attributes:
        index: The document's position in the caller's list, from 0.
        relevance_score: Relevance to the query, higher is better. Qwen3-Reranker returns a probability, 0 to 1.
        document: The caller's own object.
        passage: With `long_documents="split"`, the best passage of a split document as `(start, end)`, character
            positions in its text. None for a document that was scored whole.
    """

    index: int
    relevance_score: float
    document: T
    passage: tuple[int, int] | None = None

    def __str__(self) -> str:
        return _display.text([self], ranked=False)

    def _repr_html_(self) -> str:
        return _display.html([self], ranked=False)


@dataclass(slots=True)
class Usage:
    """Usage of one call, added up over the requests whose replies report it.

    Attributes:
        total_tokens: Tokens as counted by the server, or None if it does not report them, or reports 0.
        requests: HTTP requests sent, retries included. Each counts against the rate limit of the API key.
        cost: Cost as counted by the gateway (header `x-litellm-response-cost`), without a currency. None if it does
            not report one, or reports 0, as it does for models without a price.
    """

    total_tokens: int | None = None
    requests: int = 0
    cost: float | None = None


@dataclass(slots=True)
class RerankResponse(Generic[T]):
    """A ranking, best document first. Its length, items and slices are those of `results`.

    Attributes:
        id: The server's id of the first reply, or None if nothing was sent.
        model: The model that produced the scores, or None if the server did not report it.
        results: The documents that were kept, by falling score. Documents with equal scores keep their input order.
        usage: Tokens, requests and cost of all requests of the call.
        request_ids: The gateway's id of each request that has one (header `x-litellm-call-id`), for support.
        meta: The `meta` field of the first reply, unchanged.
    """

    id: str | None = None
    model: str | None = None
    results: list[RerankResult[T]] = field(default_factory=list)
    usage: Usage = field(default_factory=Usage)
    request_ids: list[str] = field(default_factory=list)
    meta: Any = None

    def __len__(self) -> int:
        return len(self.results)

    def __iter__(self) -> Iterator[RerankResult[T]]:
        return iter(self.results)

    @overload
    def __getitem__(self, position: SupportsIndex) -> RerankResult[T]: ...

    @overload
    def __getitem__(self, position: slice) -> list[RerankResult[T]]: ...

    def __getitem__(self, position: SupportsIndex | slice) -> RerankResult[T] | list[RerankResult[T]]:
        return self.results[position]

    def __str__(self) -> str:
        return _display.text(self.results)

    def _repr_html_(self) -> str:
        return _display.html(self.results)
