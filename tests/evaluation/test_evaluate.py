import json
import math
import random
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import httpx
import numpy as np
import pytest

from regolo_rerank import APIConnectionError, AuthenticationError, InvalidInputError, RegoloClient
from regolo_rerank.evaluation import Evaluation, Measure, evaluate

pd: Any = None
with suppress(ImportError):  # part of the extra [dev]
    import pandas as pd


def read_score(query: str, documents: list[str]) -> list[float]:
    """Score documents by the number that they end in."""
    del query
    return [float(document.rpartition("=")[2]) for document in documents]


def client(scorer: Callable[[str, list[str]], list[float]] = read_score, **options: Any) -> RegoloClient:
    """Return a client that scores by those numbers."""
    return RegoloClient(base_url="local://", scorer=scorer, **options)


def judged(scores: list[float], relevant: Any, query: str = "q") -> dict[str, Any]:
    """Return a query whose documents get these scores."""
    documents = [f"document {index} score={score}" for index, score in enumerate(scores)]
    return {"query": query, "documents": documents, "relevant": relevant}


GOOD = judged([0.1, 0.9, 0.5], [1])


def measures(evaluation: Evaluation) -> dict[str, tuple[float, float]]:
    """Return the means before and after by measure."""
    return {name: (each.before, each.after) for name, each in evaluation.variants[0].measures.items()}


def recall_at_1(evaluation: Evaluation) -> Measure:
    """Return the first variant's recall at 1."""
    return evaluation.variants[0].measures["Recall@1"]


def words(evaluation: Evaluation) -> str:
    """Return the report in one line."""
    return " ".join(str(evaluation).split())


def test_measures_match_a_calculation_by_hand() -> None:
    """Ranks 2 and 1 before, 1 and 3 after, with graded gains."""
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


@pytest.mark.parametrize(
    ("fields", "form"),
    [
        ({"labels": [0, 0, 1]}, "labels"),
        ({"labels": [False, False, True]}, "labels"),
        ({"labels": [0.5, -1.0, 1.0]}, "labels"),
        ({"labels": np.array([0, 0, 3])}, "labels"),
        *([({"labels": pd.Series([0, 0, 1])}, "labels")] if pd else []),
        ({"relevant": [2]}, "indices"),
        ({"relevant": [2.0]}, "indices"),
        ({"relevant": list(np.flatnonzero([0, 0, 1]))}, "indices"),
        ({"relevant": np.array([2])}, "indices"),
        ({"relevant": {"2": 1, "1": 0}}, "grades by index"),
        ({"relevant": {2: np.int64(2), 0: -2}}, "grades by index"),
        ({"relevant": ["c"], "ids": "abc"}, "ids"),
        ({"relevant": ["c", "c"], "ids": "abc"}, "ids"),
        ({"relevant": [9], "ids": [7, 8, 9]}, "ids"),
        ({"relevant": [9], "ids": list(np.array([7, 8, 9]))}, "ids"),
        ({"relevant": {"9": 1}, "ids": [7, 8, 9]}, "grades by id"),
        ({"labels": [0, 0, 1], "ids": "abc"}, "labels"),
    ],
)
@pytest.mark.parametrize("container", [list, pd.Series if pd else tuple])
def test_every_form_names_the_same_document(fields: dict[str, Any], form: str, container: Any) -> None:
    """The last document is the relevant one, and the report says how it was read."""
    ids = fields.get("ids")
    texts = ["x=0.1", "y=0.2", "z=0.9"]
    documents = texts if ids is None else [{"_id": each, "text": text} for each, text in zip(ids, texts, strict=True)]
    query = {"query": "q", "documents": container(documents), **fields}
    evaluation = evaluate([query], client())
    (result,) = evaluation.variants[0].per_query
    assert (result.rank_before, result.rank_after, result.scores) == (3, 1, [0.9, 0.2, 0.1])
    assert evaluation.forms == {form: 1}
    assert str(evaluation).startswith(f"Queries: 1, candidates: 3, relevant documents read as {form}.")


@pytest.mark.parametrize(
    "queries",
    [
        [GOOD, GOOD, GOOD, GOOD | {"relevant": [0, 0, 1]}],
        [judged([0.1, 0.9], [1, 0]), judged([0.1, 0.9], [0, 1])],
        [GOOD | {"documents": [{"id": i, "text": "x=1"} for i in range(3)], "relevant": [0, 0, 1]}],
    ],
)
def test_indices_that_could_be_labels_are_rejected(queries: list[Any]) -> None:
    """A misread label turns the result around. One query that can only hold indices settles it for all."""
    with pytest.raises(InvalidInputError, match=r'queries\[\d\]: .* one label per document, call the field "labels"'):
        evaluate(queries, client())
    unambiguous = judged([0.1, 0.9, 0.5], [0, 1])
    assert evaluate([judged([0.1, 0.9], [1, 0]), unambiguous], client()).forms == {"indices": 2}


def test_relevant_documents_that_were_not_retrieved_count() -> None:
    """They lower recall and gain before and after, and the report says how many there are."""
    query = {"query": "q", "documents": [{"id": "a", "text": "score=1"}], "relevant": ["a", "missed"]}
    evaluation = evaluate([query], client())
    assert evaluation.missed == 0.5
    assert measures(evaluation)["Recall@10"] == (0.5, 0.5)
    assert evaluation.variants[0].top_n.recall_after == [1.0]
    assert "The retriever missed 50% of the relevant documents; no reranker can recover those." in words(evaluation)
    found = {**query, "relevant": ["a"]}
    assert "The retriever found every relevant document." in words(evaluate([found], client()))
    assert "missed less than 1% of" in words(evaluate([found] * 199 + [query], client()))
    assert "The retriever" not in words(evaluate([GOOD], client()))


def test_equal_scores_keep_the_order_of_the_retriever() -> None:
    """A reranker without an opinion changes nothing."""
    evaluation = evaluate([judged([*[0.5] * 19, 0.4], [index]) for index in range(20)], client())
    assert all(before == after for before, after in measures(evaluation).values())
    verdicts = {(each.verdict, each.queries_needed) for each in evaluation.variants[0].measures.values()}
    assert verdicts == {("inconclusive", None)}


def drawn(better: float, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Return queries of which a share gets better by reranking and the others get worse."""
    chance = random.Random(seed)  # noqa: S311 - a fair coin is enough
    return [judged([0.1, 0.9, 0.0], [1] if chance.random() < better else [0]) for _ in range(count)]


def test_the_verdict_depends_on_the_difference_and_the_number_of_queries() -> None:
    """Clear differences are settled. For a small one, the report estimates how many queries would settle it."""
    assert recall_at_1(evaluate(drawn(0.9, 60), client())).verdict == "better"
    assert recall_at_1(evaluate(drawn(0.1, 60), client())).verdict == "worse"
    evaluation = evaluate(drawn(0.6, 30, seed=1), client())
    unsure = recall_at_1(evaluation)
    assert unsure.verdict == "inconclusive"
    assert unsure.low <= 0 <= unsure.high
    assert unsure.queries_needed is not None
    # The formula for a mean of ones and minus ones: (1.96 + 0.84)^2 (1 - d^2) / d^2.
    expected = 7.84 * (1 - unsure.difference**2) / unsure.difference**2
    assert unsure.queries_needed == pytest.approx(expected, rel=0.01)
    assert f"inconclusive (~{unsure.queries_needed})" in words(evaluation)
    assert "(~N) is roughly how many queries would settle it at this difference." in words(evaluation)


def test_fewer_than_ten_queries_are_inconclusive() -> None:
    """Nine queries that all improve are too few for an interval. They may come from an iterator."""
    found = recall_at_1(evaluate(iter([GOOD] * 9), client()))
    assert (found.difference, found.verdict, found.queries_needed) == (1.0, "inconclusive", 10)
    assert recall_at_1(evaluate([GOOD] * 10, client())).verdict == "better"


def test_the_interval_matches_the_normal_approximation() -> None:
    """For many queries both agree, and the bootstrap gives the same interval in each run."""
    queries = drawn(0.7, 400)
    found, again = recall_at_1(evaluate(queries, client())), recall_at_1(evaluate(queries, client()))
    half = 1.96 * math.sqrt((1 - found.difference**2) / 400)
    assert (found.low, found.high) == pytest.approx((found.difference - half, found.difference + half), abs=0.015)
    assert found == again


def test_top_n_keeps_95_percent_of_the_relevant_candidates() -> None:
    """19 of 20 relevant documents are first after reranking, so the top 1 is enough."""
    queries = [judged([*(0.1 for _ in range(9)), 0.9], [9]) for _ in range(19)] + [judged([0.9, *[0.1] * 9], [9])]
    evaluation = evaluate(queries, client())
    top_n = evaluation.variants[0].top_n
    length = len("document 0 score=0.1")
    assert (top_n.before, top_n.after) == (10, 1)
    assert (top_n.characters_before, top_n.characters_after) == (10 * length, length)
    assert top_n.recall_after == pytest.approx([0.95] * 9 + [1.0])
    assert top_n.recall_before == [0.0] * 9 + [1.0]
    assert (
        "To keep 95% of the relevant candidates you need the top 10 before reranking, the top 1 after: about 45 fewer "
        "tokens per query for the LLM."
    ) in words(evaluation)


def test_the_best_threshold_is_found_and_cross_validated() -> None:
    """Precision, recall and F1 count the candidates of all queries, those without a relevant document included."""
    queries = [judged([0.9, 0.6, 0.2], [0]), judged([0.8, 0.7, 0.1], [0]), judged([0.75, 0.1], [])] * 4
    evaluation = evaluate(queries, client())
    variant = evaluation.variants[0]
    best = variant.best_threshold
    assert best is not None
    assert (best.threshold, best.precision, best.recall, best.f1) == (0.8, 1.0, 1.0, 1.0)
    by_threshold = {each.threshold: each for each in variant.thresholds}
    assert (by_threshold[0.75].precision, by_threshold[0.75].recall) == pytest.approx((2 / 3, 1.0))
    assert by_threshold[0.1].precision == pytest.approx(8 / 32)
    tied = evaluate([judged([0.8, 0.8, 0.1], [0])], client()).variants[0].thresholds
    assert [(each.threshold, each.precision) for each in tied] == [(0.8, 0.5), (0.1, pytest.approx(1 / 3))]
    assert "Without a relevant document: 4 (they count for the threshold only)." in words(evaluation)
    expected = f"Best score_threshold by F1: 0.8 (precision 1.00, recall 1.00, F1 1.00; {variant.held_out_f1:.2f} cross"
    assert expected in words(evaluation)


def test_a_threshold_chosen_on_noise_does_not_hold_up() -> None:
    """Random scores have a best F1 that the other half of the queries does not confirm."""
    chance = random.Random(3)  # noqa: S311
    variant = evaluate([judged([chance.random() for _ in range(20)], [0]) for _ in range(20)], client()).variants[0]
    assert variant.best_threshold is not None
    assert variant.held_out_f1 is not None
    assert variant.held_out_f1 < variant.best_threshold.f1


def test_a_retriever_that_missed_everything_is_reported() -> None:
    """Without a relevant candidate the report leaves out threshold and top_n."""
    query = {"query": "q", "documents": [{"id": "a", "text": "score=1"}], "relevant": ["missed"]}
    evaluation = evaluate([query, {**query, "documents": []}], client())
    variant = evaluation.variants[0]
    assert (variant.thresholds, variant.best_threshold, variant.held_out_f1) == ([], None, None)
    assert (evaluation.missed, variant.per_query[0].rank_after) == (1.0, None)
    assert "95% of the relevant candidates" not in words(evaluation)


def test_queries_are_sorted_by_their_gain() -> None:
    """The report shows the most improved and the most degraded queries with ranks."""
    up, same, down = judged([0, 0, 1], [2], "up"), judged([1, 0, 0], [0], "same"), judged([0, 1, 0], [0], "down")
    evaluation = evaluate([down, same, up], client())
    assert [change.query for change in evaluation.variants[0].changes] == ["up", "same", "down"]
    assert [result.query for result in evaluation.variants[0].per_query] == ["down", "same", "up"]
    assert "Most improved (rank of the first relevant document): rank query 3 -> 1 up Most degraded:" in words(
        evaluation
    )
    assert "rank query 1 -> 2 down" in words(evaluation)


def test_variants_are_compared_with_the_first() -> None:
    """A worse variant is reported as worse than the first, on the same queries."""
    reverse = client(lambda query, documents: [-score for score in read_score(query, documents)])
    evaluation = evaluate(drawn(0.9, 40), {"good": client(), "bad": reverse})
    good, bad = evaluation.variants
    assert good.over_first is None
    assert bad.over_first is not None
    assert bad.over_first.verdict == "worse"
    assert bad.over_first.before == good.measures["nDCG@10"].after
    assert bad.over_first.after == bad.measures["nDCG@10"].after
    assert "bad compared with good: nDCG@10 -" in words(evaluation)


def test_variants_with_the_same_scores_are_reported() -> None:
    """Two clients that send the same requests are not "inconclusive" but the same."""
    one = client()
    other = one.with_options(timeout=30)
    different = client(lambda query, documents: [score / 2 for score in read_score(query, documents)])
    evaluation = evaluate([GOOD] * 12, {"web": one, "half": different, "mine": other})
    assert [variant.same_as for variant in evaluation.variants] == [None, None, "web"]
    assert "mine and web: identical scores for all candidates, so both variants send the same" in words(evaluation)
    assert "mine compared with" not in words(evaluation)
    assert str(evaluation).count("95% interval") == 2
    assert "half compared with web: nDCG@10 +0.000" in words(evaluation)


def test_every_candidate_is_scored_and_the_client_keeps_its_options() -> None:
    """The client's own top_n and threshold are ignored, and the client can be used afterwards."""
    narrow = client(top_n=1, score_threshold=0.5)
    evaluation = evaluate([judged([0.3, 0.9, 0.2], [0])], narrow)
    assert evaluation.variants[0].per_query[0].rank_after == 2
    assert len(narrow.rerank("q", ["score=0.7", "score=0.9"]).results) == 1


def test_titles_are_scored_in_front_of_the_text() -> None:
    """The fields can have other names."""
    queries = [
        {"query": "q", "documents": [{"head": "a", "body": "=1"}, {"head": "b", "body": "=2"}], "labels": [0, 1]}
    ]
    seen: list[str] = []

    def scorer(query: str, documents: list[str]) -> list[float]:
        seen.extend(documents)
        return read_score(query, documents)

    evaluate(queries, client(scorer), text_field="body", title_field="head")
    assert sorted(seen) == ["a =1", "b =2"]
    with pytest.raises(InvalidInputError, match=r'documents\[0\]: missing field "text". Is the text in "body"\?'):
        evaluate(queries, client())


def test_other_measures_are_computed() -> None:
    """The first one is the main measure."""
    evaluation = evaluate([GOOD], client(), measures="P@2 AP")
    assert measures(evaluation) == {"P@2": (0.5, 0.5), "AP": (0.5, 1.0)}
    assert "P@2" in str(evaluation)
    for name in ("foo@3", "nDCG@x", "P", ""):
        with pytest.raises(InvalidInputError, match="measures: "):
            evaluate([GOOD], client(), measures=name)


def server(reply: Callable[[dict[str, Any]], tuple[int, Any]], **options: Any) -> RegoloClient:
    """Return a client of a server that replies so to the JSON of a request."""

    def handle(request: httpx.Request) -> httpx.Response:
        status, body = reply(json.loads(request.content))
        return httpx.Response(status, json=body)

    http_client = httpx.Client(transport=httpx.MockTransport(handle))
    return RegoloClient("key", http_client=http_client, max_retries=0, **options)


def ranking(request: dict[str, Any]) -> tuple[int, Any]:
    """Reply with the scores that the documents end in."""
    scores = enumerate(read_score("", request["documents"]))
    return 200, {"results": [{"index": index, "relevance_score": score} for index, score in scores]}


def test_a_failed_query_is_excluded_and_reported() -> None:
    """It counts neither before nor after reranking."""

    def fail_one(request: dict[str, Any]) -> tuple[int, Any]:
        return (400, {"error": {"message": "too long"}}) if "bad" in request["query"] else ranking(request)

    evaluation = evaluate([judged([0.1, 0.9, 0.5], [0], "bad"), GOOD], server(fail_one))
    assert list(evaluation.variants[0].failed) == ["queries[0]"]
    assert measures(evaluation)["Recall@1"] == (0.0, 1.0)
    assert "Failed queries, excluded: 1. queries[0]: " in words(evaluation)
    assert "too long" in words(evaluation)


def test_variants_without_a_common_query_are_not_compared() -> None:
    """Each of the two variants fails for the query that the other one ranks."""

    def fail_own(request: dict[str, Any]) -> tuple[int, Any]:
        return (400, {"error": {"message": "no"}}) if request["query"] == request["model"] else ranking(request)

    clients = {name: server(fail_own, model=name, prompt_format="plain") for name in ("a", "b")}
    evaluation = evaluate([GOOD | {"query": "a"}, GOOD | {"query": "b"}], clients)
    assert [list(variant.failed) for variant in evaluation.variants] == [["queries[0]"], ["queries[1]"]]
    assert [(variant.over_first, variant.same_as) for variant in evaluation.variants] == [(None, None)] * 2
    assert "b compared with a" not in words(evaluation)
    assert "\n\n\n" not in str(evaluation)


def test_a_rejected_key_stops_the_evaluation() -> None:
    """It is not tried on a hundred queries."""
    requests: list[Any] = []

    def reject(request: dict[str, Any]) -> tuple[int, Any]:
        requests.append(request)
        return 401, {"error": {"message": "bad key"}}

    with pytest.raises(AuthenticationError):
        evaluate([GOOD | {"query": str(index)} for index in range(100)], server(reject, max_concurrency=1))
    assert len(requests) < 10


def test_an_unreachable_server_is_an_error() -> None:
    """If every query fails, the first error is raised."""
    nowhere = RegoloClient("", base_url="http://127.0.0.1:1", max_retries=0)
    with pytest.raises(APIConnectionError):
        evaluate([GOOD] * 2, nowhere)


def test_with_a_cache_an_interrupted_evaluation_resumes() -> None:
    """Scores from before the interruption are not requested again, and usage counts the new requests."""
    requests: list[Any] = []

    def reply(request: dict[str, Any]) -> tuple[int, Any]:
        requests.append(request)
        return (401, {"error": {"message": "bad key"}}) if len(requests) == 6 else ranking(request)

    queries = [GOOD | {"query": f"q{index}"} for index in range(8)]
    remote = server(reply, cache={}, max_concurrency=1)
    with pytest.raises(AuthenticationError):
        evaluate(queries, remote)
    first, again = evaluate(queries, remote).variants[0], evaluate(queries, remote).variants[0]
    assert (first.requests, again.requests) == (3, 0)
    assert first.measures == again.measures


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("q", 'expected an object with "query", "documents" and "relevant" or "labels", got str'),
        ({"query": "q", "relevant": [0]}, 'missing field "documents"'),
        ({"query": "q", "documents": ["a"]}, 'missing field "relevant" or "labels"'),
        ({**GOOD, "labels": [0, 1, 0]}, 'has both "relevant" and "labels", keep one'),
        ({**GOOD, "query": " "}, "query: must be a string that is not blank"),
        ({**GOOD, "query": 7}, "query: must be a string"),
        ({**GOOD, "documents": "a"}, "documents: expected a list, got str"),
        ({**GOOD, "documents": ["a", 7]}, r"documents\[1\]: expected a text or an object .*, got int"),
        ({**GOOD, "documents": [{"id": 1, "text": "a"}, "b"]}, r"documents\[1\]: either all documents must have an id"),
        (
            {**GOOD, "documents": [{"id": 1, "text": "a"}, {"id": "1", "text": "b"}]},
            'documents: two different texts have the id "1"',
        ),
        ({**GOOD, "relevant": [3]}, "relevant: 3 is not an index of the 3 documents"),
        ({**GOOD, "relevant": [-1]}, "relevant: -1 is not an index"),
        ({**GOOD, "relevant": [True]}, "relevant: True is not an id or an index"),
        ({**GOOD, "relevant": 1}, "relevant: expected a list, got int"),
        ({**GOOD, "relevant": {"1": 1.5}}, r"relevant\['1'\]: a grade must be a whole number, got 1.5"),
        ({**GOOD, "relevant": None, "labels": [1]}, "labels: 1 labels for 3 documents"),
        ({**GOOD, "relevant": None, "labels": [1, 0, math.nan]}, r"labels\[2\]: a grade must be a whole number"),
        ({**GOOD, "id": "queries-0"}, r'the id "queries-0" is already used by queries\[0\]'),
    ],
)
def test_a_query_with_a_problem_is_skipped_and_named(query: Any, message: str) -> None:
    """The others are evaluated. If more than half have a problem, the evaluation stops before the first request."""
    first = GOOD | {"id": "queries-0"}
    evaluation = evaluate([first, query], client())
    assert evaluation.queries == 1
    with pytest.raises(InvalidInputError, match=rf"^2 of 3 queries are unusable\. queries\[1\]: {message}"):
        evaluate([first, query, query], client())
    assert "Skipped 1 of 2 queries: queries[1]: " in words(evaluation)


def test_ten_problems_are_listed() -> None:
    """The report counts the others."""
    text = words(evaluate([GOOD] * 12 + [{}] * 12, client()))
    assert text.count("queries[") == 10
    assert "and 2 more" in text


def test_a_document_that_two_retrievers_found_counts_once() -> None:
    """The same id with the same text keeps its first rank and its best label."""
    documents = [{"id": "a", "text": "=1"}, {"id": "b", "text": "=2"}, {"id": "a", "text": "=1"}]
    evaluation = evaluate([{"query": "q", "documents": documents, "labels": [1, 0, 0]}], client())
    (result,) = evaluation.variants[0].per_query
    assert (evaluation.documents, result.rank_before, result.ranked) == (2, 1, ["b", "a"])


@pytest.mark.parametrize(
    ("queries", "clients", "message"),
    [
        ([], client(), "no query has a relevant document"),
        ([judged([1], [])], client(), "no query has a relevant document"),
        (GOOD, client(), "queries: expected a list of queries, got dict"),
        ([GOOD], {}, "clients: expected a client, or several by name"),
        ([GOOD], [client()], "clients: expected a client, or several by name"),
    ],
)
def test_arguments_of_another_shape_are_rejected(queries: Any, clients: Any, message: str) -> None:
    """The message has the expected shape."""
    with pytest.raises(InvalidInputError, match=message):
        evaluate(queries, clients)


def test_a_data_frame_is_rejected_with_the_next_step() -> None:
    """Its columns are no documents, and its rows are no queries."""
    pytest.importorskip("pandas", reason="part of the extra [dev]")
    message = r'documents: expected a list, got DataFrame\. Pass one of its columns, such as df\["text"\]'
    with pytest.raises(InvalidInputError, match=message):
        evaluate([{**GOOD, "documents": pd.DataFrame({"text": ["a"]})}], client())
    with pytest.raises(InvalidInputError, match=r"got DataFrame\. evaluation\.from_pairs makes one"):
        evaluate(pd.DataFrame({"query": ["q"]}), client())


@pytest.mark.parametrize("variants", [1, 7])
def test_the_report_fits_80_columns_and_a_notebook(variants: int) -> None:
    """Text and HTML have the same words, and neither passes on markup or control characters of the data."""
    hostile = "<b>\x1b[31m" + "很长 very long " * 30
    queries = [judged([0.1, 0.9, 0.0], [1], hostile), judged([0.9, 0.1, 0.0], [1], hostile)] * 3
    names = "nDCG@10 MRR Recall@1 Recall@5 Recall@10 P@1 P@2"
    clients = {f"v{index} <i>{'x' * 30}": client() for index in range(variants)}
    evaluation = evaluate([*queries, {hostile: 1}], clients, measures=names)
    text, html = str(evaluation), evaluation._repr_html_()
    assert max(map(len, text.splitlines())) <= 80
    assert "\x1b" not in text + html
    assert "<b>" not in html
    assert "<i>" not in html
    for phrase in ("nDCG@10", "P@2", "inconclusive", "Best score_threshold by F1", "Usage: 6 requests"):
        assert phrase in " ".join(text.split())
        assert phrase in html
    assert '<td style="text-align:left">nDCG@10</td><td style="text-align:right">' in html


def test_progress_goes_to_standard_error(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal shows the variant's name and a count. A file gets no progress bar."""
    evaluate([GOOD] * 3, client(), show_progress=True)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("FORCE_COLOR", "1")
    evaluate([GOOD] * 3, {"[my] variant": client()}, show_progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "[my] variant" in err
    assert "100%" in err
