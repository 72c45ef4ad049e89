import math
import random
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import pytest

from regolo_rerank import (
    APIConnectionError,
    AuthenticationError,
    BadRequestError,
    InvalidInputError,
    RegoloClient,
)
from regolo_rerank.evaluation import Evaluation, Measure, evaluate, example_queries
from tests.conftest import KEY
from tests.support.stub import Received, Reply, Stub, error, scored


def marked(query: str, documents: list[str]) -> list[float]:
    """Score documents by the number that they end in."""
    del query
    return [float(document.rpartition("=")[2]) for document in documents]


def client(**options: Any) -> RegoloClient:
    """Return a client that scores by those numbers."""
    return RegoloClient(base_url="local://", scorer=marked, **options)


def judged(scores: list[float], relevant: Any, query: str = "q") -> dict[str, Any]:
    """Return a query whose documents get these scores."""
    return {
        "query": query,
        "documents": [f"document {index} score={score}" for index, score in enumerate(scores)],
        "relevant": relevant,
    }


def measures(evaluation: Evaluation) -> dict[str, tuple[float, float]]:
    """Return the means before and after, by measure."""
    return {name: (each.before, each.after) for name, each in evaluation.variants[0].measures.items()}


def test_measures_are_those_of_the_textbook() -> None:
    """Places 2 and 1 before, 1 and 3 after, and graded gains, counted by hand."""
    evaluation = evaluate([judged([0.1, 0.9, 0.5], [1]), judged([0.1, 0.9, 0.5], {"0": 2, "1": 1, "2": 0})], client())
    ideal = 2 + 1 / math.log2(3)
    found = measures(evaluation)
    assert found["nDCG@10"] == pytest.approx(
        ((1 / math.log2(3) + 1) / 2, (1 + (1 + 2 / math.log2(4)) / ideal) / 2), abs=1e-6
    )
    assert found["MRR"] == pytest.approx((0.75, 1.0))
    assert found["Recall@1"] == pytest.approx((0.25, 0.75))
    assert found["Recall@5"] == found["Recall@10"] == pytest.approx((1.0, 1.0))
    assert (evaluation.queries, evaluation.others, evaluation.documents, evaluation.missed) == (2, 0, 6, 0.0)


@pytest.mark.parametrize("graded", [False, True])
@pytest.mark.parametrize("ids", [["a", "b", "c"], [7, 8, 9], None])
def test_relevant_documents_are_named_by_id_or_index(ids: list[Any] | None, *, graded: bool) -> None:
    """Ids where documents have them, indices elsewhere, in a list or in a mapping of strings, as JSON has it."""
    query = judged([0.1, 0.2, 0.9], [2 if ids is None else ids[2]])
    if ids is not None:
        query["documents"] = [{"id": each, "text": text} for each, text in zip(ids, query["documents"], strict=True)]
    if graded:
        query["relevant"] = {str(query["relevant"][0]): 1}
    (change,) = evaluate([query], client()).variants[0].changes
    assert (change.place_before, change.place_after, change.first) == (3, 1, "document 2 score=0.9")


def test_what_the_retriever_has_missed_counts() -> None:
    """A relevant document that is no candidate lowers recall and gain, before and after."""
    query = {"query": "q", "documents": [{"id": "a", "text": "score=1"}], "relevant": ["a", "missed"]}
    evaluation = evaluate([query], client())
    assert evaluation.missed == 0.5
    assert measures(evaluation)["Recall@10"] == (0.5, 0.5)
    assert evaluation.variants[0].top_n.recall_after == [1.0]


def test_equal_scores_keep_the_retrievers_order() -> None:
    """A reranker that says nothing changes nothing."""
    evaluation = evaluate([judged([0.5] * 20, [index]) for index in range(20)], client())
    assert all(before == after for before, after in measures(evaluation).values())
    assert {(each.verdict, each.queries_needed) for each in evaluation.variants[0].measures.values()} == {
        ("cannot tell", None)
    }


def drawn(better: float, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return queries of which a share gets better by reranking, and the others worse."""
    chance = random.Random(seed)  # noqa: S311 - a fair coin is all that is needed
    return [
        judged([0.1, 0.9], [1]) if chance.random() < better else judged([0.1, 0.9], [0], query=f"q{index}")
        for index in range(count)
    ]


def recall_at_1(evaluation: Evaluation) -> Measure:
    """Return the first variant's recall at 1."""
    return evaluation.variants[0].measures["Recall@1"]


def test_the_verdict_is_as_sure_as_the_queries_are_many() -> None:
    """A clear gain or loss is told, a small one on few queries is not, and how many it takes is told instead."""
    assert recall_at_1(evaluate(drawn(0.9, 60), client())).verdict == "better"
    assert recall_at_1(evaluate(drawn(0.1, 60), client())).verdict == "worse"
    unsure = recall_at_1(evaluate(drawn(0.6, 30, seed=1), client()))
    assert unsure.verdict == "cannot tell"
    assert unsure.low <= 0 <= unsure.high
    needed = unsure.queries_needed
    assert needed is not None
    assert needed > 30
    # The formula for a mean of ones and minus ones: (1.96 + 0.84)^2 (1 - d^2) / d^2.
    assert needed == pytest.approx(7.84 * (1 - unsure.difference**2) / unsure.difference**2, rel=0.01)


def test_few_queries_tell_nothing() -> None:
    """With fewer than ten queries there is no verdict, however clear they look."""
    found = recall_at_1(evaluate([judged([0.1, 0.9], [1])] * 9, client()))
    assert (found.difference, found.verdict, found.queries_needed) == (1.0, "cannot tell", 10)
    assert recall_at_1(evaluate([judged([0.1, 0.9], [1])] * 10, client())).verdict == "better"


def test_the_interval_is_the_bootstraps() -> None:
    """It covers the mean as the normal approximation does for many queries, and is the same at each run."""
    queries = drawn(0.7, 400)
    found, again = recall_at_1(evaluate(queries, client())), recall_at_1(evaluate(queries, client()))
    half = 1.96 * math.sqrt((1 - found.difference**2) / 400)
    assert (found.low, found.high) == pytest.approx((found.difference - half, found.difference + half), abs=0.015)
    assert found == again


def test_top_n_goes_down_to_what_keeps_95_percent() -> None:
    """It is where the share of relevant candidates reaches 0.95, and what an LLM reads is counted to there."""
    queries = [judged([*(0.1 for _ in range(9)), 0.9], [9]) for _ in range(19)] + [judged([0.9, *[0.1] * 9], [9])]
    top_n = evaluate(queries, client()).variants[0].top_n
    assert (top_n.before, top_n.after) == (10, 1)
    length = len("document 0 score=0.1")
    assert (top_n.characters_before, top_n.characters_after) == (10 * length, length)
    assert top_n.recall_after == pytest.approx([0.95] * 9 + [1.0])
    assert top_n.recall_before == [0.0] * 9 + [1.0]


def test_the_best_threshold_is_found_and_checked_on_others() -> None:
    """Precision, recall and F1 are counted over the candidates of all queries, those without an answer included."""
    queries = [judged([0.9, 0.6, 0.2], [0]), judged([0.8, 0.7, 0.1], [0]), judged([0.75, 0.1], [])] * 4
    variant = evaluate(queries, client()).variants[0]
    best = variant.best_threshold
    assert best is not None
    assert (best.threshold, best.precision, best.recall, best.f1) == (0.8, 1.0, 1.0, 1.0)
    by_threshold = {each.threshold: each for each in variant.thresholds}
    assert (by_threshold[0.75].precision, by_threshold[0.75].recall) == pytest.approx((2 / 3, 1.0))
    assert by_threshold[0.1].precision == pytest.approx(8 / 32)
    assert variant.held_out_f1 is not None
    assert 0.5 < variant.held_out_f1 <= 1


def test_a_threshold_that_is_luck_is_worth_less_on_other_queries() -> None:
    """Scores that mean nothing give a best F1 that the other half of the queries does not confirm."""
    chance = random.Random(3)  # noqa: S311
    queries = [judged([chance.random() for _ in range(20)], [0]) for _ in range(20)]
    variant = evaluate(queries, client()).variants[0]
    assert variant.best_threshold is not None
    assert variant.held_out_f1 is not None
    assert variant.held_out_f1 < variant.best_threshold.f1


def test_without_a_relevant_candidate_there_is_no_threshold() -> None:
    """Where the retriever has found nothing relevant, nothing can be chosen, and that is no failure."""
    query = {"query": "q", "documents": [{"id": "a", "text": "score=1"}], "relevant": ["missed"]}
    evaluation = evaluate([query, {**query, "documents": []}], client())
    variant = evaluation.variants[0]
    assert (variant.thresholds, variant.best_threshold, variant.held_out_f1) == ([], None, None)
    assert (evaluation.missed, variant.changes[0].place_after) == (1.0, None)
    assert str(evaluation)


def test_queries_are_told_by_what_they_gained() -> None:
    """The one that gained most comes first, the one that lost most last."""
    better, same, worse = judged([0, 0, 1], [2], "up"), judged([1, 0], [0], "same"), judged([0, 1], [0], "down")
    changes = evaluate([worse, same, better], client()).variants[0].changes
    assert [change.query for change in changes] == ["up", "same", "down"]
    assert (changes[-1].place_before, changes[-1].place_after) == (1, 2)


def test_variants_stand_side_by_side() -> None:
    """Each is measured on the same queries, and the second one beside the first."""
    queries = drawn(0.9, 40)
    reverse = RegoloClient(
        base_url="local://", scorer=lambda query, documents: [-each for each in marked(query, documents)]
    )
    evaluation = evaluate(queries, {"good": client(), "bad": reverse})
    good, bad = evaluation.variants
    assert (good.name, bad.name, good.over_first) == ("good", "bad", None)
    assert bad.over_first is not None
    assert bad.over_first.verdict == "worse"
    assert bad.over_first.before == good.measures["nDCG@10"].after
    assert bad.over_first.after == bad.measures["nDCG@10"].after
    assert "bad beside good: nDCG@10 -" in str(evaluation)


def test_variants_that_answered_no_query_in_common_are_not_compared(stub: Stub) -> None:
    """Where each of two fails on what the other answers, there is nothing to set side by side."""

    def one_each(request: Received) -> Reply:
        fails = request.json["query"] == request.json["model"]
        return error("too long", 400) if fails else scored(request)

    stub.reply = one_each
    clients = {name: RegoloClient(KEY, base_url=stub.url, model=name, prompt_format="plain") for name in ("a", "b")}
    evaluation = evaluate([judged([0.1, 0.9], [1], "a"), judged([0.1, 0.9], [1], "b")], clients)
    assert [list(variant.failed) for variant in evaluation.variants] == [[0], [1]]
    assert [variant.over_first for variant in evaluation.variants] == [None, None]
    assert "b beside a" not in str(evaluation)


def test_every_candidate_is_scored_and_the_client_stays_as_it_is() -> None:
    """The client's own top_n and threshold are not in force, and are so afterwards; it can go on being used."""
    narrow = client(top_n=1, score_threshold=0.5)
    evaluation = evaluate([judged([0.3, 0.9, 0.2], [0])], narrow)
    assert evaluation.variants[0].changes[0].place_after == 2
    assert (narrow.top_n, narrow.score_threshold) == (1, 0.5)
    assert len(narrow.rerank("q", ["score=0.7", "score=0.9"]).results) == 1


def test_an_interrupted_evaluation_goes_on_where_it_was(stub: Stub) -> None:
    """With a cache, what was scored before the interruption is not sent again, and the third run sends nothing."""
    queries = [judged([0.1, 0.9], [1], query=f"q{index}") for index in range(8)]
    stub.reply = scored
    with RegoloClient(KEY, base_url=stub.url, cache={}, max_concurrency=1) as remote:
        stub.reply = lambda request: error("bad key", 401) if len(stub.received) > 5 else scored(request)
        with pytest.raises(AuthenticationError):
            evaluate(queries, remote)
        stub.reply = scored
        known = len(stub.received)
        first, again = evaluate(queries, remote).variants[0], evaluate(queries, remote).variants[0]
    assert known == 6
    assert (first.requests, again.requests) == (3, 0)
    assert first.measures == again.measures


def test_what_it_took_is_added_up(stub: Stub) -> None:
    """Requests, tokens and time are those of all queries."""
    with RegoloClient(KEY, base_url=stub.url) as remote:
        variant = evaluate([judged([0.1, 0.9], [1])] * 3, remote).variants[0]
    tokens = [request.json for request in stub.received]
    assert variant.requests == len(tokens) == 3
    assert variant.total_tokens is None or variant.total_tokens > 0
    assert variant.seconds > 0


def test_a_query_that_fails_is_left_out_and_told(stub: Stub) -> None:
    """What is wrong with one query costs that query only, before and after."""

    def one_is_too_long(request: Received) -> Reply:
        too_long = "bad" in request.json["query"]
        return error("maximum context length is 4096 tokens", 400) if too_long else scored(request)

    stub.reply = one_is_too_long
    with RegoloClient(KEY, base_url=stub.url) as remote:
        evaluation = evaluate([judged([0.1, 0.9], [0], "bad"), judged([0.1, 0.9], [1], "good")], remote)
        variant = evaluation.variants[0]
        assert list(variant.failed) == [0]
        assert "maximum context length" in variant.failed[0]
        assert measures(evaluation)["Recall@1"] == (0.0, 1.0)
        assert "1 queries failed and count nowhere; queries[0]: maximum context" in " ".join(str(evaluation).split())
        with pytest.raises(BadRequestError):
            evaluate([judged([0.1, 0.9], [0], "bad")], remote)


def test_what_all_queries_share_is_raised_at_once(stub: Stub) -> None:
    """A refused key is not tried on a hundred queries."""
    stub.always(error("bad key", 401))
    with RegoloClient(KEY, base_url=stub.url, max_concurrency=1) as remote, pytest.raises(AuthenticationError):
        evaluate([judged([0.1, 0.9], [1])] * 100, remote)
    assert len(stub.received) < 10


def test_a_server_that_is_not_there_is_an_error() -> None:
    """Where every query fails, the first failure is raised."""
    nowhere = RegoloClient("", base_url="http://127.0.0.1:1", max_retries=0)
    with pytest.raises(APIConnectionError):
        evaluate([judged([0.1, 0.9], [1])] * 2, nowhere)


GOOD = judged([0.1, 0.9], [1])


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("q", "must be a mapping with query, documents and relevant, got str"),
        ({"query": "q", "documents": ["a"]}, "has no relevant"),
        ({**GOOD, "query": " "}, "query: must be a string that is not blank"),
        ({**GOOD, "query": 7}, "query: must be a string"),
        ({**GOOD, "documents": "a"}, "documents: must be a list, got str"),
        ({**GOOD, "documents": ["a", 7]}, r"documents\[0\]: must be a string as all others are"),
        ({**GOOD, "documents": [{"text": "a"}]}, r"documents\[0\]: .* mapping with id and text"),
        ({**GOOD, "documents": [{"id": 1.5, "text": "a"}]}, r"documents\[0\].id: must be a string or an integer"),
        ({**GOOD, "documents": [{"id": 1, "text": "a"}, {"id": "1", "text": "b"}]}, "documents: '1' is the id of two"),
        ({**GOOD, "relevant": [2]}, "relevant: '2' is no index of 2 documents without ids"),
        ({**GOOD, "relevant": [-1]}, "relevant: '-1' is no index"),
        ({**GOOD, "relevant": [True]}, "relevant: must be a string or an integer, got bool"),
        ({**GOOD, "relevant": 1}, "relevant: must be a list of indices or ids"),
        ({**GOOD, "relevant": {"1": 0.5}}, r"relevant\['1'\]: a grade must be an integer from 0, got 0.5"),
        ({**GOOD, "relevant": {"1": -1}}, r"relevant\['1'\]: a grade"),
    ],
)
def test_a_wrong_query_is_named(query: Any, message: str) -> None:
    """Nothing is sent, and the error says which query is wrong and how."""
    with pytest.raises(InvalidInputError, match=rf"queries\[1\]: {message}"):
        evaluate([GOOD, query], client())


@pytest.mark.parametrize("queries", [[], [judged([1], [])]])
def test_nothing_to_measure_is_refused(queries: list[Any]) -> None:
    """Without a relevant document there is nothing to measure."""
    with pytest.raises(InvalidInputError, match="queries: none of them has a relevant document"):
        evaluate(queries, client())
    with pytest.raises(InvalidInputError, match="clients: there is none"):
        evaluate([GOOD], {})


def test_queries_may_come_from_an_iterator() -> None:
    """They are read once."""

    def each() -> Iterator[dict[str, Any]]:
        yield from [GOOD] * 3

    assert evaluate(each(), client()).queries == 3


@pytest.mark.parametrize("variants", [1, 2])
def test_it_prints_in_80_columns_and_shows_as_tables(variants: int) -> None:
    """Text and HTML say the same, and what other people wrote is harmless in both."""
    hostile = "<b>\x1b[31m" + "very long " * 30
    queries = [judged([0.1, 0.9], [1], hostile), judged([0.9, 0.1], [1], hostile)] * 3
    evaluation = evaluate(queries, {f"v{index} <i>": client() for index in range(variants)})
    text, html = str(evaluation), evaluation._repr_html_()
    assert max(map(len, text.splitlines())) <= 80
    assert "\x1b" not in text + html
    assert "<b>" not in html
    assert "<i>" not in html
    for word in ("nDCG@10", "Recall@5", "cannot tell", "top_n of", "score_threshold of the best F1", "6 requests"):
        assert word in " ".join(text.split())
        assert word in html
    assert asdict(evaluation)["variants"][0]["measures"]["MRR"]["verdict"] == "cannot tell"


def test_the_examples_are_what_they_say() -> None:
    """There are 100 questions with at most 50 real candidates each, ids and texts, and BM25's order is no bad one."""
    queries = example_queries()
    assert len(queries) > 90
    assert all(0 < len(query["documents"]) <= 50 for query in queries)
    assert all(len(document["text"]) <= 1_000 for query in queries for document in query["documents"])
    assert queries == example_queries()
