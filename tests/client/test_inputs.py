import threading
from typing import Any

import pytest
from langchain_core.documents import Document
from llama_index.core.schema import NodeWithScore, TextNode

from regolo_rerank import InvalidInputError, RegoloClient
from tests.conftest import KEY, Rank
from tests.support.stub import Stub


@pytest.mark.parametrize(
    ("query", "documents", "arguments", "message"),
    [
        ("q", "one string", {}, "documents: must be a list of str, got str"),
        ("q", b"bytes", {}, "documents: must be a list of str, got bytes"),
        ("q", {"a", "b"}, {}, "documents: must be a list of str, got set"),
        ("q", frozenset("a"), {}, "documents: must be a list of str, got frozenset"),
        ("q", {"a": "b"}, {}, "documents: must be a list of str, got dict"),
        ("q", None, {}, "documents: must be a list of str, got NoneType"),
        ("q", ["a", None], {}, r"documents\[1\]: must be str, got NoneType"),
        ("q", [7], {}, r"documents\[0\]: must be str, got int"),
        ("q", ["a", b"b"], {}, r"documents\[1\]: must be str, got bytes"),
        ("q", [Document("a")], {}, r"got Document; pass its page_content, or rerank by regolo_rerank\.langchain\."),
        ("q", [TextNode(text="a")], {}, r"got TextNode; pass its get_content\(\), or rerank by .*llama_index\."),
        ("q", [NodeWithScore(node=TextNode(text="a"))], {}, r"got NodeWithScore; pass its get_content\(\), or rerank"),
        ("", ["a"], {}, "query: must not be blank"),
        (" \n", ["a"], {}, "query: must not be blank"),
        (None, ["a"], {}, "query: must be a string, got NoneType"),
        (["q"], ["a"], {}, "query: must be a string, got list"),
        ("q", ["a"], {"top_n": 0}, r"top_n: .* got int \(0\)"),
        (
            "q",
            ["a"],
            {"top_n": -1},
            r"top_n: .* 1; to keep all, set the option to None, or .*, got int \(-1\)",
        ),
        ("q", ["a"], {"top_n": True}, r"top_n: .* got bool \(True\)"),
        ("q", ["a"], {"top_n": 2.5}, r"top_n: .* got float \(2\.5\)"),
        ("q", ["a"], {"top_n": "2"}, "top_n: .* got str"),
        ("q", ["a"], {"model": " "}, "model: must not be blank, got str"),
        ("q", ["a"], {"instruction": 1}, "instruction: .* got int"),
        ("q", ["a"], {"score_threshold": float("nan")}, r"score_threshold: .* got float \(nan\)"),
        ("q", ["a"], {"score_threshold": True}, r"score_threshold: .* got bool"),
        ("q", ["a"], {"extra_body": {"top_n": 1}}, "extra_body: must not hold top_n"),
        ("q", ["a"], {"extra_body": {"x": float("nan")}}, "extra_body: must be plain JSON"),
        ("q", ["a"], {"extra_body": {"x": object()}}, "extra_body: must be plain JSON"),
        ("q", ["a"], {"extra_body": {"x": threading.Lock()}}, "extra_body: must be plain JSON"),
        ("q", ["a"], {"extra_body": {"x": "\ud800"}}, "extra_body: must be plain JSON"),
    ],
)
def test_bad_input_is_refused_before_anything_is_sent(
    rank: Rank,
    client: RegoloClient,
    stub: Stub,
    query: Any,
    documents: Any,
    arguments: dict[str, Any],
    message: str,
) -> None:
    """The error names the argument and the value's type, and the server sees nothing."""
    with pytest.raises(InvalidInputError, match=message):
        rank(client, query, documents, **arguments)
    assert not stub.received


@pytest.mark.parametrize("value", [float("nan"), object(), {"documents": ["x"]}])
def test_an_extra_body_that_was_changed_in_place_is_checked_again(rank: Rank, stub: Stub, value: Any) -> None:
    """What no check has seen is not sent, and never replaces the documents."""
    client = RegoloClient(KEY, base_url=stub.url, extra_body={"x": 1})
    assert client.extra_body is not None
    client.extra_body.update(value if isinstance(value, dict) else {"x": value})
    with pytest.raises(InvalidInputError, match="extra_body: must"):
        rank(client, "q", ["a"])
    assert not stub.received


@pytest.mark.parametrize(
    ("value", "problem"),
    [("é", ": must be printable"), ("a\r\nb: c", ": must be printable"), (5, ".x: Input should be a valid string")],
)
def test_headers_that_were_changed_in_place_are_checked_again(rank: Rank, stub: Stub, value: Any, problem: str) -> None:
    """A header that cannot be sent is refused also where it dodged the check of its option."""
    client = RegoloClient(KEY, base_url=stub.url, default_headers={"x": "1"})
    assert client.default_headers is not None
    client.default_headers["x"] = value
    with pytest.raises(InvalidInputError, match=f"default_headers{problem}"):
        rank(client, "q", ["a"])
    assert not stub.received


def test_an_extra_body_of_one_call_is_checked_beside_one_of_the_client(rank: Rank, stub: Stub) -> None:
    """What cannot be JSON, or even copied, is refused, whether or not the client has fields of its own."""
    client = RegoloClient(KEY, base_url=stub.url, extra_body={"x": 1})
    with pytest.raises(InvalidInputError, match="extra_body: must be plain JSON"):
        rank(client, "q", ["a"], extra_body={"x": threading.Lock()})


def test_an_extra_body_is_the_options_own(rank: Rank, stub: Stub) -> None:
    """A dict that the caller goes on changing, at any depth, changes no request."""
    mine: dict[str, Any] = {"x": {"y": [1]}}
    client = RegoloClient(KEY, base_url=stub.url, extra_body=mine)
    mine["x"]["y"].append(2)
    rank(client, "q", ["a"])
    assert stub.received[0].json["x"] == {"y": [1]}


def test_a_host_without_asyncio_is_told_so() -> None:
    """Where no event loop of asyncio runs, as under trio, a call says what it needs."""
    client = RegoloClient(base_url="local://")
    with pytest.raises(InvalidInputError, match="need asyncio's event loop"):
        client.arerank("q", ["a"]).send(None)
    many = client.arerank_many([("q", ["a"])])
    with pytest.raises(InvalidInputError, match="need asyncio's event loop"):
        anext(many).__await__().send(None)
