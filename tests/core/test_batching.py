import random
from typing import Any

import pytest

from regolo_rerank import APIResponseError, PromptFormat
from regolo_rerank._core.batching import Plan
from regolo_rerank._wire.messages import Reply, Request
from regolo_rerank._wire.source import Source
from regolo_rerank.options import Options
from regolo_rerank.prompts import PRESETS
from tests.support.stub import pairs, results, score

ALPHABET = ["", " ", "a", "b", "c d", "é", "\x00", '"\\', "\ud83d", "😀", "x" * 50]


def reference(documents: list[str], top_n: int | None, threshold: float | None) -> list[tuple[int, float]]:
    """Rank in the plainest way."""
    scored = [(index, score(text)) for index, text in enumerate(documents) if text.strip()]
    scored.sort(key=lambda pair: (-pair[1], pair[0]))
    lowest = min([0.0, *(value for _, value in scored)])
    blank = [(index, lowest) for index, text in enumerate(documents) if not text.strip()]
    kept = (scored + blank)[:top_n]
    if threshold is None:
        return kept
    return [(index, value) for index, value in kept if value >= threshold and documents[index].strip()]


def answered(plan: Plan, rng: random.Random) -> list[tuple[int, float]]:
    """Give a plan's requests the replies that a service may give, in any order."""
    sent = []
    for batch in rng.sample(plan.batches, len(plan.batches)):
        request = Request.model_validate_json(plan.encode(batch))
        sent += request.documents
        ranked = sorted(((score(text), index) for index, text in enumerate(request.documents)), reverse=True)
        if rng.random() < 0.5:
            ranked = ranked[: request.top_n]
        rng.shuffle(ranked)
        reply = Reply.model_validate(results(*((index, value) for value, index in ranked)))
        plan.accept(batch, reply, Source())
    assert len(sent) == len(set(sent))
    return pairs(plan.merge().results)


@pytest.mark.parametrize("seed", range(300))
def test_any_plan_ranks_as_one_big_sort(seed: int) -> None:
    """Batches, blanks, duplicates, ties, top_n and threshold never change the ranking."""
    rng = random.Random(seed)  # noqa: S311 - repeatable cases, no secrets
    documents = ["".join(rng.choices(ALPHABET, k=rng.randint(0, 3))) for _ in range(rng.randint(0, 40))]
    options = Options(
        top_n=rng.choice([None, 1, 3, 100]),
        batch_size=rng.choice([1, 3, 100]),
        max_request_bytes=rng.choice([100, 200, 10_000]),
        score_threshold=rng.choice([None, None, 0.2]),
    )
    plan = Plan("q", documents, options, PromptFormat(escape=False), {})
    plan.cut({})
    for batch in plan.batches:
        assert len(batch) <= options.batch_size
        assert len(plan.encode(batch)) <= options.max_request_bytes or len(batch) == 1
    # A lone surrogate is scored as what is sent for it.
    sent = [text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace") for text in documents]
    expected = reference(sent, options.top_n, options.score_threshold)
    assert answered(plan, rng) == expected


@pytest.mark.parametrize(
    ("count", "batch_size", "sizes"),
    [(101, 100, [51, 50]), (100, 100, [100]), (10, 4, [4, 3, 3]), (3, 1, [1, 1, 1]), (1, 100, [1])],
)
def test_batches_by_count_are_even(count: int, batch_size: int, sizes: list[int]) -> None:
    """As few requests as batch_size allows, and none more than one document larger than another."""
    plan = Plan("q", [str(index) for index in range(count)], Options(batch_size=batch_size), PromptFormat(), {})
    plan.cut({})
    assert [len(batch) for batch in plan.batches] == sizes


def test_batches_by_bytes_are_even_too() -> None:
    """Where bytes decide, equal documents are spread evenly over the same number of requests."""
    plan = Plan("q", [f"{index:0100}" for index in range(10)], Options(max_request_bytes=500), PromptFormat(), {})
    plan.cut({})
    assert [len(batch) for batch in plan.batches] == [4, 3, 3]


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (results((-1, 0.5), (0, 0.4)), "names document -1 of 2"),
        (results((2, 0.5), (0, 0.4)), "names document 2 of 2"),
        (results((0, 0.5), (0, 0.4)), "names document 0 twice"),
        (results((0, 0.5)), "ranks 1 documents where 2 were asked for"),
        (results(), "ranks 0 documents where 2 were asked for"),
    ],
)
def test_a_reply_that_does_not_fit_teaches_nothing(reply: Any, message: str) -> None:
    """An untrustworthy reply is refused whole, and a good one to the same batch still counts."""
    plan = Plan("q", ["a", "b"], Options(), PromptFormat(), {})
    plan.cut({})
    (batch,) = plan.batches
    with pytest.raises(APIResponseError, match=message) as caught:
        plan.accept(batch, Reply.model_validate(reply), Source(request_id="call-1"))
    assert caught.value.request_id == "call-1"
    plan.accept(batch, Reply.model_validate(results((0, 0.1), (1, 0.2))), Source(requests=2))
    assert pairs(plan.merge().results) == [(1, 0.2), (0, 0.1)]


@pytest.mark.parametrize(
    ("echoes", "fits"),
    [
        (["Tag: Alpha <|x|> one", "Tag: beta two", "Tag: 👍"], True),
        (["alpha < |x|>", "BETA", "👍"], True),
        ([None, None, None], True),
        ([None, "beta two", None], True),
        (["gamma", "delta", "epsilon"], False),
        (["beta two", "Alpha one", "👍"], False),
        (["Alpha one", "something else", "👍"], False),
        (["something else", "beta two", "👍"], False),
        (["Alpha one", "", "👍"], False),
        (["Alpha one", " ", "👍"], False),
        (["Alpha one", "…", "👍"], False),
        (["Alpha one", "beta two", "👎"], False),
        (["", "", ""], False),
    ],
)
def test_a_reply_to_another_request_is_refused_by_its_echo(echoes: list[str | None], *, fits: bool) -> None:
    """Echoed texts may be cut, tagged or in another case; where one of them was not sent, the reply is foreign."""
    plan = Plan("q", ["Alpha <|x|> one", "beta two", "👍"], Options(), PromptFormat(document="Tag: {document}"), {})
    plan.cut({})
    ranked = [
        {"index": index, "relevance_score": 0.5, "document": None if echo is None else {"text": echo}}
        for index, echo in enumerate(echoes)
    ]
    reply = Reply.model_validate({"results": ranked})
    if fits:
        plan.accept(plan.batches[0], reply, Source())
    else:
        with pytest.raises(APIResponseError, match="echoes other documents"):
            plan.accept(plan.batches[0], reply, Source())


def test_the_echo_of_a_long_document_may_be_cut_but_not_be_anothers() -> None:
    """Documents that begin alike are told apart, and the echo of one may be a part of it."""
    texts = [f"The same words at the beginning of both. {name} {name * 200}" for name in ("Rome", "Oslo")]
    plan = Plan("q", texts, Options(), PRESETS["tagged"], {})
    plan.cut({})

    def accept(*echoes: str) -> None:
        ranked = [{"index": index, "relevance_score": 0.5, "document": echo} for index, echo in enumerate(echoes)]
        plan.accept(plan.batches[0], Reply.model_validate({"results": ranked}), Source())

    accept(*texts)
    accept(texts[0][:30], texts[1][:300].lower())
    with pytest.raises(APIResponseError, match="echoes other documents"):
        accept(*reversed(texts))
