from regolo_rerank import RegoloClient
from tests.conftest import Rank
from tests.stub import Stub, pairs


def test_a_ranking_is_sorted_and_holds_the_callers_own_strings(rank: Rank, client: RegoloClient, stub: Stub) -> None:
    """The best document comes first, each with its own index, score and string."""
    documents = ["a score=0.1", "b score=0.9", "c score=0.5"]
    response = rank(client, "q", documents)
    assert pairs(response.results) == [(1, 0.9), (2, 0.5), (0, 0.1)]
    assert all(result.document is documents[result.index] for result in response.results)
    assert len(stub.received) == 1
