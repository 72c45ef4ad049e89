"""Documents and nodes in, copies with scores out: the parts that both adapters have in common."""

from copy import deepcopy
from typing import Any

import pytest
from langchain_core.documents import Document
from llama_index.core.schema import TextNode

from regolo_rerank import InvalidInputError
from tests.adapters.helpers import (
    BEST,
    QUERY,
    TEXTS,
    Adapter,
    Rerank,
    items_for,
    metadata_of,
    scores_of,
    texts_of,
)
from tests.support.stub import Stub


def test_the_best_come_first_with_their_scores(rerank: Rerank, adapter: Adapter, stub: Stub) -> None:
    """The `top_n` best are in order, with their scores, also in the metadata. All were sent with the query."""
    kept = rerank(adapter)
    assert (texts_of(kept), scores_of(kept)) == (BEST, [0.9, 0.5])
    assert [metadata_of(item)["relevance_score"] for item in kept] == [0.9, 0.5]
    assert stub.documents == [TEXTS]
    assert stub.received[0].json["query"] == QUERY


def test_the_input_is_never_changed(rerank: Rerank, adapter: Adapter) -> None:
    """List, items and metadata are the same after the call, and the results share none of the changed parts."""
    given = items_for(adapter, TEXTS)
    for item in given:
        metadata_of(item)["nested"] = {"tags": ["y"]}
    before = deepcopy(given)
    kept = rerank(adapter, given)
    assert given == before
    assert not {id(item) for item in given} & {id(item) for item in kept}
    assert not {id(metadata_of(item)) for item in given} & {id(metadata_of(item)) for item in kept}


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ("text", "must be a list, got str"),
        ({"a": 1}, "must be a list, got dict"),
        ([None], r"\[0\]: must be a (Document|NodeWithScore), got NoneType"),
        (["a"], r"\[0\]: must be a (Document|NodeWithScore), got str. Pass (Document|NodeWithScore)\("),
        ([TextNode(text="a")], r"\[0\]: must be a (Document|NodeWithScore), got TextNode"),
    ],
)
def test_other_input_is_rejected_by_position_and_type(
    rerank: Rerank, adapter: Adapter, stub: Stub, given: Any, problem: str
) -> None:
    """The error has position and type, and nothing is sent, also with `on_error`."""
    adapter.on_error = "return_input"
    with pytest.raises(InvalidInputError, match=problem):
        rerank(adapter, given)
    assert stub.received == []


def test_without_a_metadata_key_only_the_ranking_is_new(rerank: Rerank, adapter: Adapter) -> None:
    """With `score_metadata_key=None` documents stay equal, and nodes keep their hash. A node's `score` is set."""
    adapter.score_metadata_key = None
    given = items_for(adapter, TEXTS)
    kept = rerank(adapter, given)
    if isinstance(kept[0], Document):
        assert kept == [given[1], given[2]]
    else:
        assert [item.node.hash for item in kept] == [given[1].node.hash, given[2].node.hash]
        assert [item.node for item in kept] == [given[1].node, given[2].node]
        assert scores_of(kept) == [0.9, 0.5]


def test_the_metadata_key_can_have_another_name(rerank: Rerank, adapter: Adapter) -> None:
    """Two rerankers in a row can keep both scores."""
    first = rerank(adapter)
    adapter.score_metadata_key = "second"
    kept = rerank(adapter, first)
    assert [metadata_of(item)["second"] for item in kept] == [0.9, 0.5]
    assert [metadata_of(item)["relevance_score"] for item in kept] == [0.9, 0.5]


def test_a_split_document_is_returned_whole_with_its_best_passage(rerank: Rerank, adapter: Adapter, stub: Stub) -> None:
    """The metadata of a long document names the passage that its score is from.

    Without a passage, as for a short document, there is no such key, not even an earlier one.
    """
    adapter.max_document_chars, adapter.long_documents = 32, "split"
    long = "Nothing here, score=0.1 only. The answer, score=0.8 that is. The end, score=0.2 it is."
    short, kept = rerank(adapter, items_for(adapter, ["b score=0.9", long]))
    start, end = metadata_of(kept)["relevant_passage"]
    assert (texts_of([kept]), scores_of([kept])) == ([long], [0.8])
    assert long[start:end].strip() == "The answer, score=0.8 that is."
    assert "relevant_passage" not in metadata_of(short)
    assert max(len(text) for texts in stub.documents for text in texts) <= 32
    adapter.long_documents = "cut"
    (again,) = rerank(adapter, [kept])
    assert "relevant_passage" not in metadata_of(again)
