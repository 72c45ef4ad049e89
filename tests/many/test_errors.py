import asyncio
import time
from collections.abc import Iterator
from typing import Any

import pytest

from regolo_rerank import (
    BadRequestError,
    InvalidInputError,
    MissingAPIKeyError,
    RegoloClient,
    RegoloError,
    RerankResponse,
)
from tests.conftest import KEY
from tests.support.many import Endless, Many, any_source, essence, fails_on, large, slowly, small, smalls
from tests.support.stub import Stub

BAD_PAIRS: dict[str, tuple[Any, str]] = {
    "a number": (1, r"pairs\[2\]: must be \(query, documents\), got int"),
    "a string of two": ("ab", r"pairs\[2\]: must be \(query, documents\), got str"),
    "a triple": (("a", ["b"], ["c"]), r"pairs\[2\]: must be \(query, documents\), got tuple of 3$"),
    "nothing": (None, r"pairs\[2\]: must be \(query, documents\), got NoneType"),
    "a dict": ({"query": "a", "documents": ["b"]}, r"pairs\[2\]: must be \(query, documents\), got dict"),
    "a blank query": ((" ", ["b"]), r"pairs\[2\]: query: must not be blank"),
    "a query of bytes": ((b"a", ["b"]), r"pairs\[2\]: query: must be a string, got bytes"),
    "a single document": (("a", "b"), r"pairs\[2\]: documents: must be a list of str, got str"),
    "documents without order": (("a", {"b"}), r"pairs\[2\]: documents: must be a list of str, got set"),
    "a document of bytes": (("a", ["b", b"c"]), r"pairs\[2\]: documents\[1\]: must be str, got bytes"),
    "a query that fills a request": (("a" * 999, ["b"]), r"pairs\[2\]: query: .* max_request_bytes=900"),
}


@pytest.mark.parametrize(("pair", "words"), BAD_PAIRS.values(), ids=BAD_PAIRS.keys())
def test_a_bad_pair_is_named_in_its_place(many: Many, stub: Stub, pair: Any, words: str) -> None:
    """A pair that is wrong gives its error in its place, raised or returned, and stops no other one."""
    with RegoloClient(KEY, base_url=stub.url, max_request_bytes=900) as client:
        got = many(client, [small(0), small(1), pair, small(3)], return_exceptions=True)
        with pytest.raises(InvalidInputError, match=words):
            raise got.pop(2)
        assert list(map(essence, got)) == [essence(client.rerank(*small(index))) for index in (0, 1, 3)]
        del got[:]
        with pytest.raises(InvalidInputError, match=words):
            many(client, [small(0), small(1), pair, small(3)], into=got)
        assert len(got) == 2


@pytest.mark.parametrize("max_concurrency", [1, 2, 4])
def test_returned_errors_stop_no_other_query(many: Many, stub: Stub, max_concurrency: int) -> None:
    """Each query that the service refuses gives its error in its place; all others are ranked."""
    stub.reply = fails_on("5", delay=0.002)
    source = [large(index, index % 4) for index in range(60)]
    with RegoloClient(KEY, base_url=stub.url, batch_size=2) as client:
        got = many(client, source, return_exceptions=True, max_concurrency=max_concurrency)
    assert len(got) == 60
    for (query, documents), outcome in zip(source, got, strict=True):
        if "5" in query and documents:
            assert isinstance(outcome, BadRequestError)
        else:
            assert len(outcome.results) == len(documents)


@pytest.mark.parametrize("max_concurrency", [1, 3])
def test_a_raised_error_comes_after_the_earlier_rankings(many: Many, stub: Stub, max_concurrency: int) -> None:
    """However late the earlier replies are, they come first; after the error the iterator is over, and nothing sent."""
    stub.reply = fails_on("query 7", delay=0.02)
    source = Endless()
    with RegoloClient(KEY, base_url=stub.url) as client:
        with pytest.raises(BadRequestError, match="bad query"):
            many(client, iter(source), into=source.got, max_concurrency=max_concurrency)
        sent = len(stub.received)
        time.sleep(0.1)
    assert len(source.got) == 7
    assert len(stub.received) <= sent + max_concurrency
    assert source.ahead <= 4 * max_concurrency


def test_an_iterator_that_has_raised_is_over(many: Many, client: RegoloClient, stub: Stub) -> None:
    """After its error an iterator gives nothing more, as any generator."""
    stub.reply = fails_on("query 0")

    async def run() -> None:
        ranked = client.arerank_many(smalls(3))
        with pytest.raises(BadRequestError):
            await anext(ranked)
        with pytest.raises(StopAsyncIteration):
            await anext(ranked)

    if many.mode == "sync":
        ranked = client.rerank_many(smalls(3))
        with pytest.raises(BadRequestError):
            next(ranked)
        with pytest.raises(StopIteration):
            next(ranked)
    else:
        asyncio.run(run())


@any_source
@pytest.mark.parametrize("where", ["source", "documents"])
@pytest.mark.parametrize(("max_concurrency", "return_exceptions"), [(1, False), (3, True)])
@pytest.mark.parametrize("failure", [LookupError("lost"), RegoloError("lost")], ids=repr)
def test_an_error_of_the_source_comes_after_the_earlier_rankings(
    many: Many, stub: Stub, failure: Exception, max_concurrency: int, where: str, *, return_exceptions: bool
) -> None:
    """What the caller's own iterables raise is raised as it is, once all that was read before has been given."""

    def broken() -> Iterator[str]:
        yield "a"
        raise failure

    def source() -> Iterator[Any]:
        yield from smalls(4)
        if where == "documents":
            yield "query", broken()
        raise failure

    stub.reply = slowly(0.01)
    got: list[RerankResponse] = []
    with RegoloClient(KEY, base_url=stub.url) as client, pytest.raises(type(failure), match="lost"):
        many(client, source(), into=got, return_exceptions=return_exceptions, max_concurrency=max_concurrency)
    assert len(got) == 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"max_concurrency": 0}, "max_concurrency"),
        ({"max_concurrency": "x"}, "max_concurrency"),
        ({"top_n": 0}, "top_n"),
        ({"score_threshold": float("nan")}, "score_threshold"),
        ({"extra_body": {"query": "mine"}}, "extra_body"),
        *(({"pairs": pairs}, "pairs: must be an iterable of") for pairs in ("ab", b"ab", {"a": ["b"]}, {1}, 1, None)),
    ],
    ids=str,
)
def test_a_wrong_argument_is_refused_at_once(
    many: Many, client: RegoloClient, stub: Stub, arguments: dict[str, Any], words: str
) -> None:
    """A wrong argument is an error at the call, not at the first ranking."""
    call = client.rerank_many if many.mode == "sync" else client.arerank_many
    with pytest.raises(InvalidInputError, match=words):
        call(**{"pairs": smalls(1), **arguments})
    assert not stub.received


def test_a_missing_key_is_told_at_once(many: Many) -> None:
    """Without a key nothing is read from the source."""
    client = RegoloClient()
    source = iter(smalls(3))
    call = client.rerank_many if many.mode == "sync" else client.arerank_many
    with pytest.raises(MissingAPIKeyError):
        call(source)
    assert len(list(source)) == 3
