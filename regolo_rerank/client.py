"""The client: calls with one query or many, sync and async."""

import asyncio
import itertools
import os
import threading
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    Callable,
    Generator,
    Iterable,
    Mapping,
    MutableMapping,
)
from contextlib import closing
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, Self, TypedDict, TypeVar, Unpack, overload

from pydantic import SecretStr

from regolo_rerank import _workers
from regolo_rerank._call import Call
from regolo_rerank._http import Connections
from regolo_rerank._inputs import check_documents, check_pair, check_query, get_texts
from regolo_rerank._retries import Pause
from regolo_rerank.cache import QueryCache
from regolo_rerank.errors import InvalidInputError, RegoloError
from regolo_rerank.options import Options, Scorer, Settings, resolve
from regolo_rerank.prompts import DEFAULT_INSTRUCTION, PromptFormat
from regolo_rerank.results import RerankResponse

if TYPE_CHECKING:
    import httpx

__all__ = ["RegoloClient"]

T = TypeVar("T")


class _Default(float):
    """A default that differs from the same number given by the caller.

    A timeout that is given also applies to the caller's own HTTP client, but the default does not.
    """


class RankOptions(TypedDict, total=False):
    """Keyword arguments of `rerank`, `rerank_many` and LangChain's `rerank`."""

    top_n: int | None
    model: str | None
    instruction: str | None
    score_threshold: float | None
    total_timeout: float | None
    extra_body: dict[str, Any] | None


class RegoloClient:
    """Client of the Rerank API, for sync and async calls.

    Connections are opened with the first call and kept. They close with `close`, at the end of a `with` block, or when
    the client is garbage-collected. `client.options` shows the options. Assigning one takes effect at the next call.

    Args:
        api_key: API key. None reads the environment variable `REGOLO_API_KEY` at each call. "" sends no key.
        base_url: Server, with or without `/v1`, `/rerank` or a trailing slash. None reads the environment variable
            `REGOLO_BASE_URL`, else uses `https://api.regolo.ai`. `local://` is the offline scorer: no key, no network.
        model: Name of the reranking model.
        top_n: Number of results to keep, at least 1. None keeps all.
        instruction: The task in one sentence, for prompt formats that use one.
        prompt_format: A preset name or a `PromptFormat`. "auto" is `tagged` for `Qwen3-Reranker*`, and `plain` for
            other models and for `local://`.
        score_threshold: Drop results with a lower score, after `top_n` was applied. A blank document never passes.
        timeout: Seconds per attempt, from connecting to the last byte of the reply.
        total_timeout: Seconds for a whole call: all requests, retries and waits. None means no limit.
        max_retries: Further attempts per request, at least 0.
        batch_size: Maximum number of documents per request.
        max_request_bytes: Maximum bytes of JSON per request. A single longer document is sent alone.
        max_concurrency: Maximum number of concurrent requests per call.
        max_document_chars: Characters of a document that are scored. The caller's document is returned whole.
        long_documents: "cut" scores only the beginning of a longer document. "split" scores overlapping passages, and
            the document gets the score of the best one.
        default_headers: Additional HTTP headers, such as a gateway's tags, but never the key.
        extra_body: Additional JSON fields of each request.
        allow_http: Allow sending the key over plain http to another machine.
        cache: Where scores are kept: the path of an SQLite file, or any mutable mapping from strings to floats.
        scorer: For `local://`: a function (query, documents) -> scores instead of the offline scorer.
        http_client: The caller's own `httpx.Client` for sync calls. Its proxies, certificates and pool apply, and it
            is never closed. Its timeouts apply unless `timeout` is given.
        async_http_client: The caller's own `httpx.AsyncClient` for async calls.

    Raises:
        InvalidInputError: An option has a wrong value.

    Examples:
        >>> client = RegoloClient(base_url="local://")
        >>> documents = ["Rome is in Italy.", "Beijing is the capital of China."]
        >>> client.rerank("capital of China", documents, top_n=1)[0].document
        'Beijing is the capital of China.'
    """

    __slots__ = ("__weakref__", "_cache_locks", "_connections", "_options", "_pauses")

    def __init__(
        self,
        api_key: SecretStr | str | None = None,
        *,
        base_url: str | None = None,
        model: str = "Qwen3-Reranker-4B",
        top_n: int | None = None,
        instruction: str = DEFAULT_INSTRUCTION,
        prompt_format: PromptFormat
        | Literal["auto", "tagged", "documented", "chat", "server_template", "plain"] = "auto",
        score_threshold: float | None = None,
        timeout: float = _Default(60.0),
        total_timeout: float | None = 90.0,
        max_retries: int = 3,
        batch_size: int = 100,
        max_request_bytes: int = 1_000_000,
        max_concurrency: int = 4,
        max_document_chars: int | None = None,
        long_documents: Literal["cut", "split"] = "cut",
        default_headers: Mapping[str, str] | None = None,
        extra_body: Mapping[str, Any] | None = None,
        allow_http: bool = False,
        cache: MutableMapping[str, float] | str | PathLike[str] | None = None,
        scorer: Scorer | None = None,
        http_client: "httpx.Client | None" = None,
        async_http_client: "httpx.AsyncClient | None" = None,
    ) -> None:
        arguments = {name: value for name, value in locals().items() if name != "self"}
        self._options = Options(**{k: value for k, value in arguments.items() if not isinstance(value, _Default)})
        self._connections = Connections()
        self._pauses: dict[tuple[str, SecretStr | None], Pause] = {}
        self._cache_locks: dict[int, threading.Lock] = {}  # one per process: a fork may copy a lock that is held

    @property
    def options(self) -> Options:
        """The options. Assigning one is checked, and takes effect at the next call."""
        return self._options

    def with_options(self, options: Options | None = None, /, **changes: Any) -> Self:
        """Return a client with other options that shares connections, cache and the pause after a 429.

        Args:
            options: An object with all options, which is used as it is if nothing is changed. By default, the options
                of this client.
            **changes: Options to change, by name, as in the constructor.

        Raises:
            InvalidInputError: An option is unknown or has a wrong value.
        """
        copy = object.__new__(type(self))
        copy._options = options if options and not changes else (options or self._options).model_copy(update=changes)
        copy._connections = self._connections
        copy._pauses = self._pauses
        copy._cache_locks = self._cache_locks
        return copy

    @overload
    def rerank(
        self, query: str, documents: Iterable[str], *, text: None = None, **options: Unpack[RankOptions]
    ) -> RerankResponse[str]: ...

    @overload
    def rerank(
        self, query: str, documents: Iterable[T], *, text: str | Callable[[T], str], **options: Unpack[RankOptions]
    ) -> RerankResponse[T]: ...

    def rerank(
        self,
        query: str,
        documents: Iterable[Any],
        *,
        text: str | Callable[[Any], str] | None = None,
        top_n: int | None = None,
        model: str | None = None,
        instruction: str | None = None,
        score_threshold: float | None = None,
        total_timeout: float | None = None,
        extra_body: dict[str, Any] | None = None,
    ) -> RerankResponse[Any]:
        """Rank documents by their relevance to a query.

        An argument of None uses the client's option. To keep all results of one call, pass `top_n=len(documents)`.

        Args:
            query: The query, not blank.
            documents: N documents: a list, a tuple or an iterator. Blank texts are not sent and rank last.
            text: How to get a document's text: a field name (key of a mapping, or attribute), or a function of one
                document. None if the documents are strings.
            top_n: Number of results to keep, at least 1.
            model: Name of the reranking model.
            instruction: The task in one sentence, for prompt formats that use one.
            score_threshold: Drop results with a lower score, after `top_n` was applied.
            total_timeout: Seconds for the whole call.
            extra_body: Additional JSON fields of each request, instead of those of the client.

        Returns:
            The ranking, with at most min(N, top_n) results, best first. Each result has the caller's own document.

        Raises:
            InvalidInputError: An argument is wrong. Nothing was sent.
            MissingAPIKeyError: The server requires a key, but no key is set.
            APIConnectionError: The server could not be reached. `APITimeoutError` means that it was too slow.
            APIStatusError: The server answered with an error. The subclass tells which.
            APIResponseError: The reply is not a valid ranking.
        """
        settings = resolve(
            self._options,
            is_async=False,
            top_n=top_n,
            model=model,
            instruction=instruction,
            score_threshold=score_threshold,
            total_timeout=total_timeout,
            extra_body=extra_body,
        )
        call = self._begin(settings, query, documents, text)
        _workers.run(call, self._connections, self._pause(settings))
        return call.response()

    @overload
    async def arerank(
        self, query: str, documents: Iterable[str], *, text: None = None, **options: Unpack[RankOptions]
    ) -> RerankResponse[str]: ...

    @overload
    async def arerank(
        self, query: str, documents: Iterable[T], *, text: str | Callable[[T], str], **options: Unpack[RankOptions]
    ) -> RerankResponse[T]: ...

    async def arerank(
        self,
        query: str,
        documents: Iterable[Any],
        *,
        text: str | Callable[[Any], str] | None = None,
        top_n: int | None = None,
        model: str | None = None,
        instruction: str | None = None,
        score_threshold: float | None = None,
        total_timeout: float | None = None,
        extra_body: dict[str, Any] | None = None,
    ) -> RerankResponse[Any]:
        """Rank documents as `rerank` does, without blocking the event loop. Can be cancelled at any time."""
        _check_event_loop()
        settings = resolve(
            self._options,
            is_async=True,
            top_n=top_n,
            model=model,
            instruction=instruction,
            score_threshold=score_threshold,
            total_timeout=total_timeout,
            extra_body=extra_body,
        )
        call = self._begin(settings, query, documents, text)
        await _workers.run_async(call, self._connections, self._pause(settings))
        return call.response()

    def score(
        self,
        query: str,
        documents: Iterable[Any],
        *,
        text: str | Callable[[Any], str] | None = None,
        model: str | None = None,
        instruction: str | None = None,
        total_timeout: float | None = None,
        extra_body: dict[str, Any] | None = None,
    ) -> list[float]:
        """Return the scores of N documents in the caller's order, for example as a column of a DataFrame.

        `top_n` and `score_threshold` do not apply. A blank document gets the lowest score.

        Args:
            query: The query, not blank.
            documents: N documents, as in `rerank`.
            text: As in `rerank`.
            model: As in `rerank`, like the following arguments.
            instruction: The task in one sentence.
            total_timeout: Seconds for the whole call.
            extra_body: Additional JSON fields of each request.

        Raises:
            RegoloError: As in `rerank`.
        """
        everything = self.with_options(top_n=None, score_threshold=None)
        response = everything.rerank(
            query,
            documents,
            text=text,
            model=model,
            instruction=instruction,
            total_timeout=total_timeout,
            extra_body=extra_body,
        )
        return _in_input_order(response)

    async def ascore(
        self,
        query: str,
        documents: Iterable[Any],
        *,
        text: str | Callable[[Any], str] | None = None,
        model: str | None = None,
        instruction: str | None = None,
        total_timeout: float | None = None,
        extra_body: dict[str, Any] | None = None,
    ) -> list[float]:
        """Return the scores as `score` does, without blocking the event loop."""
        everything = self.with_options(top_n=None, score_threshold=None)
        response = await everything.arerank(
            query,
            documents,
            text=text,
            model=model,
            instruction=instruction,
            total_timeout=total_timeout,
            extra_body=extra_body,
        )
        return _in_input_order(response)

    @overload
    def rerank_many(
        self,
        pairs: Iterable[tuple[str, Iterable[Any]]],
        *,
        text: str | Callable[[Any], str] | None = None,
        max_concurrency: int | None = None,
        return_exceptions: Literal[False] = False,
        **options: Unpack[RankOptions],
    ) -> Generator[RerankResponse[Any]]: ...

    @overload
    def rerank_many(
        self,
        pairs: Iterable[tuple[str, Iterable[Any]]],
        *,
        text: str | Callable[[Any], str] | None = None,
        max_concurrency: int | None = None,
        return_exceptions: bool,
        **options: Unpack[RankOptions],
    ) -> Generator[RerankResponse[Any] | RegoloError]: ...

    def rerank_many(
        self,
        pairs: Iterable[tuple[str, Iterable[Any]]],
        *,
        text: str | Callable[[Any], str] | None = None,
        max_concurrency: int | None = None,
        return_exceptions: bool = False,
        **options: Unpack[RankOptions],
    ) -> Generator[RerankResponse[Any] | RegoloError]:
        """Rank the documents of many queries, and yield the rankings in input order.

        Args:
            pairs: `(query, documents)` pairs, any number of them. They are read in the caller's thread, at most
                4 x `max_concurrency` pairs ahead of the last ranking.
            text: As in `rerank`.
            max_concurrency: Maximum number of concurrent requests, over all pairs.
            return_exceptions: Yield errors in place of failed rankings. If False, the first error is raised, and the
                pairs that were read ahead are dropped.
            **options: `top_n`, `model`, `instruction`, `score_threshold`, `total_timeout` and `extra_body`, as in
                `rerank`. `total_timeout` applies to each pair, from the moment its first request could be sent.

        Returns:
            A generator with one ranking per pair. Closing it stops the requests in progress.

        Raises:
            InvalidInputError: An argument is wrong (at once), or a pair (at its position).
            RegoloError: As in `rerank`. `error.index` is the position of the pair.
        """
        settings = resolve(self._options, is_async=False, max_concurrency=max_concurrency, **options)
        _check_pairs(pairs, Iterable)
        return self._rank_many(settings, pairs, text, return_exceptions=return_exceptions)

    def _rank_many(
        self, settings: Settings, pairs: Iterable[Any], text: Any, *, return_exceptions: bool
    ) -> Generator[RerankResponse[Any] | RegoloError]:
        calls = (self._begin_pair(settings, index, pair, text) for index, pair in enumerate(pairs))
        workers = settings.options.max_concurrency
        with closing(_workers.run_in_order(calls, workers, self._connections, self._pause(settings))) as finished:
            for call in finished:
                yield _finish(call, return_exceptions=return_exceptions)

    @overload
    def arerank_many(
        self,
        pairs: Iterable[tuple[str, Iterable[Any]]] | AsyncIterable[tuple[str, Iterable[Any]]],
        *,
        text: str | Callable[[Any], str] | None = None,
        max_concurrency: int | None = None,
        return_exceptions: Literal[False] = False,
        **options: Unpack[RankOptions],
    ) -> AsyncGenerator[RerankResponse[Any]]: ...

    @overload
    def arerank_many(
        self,
        pairs: Iterable[tuple[str, Iterable[Any]]] | AsyncIterable[tuple[str, Iterable[Any]]],
        *,
        text: str | Callable[[Any], str] | None = None,
        max_concurrency: int | None = None,
        return_exceptions: bool,
        **options: Unpack[RankOptions],
    ) -> AsyncGenerator[RerankResponse[Any] | RegoloError]: ...

    def arerank_many(
        self,
        pairs: Iterable[tuple[str, Iterable[Any]]] | AsyncIterable[tuple[str, Iterable[Any]]],
        *,
        text: str | Callable[[Any], str] | None = None,
        max_concurrency: int | None = None,
        return_exceptions: bool = False,
        **options: Unpack[RankOptions],
    ) -> AsyncGenerator[RerankResponse[Any] | RegoloError]:
        """Rank as `rerank_many` does, without blocking the event loop. `pairs` may be an async iterable.

        To leave the loop with `break`, wrap the generator in `contextlib.aclosing`, which stops the requests at once.
        """
        settings = resolve(self._options, is_async=True, max_concurrency=max_concurrency, **options)
        _check_pairs(pairs, Iterable, AsyncIterable)
        return self._arank_many(settings, pairs, text, return_exceptions=return_exceptions)

    async def _arank_many(
        self, settings: Settings, pairs: Any, text: Any, *, return_exceptions: bool
    ) -> AsyncGenerator[RerankResponse[Any] | RegoloError]:
        _check_event_loop()
        indices = itertools.count()

        def begin(pair: object) -> Call:
            return self._begin_pair(settings, next(indices), pair, text)

        workers = settings.options.max_concurrency
        calls = _workers.TasksInOrder(pairs, begin, workers, self._connections, self._pause(settings))
        try:
            while (call := await calls.next()) is not None:
                yield _finish(call, return_exceptions=return_exceptions)
        finally:
            await calls.stop()

    def _begin(self, settings: Settings, query: Any, documents: Any, text: Any) -> Call:
        """Check query and documents, and return their call."""
        query, documents = check_query(query), check_documents(documents)
        return Call(settings, query, documents, get_texts(documents, text), self._open_cache(settings, query))

    def _begin_pair(self, settings: Settings, index: int, pair: object, text: Any) -> Call:
        """Return the call of one of many pairs. A wrong pair becomes a call without requests that has failed."""
        try:
            call = self._begin(settings, *check_pair(pair), text)
        except RegoloError as error:
            error.args = (f"pairs[{index}]: {error}",)
            call = Call.rejected(settings, error)
        call.index = index
        return call

    def _open_cache(self, settings: Settings, query: str) -> QueryCache | None:
        options, prompt_format = settings.options, settings.prompt_format
        if options.cache is None:
            return None
        return QueryCache(
            options.cache,
            self._cache_locks.setdefault(os.getpid(), threading.Lock()),
            settings.endpoint.url,
            options.model,
            sorted(settings.fields.items()),
            prompt_format.document,
            prompt_format.escape,
            prompt_format.format_query(query, options.instruction),
        )

    def _pause(self, settings: Settings) -> Pause:
        """Return the pause after a 429, which belongs to a server and an API key."""
        owner = settings.endpoint.url, settings.key
        return self._pauses.get(owner) or self._pauses.setdefault(owner, Pause())

    def close(self) -> None:
        """Close the connections of sync calls. The next call opens new ones."""
        self._connections.close()

    async def aclose(self) -> None:
        """Close the connections of sync calls, and of async calls in the running event loop."""
        await self._connections.aclose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self._options.__repr_args__())})"
        )

    def __copy__(self) -> Self:
        return self.with_options()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self.with_options()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the options, without the key, the cache and the caller's HTTP clients."""
        return _rebuild, (type(self), self._options)


def _rebuild(cls: type[RegoloClient], options: Options) -> RegoloClient:
    return cls().with_options(options)


def _check_pairs(pairs: object, *kinds: type) -> None:
    if isinstance(pairs, str | bytes | Mapping | set | frozenset) or not isinstance(pairs, kinds):
        raise InvalidInputError(f"pairs: must be an iterable of (query, documents), got {type(pairs).__name__}")


def _check_event_loop() -> None:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        raise InvalidInputError(
            "async calls need an asyncio event loop. Other loops, such as trio's, do not work"
        ) from None


def _finish(call: Call, *, return_exceptions: bool) -> RerankResponse[Any] | RegoloError:
    """Return the ranking of one of many pairs, or raise its error, or return the error if the caller wants that."""
    try:
        return call.response()
    except RegoloError as error:
        if return_exceptions:
            return error
        raise


def _in_input_order(response: RerankResponse[Any]) -> list[float]:
    return [result.relevance_score for result in sorted(response, key=lambda result: result.index)]
