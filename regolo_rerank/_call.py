"""One call, without I/O: from a query and texts to batches, and from the replies to one ranking.

Blank documents are not sent and rank last. Equal texts are sent once. With `long_documents="split"`, a long document
is sent as several passages and gets the best of their scores. The distinct texts go out in even batches. A score does
not depend on the other documents of its request, so the replies merge into exactly the ranking of a single request.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from operator import attrgetter
from typing import Any, Final, Self

from regolo_rerank._passages import split_passages
from regolo_rerank._protocol import Ranking, Reply, encode, invalid_reply, read_reply, replace_surrogates
from regolo_rerank.cache import QueryCache
from regolo_rerank.errors import (
    APIResponseError,
    APIStatusError,
    APITimeoutError,
    ContextLengthError,
    InvalidInputError,
    RegoloError,
    RerankWarning,
    warn,
)
from regolo_rerank.options import Settings
from regolo_rerank.results import RerankResponse, RerankResult, Usage

__all__ = ["Batch", "Call"]

_MAX_BYTES_PER_CHARACTER: Final = 6
"""In JSON: a control character is written as `\\u0000`."""
_EQUAL_SCORES: Final = 10
"""At least this many distinct documents with the same score mean a wrongly configured server."""


Batch = tuple[int, ...]
"""The texts of one request, as positions in the distinct texts of its call."""


class Call:
    """One query and its texts. Workers call `accept` and `fail`. The caller waits until `is_finished`.

    Args:
        settings: The settings of the call.
        query: The query, not blank.
        documents: The caller's N objects.
        texts: Their texts.
        cache: The cached scores of the query, if there is a cache.

    Attributes:
        index: The position of the pair in `rerank_many`, or None in other calls.
        batches: The requests to send. Empty if every score is cached.
        deadline: Monotonic time when `total_timeout` expires. It is None before the first request, and without a limit.

    Raises:
        InvalidInputError: The query alone is larger than `max_request_bytes`.
    """

    def __init__(
        self,
        settings: Settings,
        query: str,
        documents: Sequence[Any],
        texts: Sequence[str],
        cache: QueryCache | None = None,
    ) -> None:
        self.settings = settings
        self.index: int | None = None
        self.deadline: float | None = None
        self._failure: BaseException | None = None
        self._query = query
        self._query_string = settings.prompt_format.format_query(query, settings.options.instruction)
        self._documents = documents
        self._document_texts = texts
        # The distinct texts, and for each document the position of its text among them. A blank document has none, and
        # a split document has passages instead, each with its position and its span `(start, end)` in the document.
        positions: dict[str, int] = {}
        self._passages: dict[int, list[tuple[int, tuple[int, int]]]] = {}
        limit = settings.options.max_document_chars
        if limit is not None and settings.options.long_documents == "split":
            for index, text in enumerate(texts):
                if len(text) > limit:
                    self._passages[index] = [
                        (positions.setdefault(text[start:end], len(positions)), (start, end))
                        for start, end in split_passages(text, limit)
                        if not text[start:end].isspace()
                    ]
            texts = ["" if index in self._passages else text for index, text in enumerate(texts)]
        elif limit is not None:
            texts = [text[:limit] for text in texts]
        self._position_of = [
            positions.setdefault(text, len(positions)) if text and not text.isspace() else None for text in texts
        ]
        self._texts = list(positions)
        self._scores: dict[int, float] = {}
        self._rankings: dict[Batch, Ranking] = {}
        self._requests = 0
        self._cache = cache
        if cache is not None:
            self._scores = {positions[text]: score for text, score in cache.read(self._texts).items()}
        to_send = [position for position in range(len(self._texts)) if position not in self._scores]
        self.batches = self._make_batches(to_send) if to_send else []

    def _make_batches(self, to_send: list[int]) -> list[Batch]:
        """Return even batches within the limits of documents and bytes per request."""
        options = self.settings.options
        budget = options.max_request_bytes - len(self._body([], options.batch_size))
        if budget <= 0:
            raise InvalidInputError(
                f"query: with instruction and extra_body it is larger than max_request_bytes="
                f"{options.max_request_bytes}. Shorten it, or raise the limit"
            )
        longest = max(map(len, self._texts)) + len(self.settings.prompt_format.document)
        most = min(options.batch_size, len(to_send))
        if most * (longest * _MAX_BYTES_PER_CHARACTER + len('"",')) <= budget:
            sizes = [0] * len(to_send)  # so far below the limit that nothing has to be measured
        else:
            sizes = [len(encode(document)) + len(",") for document in self._document_strings(to_send)]
        parts = _split_by_size(sizes, options.batch_size, budget)
        return [tuple(to_send[part.start : part.stop]) for part in parts]

    def request_body(self, batch: Batch) -> bytes:
        """Return the JSON of a batch's request, and count the request."""
        self._requests += 1
        return self._body(self._document_strings(batch), self._wanted(batch))

    def _document_strings(self, positions: Sequence[int]) -> list[str]:
        return self.settings.prompt_format.format_documents([self._texts[position] for position in positions])

    def _body(self, documents: list[str], top_n: int) -> bytes:
        body = {
            "model": self.settings.options.model,
            "query": self._query_string,
            "documents": documents,
            "top_n": top_n,
        }
        return encode(self.settings.fields | body)

    def _wanted(self, batch: Batch) -> int:
        """Return the `top_n` of a batch: all scores if a cache keeps them, or if documents are made of passages."""
        top_n = self.settings.options.top_n
        if top_n is None or self._cache is not None or self._passages:
            return len(batch)
        return min(top_n, len(batch))

    def start(self) -> None:
        """Start the clock of `total_timeout`, unless it is running."""
        limit = self.settings.options.total_timeout
        if self.deadline is None and limit is not None:
            self.deadline = time.monotonic() + limit

    def seconds_left(self) -> float | None:
        """Return the seconds until `total_timeout` expires, or None without a limit."""
        if self.deadline is None:
            return self.settings.options.total_timeout
        return max(0.0, self.deadline - time.monotonic())

    @property
    def is_finished(self) -> bool:
        """Whether all batches were accepted, or one has failed."""
        return self._failure is not None or len(self._rankings) == len(self.batches)

    def accept(self, batch: Batch, reply: Reply) -> None:
        """Check a reply and keep its scores.

        Raises:
            APIStatusError: The status is not 2xx. The message suggests an option if one helps.
            APIResponseError: The reply is not a valid ranking of the batch.
        """
        try:
            ranking = read_reply(reply, url=self.settings.endpoint.url, model=self.settings.options.model)
        except APIStatusError as error:
            error.args = (f"{error}{self._advise(error, batch)}",)
            raise
        if problem := self._find_problem(batch, ranking):
            raise invalid_reply(problem, reply)
        for score in ranking.scores:
            self._scores[batch[score.position]] = score.value
        self._rankings[batch] = replace(ranking, scores=[])  # which are in `_scores` now

    def _find_problem(self, batch: Batch, ranking: Ranking) -> str | None:
        """Return the problem of a ranking, or None. Each requested document must occur once, with its own text."""
        count, wanted = len(batch), self._wanted(batch)
        found: set[int] = set()
        echoes: dict[int, str] = {}
        for position, _, echo in ranking.scores:
            if not 0 <= position < count:
                return f"it contains index {position}, and the request has {count} documents"
            if position in found:
                return f"it contains index {position} more than once"
            found.add(position)
            if echo is not None:
                echoes[position] = echo
        if len(found) < wanted:
            return f"it ranks {len(found)} documents instead of {wanted}"
        return self._find_swapped(batch, echoes) if echoes else None

    def _find_swapped(self, batch: Batch, echoes: dict[int, str]) -> str | None:
        """Return the problem if a result has the text of another document.

        Other differences are allowed, such as missing tags.
        """
        sent = self._document_strings([batch[position] for position in echoes])
        strange = [position for position, text in zip(echoes, sent, strict=True) if echoes[position] != text]
        if strange:
            stripped = [text.strip() for text in self._document_strings(batch)]
            position_of = {text: position for position, text in enumerate(stripped)}
            for position in strange:
                other = position_of.get(echoes[position].strip(), position)
                if replace_surrogates(stripped[other]) != replace_surrogates(stripped[position]):
                    return f"document {position} has the text of document {other}"
        return None

    def _advise(self, error: APIStatusError, batch: Batch) -> str:
        """Return what helps against a limit of the server."""
        if isinstance(error, ContextLengthError):
            return f". {self._describe_longest(batch)}"
        if "maximum allowed batch size" in str(error):
            return ". Set batch_size to the server's limit"
        return ""

    def _describe_longest(self, batch: Batch) -> str:
        """Return the longest text of a request, and the option that helps."""
        options = self.settings.options
        position = max(batch, key=lambda position: len(self._texts[position]))
        length = len(self._texts[position])
        if self.settings.prompt_format.uses_instruction and len(options.instruction) > max(length, len(self._query)):
            return f"The longest text is the instruction with {len(options.instruction)} characters: shorten it"
        if len(self._query) > length:
            return f"The longest text is the query with {len(self._query)} characters: shorten it"
        index = self._position_of.index(position) if position in self._position_of else self._find_split(position)
        split = "" if options.long_documents == "split" else ", and long_documents='split' to score all of it"
        return (
            f"The longest text is documents[{index}] with {len(self._document_texts[index])} characters: set "
            f"{'a lower ' if options.max_document_chars else ''}max_document_chars{split}"
        )

    def _find_split(self, position: int) -> int:
        """Return the index of the document that a passage is from."""
        return next(
            index for index, passages in self._passages.items() if position in {passage[0] for passage in passages}
        )

    @classmethod
    def rejected(cls, settings: Settings, error: RegoloError) -> Self:
        """Return a failed call for a wrong pair. `fail` would not do: a call without requests is finished."""
        call = cls(settings, "", [], [])
        call._failure = error
        return call

    def fail(self, error: BaseException) -> None:
        """End the call with its first final error."""
        if not self.is_finished:
            self._failure = error

    def check_time(self) -> None:
        """Raise APITimeoutError if `total_timeout` has expired."""
        if self.seconds_left() == 0.0:
            raise self.timeout_error()

    def timeout_error(self) -> APITimeoutError:
        """Return the error for a call that `total_timeout` has ended."""
        limit = self.settings.options.total_timeout
        return APITimeoutError(f"no ranking from {self.settings.endpoint.host} within total_timeout={limit:g} s")

    def keep_scores(self) -> None:
        """Keep the new scores in the cache, also those of a call that has failed."""
        if self._cache is not None:
            self._cache.write(
                {self._texts[position]: self._scores[position] for batch in list(self._rankings) for position in batch}
            )

    def response(self) -> RerankResponse[Any]:
        """Return the ranking of a call that is done, or raise the error that ended it."""
        if self._failure is not None:
            if isinstance(self._failure, RegoloError):
                self._failure.index = self.index
            raise self._failure
        rankings = [self._rankings[batch] for batch in self.batches]
        models = {ranking.model for ranking in rankings} - {None}
        if len(models) > 1:
            raise APIResponseError(
                f"invalid replies: the requests were answered by {' and '.join(sorted(map(str, models)))}"
            )
        tokens = [ranking.total_tokens for ranking in rankings if ranking.total_tokens is not None]
        costs = [ranking.cost for ranking in rankings if ranking.cost is not None]
        return RerankResponse(
            id=rankings[0].id if rankings else None,
            model=next(iter(models), None),
            results=self._results(),
            usage=Usage(
                total_tokens=sum(tokens) if tokens else None,
                requests=self._requests,
                cost=math.fsum(costs) if costs else None,
            ),
            request_ids=[ranking.request_id for ranking in rankings if ranking.request_id is not None],
            meta=rankings[0].meta if rankings else None,
        )

    def _results(self) -> list[RerankResult[Any]]:
        """Merge the scores: best first, ties in input order, blank documents last."""
        options = self.settings.options
        ranked, blank = [], []
        for index, position in enumerate(self._position_of):
            if position in self._scores:  # with `top_n`, a server returns the best scores only
                ranked.append(RerankResult(index, self._scores[position], self._documents[index]))
            elif passages := self._passages.get(index):
                best, span = max(passages, key=lambda passage: self._scores[passage[0]])
                ranked.append(RerankResult(index, self._scores[best], self._documents[index], span))
            elif position is None:
                blank.append(index)
        self._warn_about_equal_scores()
        ranked.sort(key=attrgetter("relevance_score"), reverse=True)
        if options.score_threshold is not None:
            return [result for result in ranked[: options.top_n] if result.relevance_score >= options.score_threshold]
        lowest = min(0.0, ranked[-1].relevance_score if ranked else 0.0)
        ranked += [RerankResult(index, lowest, self._documents[index]) for index in blank]
        return ranked[: options.top_n]

    def _warn_about_equal_scores(self) -> None:
        if len(self._scores) >= _EQUAL_SCORES and len(set(self._scores.values())) == 1:
            warn(
                f"all {len(self._scores)} documents have the same score, {next(iter(self._scores.values()))}. The "
                f"server is probably not configured as a reranker, or needs another prompt_format; see "
                f"'regolo-rerank check'",
                RerankWarning,
            )


def _split_by_size(sizes: list[int], max_count: int, max_bytes: int) -> list[range]:
    """Split texts into as few ranges as the limits allow, of even length if that is possible.

    Args:
        sizes: The bytes of each text.
        max_count: Maximum number of texts in a range.
        max_bytes: Maximum bytes of a range. A single larger text gets its own range.
    """
    ends = [0, *accumulate(sizes)]
    if len(sizes) <= max_count and ends[-1] <= max_bytes:
        return [range(len(sizes))]
    full, start = [], 0
    for stop in range(1, len(sizes) + 1):
        # Close a range before the first text that does not fit.
        if stop - start > max_count or (stop - start > 1 and ends[stop] - ends[start] > max_bytes):
            full.append(range(start, stop - 1))
            start = stop - 1
    full.append(range(start, len(sizes)))
    count = len(full)
    bounds = [-(-len(sizes) * part // count) for part in range(count + 1)]
    even = [range(start, stop) for start, stop in pairwise(bounds)]
    fits = all(ends[part.stop] - ends[part.start] <= max_bytes for part in even)
    return even if fits else full
