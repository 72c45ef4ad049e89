"""What a call gives: a ranking, its results and what they took."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, SupportsIndex, overload

__all__ = ["RerankResponse", "RerankResult", "Usage"]


@dataclass(slots=True)
class RerankResult:
    """One document of a ranking.

    Attributes:
        index: The document's place in the caller's list, from 0.
        relevance_score: How relevant it is; higher is better. Qwen3-Reranker gives a probability, 0 to 1.
        document: The caller's own string.
    """

    index: int
    relevance_score: float
    document: str

    def __str__(self) -> str:
        from regolo_rerank._display.tables import text

        return text([self], ranked=False)

    def _repr_html_(self) -> str:
        from regolo_rerank._display.tables import html

        return html([self], ranked=False)


@dataclass(slots=True)
class Usage:
    """What a call took.

    Attributes:
        total_tokens: Tokens as the service counted them, added up over the replies that tell; None where none does.
        requests: HTTP requests sent, retries included: each spends one of the account's rate limit.
        cost: US dollars as the service counts them (header `x-litellm-response-cost`), added up over the replies that
            tell; None where none does. A gateway that knows no price for the model says 0.0.
    """

    total_tokens: int | None = None
    requests: int = 0
    cost: float | None = None


@dataclass(slots=True)
class RerankResponse:
    """A ranking, the best document first; its length, items and slices are those of `results`.

    Attributes:
        id: The service's name for the first reply; None where nothing was sent.
        model: The model that has answered, as far as the server says it; None where it does not, or nothing was sent.
        results: The documents that were kept, by falling score, equal scores in input order.
        meta: The `meta` of the first reply, as it came.
        usage: Tokens, requests and cost, added up over all requests of the call.
        request_ids: The gateway's name for each request that has one (header `x-litellm-call-id`), for support.
    """

    id: str | None = None
    results: list[RerankResult] = field(default_factory=list)
    meta: Any = None
    usage: Usage = field(default_factory=Usage)
    request_ids: list[str] = field(default_factory=list)
    model: str | None = None

    def __len__(self) -> int:
        return len(self.results)

    def __iter__(self) -> Iterator[RerankResult]:
        return iter(self.results)

    @overload
    def __getitem__(self, place: SupportsIndex) -> RerankResult: ...

    @overload
    def __getitem__(self, place: slice) -> list[RerankResult]: ...

    def __getitem__(self, place: SupportsIndex | slice) -> RerankResult | list[RerankResult]:
        return self.results[place]

    def __str__(self) -> str:
        from regolo_rerank._display.tables import text

        return text(self.results)

    def _repr_html_(self) -> str:
        from regolo_rerank._display.tables import html

        return html(self.results)
