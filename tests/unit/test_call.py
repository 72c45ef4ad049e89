import json
import random
import threading
import warnings
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from regolo_rerank import (
    APIResponseError,
    APITimeoutError,
    BadRequestError,
    ContextLengthError,
    InvalidInputError,
    NotFoundError,
    PromptFormat,
    RerankResponse,
    RerankWarning,
    ServerError,
    Usage,
)
from regolo_rerank._call import Batch, Call
from regolo_rerank._passages import split_passages
from regolo_rerank.cache import QueryCache
from tests.unit.calls import URL, answer, begin, cases, join_surrogates, rank, reply_of, results_of, score_of
from tests.unit.conftest import Clock

Pairs = list[tuple[int, float]]


def pairs(response: RerankResponse[Any]) -> Pairs:
    """Return index and score of each result."""
    return [(result.index, result.relevance_score) for result in response]


def request_of(call: Call, batch: Batch) -> dict[str, Any]:
    """Return the JSON of a batch's request."""
    request: dict[str, Any] = json.loads(call.request_body(batch))
    return request


def answer_all(call: Call) -> RerankResponse[Any]:
    """Give all batches of a call the right reply, and return its ranking."""
    for batch in call.batches:
        answer(call, batch)
    return call.response()


# --- one exact ranking ------------------------------------------------------------------------------------------------

ODD = [
    "",
    " ",
    "\u2003\n",
    "a",
    "b. c. d",
    "é",
    "\x00",
    '"\\',
    "\ud83d",
    "\ud83d\ude00",
    "😀",
    "日本。語\uff01",
    "x" * 50,
]
TEXT = st.lists(st.sampled_from(ODD) | st.text(st.characters(), max_size=5), max_size=4).map("".join)
OPTIONS = st.fixed_dictionaries(
    {
        "top_n": st.none() | st.integers(1, 12),
        "batch_size": st.sampled_from([1, 2, 3, 100]),
        "max_request_bytes": st.sampled_from([150, 300, 10_000, 1_000_000]),
        "score_threshold": st.none() | st.sampled_from([-0.5, 0.0, 0.25]),
        "max_document_chars": st.none() | st.sampled_from([1, 3, 10, 10_000]),
        "long_documents": st.sampled_from(["cut", "split"]),
    }
)


@st.composite
def documents(draw: st.DrawFn) -> list[str]:
    """Texts, some of them more than once."""
    pool = draw(st.lists(TEXT, min_size=1, max_size=12))
    return draw(st.lists(st.sampled_from(pool), max_size=30))


def parts_of(text: str, options: dict[str, Any]) -> list[str]:
    """Return what is scored of a document: nothing, one text, or passages."""
    limit = options["max_document_chars"]
    if limit is not None and options["long_documents"] == "split" and len(text) > limit:
        parts = [text[start:end] for start, end in split_passages(text, limit)]
    else:
        parts = [text[:limit]]
    return [part for part in parts if part.strip()]


def plain_ranking(texts: list[str], options: dict[str, Any]) -> Pairs:
    """Rank in the plainest way: every document by its best part, blank ones last."""
    scores = [
        max([score_of(join_surrogates(part)) for part in parts_of(text, options)], default=None) for text in texts
    ]
    scored = [(index, score) for index, score in enumerate(scores) if score is not None]
    lowest = min([0.0, *(score for _, score in scored)])
    blank = [(index, lowest) for index, score in enumerate(scores) if score is None]
    kept = (sorted(scored, key=lambda pair: -pair[1]) + blank)[: options["top_n"]]
    threshold = options["score_threshold"]
    if threshold is None:
        return kept
    return [(index, score) for index, score in kept if scores[index] is not None and score >= threshold]


@given(documents(), OPTIONS, st.sampled_from(["none", "empty", "half", "full"]), st.integers(0, 99))
@cases(250)
def test_any_documents_rank_as_in_one_plain_sort(
    texts: list[str], options: dict[str, Any], known: str, seed: int
) -> None:
    """Each unknown text is sent once, within the limits, and replies in any order merge into the plain ranking."""
    chosen = random.Random(seed)  # noqa: S311 - repeatable cases, no secrets
    parts = {part for text in texts for part in parts_of(text, options)}
    before = {"none": set(), "empty": set(), "half": set(sorted(parts)[::2]), "full": parts}[known]
    cache = QueryCache({}, threading.Lock())
    cache.write({part: score_of(join_surrogates(part)) for part in before})
    with warnings.catch_warnings(action="ignore", category=RerankWarning):
        call = begin(texts, cache=None if known == "none" else cache, **options)
        sent: list[str] = []
        for batch in chosen.sample(call.batches, len(call.batches)):
            body = call.request_body(batch)
            request = json.loads(body)
            sent += request["documents"]
            assert 1 <= len(request["documents"]) <= options["batch_size"]
            assert len(body) <= options["max_request_bytes"] or len(request["documents"]) == 1
            assert 1 <= request["top_n"] <= len(request["documents"])
            reply = rank({**request, "top_n": chosen.randint(request["top_n"], len(request["documents"]))})
            chosen.shuffle(reply["results"])
            call.accept(batch, reply_of(reply))
        assert call.is_finished
        response = call.response()
        call.keep_scores()
    assert Counter(sent) == Counter(map(join_surrogates, parts - before))
    assert response.usage.requests == len(call.batches)
    assert pairs(response) == plain_ranking(texts, options)
    assert all(result.document is texts[result.index] for result in response)
    assert known == "none" or cache.read(parts).keys() == parts


@pytest.mark.parametrize(
    ("count", "batch_size", "sizes"),
    [(101, 100, [51, 50]), (100, 100, [100]), (10, 4, [4, 3, 3]), (3, 1, [1, 1, 1]), (1, 100, [1]), (0, 100, [])],
)
def test_batches_are_even(count: int, batch_size: int, sizes: list[int]) -> None:
    """There are as few requests as `batch_size` allows, and none is more than one document larger than another."""
    call = begin([str(index) for index in range(count)], batch_size=batch_size)
    assert [len(batch) for batch in call.batches] == sizes
    assert call.is_finished is (count == 0)


def test_batches_by_bytes_are_even_if_they_can_be() -> None:
    """Texts of equal size are spread evenly; a single text over the limit is sent alone, and the rest together."""
    call = begin([f"{index:0100}" for index in range(10)], max_request_bytes=500)
    assert [len(batch) for batch in call.batches] == [4, 3, 3]
    call = begin(["a", "b", "c" * 900, "d", "e"], max_request_bytes=500)
    assert call.batches == [(0, 1), (2,), (3, 4)]


@pytest.mark.parametrize(("count", "text"), [(50, ""), (5, "\x00" * 30), (5, "é" * 60)])
def test_no_byte_is_forgotten(count: int, text: str) -> None:
    """Quotes, commas and escaped characters count, at every limit."""
    texts = [f"{index:02}{text}" for index in range(count)]
    for limit in range(300, 420):
        call = begin(texts, max_request_bytes=limit)
        assert max(len(call.request_body(batch)) for batch in call.batches) <= limit


def test_a_request_may_be_as_large_as_the_limit() -> None:
    """The limit counts every byte of the JSON: one byte less makes two requests."""
    texts = ['"\x00é', "b" * 400]
    (batch,) = begin(texts).batches
    size = len(begin(texts).request_body(batch)) + len('00"')  # room for `top_n` and a comma is always kept
    assert len(begin(texts, max_request_bytes=size).batches) == 1
    assert len(begin(texts, max_request_bytes=size - 4).batches) == 2


def test_a_query_that_fills_a_request_is_rejected() -> None:
    """If not even an empty list of documents fits, no request is possible."""
    with pytest.raises(InvalidInputError, match=r"^query: .* larger than max_request_bytes=200. Shorten it"):
        begin(["a"], "q" * 200, max_request_bytes=200)
    assert begin([" "], "q" * 200, max_request_bytes=200).batches == []


@pytest.mark.parametrize(
    ("options", "top_n"),
    [
        ({}, 3),
        ({"top_n": 2}, 2),
        ({"top_n": 9}, 3),
        ({"top_n": 1, "cache": True}, 3),
        ({"top_n": 1, "max_document_chars": 2, "long_documents": "cut"}, 1),
        ({"top_n": 1, "max_document_chars": 2, "long_documents": "split"}, 4),
    ],
)
def test_top_n_is_always_sent(options: dict[str, Any], top_n: int) -> None:
    """Some servers have a default of their own. A cache, and documents made of passages, need all scores."""
    cache = QueryCache({}, threading.Lock()) if options.pop("cache", False) else None
    call = begin(["a", "b", "cdef" if options else "c"], cache=cache, **options)
    assert request_of(call, call.batches[0])["top_n"] == top_n


def test_a_request_has_the_fields_of_the_settings() -> None:
    """Model, query, documents and top_n win over every other field."""
    own = PromptFormat(query="Q {query}", document="D {document}", instruction_field="task")
    call = begin(["a"], prompt_format=own, model="m", instruction="i", extra_body={"user": {"id": 1}})
    ours = {"model": "m", "query": "Q q", "documents": ["D a"], "top_n": 1}
    assert request_of(call, call.batches[0]) == {"task": "i", "user": {"id": 1}, **ours}
    call.settings.fields["model"] = "other"
    assert request_of(call, call.batches[0])["model"] == "m"


def test_blank_documents_rank_last_and_pass_no_threshold() -> None:
    """Their score is 0, or the lowest one if that is below 0."""
    call = begin(["", "a", " \t", "b"], score_threshold=None)
    call.accept(call.batches[0], reply_of(results_of((0, -3.0), (1, 5.0))))
    assert pairs(call.response()) == [(3, 5.0), (1, -3.0), (0, -3.0), (2, -3.0)]
    assert pairs(begin(["", " "]).response()) == [(0, 0.0), (1, 0.0)]
    assert pairs(begin(["", " "], score_threshold=-5.0).response()) == []
    assert pairs(begin(["", " "], top_n=1).response()) == [(0, 0.0)]


def test_a_split_document_has_its_best_passage() -> None:
    """`passage` is a place in the caller's text; equal passages take the first one, and short documents have none."""
    text = "Bad one. Good one. Bad one."
    call = begin([text, "short"], max_document_chars=10, long_documents="split")
    (batch,) = call.batches
    sent = request_of(call, batch)["documents"]
    scores = [(index, 0.9 if passage.startswith("Good") else 0.1) for index, passage in enumerate(sent)]
    call.accept(batch, reply_of(results_of(*scores)))
    first, second = call.response()
    assert first.passage is not None
    assert text[slice(*first.passage)].strip() == "Good one."
    assert (second.document, second.passage) == ("short", None)
    assert pairs(call.response()) == [(0, 0.9), (1, 0.1)]


def test_a_document_of_blank_passages_is_blank() -> None:
    """A long document of white space is not sent."""
    call = begin([" " * 99], max_document_chars=9, long_documents="split")
    assert call.batches == []
    assert pairs(call.response()) == [(0, 0.0)]


# --- replies that do not fit ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "problem"),
    [
        ([(-1, 0.5), (0, 0.4)], "it contains index -1, and the request has 2 documents"),
        ([(0, 0.5), (2, 0.4)], "it contains index 2, and the request has 2 documents"),
        ([(0, 0.5), (1, 0.3), (0, 0.4)], "it contains index 0 more than once"),
        ([(1, 0.5)], "it ranks 1 documents instead of 2"),
        ([], "it ranks 0 documents instead of 2"),
    ],
)
def test_a_reply_must_rank_every_document_once(scores: Pairs, problem: str) -> None:
    """A wrong reply is rejected whole, and a right one to the same batch still counts."""
    call = begin(["a", "b"])
    (batch,) = call.batches
    with pytest.raises(APIResponseError, match=f"^invalid reply: {problem}$") as caught:
        call.accept(batch, reply_of(results_of(*scores), headers={"x-litellm-call-id": "call-1"}))
    assert caught.value.request_id == "call-1"
    assert caught.value.body.startswith('{"results"')
    assert not call.is_finished
    call.accept(batch, reply_of(results_of((0, 0.1), (1, 0.2))))
    assert pairs(call.response()) == [(1, 0.2), (0, 0.1)]


def test_an_error_names_the_address_and_the_model_of_its_call() -> None:
    """Both are those of its settings."""
    call = begin(["a"], model="m")
    with pytest.raises(NotFoundError, match=f"No rerank endpoint at {URL}: check base_url"):
        call.accept(call.batches[0], reply_of("", 404))
    with pytest.raises(APIResponseError, match="'m' was requested, and another model answered"):
        call.accept(call.batches[0], reply_of(results_of((0, 0.5)), headers={"x-litellm-attempted-fallbacks": "1"}))


def test_with_top_n_a_reply_may_be_shorter() -> None:
    """Fewer results than `top_n` are too few; more are not too many."""
    call = begin(["a", "b", "c"], top_n=2)
    (batch,) = call.batches
    with pytest.raises(APIResponseError, match="ranks 1 documents instead of 2"):
        call.accept(batch, reply_of(results_of((2, 0.5))))
    call.accept(batch, reply_of(results_of((2, 0.5), (1, 0.7), (0, 0.6))))
    assert pairs(call.response()) == [(1, 0.7), (0, 0.6)]


@pytest.mark.parametrize(
    "echoes", [["D: a", "D: b"], ["a", "b"], [None, None], [None, "D: b"], ["", "D: B"], ["x", "…"]]
)
def test_an_echo_may_be_anything_but_another_document(echoes: list[str | None]) -> None:
    """A server may cut or change an echo, but the text of another document means that scores are mixed up."""
    call = begin(["a", "b"], prompt_format=PromptFormat(document="D: {document}"))
    (batch,) = call.batches
    results = [{"index": index, "relevance_score": 0.5, "document": echo} for index, echo in enumerate(echoes)]
    call.accept(batch, reply_of({"results": results}))
    assert call.is_finished
    for wrong, problem in ((1, "document 1 has the text of document 0"), (0, "document 0 .* document 1")):
        results[wrong]["document"] = f"D: {'ba'[wrong]}"
        with pytest.raises(APIResponseError, match=problem):
            call.accept(batch, reply_of({"results": results}))


@pytest.mark.parametrize(
    ("query", "options", "longest"),
    [
        ("q" * 40, {}, "the query with 40 characters: shorten it"),
        (
            "q" * 40,
            {"instruction": "i" * 50, "prompt_format": "tagged"},
            "the instruction with 50 characters: shorten it",
        ),
        ("q" * 40, {"max_document_chars": 20}, "the query with 40"),
        ("q", {}, r"documents\[2\] with 30 characters: set max_document_chars, and long_documents="),
        ("q", {"max_document_chars": 20}, r"documents\[2\] with 30 characters"),
        ("q", {"max_document_chars": 20, "long_documents": "split"}, r"documents\[2\] with 30"),
    ],
)
def test_over_the_context_length_the_longest_text_is_named(query: str, options: dict[str, Any], longest: str) -> None:
    """The error keeps the server's message, and adds which text to shorten and the option that helps."""
    call = begin(["a", "", "b" * 30, "c"], query, **options)
    with pytest.raises(ContextLengthError, match=rf"length is 8 \[HTTP 400\]. The longest text is {longest}"):
        call.accept(call.batches[0], reply_of({"error": "maximum context length is 8"}, 400))


def test_an_instruction_that_is_not_sent_is_not_the_longest_text() -> None:
    """The default instruction is longer than many queries, and plain formats do not send it."""
    call = begin(["a"], "a short query")
    with pytest.raises(ContextLengthError, match="The longest text is the query with 13 characters"):
        call.accept(call.batches[0], reply_of({"error": "context_length_exceeded"}, 413))


def test_a_limit_on_documents_per_request_names_batch_size() -> None:
    """TEI rejects more documents than it was started for."""
    call = begin(["a"])
    with pytest.raises(BadRequestError, match=r"\[HTTP 422\]\. Set batch_size to the server's limit$"):
        call.accept(call.batches[0], reply_of({"error": "batch size 90 > maximum allowed batch size 32"}, 422))


@pytest.mark.parametrize(("count", "warns"), [(9, False), (10, True)])
def test_equal_scores_of_ten_documents_are_a_warning(count: int, *, warns: bool) -> None:
    """Only distinct texts count, and one different score is enough."""
    call = begin(["", *map(str, range(count)), "0"])
    call.accept(call.batches[0], reply_of(results_of(*((index, 0.5) for index in range(count)))))
    with warnings.catch_warnings(record=True, action="always") as caught:
        call.response()
    assert [str(warning.message)[:40] for warning in caught] == ["all 10 documents have the same score, 0."] * warns
    assert all(warning.category is RerankWarning for warning in caught)
    call = begin([str(index) for index in range(count)])
    call.accept(call.batches[0], reply_of(results_of(*((index, 0.5 + (index == 3)) for index in range(count)))))
    call.response()


# --- usage and errors -------------------------------------------------------------------------------------------------


def test_usage_is_added_up_over_the_requests() -> None:
    """Id and meta come from the first reply, request ids from all, and every encoded request counts."""
    call = begin(["a", "b", "c"], batch_size=1)
    for number, batch in enumerate(call.batches):
        call.request_body(batch)
        call.request_body(batch)
        headers = {"x-litellm-call-id": f"call-{number}", "x-litellm-response-cost": "0.1"} if number else {}
        body = results_of((0, 0.5), id=f"id-{number}", meta=number, usage={"total_tokens": number}, model="m")
        call.accept(batch, reply_of(body, headers=headers))
    response = call.response()
    assert response.usage == Usage(total_tokens=3, requests=6, cost=0.2)
    assert (response.id, response.meta, response.model) == ("id-0", 0, "m")
    assert response.request_ids == ["call-1", "call-2"]
    assert answer_all(begin(["a"])).usage == Usage(requests=1)


def test_one_ranking_has_one_model() -> None:
    """Scores of two models are on two scales; a reply that names no model goes with any."""
    call = begin(["a", "b", "c"], batch_size=1)
    for batch, model in zip(call.batches, ["m", None, "n"], strict=True):
        call.accept(batch, reply_of(results_of((0, 0.5), model=model)))
    with pytest.raises(APIResponseError, match="invalid replies: the requests were answered by m and n"):
        call.response()


def test_the_first_final_error_ends_a_call() -> None:
    """Later errors do not replace it, and it knows its place in `rerank_many`."""
    call = begin(["a", "b"], batch_size=1, index=7)
    call.fail(ServerError("first"))
    call.fail(ServerError("second"))
    assert call.is_finished
    with pytest.raises(ServerError, match="first") as caught:
        call.response()
    assert caught.value.index == 7
    ranked = begin([])
    ranked.fail(ServerError("too late"))
    assert ranked.response().results == []
    call = begin(["a"], index=7)
    call.fail(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        call.response()


def test_a_failed_call_keeps_the_scores_that_it_paid_for() -> None:
    """The cache gets the scores of the batches that were answered, and none twice."""
    known: dict[str, float] = {}
    for _ in range(2):
        call = begin(["a", "b"], batch_size=1, cache=QueryCache(known, threading.Lock()))
        answer(call, call.batches[0])
        call.fail(ServerError("down"))
        call.keep_scores()
    assert sorted(known.values()) == sorted(map(score_of, "ab"))


def test_total_timeout_counts_from_the_first_request(clock: Clock) -> None:
    """Time before `start` does not count, and a second start changes nothing."""
    call = begin(["a"], total_timeout=10.0)
    clock.now += 99
    assert (call.deadline, call.seconds_left()) == (None, 10.0)
    call.start()
    clock.now += 4
    call.start()
    assert call.seconds_left() == 6.0
    clock.now += 7
    assert call.seconds_left() == 0.0
    error = call.timeout_error()
    assert type(error) is APITimeoutError
    assert str(error) == "no ranking from rerank.example within total_timeout=10 s"
    endless = begin(["a"], total_timeout=None)
    endless.start()
    assert endless.seconds_left() is None
