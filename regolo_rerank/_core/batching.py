"""From texts to requests and from replies to one ranking, without any I/O.

Blank documents are not sent and equal ones are sent once; what is left is cut into even batches. Scores are pointwise
(a document's score does not depend on the others in its request), so the replies merge exactly.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate, islice
from operator import attrgetter
from typing import Any

from regolo_rerank._wire.messages import Reply, encode, repair
from regolo_rerank._wire.replies import may_mean
from regolo_rerank._wire.source import CACHE, Source, agree_on_model
from regolo_rerank.errors import APIResponseError, InvalidInputError
from regolo_rerank.options import Options
from regolo_rerank.prompts import PromptFormat
from regolo_rerank.results import RerankResponse, RerankResult, Usage

__all__ = ["Plan"]

_BYTES_A_CHARACTER = 6
"""Of JSON at most: a control character is written as `\\u0000`."""


class Plan:
    """Which requests to send for checked input, and the ranking that their replies add up to.

    Attributes:
        query: The query string of all requests.
        texts: The distinct texts of the documents, those that have to be sent first.
        batches: One range a request, over the texts; empty where there is nothing to send, and before `cut`.

    Raises:
        InvalidInputError: The query alone fills a request.
    """

    def __init__(
        self,
        query: str,
        documents: Sequence[str],
        options: Options,
        prompt_format: PromptFormat,
        fields: dict[str, Any],
    ) -> None:
        self._documents = documents
        self._options = options
        self._format = prompt_format
        self._fields = fields
        self.query = prompt_format.format_query(query, options.instruction)
        # A slot is a place in `texts`; that of a blank document is None.
        self._slots, self.texts = _find_distinct(documents, options.max_document_chars)
        self._scores: dict[int, float] = {}
        self._cached: list[Source] = []
        self._sources: dict[range, Source] = {}
        self.batches: list[range] = []
        # The bytes that a request's other fields leave for its documents.
        self._budget = options.max_request_bytes - len(self._encode_body([])) - len(f',"top_n":{options.batch_size}')
        if self._budget <= 0:
            raise InvalidInputError(
                f"query: with instruction and extra_body it fills a request of max_request_bytes="
                f"{options.max_request_bytes}; shorten it or raise that limit"
            )

    def cut(self, known: Mapping[str, float]) -> None:
        """Cut into batches what has to be sent: the texts without a known score."""
        if known:
            texts = [*(text for text in self.texts if text not in known), *known]
            numbers = dict(zip(texts, range(len(texts)), strict=True))
            self._slots = [None if slot is None else numbers[self.texts[slot]] for slot in self._slots]
            self._scores = {numbers[text]: score for text, score in known.items()}
            self._cached = [CACHE]
            self.texts = texts
        self.batches = self._split(len(self.texts) - len(known))

    def encode(self, batch: range) -> bytes:
        """Return the JSON of a batch's request; its strings are built here, a batch at a time."""
        return self._encode_body(self._format.format_documents(self.texts[batch.start : batch.stop]))

    def _encode_body(self, documents: list[str]) -> bytes:
        body: dict[str, Any] = {"model": self._options.model, "query": self.query, "documents": documents}
        if documents and (asked := self._ask_for(len(documents))) is not None:
            body["top_n"] = asked
        return encode(self._fields | body)

    def _ask_for(self, count: int) -> int | None:
        """Return the top_n of a request with that many documents; for a cache, every score is learnt."""
        top_n = self._options.top_n
        return None if top_n is None or self._options.cache is not None else min(top_n, count)

    def _split(self, count: int) -> list[range]:
        """Cut the first texts into as few batches as the limits allow, even ones where that keeps within the bytes."""
        most, budget = self._options.batch_size, self._budget
        even = _split_evenly(count, -(-count // most))
        # Most calls are far below the limit: then nothing needs to be encoded to know it.
        longest = max(map(len, islice(self.texts, count)), default=0) + len(self._format.document)
        if min(most, count) * (longest * _BYTES_A_CHARACTER + len(b'"",')) <= budget:
            return even
        sizes = [len(encode(self._format.format_document(self.texts[slot]))) + 1 for slot in range(count)]
        ends = [0, *accumulate(sizes)]
        packed, start = [], 0
        for slot in range(count):
            if slot - start >= most or (slot > start and ends[slot + 1] - ends[start] > budget):
                packed.append(range(start, slot))
                start = slot
        packed.append(range(start, count))
        even = _split_evenly(count, len(packed))
        fits = all(len(batch) <= most and ends[batch.stop] - ends[batch.start] <= budget for batch in even)
        return even if fits else packed

    def accept(self, batch: range, reply: Reply, source: Source) -> None:
        """Check a batch's reply against what was asked, and keep its scores.

        Raises:
            APIResponseError: It leaves a document out, names one twice, or names or echoes one that was not sent.
        """
        asked = self._ask_for(len(batch)) or len(batch)
        scores, echoes = dict[int, float](), dict[int, str]()
        for result in reply.results:
            index, echo = result.index, result.echo
            if not 0 <= index < len(batch):
                raise _distrust(f"it names document {index} of {len(batch)}", source)
            if batch[index] in scores:
                raise _distrust(f"it names document {index} twice", source)
            scores[batch[index]] = result.relevance_score
            if echo is not None:
                echoes[batch[index]] = echo
        if len(scores) < asked:
            raise _distrust(f"it ranks {len(scores)} documents where {asked} were asked for", source)
        if echoes:
            expected = self._format.format_documents([self.texts[slot] for slot in echoes])
            for echo, text in zip(echoes.values(), expected, strict=True):
                if echo != text and not may_mean(echo, repair(text)):
                    raise _distrust("it echoes other documents than were sent", source)
        self._scores.update(scores)
        self._sources[batch] = source

    @property
    def is_complete(self) -> bool:
        """Whether the replies to all batches were accepted."""
        return len(self._sources) == len(self.batches)

    @property
    def new_scores(self) -> dict[str, float]:
        """The scores of all replies so far, by text, but for those of a substitute."""
        return {
            self.texts[slot]: self._scores[slot]
            for batch, source in list(self._sources.items())  # a worker may add one meanwhile
            if not source.is_substitute
            for slot in batch
        }

    def find_longest(self, batch: range) -> tuple[int, int]:
        """Return the index and the length in characters of the longest document that a batch sends."""
        slot = max(batch, key=lambda slot: len(self.texts[slot]))
        return self._slots.index(slot), len(self.texts[slot])

    def merge(self) -> RerankResponse:
        """Return the ranking, once the replies to all batches were accepted.

        Raises:
            APIResponseError: Its scores come from several models.
        """
        sources = [self._sources[batch] for batch in self.batches]
        first = sources[0] if sources else CACHE
        return RerankResponse(
            id=first.id,
            results=self._rank(),
            meta=first.meta,
            usage=_add_up(sources),
            request_ids=[source.request_id for source in sources if source.request_id is not None],
            model=agree_on_model(self._options.model, [*self._cached, *sources]),
        )

    def _rank(self) -> list[RerankResult]:
        options, scores = self._options, self._scores
        ranked = [
            RerankResult(index, scores[slot], self._documents[index])
            for index, slot in enumerate(self._slots)
            if slot in scores
        ]
        ranked.sort(key=attrgetter("relevance_score"), reverse=True)
        ranked = ranked[: options.top_n]
        if options.score_threshold is not None:
            # No blank document passes a threshold.
            return [result for result in ranked if result.relevance_score >= options.score_threshold]
        if len(ranked) == options.top_n:
            return ranked  # with no place for a blank document
        worst = min(0.0, ranked[-1].relevance_score if ranked else 0.0)
        blank = [
            RerankResult(index, worst, self._documents[index]) for index, slot in enumerate(self._slots) if slot is None
        ]
        return (ranked + blank)[: options.top_n]


def _find_distinct(documents: Sequence[str], max_chars: int | None) -> tuple[Sequence[int | None], Sequence[str]]:
    """Return which distinct text each document is, None for a blank one, and these texts."""
    scored = documents if max_chars is None else [document[:max_chars] for document in documents]
    numbers: dict[str, int | None] = dict.fromkeys(scored)
    if len(numbers) == len(documents) and "" not in numbers and not any(map(str.isspace, numbers)):
        return range(len(documents)), scored
    texts = [text for text in numbers if text and not text.isspace()]
    numbers.update(zip(texts, range(len(texts)), strict=True))
    return [numbers[text] for text in scored], texts


def _add_up(sources: Sequence[Source]) -> Usage:
    """Return what all requests of a call took, as far as their replies tell."""
    tokens = [source.tokens for source in sources if source.tokens is not None]
    costs = [source.cost for source in sources if source.cost is not None]
    return Usage(
        total_tokens=sum(tokens) if tokens else None,
        requests=sum(source.requests for source in sources),
        cost=sum(costs) if costs else None,
    )


def _distrust(problem: str, source: Source) -> APIResponseError:
    return APIResponseError(f"the reply cannot be trusted: {problem}", request_id=source.request_id)


def _split_evenly(count: int, parts: int) -> list[range]:
    return [range(-(-count * part // parts), -(-count * (part + 1) // parts)) for part in range(parts)]
