"""What both adapters share besides the core: their default top_n, a way around failures, and what traces tell."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from regolo_rerank._core.reranker import Reranker
from regolo_rerank._core.retry import is_retryable
from regolo_rerank.errors import RegoloError, RerankFallbackWarning, warn
from regolo_rerank.options import Count
from regolo_rerank.results import RerankResponse

__all__ = ["AdapterOptions", "Outcome", "report_failure"]

T = TypeVar("T")


@dataclass(slots=True)
class Outcome(Generic[T]):
    """What a rerank has come to.

    Attributes:
        kept: The documents that the caller gets.
        report: What traces and events tell of it besides.
    """

    kept: list[T]
    report: dict[str, Any]


def _report_ranking(response: RerankResponse) -> dict[str, Any]:
    """Return what traces and events tell of a ranking."""
    usage = response.usage
    return {
        "response_id": response.id,
        "request_ids": response.request_ids,
        "usage": {"total_tokens": usage.total_tokens, "requests": usage.requests, "cost": usage.cost},
        "fallback": False,
        "error": None,
    }


def report_failure(error: BaseException, *, fallback: bool) -> dict[str, Any]:
    """Return what traces and events tell of a failure, whether or not the input stands in for a ranking."""
    request_id = getattr(error, "request_id", None)
    return {
        "response_id": None,
        "request_ids": [] if request_id is None else [request_id],
        "usage": None,
        "fallback": fallback,
        "error": f"{type(error).__name__}: {error}",
    }


class AdapterOptions(Reranker):
    """The options that only adapters have.

    Raises:
        pydantic.ValidationError: On construction and on assignment, as in `Options`.
    """

    top_n: Count | None = 5
    """Documents kept, the best first; None keeps all."""

    on_error: Literal["raise", "return_input"] = "raise"
    """What happens when the service fails (no connection, a timeout, 408, 429, 5xx, an untrustworthy reply):
    "return_input" gives the first `top_n` documents in their own order, without a relevance score and with
    a `RerankFallbackWarning`. The caller's mistakes, such as a wrong key or bad input, raise in any case."""

    def _argument(self, name: str, arguments: Mapping[str, Any]) -> Any:
        """Return an argument of a call; one left None takes the object's option."""
        given = arguments.get(name)
        return getattr(self, name) if given is None else given

    def _rerank(
        self,
        query: str,
        candidates: list[T],
        get_texts: Callable[[list[T]], list[str]],
        attach_scores: Callable[[list[T], RerankResponse], list[T]],
        **arguments: Any,
    ) -> Outcome[T]:
        """Rank candidates by their texts, or fall back.

        `attach_scores` gives those that a ranking keeps, and `arguments` stand in for options in this call.
        """
        try:
            response = self._rank(query, get_texts(candidates), **arguments)
        except RegoloError as error:
            return self._fall_back(error, candidates, arguments)
        return Outcome(attach_scores(candidates, response), _report_ranking(response))

    async def _arerank(
        self,
        query: str,
        candidates: list[T],
        get_texts: Callable[[list[T]], list[str]],
        attach_scores: Callable[[list[T], RerankResponse], list[T]],
        **arguments: Any,
    ) -> Outcome[T]:
        try:
            response = await self._arank(query, get_texts(candidates), **arguments)
        except RegoloError as error:
            return self._fall_back(error, candidates, arguments)
        return Outcome(attach_scores(candidates, response), _report_ranking(response))

    def _fall_back(self, error: RegoloError, candidates: list[T], arguments: Mapping[str, Any]) -> Outcome[T]:
        """Return what stands in for a ranking that failed, or raise the error again."""
        if self.on_error == "raise" or not is_retryable(error):
            raise error
        kept = candidates[: self._argument("top_n", arguments)]
        report = report_failure(error, fallback=True)
        words = (
            f"reranking failed, so the first {len(kept)} of {len(candidates)} documents are returned in their own "
            f"order: {report['error']}"
        )
        warn(words, RerankFallbackWarning)
        return Outcome(kept, report)
