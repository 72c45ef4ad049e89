"""Common parts of both adapters: options, a client, and the fallback."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, Self

from pydantic import Field, PrivateAttr, SecretStr

from regolo_rerank._inputs import BlankQueryError
from regolo_rerank.client import RegoloClient
from regolo_rerank.errors import (
    APIConnectionError,
    APIResponseError,
    APIStatusError,
    ContextLengthError,
    RateLimitError,
    RegoloError,
    RerankFallbackWarning,
    ServerError,
    warn,
)
from regolo_rerank.options import Count, Options
from regolo_rerank.results import RerankResponse, RerankResult

__all__ = ["AdapterOptions", "Outcome", "report_failure"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of a rerank that has not raised.

    Attributes:
        response: The ranking, or None if the input is returned instead.
        report: What traces and events contain in addition to the documents.
    """

    response: RerankResponse[Any] | None
    report: dict[str, Any]


class AdapterOptions(Options):
    """Options of both adapters: those of the client, and a few more.

    An adapter holds a `RegoloClient`. Each call gives it the adapter's options as they are then, so that an assigned
    option takes effect at the next call. Copies share the client's connections.
    """

    top_n: Count | None = 5
    """Number of documents to keep, at least 1. None keeps all."""

    on_error: Literal["raise", "return_input"] = "raise"
    """What happens if reranking fails: "raise" raises the error. "return_input" returns the first `top_n` documents in
    their own order, without a score, and issues a `RerankFallbackWarning`. A missing or wrong key and other invalid
    input raise in any case."""

    score_metadata_key: str | None = Field(default="relevance_score", min_length=1)
    """Metadata key for the score. None leaves the metadata unchanged."""

    _client: RegoloClient = PrivateAttr(default_factory=RegoloClient)

    if not TYPE_CHECKING:  # type checkers read the parameters from the fields

        def __init__(self, api_key: SecretStr | str | None = None, **options: Any) -> None:
            super().__init__(**({} if api_key is None else {"api_key": api_key}), **options)

    def with_options(self, **changes: Any) -> Self:
        """Return a copy with other options that shares connections, cache and the pause after a 429.

        Args:
            **changes: Options by name, as in the constructor.

        Raises:
            InvalidInputError: An option is unknown or has a wrong value.
        """
        return self.model_copy(update=changes)

    def _client_for_call(self) -> RegoloClient:
        """Return a client with the adapter's current options, on the connections of its client."""
        return self._client.with_options(self)

    def _rerank(self, query: str, documents: list[Any], text: Callable[[Any], str]) -> Outcome:
        try:
            response = self._client_for_call().rerank(query, documents, text=text)
        except RegoloError as error:
            return self._fall_back(error, len(documents))
        return Outcome(response, _report_ranking(response))

    async def _arerank(self, query: str, documents: list[Any], text: Callable[[Any], str]) -> Outcome:
        try:
            response = await self._client_for_call().arerank(query, documents, text=text)
        except RegoloError as error:
            return self._fall_back(error, len(documents))
        return Outcome(response, _report_ranking(response))

    def _metadata(self, earlier: dict[str, Any], result: RerankResult[Any] | None) -> dict[str, Any]:
        """Return metadata with the score and passage of a result, and without those of an earlier reranker."""
        metadata, key = dict(earlier), self.score_metadata_key
        if key is None:
            return metadata
        metadata.pop(key, None)
        metadata.pop("relevant_passage", None)
        if result is not None:
            metadata[key] = result.relevance_score
            if result.passage is not None:
                metadata["relevant_passage"] = result.passage
        return metadata

    def _fall_back(self, error: RegoloError, count: int) -> Outcome:
        """Return the outcome of a failed call, or raise its error if the option `on_error` does not cover it."""
        if self.on_error == "raise" or not _is_covered(error):
            raise error
        kept = count if self.top_n is None else min(self.top_n, count)
        report = report_failure(error, fallback=True)
        warn(
            f"reranking failed, and the first {kept} of {count} documents are returned in their own order: "
            f"{report['error']}",
            RerankFallbackWarning,
        )
        return Outcome(None, report)

    def close(self) -> None:
        """Close the connections of sync calls. The next call opens new ones."""
        self._client.close()

    async def aclose(self) -> None:
        """Close the connections of sync calls, and of async calls in the running event loop."""
        await self._client.aclose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


_COVERED: Final = (
    APIConnectionError,
    APIResponseError,
    BlankQueryError,
    ContextLengthError,
    RateLimitError,
    ServerError,
)


def _is_covered(error: RegoloError) -> bool:
    """Return whether `on_error="return_input"` covers an error, because the caller's code cannot prevent it."""
    is_budget_spent = isinstance(error, APIStatusError) and (
        error.status_code == 402 or error.type == "budget_exceeded"
    )
    return isinstance(error, _COVERED) or is_budget_spent


def _report_ranking(response: RerankResponse[Any]) -> dict[str, Any]:
    """Return what traces and events contain about a ranking."""
    usage = response.usage
    return {
        "response_id": response.id,
        "request_ids": response.request_ids,
        "usage": {"total_tokens": usage.total_tokens, "requests": usage.requests, "cost": usage.cost},
        "fallback": False,
        "error": None,
    }


def report_failure(error: BaseException, *, fallback: bool) -> dict[str, Any]:
    """Return what traces and events contain about a failure."""
    request_id = getattr(error, "request_id", None)
    return {
        "response_id": None,
        "request_ids": [] if request_id is None else [request_id],
        "usage": None,
        "fallback": fallback,
        "error": f"{type(error).__name__}: {error}",
    }
