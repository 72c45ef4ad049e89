"""One call: what it sends, what each reply means, and whether it has ended. Nothing here waits.

The batches of all calls that are under way together are shared by a crew of workers, threads or tasks.
"""

import asyncio
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import cached_property
from typing import Any, Final, Generic, TypeVar

import httpx
from pydantic import SecretStr

from regolo_rerank._core.cache import KnownScores, identity
from regolo_rerank._core.inputs import checked_documents, checked_query
from regolo_rerank._core.ranking import Plan
from regolo_rerank._core.retry import SLOT_LAG, Gate, Patience, is_crowded
from regolo_rerank._transports.lines import is_proxied
from regolo_rerank._transports.local import SCORER_EXTENSION
from regolo_rerank._wire.messages import read_error, read_reply, request_id_of
from regolo_rerank.errors import (
    APIConnectionError,
    APIResponseError,
    APITimeoutError,
    BadRequestError,
    InvalidInputError,
    NotFoundError,
    RegoloError,
)
from regolo_rerank.options import Options
from regolo_rerank.results import RerankResponse

__all__ = ["MAX_REPLY_BYTES", "Call", "Crew", "EndedError", "Event", "LeftError", "Terms"]

Event = TypeVar("Event", threading.Event, asyncio.Event)

MAX_REPLY_BYTES: Final = 64 * 1024 * 1024
"""Bytes of a reply, decompressed, after which it is refused."""

_FORGETS_AFTER: Final = 60.0
"""Seconds after a refusal for too many in flight until the crew tries again: LiteLLM's window is a minute."""

_log = logging.getLogger("regolo_rerank")


class _BearerAuth(httpx.Auth):
    """Puts the key on the request at the last moment, so that no frame of ours ever holds the header."""

    def __init__(self, key: SecretStr) -> None:
        self._key = key

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response]:
        request.headers["Authorization"] = f"Bearer {self._key.get_secret_value()}"
        yield request


class LeftError(Exception):
    """Ends a worker whose batch is another's now; nobody else sees it."""


class EndedError(Exception):
    """Ends the sending of a batch whose call has ended elsewhere; nobody else sees it."""


class Terms:
    """What holds for every query of a call: its options as they are now, and where and how it sends.

    Args:
        options: The call's own options.
        user_agent: What requests call themselves.
        gate: The wait after a 429.
        callers_client: The http client that the caller has passed.

    Raises:
        InvalidInputError: Options contradict each other, or the key would travel in the clear.
        MissingAPIKeyError: The endpoint demands a key, and there is none.
    """

    def __init__(
        self, options: Options, user_agent: str, gate: Gate, callers_client: httpx.Client | httpx.AsyncClient | None
    ) -> None:
        self.options = options
        self.gate = gate
        self.endpoint = options.endpoint()
        self.prompt_format = options.format_for(self.endpoint)
        # A caller's client has a timeout of its own, and a scorer on this machine takes the time it takes.
        self.timeout = None if callers_client is not None or self.endpoint.embedded else options.timeout
        self.callers_client = callers_client
        self._user_agent = user_agent

    @cached_property
    def key(self) -> SecretStr | None:
        """The key that requests carry."""
        return self.options.key_for(self.endpoint)

    @cached_property
    def arguments(self) -> dict[str, Any]:
        """What all requests have in common, as arguments of `stream`; a key is needed from here on."""
        url = self.endpoint.url
        in_the_clear = self.key is not None and url.scheme == "http" and not self.options.allow_http
        if in_the_clear and self.callers_client is not None and is_proxied(self.callers_client, url):
            raise InvalidInputError(
                "http_client: its proxy would see the API key in the clear; use https, a client without a proxy, "
                "or allow_http=True"
            )
        own = {name.lower(): value for name, value in (self.options.default_headers or {}).items()}
        arguments: dict[str, Any] = {
            "method": "POST",
            "url": url,
            "headers": {
                "accept": "application/json",
                "content-type": "application/json",
                "user-agent": self._user_agent,
                **own,
            },
        }
        if self.callers_client is not None:
            arguments["follow_redirects"] = False
        elif self.timeout is not None:
            arguments["timeout"] = self.timeout
        if self.key is not None:
            arguments["auth"] = _BearerAuth(self.key)
        if self.options.scorer is not None:
            arguments["extensions"] = {SCORER_EXTENSION: self.options.scorer}
        return arguments

    def known_scores(self, query: str) -> KnownScores | None:
        """Return the scores that the caller's cache holds for a query string."""
        options = self.options
        if options.cache is None:
            return None
        return KnownScores(
            options.cache,
            str(self.endpoint.url),
            options.model,
            sorted((options.extra_body or {}).items()),
            identity(options.scorer),
            self.prompt_format.document,
            self.prompt_format.escape,
            query,
        )


class Call(Generic[Event]):
    """One query and its documents, from the plan to the ranking.

    Args:
        terms: What holds for this call and others.
        query: The query, unchecked.
        documents: The documents, unchecked.
        over: Set when the call has ended; whoever waits on its behalf wakes.

    Raises:
        InvalidInputError: Query or documents are wrong.
    """

    def __init__(self, terms: Terms, query: str, documents: Iterable[str], over: Event) -> None:
        self.terms = terms
        self.over: Event = over
        self.plan = Plan(checked_query(query), checked_documents(documents, str), terms.options, terms.prompt_format)
        self.crew: Crew[Event] | None = None
        self._known = terms.known_scores(self.plan.query)
        self._patience: dict[range, Patience] = {}
        self._unranked = 0
        self._failure: BaseException | None = None
        self._lock = threading.Lock()

    def prepare(self, loop: asyncio.AbstractEventLoop | None = None) -> Future[None] | None:
        """Find out what has to be sent.

        Args:
            loop: The event loop of an async call.

        Returns:
            None when the call can go on. Otherwise what ends when another call has ended: it is asking for the same
            pairs, and this call should be prepared again, to find their scores in the cache.

        Raises:
            InvalidInputError: The key would travel in the clear.
            MissingAPIKeyError: The endpoint demands a key, and there is none.
        """
        known: dict[str, float] = {}
        if self._known is not None:
            claimed = self._known.claim(self.plan.texts, loop)
            if isinstance(claimed, Future):
                return claimed
            known = claimed
        self.plan.cut(known)
        self._unranked = len(self.plan.batches)
        if self._unranked:
            _ = self.terms.arguments  # refused before anything waits or is sent
        else:
            self.close()
        return None

    def close(self) -> None:
        """End the call, ranked or not, in the caller's thread; what has not started never starts."""
        self._end()
        if self._known is not None:
            self._known.settle()

    def _end(self) -> None:
        self.over.set()
        if self._known is not None:
            self._known.end()

    def crew_of_its_own(self) -> "Crew[Event]":
        """Return as many workers as this call alone can use."""
        return Crew(min(self.terms.options.max_concurrency, len(self.plan.batches)))

    def request(self, batch: range) -> dict[str, Any]:
        """Return the arguments of a batch's request, for the `stream` of a line or of an httpx client."""
        return {**self.terms.arguments, "content": self.plan.request(batch)}

    def patience(self, batch: range, *, hurries: bool) -> Patience:
        """Return the patience of a batch's request, the same one whoever sends it."""
        patience = self._patience.setdefault(batch, Patience(self.terms.options, self.terms.gate))
        patience.hurries = hurries
        return patience

    def learn(
        self, batch: range, response: httpx.Response, body: bytearray, patience: Patience, started: float
    ) -> None:
        """Take in a complete reply to what was sent at `started` by the monotonic clock.

        Raises:
            APIStatusError: The server said no.
            APIResponseError: The reply cannot be trusted.
            LeftError: The server has too many requests in flight, and another worker has the batch now.
        """
        url, key = self.terms.endpoint.url, self.terms.key
        request_id = request_id_of(response.headers, key)
        _log.debug("%s answered %d to %d documents, request %s", url, response.status_code, len(batch), request_id)
        if response.is_success:
            scores = self.plan.learn(batch, read_reply(body, response.headers, key), request_id, patience.sent)
            if self._known is not None:
                self._known.learn({self.plan.texts[slot]: score for slot, score in scores.items()})
            self.terms.gate.took(time.monotonic() - started)
            return
        error = read_error(response.status_code, body, response.headers, key)
        if is_crowded(error) and self.crew:
            if not patience.too_many():
                self.crew.lags()
            elif self.crew.hand_back(self, batch):
                _log.warning("attempt %d failed, next by another worker: %s", patience.sent, error)
                patience.max_retries += 1
                raise LeftError
        if isinstance(error, NotFoundError):
            error.args = (f"{error}; nothing to rerank with at {url}: see base_url",)
        if isinstance(error, BadRequestError) and "context length" in str(error):
            index, length = self.plan.longest(batch)
            hint = f"the longest document sent is documents[{index}] with {length} characters"
            error.args = (f"{error}; {hint}; the option max_document_chars cuts documents for scoring only",)
        raise error

    def ranked_one(self) -> None:
        """Count a batch whose scores are known; the last one ends the call."""
        with self._lock:
            self._unranked -= 1
            ranked = not self._unranked
        if ranked:
            self._end()

    def fail(self, error: BaseException) -> None:
        """End the call with the first final failure; what has not started never starts."""
        if not self.over.is_set():
            # The worker's own frame, on top, goes on with other calls: it is not to be emptied with this one's.
            self._failure = error.with_traceback(error.__traceback__ and error.__traceback__.tb_next)
            self._end()

    def response(self) -> RerankResponse:
        """Return the ranking of a call that has ended, or raise what ended it."""
        if self._failure is not None:
            raise self._failure
        return self.plan.response()

    def check(self, body: bytearray, started: float) -> None:
        """Refuse a reply that grows without end, or comes too slowly (`started` in seconds of the monotonic clock).

        Raises:
            APIResponseError: It is too large.
            TimeoutError: It is too late.
        """
        if len(body) > MAX_REPLY_BYTES:
            raise APIResponseError(f"the reply cannot be trusted: it is larger than {MAX_REPLY_BYTES} bytes")
        if self.terms.timeout is not None and time.monotonic() - started > self.terms.timeout:
            raise TimeoutError

    @contextmanager
    def unless_over(self) -> Iterator[None]:
        """Let nothing start, and no error count, once the call has ended elsewhere."""
        if self.over.is_set():
            raise EndedError
        try:
            yield
        except RegoloError:
            if self.over.is_set():
                raise EndedError from None
            raise

    @contextmanager
    def decoding(self, response: httpx.Response, body: bytearray) -> Iterator[None]:
        """Let an error reply that cannot be decompressed count by its status alone."""
        try:
            yield
        except httpx.DecodingError:
            if response.is_success:
                raise
            body.clear()

    @contextmanager
    def errors(self, batch: range) -> Iterator[None]:
        """Turn whatever can go wrong below, with a batch's request, into this package's errors."""
        host = self.terms.endpoint.url.netloc.decode()
        try:
            try:
                yield
            except (httpx.TimeoutException, TimeoutError) as error:
                raise APITimeoutError(
                    f"no complete reply from {host} within the timeout ({type(error).__name__})"
                ) from error
            except httpx.DecodingError as error:
                raise APIResponseError(
                    f"the reply cannot be trusted: its body cannot be decompressed: {error}"
                ) from error
            except (httpx.HTTPError, httpx.StreamError, httpx.InvalidURL, OSError) as error:
                raise APIConnectionError(
                    f"no complete reply from {host}: {str(error) or type(error).__name__}"
                ) from error
            except RuntimeError as error:
                raise APIConnectionError(
                    f"the http client cannot be used: {error} An httpx client that was passed must be open, and an "
                    f"async one belongs to the event loop that it was first used in"
                ) from error
        except RegoloError as error:
            _log.debug("%s has not answered to %d documents: %s", self.terms.endpoint.url, len(batch), error)
            raise


class Crew(Generic[Event]):
    """The batches of the calls under way, and the workers that share them; a worker that finds no batch leaves.

    Where the account may have fewer requests in flight than there are workers, a worker that is refused hands its
    batch back and leaves; the last one stays and waits. Where the service counts a request for a moment after its
    reply, workers rest that moment. A minute later one more may start, and nobody rests.

    Attributes:
        most: Workers at most.
        window: Calls under way at most: enough that a slow one keeps nobody idle.
    """

    def __init__(self, most: int) -> None:
        self.most = self._limit = most
        self._workers = 0
        self._refused_at = 0.0
        self._lagged_at = -math.inf
        self._todo: deque[tuple[Call[Event], range]] = deque()
        self._lock = threading.Lock()
        self.window = 4 * most if most > 1 else 1

    def add(self, call: Call[Event]) -> None:
        """Take on a call."""
        call.crew = self
        with self._lock:
            self._todo.extend((call, batch) for batch in call.plan.batches)

    def due(self) -> int:
        """Return how many workers have to start now."""
        with self._lock:
            if self._limit < self.most and time.monotonic() - self._refused_at > _FORGETS_AFTER:
                self._limit += 1
                self._refused_at = time.monotonic()
            starting = max(0, min(self._limit - self._workers, len(self._todo)))
            self._workers += starting
            return starting

    def take(self) -> tuple[Call[Event], range] | None:
        """Return the next batch and its call; a worker that gets none has left."""
        with self._lock:
            while self._todo:
                call, batch = self._todo.popleft()
                if not call.over.is_set():
                    return call, batch
            self._workers -= 1
            return None

    def lags(self) -> None:
        """Learn that the service has not noticed at once that a request was answered."""
        self._lagged_at = time.monotonic()

    def rest(self) -> float:
        """Return the seconds that a worker waits before it sends."""
        return SLOT_LAG if time.monotonic() - self._lagged_at < _FORGETS_AFTER else 0.0

    def hand_back(self, call: Call[Event], batch: range) -> bool:
        """Give a batch to the other workers and leave, or return False to the last one."""
        with self._lock:
            if self._workers == 1:
                return False
            self._workers -= 1
            self._limit = self._workers
            self._refused_at = time.monotonic()
            self._todo.appendleft((call, batch))
            return True
