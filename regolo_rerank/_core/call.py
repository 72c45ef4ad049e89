"""One call: a query and its documents, from the plan to the ranking. Nothing here waits or sends."""

import asyncio
import logging
from typing import Generic, TypeVar

from regolo_rerank._core.batching import Plan
from regolo_rerank._core.cache import ScoreCache, name_scorer
from regolo_rerank._core.config import RequestConfig
from regolo_rerank._transports.spread import Done
from regolo_rerank._wire.body import RawReply
from regolo_rerank._wire.inputs import check_documents, check_pair, check_query
from regolo_rerank._wire.replies import advise_on_length, read_error, read_reply
from regolo_rerank._wire.request_ids import request_id_of
from regolo_rerank._wire.source import read_source, refuse_substitute
from regolo_rerank.errors import BadRequestError, InvalidInputError, RegoloError
from regolo_rerank.results import RerankResponse

__all__ = ["Call", "Event"]

Event = TypeVar("Event", Done, asyncio.Event)

_log = logging.getLogger("regolo_rerank")


class Call(Generic[Event]):
    """One query and its documents. It belongs to the caller's thread or task; workers only `accept` and `fail`.

    Args:
        config: What its requests have in common.
        pair: The query and the documents; what is wrong with them, `result` raises.
        done: What is set when the call is ranked, has failed or was given up; whoever waits on its behalf wakes.
        place: What an error says in front, where the pair is one of many.

    Attributes:
        plan: What is to be sent, and what was learnt of it.
        batches: One range a request; none where there is nothing to send.

    Raises:
        InvalidInputError: The key is malformed, or would travel in the clear.
        MissingAPIKeyError: Something has to be sent, the endpoint demands a key, and there is none.
    """

    plan: Plan

    def __init__(self, config: RequestConfig, pair: object, done: Event, place: str = "") -> None:
        self.config = config
        self.done: Event = done
        self.batches: list[range] = []
        self._cache: ScoreCache | None = None
        self._failure: BaseException | None = None
        try:
            query, documents = check_pair(pair)
            self.plan = Plan(
                check_query(query), check_documents(documents, str), config.options, config.prompt_format, config.fields
            )
            self._cache = _open_cache(config, self.plan.query)
            self.plan.cut(self._cache.read(self.plan.texts) if self._cache else {})
            self.batches = self.plan.batches
        except InvalidInputError as error:
            self.fail(InvalidInputError(f"{place}{error}"))
        if self.batches:
            config.require_key()
        else:
            done.set()

    def accept(self, batch: range, raw: RawReply, sent: int) -> None:
        """Take in the complete reply to a batch's request, its `sent`-th.

        Raises:
            APIStatusError: The server said no.
            APIResponseError: The reply cannot be trusted.
        """
        url, key, headers = self.config.endpoint.url, self.config.key, raw.headers
        if _log.isEnabledFor(logging.DEBUG):
            request_id = request_id_of(headers, key)
            _log.debug("%s answered %d to %d documents, request %s", url, raw.status_code, len(batch), request_id)
        if not 200 <= raw.status_code < 300:
            error = read_error(raw.status_code, raw.content, headers, key, url)
            if isinstance(error, BadRequestError) and "context length" in str(error):
                error.args = (f"{error}; {advise_on_length(str(error), *self.plan.find_longest(batch))}",)
            raise error
        reply = read_reply(raw.content, headers, key, url)
        source = read_source(headers, reply, key, sent)
        if source.is_substitute and not self.config.options.allow_substitutes:
            raise refuse_substitute(self.config.options.model, source)
        self.plan.accept(batch, reply, source)
        if self.plan.is_complete:
            self.done.set()

    def fail(self, error: BaseException) -> None:
        """End the call with the first final failure; what has not started never starts."""
        if not self.done.is_set():
            if isinstance(error, RegoloError):
                # Its frames hold all documents, and what it was made from may hold the key.
                error.__context__ = error.__traceback__ = None
            self._failure = error
            self.done.set()

    def close(self) -> None:
        """End the call, ranked or not, in the caller's thread; what it has learnt is kept in the cache."""
        self.done.set()
        if self._cache is not None:
            self._cache.write(self.plan.new_scores)
            self._cache = None

    def result(self) -> RerankResponse:
        """Return the ranking of a call that is done, or raise what ended it."""
        if self._failure is None:
            return self.plan.merge()
        failure, self._failure = self._failure, None
        try:
            raise failure
        finally:
            del failure  # a frame that holds its own error is freed late


def _open_cache(config: RequestConfig, query: str) -> ScoreCache | None:
    """Return the caller's cache for a query string, where there is one."""
    options = config.options
    if options.cache is None:
        return None
    return ScoreCache(
        options.cache,
        config.endpoint.address,
        options.model,
        sorted((name, value) for name, value in config.fields.items() if name != "disable_fallbacks"),
        name_scorer(options.scorer),
        config.prompt_format.document,
        config.prompt_format.escape,
        query,
    )
