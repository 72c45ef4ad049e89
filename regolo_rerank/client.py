"""The client: calls of one query or of many, sync and async."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, Generator, Iterable, Mapping
from contextlib import aclosing, closing
from typing import Any, Literal, TypedDict, TypeVar, Unpack, overload

from regolo_rerank._core import tasks, threads
from regolo_rerank._core.call import Call, Event
from regolo_rerank._core.config import RequestConfig
from regolo_rerank._core.reranker import Reranker
from regolo_rerank._display.progress import progress
from regolo_rerank._transports.spread import Done
from regolo_rerank.errors import InvalidInputError, RegoloError, ends_here
from regolo_rerank.results import RerankResponse

__all__ = ["RegoloClient"]

T = TypeVar("T")

Pair = tuple[str, Iterable[str]]

_PLACE = "pairs[{}]: "
"""What an error says in front that is about a pair."""


class CallArguments(TypedDict, total=False):
    """What a call of many queries takes besides them."""

    top_n: int | None
    model: str | None
    instruction: str | None
    score_threshold: float | None
    extra_body: dict[str, Any] | None
    max_concurrency: int | None
    show_progress: bool


class RegoloClient(Reranker):
    """Client of the Rerank API, for sync and async calls; options are fields and may be assigned at any time.

    Args:
        api_key: The key; without it, the environment's `REGOLO_API_KEY` is used at each call.
        **options: Any option, by name; see `Options`.

    Raises:
        pydantic.ValidationError: An option is unknown or has a wrong value; the message names it.

    Examples:
        >>> client = RegoloClient(base_url="local://")
        >>> documents = ["Rome", "Beijing, capital of China"]
        >>> client.rerank("capital of China", documents, top_n=1).results[0].document
        'Beijing, capital of China'
    """

    def rerank(
        self,
        query: str,
        documents: Iterable[str],
        *,
        top_n: int | None = None,
        model: str | None = None,
        instruction: str | None = None,
        score_threshold: float | None = None,
        extra_body: dict[str, Any] | None = None,
    ) -> RerankResponse:
        """Rank documents by their relevance to a query.

        An argument left None takes the client's option; for all results in one call, pass `top_n=len(documents)`.

        Args:
            query: What is searched; not blank.
            documents: N texts, in a list, a tuple or an iterator. Blank ones are not sent and rank last.
            top_n: Results kept, at least 1.
            model: Name of the reranking model.
            instruction: The task in a sentence, for prompt formats that have a place for it.
            score_threshold: Results that score lower are dropped, after `top_n` has been chosen from all N.
            extra_body: Further JSON fields of the request.

        Returns:
            The ranking, min(N, top_n) results at most, the best first.

        Raises:
            InvalidInputError: An argument is wrong; nothing was sent.
            MissingAPIKeyError: The host demands a key, and there is none.
            APIConnectionError: The server could not be reached; `APITimeoutError` where it was too slow.
            APIStatusError: The server said no; the subclass says why.
            APIResponseError: The server's reply cannot be trusted.
        """
        with ends_here:
            return self._rank(
                query,
                documents,
                top_n=top_n,
                model=model,
                instruction=instruction,
                score_threshold=score_threshold,
                extra_body=extra_body,
            )

    async def arerank(
        self,
        query: str,
        documents: Iterable[str],
        *,
        top_n: int | None = None,
        model: str | None = None,
        instruction: str | None = None,
        score_threshold: float | None = None,
        extra_body: dict[str, Any] | None = None,
    ) -> RerankResponse:
        """Rank documents as `rerank` does, without blocking the event loop; may be cancelled at any time."""
        with ends_here:
            return await self._arank(
                query,
                documents,
                top_n=top_n,
                model=model,
                instruction=instruction,
                score_threshold=score_threshold,
                extra_body=extra_body,
            )

    @overload
    def rerank_many(
        self, pairs: Iterable[Pair], *, return_exceptions: Literal[False] = ..., **arguments: Unpack[CallArguments]
    ) -> Generator[RerankResponse]: ...

    @overload
    def rerank_many(
        self, pairs: Iterable[Pair], *, return_exceptions: bool, **arguments: Unpack[CallArguments]
    ) -> Generator[RerankResponse | RegoloError]: ...

    def rerank_many(
        self,
        pairs: Iterable[Pair],
        *,
        top_n: int | None = None,
        model: str | None = None,
        instruction: str | None = None,
        score_threshold: float | None = None,
        extra_body: dict[str, Any] | None = None,
        max_concurrency: int | None = None,
        return_exceptions: bool = False,
        show_progress: bool = False,
    ) -> Generator[RerankResponse | RegoloError]:
        """Rank the documents of many queries, and give each ranking when it is its turn.

        Args:
            pairs: Queries with their documents, `(query, documents)`; may be endless. They are read in the caller's
                thread, at most 4 x `max_concurrency` of them ahead of the ranking that was given last.
            top_n: As in `rerank`; it holds for all pairs, and so do the next four.
            model: As in `rerank`.
            instruction: As in `rerank`.
            score_threshold: As in `rerank`.
            extra_body: As in `rerank`.
            max_concurrency: Requests in flight at once, over all pairs; batches of a large one count too.
            return_exceptions: Whether a pair that fails gives its error in its place. Otherwise the error is raised
                there, and what was read ahead is given up.
            show_progress: Whether a bar is shown, on a terminal and in a notebook; needs tqdm.

        Returns:
            A generator of one ranking a pair, in the order of `pairs`; closing it stops what is under way.

        Raises:
            InvalidInputError: An argument is wrong, at once; a pair is wrong, in its place.
            MissingAPIKeyError: The host demands a key, and there is none, at once.
            RegoloError: As in `rerank`, in the place of the pair that fails.
        """
        with ends_here:
            config = self._configure(
                is_async=False,
                top_n=top_n,
                model=model,
                instruction=instruction,
                score_threshold=score_threshold,
                extra_body=extra_body,
                max_concurrency=max_concurrency,
            )
            _check_pairs(pairs, Iterable)
            config.require_key()  # a missing key is refused now, and not at the first pair
            return self._many(config, pairs, return_exceptions=return_exceptions, show_progress=show_progress)

    @overload
    def arerank_many(
        self,
        pairs: Iterable[Pair] | AsyncIterable[Pair],
        *,
        return_exceptions: Literal[False] = ...,
        **arguments: Unpack[CallArguments],
    ) -> AsyncGenerator[RerankResponse]: ...

    @overload
    def arerank_many(
        self,
        pairs: Iterable[Pair] | AsyncIterable[Pair],
        *,
        return_exceptions: bool,
        **arguments: Unpack[CallArguments],
    ) -> AsyncGenerator[RerankResponse | RegoloError]: ...

    def arerank_many(
        self,
        pairs: Iterable[Pair] | AsyncIterable[Pair],
        *,
        top_n: int | None = None,
        model: str | None = None,
        instruction: str | None = None,
        score_threshold: float | None = None,
        extra_body: dict[str, Any] | None = None,
        max_concurrency: int | None = None,
        return_exceptions: bool = False,
        show_progress: bool = False,
    ) -> AsyncGenerator[RerankResponse | RegoloError]:
        """Rank as `rerank_many` does, without blocking the event loop; `pairs` may be an async iterable too.

        Leave the loop over it by `break` only inside `contextlib.aclosing`, so that what is under way ends at once.
        """
        with ends_here:
            config = self._configure(
                is_async=True,
                top_n=top_n,
                model=model,
                instruction=instruction,
                score_threshold=score_threshold,
                extra_body=extra_body,
                max_concurrency=max_concurrency,
            )
            _check_pairs(pairs, Iterable, AsyncIterable)
            config.require_key()  # a missing key is refused now, and not at the first pair
            return self._amany(config, pairs, return_exceptions=return_exceptions, show_progress=show_progress)

    def _many(
        self, config: RequestConfig, pairs: Iterable[Pair], *, return_exceptions: bool, show_progress: bool
    ) -> Generator[RerankResponse | RegoloError]:
        calls = (Call(config, pair, Done(), _PLACE.format(index)) for index, pair in enumerate(pairs))
        workers = config.options.max_concurrency
        with (
            progress(_count(pairs), unit="query", shown=show_progress) as advance,
            closing(threads.finish_in_order(calls, workers, self._client_for(config))) as finished,
        ):
            for call in finished:
                outcome = _unwrap(call, return_exceptions=return_exceptions)
                advance()
                yield outcome

    async def _amany(
        self,
        config: RequestConfig,
        pairs: Iterable[Pair] | AsyncIterable[Pair],
        *,
        return_exceptions: bool,
        show_progress: bool,
    ) -> AsyncGenerator[RerankResponse | RegoloError]:
        calls, workers = _open_calls(config, pairs), config.options.max_concurrency
        with progress(_count(pairs), unit="query", shown=show_progress) as advance:
            client = await self._async_client_for(config)
            async with aclosing(tasks.FinishInOrder(calls, workers, client)) as finished:
                async for call in finished:
                    outcome = _unwrap(call, return_exceptions=return_exceptions)
                    advance()
                    yield outcome


def _check_pairs(pairs: object, *kinds: type) -> None:
    if isinstance(pairs, str | bytes | Mapping | set | frozenset) or not isinstance(pairs, kinds):
        raise InvalidInputError(f"pairs: must be an iterable of (query, documents), got {type(pairs).__name__}")


def _count(pairs: object) -> int | None:
    try:
        return len(pairs)  # type: ignore[arg-type]  # where it has a length
    except Exception:  # noqa: BLE001 - tqdm around a generator, or a dataset, has one that raises
        return None


async def _open_calls(
    config: RequestConfig, pairs: Iterable[Pair] | AsyncIterable[Pair]
) -> AsyncGenerator[Call[asyncio.Event]]:
    index = 0
    async with aclosing(_iterate(pairs)) as given:
        async for pair in given:
            yield Call(config, pair, asyncio.Event(), _PLACE.format(index))
            index += 1


async def _iterate(items: Iterable[T] | AsyncIterable[T]) -> AsyncGenerator[T]:
    if isinstance(items, AsyncIterable):
        async for item in items:
            yield item
    else:
        for item in items:
            yield item


def _unwrap(call: Call[Event], *, return_exceptions: bool) -> RerankResponse | RegoloError:
    """Return what a call has come to; an error is raised, or returned where the caller wants that."""
    try:
        with ends_here:
            call.close()
            return call.result()
    except RegoloError as error:
        if return_exceptions:
            return error.with_traceback(None)  # whose frames would keep the call and its documents
        raise
