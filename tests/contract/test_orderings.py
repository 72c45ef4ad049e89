import asyncio
import json
import random
from typing import Any, Final

import httpx
import pytest

from regolo_rerank import RegoloClient, RerankResponse
from tests.conftest import KEY
from tests.support.stub import pairs

Pairs = list[tuple[int, float]]

QUERIES: Final = 3
"""Of a case: they have documents in common, and share a cache where there is one."""


class Case:
    """Documents and options, and a server that ranks as it likes; all chosen by the case's number alone.

    Attributes:
        documents: Of each query.
        options: Of the client.
    """

    def __init__(self, number: int) -> None:
        chosen = random.Random(number)  # noqa: S311 - chooses a case
        self._number = number
        size = chosen.choice([1, 2, 5, 12, 40])
        words = [f"{index} {chosen.randbytes(3).hex()}" for index in range(size)]
        pool = [*words, *["", " ", "\n\u2003"][: chosen.randrange(4)]]
        self._scores = {
            word: chosen.choice([chosen.uniform(-1, 1), *[level / 4 for level in range(-2, 3)]]) for word in words
        }
        self.documents = [chosen.choices(pool, k=chosen.randrange(2 * size + 1)) for _ in range(QUERIES)]
        self.options: dict[str, Any] = {
            "top_n": chosen.choice([None, 1, 2, 3, 10, 100]),
            "batch_size": chosen.choice([1, 2, 3, 7, 100]),
            "max_request_bytes": chosen.choice([300, 500, 1_000_000]),
            "max_concurrency": chosen.choice([1, 4]),
            "score_threshold": chosen.choice([None, None, -0.25, 0.0, 0.25, chosen.uniform(-1, 1)]),
            "cache": chosen.choice([None, None, {}]),
        }

    def answer(self, request: httpx.Request) -> httpx.Response:
        """Return all scores, or the best `top_n` and perhaps some more, in any order."""
        chosen = random.Random(f"{self._number} {request.content!r}")  # noqa: S311 - chooses a reply
        asked = json.loads(request.content)
        results: list[dict[str, Any]] = [
            {"index": index, "relevance_score": self._scores[text], "document": {"text": text}}
            for index, text in enumerate(asked["documents"])
        ]
        chosen.shuffle(results)
        results.sort(key=lambda result: -result["relevance_score"])  # equal ones stay shuffled
        least = min(asked.get("top_n") or len(results), len(results))
        kept = results[: chosen.choice([least, least, len(results), chosen.randint(least, len(results))])]
        if chosen.random() < 0.6:
            chosen.shuffle(kept)
        return httpx.Response(200, json={"results": kept})

    def ranked(self, documents: list[str]) -> Pairs:
        """Rank in the plainest way."""
        scored = [(index, self._scores[text]) for index, text in enumerate(documents) if text.strip()]
        lowest = min([0.0, *(value for _, value in scored)])
        blank = [(index, lowest) for index, text in enumerate(documents) if not text.strip()]
        kept = (sorted(scored, key=lambda pair: -pair[1]) + blank)[: self.options["top_n"]]
        threshold = self.options["score_threshold"]
        if threshold is None:
            return kept
        return [(index, value) for index, value in kept if documents[index].strip() and value >= threshold]

    def check(self, documents: list[str], response: RerankResponse) -> None:
        """See that a ranking is the plain one; of those that share the last score, a server may have kept any."""
        got, expected = pairs(response.results), self.ranked(documents)
        if self.options["top_n"] is None or self.options["cache"] is not None:
            assert got == expected
        last = expected[-1][1] if expected else None
        assert [pair for pair in got if pair[1] != last] == [pair for pair in expected if pair[1] != last]
        ends = [index for index, value in got if value == last]
        assert len(got) == len(expected)
        assert ends == sorted(ends, key=lambda index: (not documents[index].strip(), index))
        assert all(self._scores.get(documents[index], last) == last for index in ends)
        assert all(result.document is documents[result.index] for result in response.results)


def rank_all(case: Case) -> list[RerankResponse]:
    """Rank the documents of all queries, one after the other and all at once."""
    with httpx.Client(transport=httpx.MockTransport(case.answer)) as service:
        client = RegoloClient(KEY, http_client=service, prompt_format="plain", **case.options)
        alone = [client.rerank("q", documents) for documents in case.documents]
        return [*alone, *client.rerank_many(("q", documents) for documents in case.documents)]


async def arank_all(case: Case) -> list[RerankResponse]:
    """Rank them in an event loop."""
    async with httpx.AsyncClient(transport=httpx.MockTransport(case.answer)) as service:
        client = RegoloClient(KEY, async_http_client=service, prompt_format="plain", **case.options)
        alone = [await client.arerank("q", documents) for documents in case.documents]
        many = client.arerank_many(("q", documents) for documents in case.documents)
        return [*alone, *[response async for response in many]]


@pytest.mark.parametrize("count", [60, pytest.param(6_000, marks=[pytest.mark.long, pytest.mark.timeout(900)])])
def test_any_order_of_the_server_gives_the_plain_ranking(mode: str, count: int) -> None:
    """Blank, equal and tied documents in any batches, however a server sorts and cuts them, rank as by a plain sort."""
    rankings = 0
    for number in range(count):
        case = Case(number)
        responses = rank_all(case) if mode == "sync" else asyncio.run(arank_all(case))
        for documents, response in zip(case.documents * 2, responses, strict=True):
            case.check(documents, response)
            rankings += 1
    print(f"{rankings} rankings")  # noqa: T201 - of a long run
