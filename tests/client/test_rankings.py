from collections.abc import Callable
from typing import Any

import pytest

from regolo_rerank import PromptFormat, RegoloClient, RerankResponse
from tests.conftest import KEY, Rank
from tests.support.stub import Reply, Stub, pairs, results, texts


def test_a_ranking_is_sorted_and_holds_the_callers_own_strings(rank: Rank, client: RegoloClient, stub: Stub) -> None:
    """The best document comes first, each with its own index, score and string."""
    documents = ["a score=0.1", "b score=0.9", "c score=0.5"]
    response = rank(client, "q", documents)
    assert pairs(response.results) == [(1, 0.9), (2, 0.5), (0, 0.1)]
    assert all(result.document is documents[result.index] for result in response.results)
    assert len(stub.received) == 1


def test_a_response_is_the_sequence_of_its_results(rank: Rank, client: RegoloClient) -> None:
    """It has a length, is iterated, indexed and cut as its results are; an empty one is false."""
    response = rank(client, "q", texts(3), top_n=2)
    assert (len(response), list(response)) == (2, response.results)
    assert (response[0], response[-1], response[1:]) == (*response.results, response.results[1:])
    with pytest.raises(IndexError):
        _ = response[2]
    assert response
    assert not rank(client, "q", [])


def test_results_make_a_data_frame(rank: Rank, client: RegoloClient) -> None:
    """Pandas has a row for each result, with the fields' own types, whether it is given the results or the response."""
    response = rank(client, "q", texts(3))
    pandas: Any = pytest.importorskip("pandas", reason="part of the extra [dev]")
    given: Any
    for given in (response.results, response):
        frame = pandas.DataFrame(given)
        assert list(frame.columns) == ["index", "relevance_score", "document"]
        assert frame["index"].tolist() == [2, 1, 0]
        assert frame["relevance_score"].dtype == float
        assert frame["document"].tolist() == texts(3)[::-1]


@pytest.mark.parametrize("kind", [list, tuple, iter, lambda documents: (text for text in documents)])
def test_documents_may_come_in_any_order_keeping_iterable(
    rank: Rank, client: RegoloClient, kind: Callable[[list[str]], Any]
) -> None:
    """Lists, tuples, iterators and generators rank alike."""
    assert pairs(rank(client, "q", kind(texts(3))).results) == [(2, 2 / 3), (1, 1 / 3), (0, 0.0)]


@pytest.mark.parametrize("documents", [[], (), iter([])])
def test_nothing_to_rank_sends_nothing(rank: Rank, stub: Stub, documents: Any) -> None:
    """An empty list gives an empty response, and needs no key."""
    assert rank(RegoloClient(), "q", documents) == RerankResponse()
    assert not stub.received


def test_blank_documents_are_not_sent_and_rank_last(rank: Rank, client: RegoloClient, stub: Stub) -> None:
    """Blank documents get the lower of 0.0 and the lowest score, behind all others."""
    response = rank(client, "q", ["", "b score=-3", " \n\t", "d score=2"])
    assert pairs(response.results) == [(3, 2.0), (1, -3.0), (0, -3.0), (2, -3.0)]
    assert pairs(rank(client, "q", ["", "b score=3"]).results) == [(1, 3.0), (0, 0.0)]
    assert [len(documents) for documents in stub.documents] == [2, 1]


def test_only_blank_documents_send_nothing(rank: Rank, client: RegoloClient, stub: Stub) -> None:
    """A list of blanks comes back in its own order with score 0."""
    assert pairs(rank(client, "q", ["", " "]).results) == [(0, 0.0), (1, 0.0)]
    assert not stub.received


def test_equal_documents_are_sent_once_and_share_the_score(rank: Rank, client: RegoloClient, stub: Stub) -> None:
    """Duplicates cost nothing, come back each with its own index, and count for top_n."""
    documents = ["a score=1", "b score=2", "a score=1", "b score=2"]
    assert pairs(rank(client, "q", documents).results) == [(1, 2.0), (3, 2.0), (0, 1.0), (2, 1.0)]
    assert pairs(rank(client, "q", documents, top_n=3).results) == [(1, 2.0), (3, 2.0), (0, 1.0)]
    assert [len(sent) for sent in stub.documents] == [2, 2]


def test_ties_keep_input_order(rank: Rank, client: RegoloClient, stub: Stub) -> None:
    """Equal scores rank in input order, whatever order the server gives them."""
    stub.always(Reply(results((2, 0.5), (0, 0.5), (1, 0.5))))
    assert [result.index for result in rank(client, "q", ["a", "b", "c"]).results] == [0, 1, 2]


def test_a_threshold_applies_after_top_n_and_no_blank_passes_it(rank: Rank, client: RegoloClient) -> None:
    """Results below the threshold are dropped from the top_n, and 0.0 is a threshold."""
    documents = ["a score=0.2", "b score=-1", "", "c score=0.9"]
    assert pairs(rank(client, "q", documents, score_threshold=0.0).results) == [(3, 0.9), (0, 0.2)]
    assert pairs(rank(client, "q", documents, top_n=1, score_threshold=0.1).results) == [(3, 0.9)]
    assert rank(client, "q", documents, top_n=1, score_threshold=0.95).results == []


def test_the_strings_that_are_sent_are_built_a_batch_at_a_time(
    rank: Rank, stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No more documents than one request holds are put into words at once, and each of them once."""
    built: list[int] = []
    put_into_words = PromptFormat.format_documents

    def counted(self: PromptFormat, documents: list[str]) -> list[str]:
        built.append(len(documents))
        return put_into_words(self, documents)

    monkeypatch.setattr(PromptFormat, "format_documents", counted)
    documents = [f"{index} score=0.5" for index in range(1_000)]
    rank(RegoloClient(KEY, base_url=stub.url, top_n=5), "q", documents)
    # For each reply those five that it echoes, to be compared with what was sent.
    assert sorted(built) == [5] * 10 + [100] * 10


def test_arguments_of_a_call_stand_in_for_options(rank: Rank, stub: Stub) -> None:
    """An argument left None takes the object's value; any other holds for this call only."""
    client = RegoloClient(KEY, base_url=stub.url, top_n=1, model="m", extra_body={"a": 1}, prompt_format="documented")
    rank(client, "q", texts(3))
    rank(client, "q", texts(3), top_n=3, model="n", instruction="Find", extra_body={"b": 2})
    rank(client, "q", texts(3))
    first, second, third = (request.json for request in stub.received)
    assert (first["top_n"], first["model"], first["a"]) == (1, "m", 1)
    assert (second["top_n"], second["model"], second["b"], second["query"]) == (3, "n", 2, "Find\n<Query>: q")
    assert "a" not in second
    assert third == first


def test_the_request_is_what_the_api_documents(rank: Rank, client: RegoloClient, stub: Stub) -> None:
    """One POST with model, query and documents; top_n is left out where all results are wanted."""
    rank(client, "q", ["a"])
    request = stub.received[0]
    assert (request.path, request.headers["authorization"]) == ("/rerank", f"Bearer {KEY}")
    assert request.headers["user-agent"].startswith("regolo_rerank/")
    assert request.json == {
        "model": "Qwen3-Reranker-4B",
        "query": ("<Instruct>: Given a web search query, retrieve relevant passages that answer the query\n<Query>: q"),
        "documents": ["<Document>: a"],
    }


def test_long_documents_are_cut_for_scoring_only(rank: Rank, stub: Stub) -> None:
    """max_document_chars cuts what is sent; the caller's document comes back whole, and a blank cut is blank."""
    client = RegoloClient(KEY, base_url=stub.url, max_document_chars=5, prompt_format="plain")
    documents = ["abcdefgh", "abcdeXYZ", "     late"]
    response = rank(client, "q", documents)
    assert stub.documents == [["abcde"]]
    assert [result.document for result in response.results] == documents
