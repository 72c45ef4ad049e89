"""Rankings end to end: what comes in, what is sent, and what comes out."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from regolo_rerank import InvalidInputError, RegoloClient, RerankResponse
from tests.conftest import KEY
from tests.support.modes import Call
from tests.support.stub import Reply, Stub, pairs, results, texts


@dataclass(frozen=True)
class Row:
    """A document that is no string."""

    body: str


def test_a_ranking_is_sorted_and_has_the_callers_own_strings(call: Call, client: RegoloClient, stub: Stub) -> None:
    """The best document comes first, with its index, its score and the caller's object."""
    documents = ["a score=0.1", "b score=0.9", "c score=0.5"]
    response = call(client.rerank, "q", documents)
    assert pairs(response) == [(1, 0.9), (2, 0.5), (0, 0.1)]
    assert all(result.document is documents[result.index] for result in response)
    assert (response.usage.requests, len(stub.received)) == (1, 1)


@pytest.mark.parametrize(
    ("rows", "text"),
    [
        ([{"body": "a score=0.1"}, {"body": "b score=0.9"}], "body"),
        ([Row("a score=0.1"), Row("b score=0.9")], "body"),
        ([Row("a score=0.1"), Row("b score=0.9")], lambda row: row.body),
    ],
)
def test_documents_of_any_type_come_back_as_themselves(
    call: Call, client: RegoloClient, rows: list[Any], text: str | Callable[[Any], str]
) -> None:
    """`text` is a key, an attribute or a function, and each result has the caller's own object."""
    response = call(client.rerank, "q", rows, text=text)
    assert [result.document for result in response] == rows[::-1]
    assert all(result.document is rows[result.index] for result in response)
    with pytest.raises(InvalidInputError, match=r"documents\[0\]: must be a string"):
        call(client.rerank, "q", rows)


def test_scores_come_in_the_callers_order(call: Call, stub: Stub) -> None:
    """`score` returns N numbers, whatever `top_n` and `score_threshold` are; a blank document has the lowest."""
    client = RegoloClient(KEY, base_url=stub.url, top_n=1, score_threshold=0.6, batch_size=2)
    assert call(client.score, "q", ["a score=0.1", "", "b score=0.9", "a score=0.1"]) == [0.1, 0.0, 0.9, 0.1]
    assert call(client.score, "q", [{"t": "c score=-2"}, {"t": ""}], text="t", instruction="Find") == [-2.0, -2.0]
    assert stub.received[-1].json["query"] == "<Instruct>: Find\n<Query>: q"
    wrong: Any = client.score
    with pytest.raises(TypeError, match="top_n"):
        call(wrong, "q", ["a", "b"], top_n=1)
    assert len(call(client.rerank, "q", texts(3))) == 1  # the options are as they were


def test_a_response_is_the_sequence_of_its_results(call: Call, client: RegoloClient) -> None:
    """It has a length, and is iterated, indexed and sliced; an empty one is false."""
    response = call(client.rerank, "q", texts(3), top_n=2)
    assert (len(response), list(response), response[-1]) == (2, response.results, response.results[1])
    assert response
    assert not call(client.rerank, "q", [])


@pytest.mark.parametrize("kind", [tuple, iter, lambda documents: (text for text in documents)])
def test_documents_may_come_in_any_ordered_iterable(call: Call, client: RegoloClient, kind: Any) -> None:
    """Tuples, iterators and generators rank as lists do."""
    assert pairs(call(client.rerank, "q", kind(texts(3)))) == [(2, 2 / 3), (1, 1 / 3), (0, 0.0)]


@pytest.mark.parametrize("documents", [[], iter([]), ["", " \n"]])
def test_without_a_text_nothing_is_sent(call: Call, client: RegoloClient, stub: Stub, documents: Any) -> None:
    """An empty list gives an empty response, and blank documents their own order with score 0."""
    assert pairs(call(client.rerank, "q", documents)) in ([], [(0, 0.0), (1, 0.0)])
    assert not stub.received


def test_blank_documents_are_not_sent_and_rank_last(call: Call, client: RegoloClient, stub: Stub) -> None:
    """Blank documents get the lower of 0.0 and the lowest score."""
    response = call(client.rerank, "q", ["", "b score=-3", " \n\t", "d score=2"])
    assert pairs(response) == [(3, 2.0), (1, -3.0), (0, -3.0), (2, -3.0)]
    assert [len(documents) for documents in stub.documents] == [2]


def test_equal_documents_are_sent_once_and_share_the_score(call: Call, client: RegoloClient, stub: Stub) -> None:
    """Each duplicate has its own index, and counts for `top_n`."""
    documents = ["a score=1", "b score=2", "a score=1", "b score=2"]
    assert pairs(call(client.rerank, "q", documents, top_n=3)) == [(1, 2.0), (3, 2.0), (0, 1.0)]
    assert [len(sent) for sent in stub.documents] == [2]


def test_ties_keep_input_order(call: Call, client: RegoloClient, stub: Stub) -> None:
    """Equal scores rank in input order, whatever the server's order is."""
    stub.always(Reply(results((2, 0.5), (0, 0.5), (1, 0.5))))
    assert [result.index for result in call(client.rerank, "q", ["a", "b", "c"])] == [0, 1, 2]


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_batches_merge_into_one_exact_ranking(call: Call, stub: Stub, batch_size: int) -> None:
    """101 documents in even batches rank as in one request, and each is sent once."""
    with RegoloClient(KEY, base_url=stub.url, batch_size=batch_size) as client:
        response = call(client.rerank, "q", texts(101), top_n=7)
    assert [result.index for result in response] == [100, 99, 98, 97, 96, 95, 94]
    sizes = [len(documents) for documents in stub.documents]
    assert (sum(sizes), max(sizes) - min(sizes) <= 1, max(sizes) <= batch_size) == (101, True, True)
    assert response.usage.requests == len(stub.received) == -(-101 // batch_size)
    assert stub.most_at_once <= 4


def test_a_threshold_applies_after_top_n(call: Call, client: RegoloClient) -> None:
    """Results below the threshold are dropped from the best `top_n`, and no blank document passes."""
    documents = ["a score=0.2", "b score=-1", "", "c score=0.9"]
    assert pairs(call(client.rerank, "q", documents, score_threshold=0.0)) == [(3, 0.9), (0, 0.2)]
    assert pairs(call(client.rerank, "q", documents, top_n=1, score_threshold=0.1)) == [(3, 0.9)]
    assert not call(client.rerank, "q", documents, top_n=1, score_threshold=0.95)


def test_arguments_replace_options_for_one_call(call: Call, stub: Stub) -> None:
    """An argument counts for its call only, and an assigned option from the next call on."""
    client = RegoloClient(KEY, base_url=stub.url, top_n=1, model="m", extra_body={"a": 1}, prompt_format="documented")
    call(client.rerank, "q", texts(3))
    call(client.rerank, "q", texts(3), top_n=3, model="n", instruction="Find", extra_body={"b": 2})
    client.options.model = "o"
    call(client.rerank, "q", texts(3))
    first, second, third = (request.json for request in stub.received)
    assert (first["top_n"], first["model"], first["a"]) == (1, "m", 1)
    assert (second["top_n"], second["model"], second["b"], second["query"]) == (3, "n", 2, "Find\n<Query>: q")
    assert "a" not in second
    assert third == {**first, "model": "o"}


def test_with_options_shares_connections_and_changes_nothing_else(call: Call, client: RegoloClient, stub: Stub) -> None:
    """A copy has its own options; `top_n` of the original stays."""
    copy = client.with_options(top_n=1)
    assert [len(call(each.rerank, "q", texts(3))) for each in (client, copy, client)] == [3, 1, 3]
    assert stub.connections == (1 if call.mode == "sync" else 3)  # an event loop of its own for each async call


def test_a_response_has_what_the_server_reports(call: Call, client: RegoloClient, stub: Stub) -> None:
    """Id, model, meta, tokens, cost and request id come from the reply."""
    meta = {"billed_units": {"total_tokens": 7}}
    headers = {"x-litellm-call-id": "call-1", "x-litellm-response-cost": "0.5", "x-litellm-model-group": "Group"}
    stub.always(Reply({**results((0, 1.0)), "meta": meta}, headers=headers))
    response: RerankResponse[str] = call(client.rerank, "q", ["a"])
    assert (response.id, response.model, response.meta) == ("stub-1", "Group", meta)
    assert (response.usage.total_tokens, response.usage.cost, response.request_ids) == (7, 0.5, ["call-1"])


@pytest.mark.parametrize(
    ("query", "documents", "words"),
    [(" ", ["a"], "query: must not be blank"), ("q", "abc", "documents: must be a list"), ("q", {"a"}, "got set")],
)
def test_wrong_input_is_rejected_before_anything_is_sent(
    call: Call, client: RegoloClient, stub: Stub, query: str, documents: Any, words: str
) -> None:
    """The error names the argument."""
    with pytest.raises(InvalidInputError, match=words):
        call(client.rerank, query, documents)
    assert not stub.received
