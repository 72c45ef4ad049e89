import os

import pytest

from regolo_rerank import AuthenticationError, BadRequestError, RegoloClient
from tests.conftest import Rank

KEY = os.environ.get("REGOLO_API_KEY")

pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(not KEY, reason="REGOLO_API_KEY is not set: the real API is not called"),
]

DOCUMENTS = [
    "Gravity is a force that attracts two bodies towards each other.",
    "The capital of China is Beijing.",
    "Pizza is made of dough, tomatoes and cheese.",
    "Rome is the capital of Italy.",
]
QUERY = "What is the capital of China?"


@pytest.fixture
def live() -> RegoloClient:
    """A client of the real API."""
    return RegoloClient(KEY)


def test_the_right_document_comes_first(rank: Rank, live: RegoloClient) -> None:
    """The real model puts the answer first, and scores within 0 and 1."""
    results = rank(live, QUERY, DOCUMENTS).results
    assert results[0].index == 1
    assert sorted(result.index for result in results) == [0, 1, 2, 3]
    assert all(0 <= result.relevance_score <= 1 for result in results)


def test_batches_rank_as_one_request_does(rank: Rank, live: RegoloClient) -> None:
    """Scores do not depend on the other documents of a request."""
    whole = rank(live, QUERY, DOCUMENTS, top_n=3).results
    live.batch_size = 1
    parts = rank(live, QUERY, DOCUMENTS, top_n=3).results
    assert [result.index for result in parts] == [result.index for result in whole]
    assert [result.relevance_score for result in parts] == pytest.approx(
        [result.relevance_score for result in whole], abs=1e-3
    )


def test_a_wrong_key_is_refused(rank: Rank) -> None:
    """The real service refuses a wrong key."""
    with pytest.raises(AuthenticationError):
        rank(RegoloClient("sk-wrong"), QUERY, DOCUMENTS)


def test_an_unknown_model_is_refused(rank: Rank, live: RegoloClient) -> None:
    """The real service refuses an unknown model."""
    with pytest.raises(BadRequestError):
        rank(live, QUERY, DOCUMENTS, model="no-such-model")
