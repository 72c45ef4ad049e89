"""Rankings end to end: what comes in, what is sent, and what comes out."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from regolo_rerank import InvalidInputError, RegoloClient
from tests.conftest import KEY
from tests.support.modes import Call
from tests.support.stub import Stub, pairs, texts


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


@pytest.mark.parametrize("kind", [tuple, iter, lambda documents: (text for text in documents)])
def test_documents_may_come_in_any_ordered_iterable(call: Call, client: RegoloClient, kind: Any) -> None:
    """Tuples, iterators and generators rank as lists do."""
    assert pairs(call(client.rerank, "q", kind(texts(3)))) == [(2, 2 / 3), (1, 1 / 3), (0, 0.0)]


@pytest.mark.parametrize("documents", [[], iter([]), ["", " \n"]])
def test_without_a_text_nothing_is_sent(call: Call, client: RegoloClient, stub: Stub, documents: Any) -> None:
    """An empty list gives an empty response, and blank documents their own order with score 0."""
    assert pairs(call(client.rerank, "q", documents)) in ([], [(0, 0.0), (1, 0.0)])
    assert not stub.received


def test_batches_merge_into_one_ranking(call: Call, stub: Stub) -> None:
    """At most `max_concurrency` requests are in flight, and their documents rank as in one request."""
    with RegoloClient(KEY, base_url=stub.url, batch_size=3) as client:
        response = call(client.rerank, "q", texts(101), top_n=7)
    assert [result.index for result in response] == [100, 99, 98, 97, 96, 95, 94]
    assert response.usage.requests == len(stub.received) == 34
    assert stub.most_at_once <= 4


def test_arguments_replace_options_for_one_call(call: Call, stub: Stub) -> None:
    """An argument counts for its call only, and an assigned option from the next call on."""
    client = RegoloClient(KEY, base_url=stub.url, top_n=1, model="m", extra_body={"a": 1}, prompt_format="documented")
    call(client.rerank, "q", texts(3))
    response = call(
        client.rerank, "q", texts(3), top_n=3, model="n", instruction="Find", score_threshold=0.3, extra_body={"b": 2}
    )
    assert len(response) == 2
    client.options.model = "o"
    call(client.rerank, "q", texts(3))
    first, second, third = (request.json for request in stub.received)
    assert (first["top_n"], first["model"], first["a"]) == (1, "m", 1)
    assert (second["top_n"], second["model"], second["b"], second["query"]) == (3, "n", 2, "Find\n<Query>: q")
    assert "a" not in second
    assert third == {**first, "model": "o"}


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
