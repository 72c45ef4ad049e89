import copy
import json
import pickle
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from regolo_rerank import InvalidInputError, PromptFormat, RegoloClient, RegoloError
from tests.conftest import KEY, Rank
from tests.support.inside import connections_of
from tests.support.stub import Stub


def brackets(_query: str, documents: list[str]) -> list[float]:
    """Score by the number of opening brackets; at module level, so that it can be pickled."""
    return [float(document.count("(")) for document in documents]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_n": 0}, r"top_n\n  .* got int \(0\)"),
        ({"top_n": -1}, r"top_n\n  .* got int \(-1\)"),
        ({"top_n": True}, r"top_n\n  .* got bool \(True\)"),
        ({"top_n": 2.0}, r"top_n\n  .* got float \(2\.0\)"),
        ({"batch_size": 0}, r"batch_size\n  .* got int \(0\)"),
        ({"max_request_bytes": "1"}, r"max_request_bytes\n  .* got str"),
        ({"max_concurrency": 0}, r"max_concurrency\n  .* got int"),
        ({"max_retries": -1}, r"max_retries\n  .* got int"),
        ({"max_retry_seconds": float("nan")}, r"max_retry_seconds\n  .* got float \(nan\)"),
        ({"timeout": 1e10}, r"timeout\n  .* got float"),
        ({"timeout": 0}, r"timeout\n  .* got int \(0\)"),
        ({"timeout": None}, r"timeout\n  .* got NoneType \(None\)"),
        ({"timeout": float("inf")}, r"timeout\n  .* got float \(inf\)"),
        ({"model": ""}, r"model\n  must not be blank, got str"),
        ({"instruction": 5}, r"instruction\n  .* got int"),
        ({"score_threshold": "0.5"}, r"score_threshold\n  .* got str"),
        ({"max_document_chars": 0}, r"max_document_chars\n  .* got int"),
        ({"allow_http": 1}, r"allow_http\n  .* got int"),
        ({"prompt_format": "fancy"}, r"prompt_format.*\n  .*'tagged'.* got str"),
        ({"prompt_format": 5}, r"prompt_format.*\n  .* got int"),
        ({"prompt_format": {"query": "x"}}, r"prompt_format.*\n  the query template must hold \{query\}"),
        (
            {"prompt_format": {"query": "{query}", KEY: 1}},
            r"prompt_format.*\n  holds a field that there is not, got int",
        ),
        ({"base_url": "ftp://host"}, r"base_url\n  must start with https://.* got str"),
        ({"base_url": "api.regolo.ai"}, r"base_url\n  must start with https://"),
        ({"base_url": "https://"}, r"base_url\n  must name a host"),
        ({"base_url": "https://a..b"}, r"base_url\n  must name a host whose labels"),
        ({"base_url": f"https://{'a' * 64}.b"}, r"base_url\n  must name a host whose labels"),
        ({"base_url": f"https://{'a.' * 127}b"}, r"base_url\n  must name a host whose labels"),
        ({"base_url": "https://host:0"}, r"base_url\n  must name a port from 1 to 65535"),
        ({"base_url": "https://host:65536"}, r"base_url\n  must name a port from 1 to 65535"),
        ({"base_url": "https://host:99999999999999999999"}, r"base_url\n  must name a port from 1 to 65535"),
        ({"base_url": f"https://host/{'a' * 70_000}"}, r"base_url\n  URL too long"),
        ({"base_url": "local"}, r"base_url\n  must start with https://"),
        ({"base_url": "local:/"}, r"base_url\n  "),
        ({"base_url": "https://[::1"}, r"base_url\n  "),
        ({"base_url": "https://user:pass@host"}, r"base_url\n  must hold no user"),
        ({"base_url": 5}, r"base_url\n  .* got int"),
        ({"api_key": f"{KEY}\nx"}, r"api_key\n  holds a character at position 14 .* got str"),
        ({"api_key": f"{KEY}–x"}, r"api_key\n  holds a character at position 14 .* got str"),  # noqa: RUF001 - a typographic dash
        ({"api_key": f"{KEY} x"}, r"api_key\n  holds a character at position 14 .* got str"),
        ({"api_key": 5}, r"api_key\n  must be a string, got int"),
        ({"apikey": KEY}, r"apikey\n  no such option; did you mean api_key\?, got str"),
        ({"top_k": 5}, r"top_k\n  no such option; did you mean top_n\?, got int"),
        ({"k": 5}, r"k\n  no such option; did you mean top_n\?, got int"),
        ({"model_name": KEY}, r"model_name\n  no such option; did you mean model\?, got str"),
        ({"cohere_api_key": KEY}, r"cohere_api_key\n  no such option; did you mean api_key\?, got str"),
        ({"choice_batch_size": 5}, r"choice_batch_size\n  no such option of RegoloClient, got int"),
        (
            {"top_n": -1},
            r"top_n\n  .*; to keep all, set the option to None, or .*, got int",
        ),
        ({"api_key": f"Bearer {KEY}"}, r"api_key\n  must be the key alone, without 'Bearer ' in front and"),
        ({"api_key": f'"{KEY}"'}, r"api_key\n  must be the key alone, without .* quotes around it, got str"),
        ({"zork": KEY}, r"zork\n  no such option of RegoloClient, got str"),
        ({"default_headers": {"Authorization": f"Bearer {KEY}"}}, r"default_headers\n  must not hold Authorization"),
        ({"default_headers": {"Content-Length": "3"}}, r"default_headers\n  must not hold Content-Length"),
        ({"default_headers": {"transfer-encoding": "chunked"}}, r"default_headers\n  must not hold transfer-encoding"),
        ({"default_headers": {"x y": "1"}}, r"default_headers\n  must be printable ASCII"),
        ({"default_headers": {"x": "a\nb"}}, r"default_headers\n  must be printable ASCII"),
        ({"default_headers": {"x": " a"}}, r"default_headers\n  must be printable ASCII"),
        ({"default_headers": {"x": "a\t"}}, r"default_headers\n  must be printable ASCII"),
        ({"extra_body": {"query": "q"}}, r"extra_body\n  must not hold query"),
        ({"extra_body": {"x": float("inf")}}, r"extra_body\n  must be plain JSON"),
        ({"extra_body": {"x": json.loads("[" * 300 + "]" * 300)}}, r"extra_body\n  must be plain JSON"),
        ({"scorer": 5}, r"scorer\n  .* got int"),
        ({"http_client": "x"}, r"http_client\n  must be an httpx\.Client, got str"),
        ({"http_client": httpx.AsyncClient()}, r"http_client\n  must be an httpx\.Client, got httpx\.AsyncClient"),
        ({"async_http_client": httpx.Client()}, r"client\n  must be an httpx\.AsyncClient, got httpx\.Client"),
        (
            {"http_client": type("Client", (), {"__module__": "httpx2._client"})()},
            r"http_client\n  must be an httpx\.Client, got httpx2\.Client",
        ),
    ],
)
@pytest.mark.parametrize("how", ["constructor", "model_validate", "assignment", "model_copy"])
def test_a_wrong_option_is_refused_by_name(how: str, options: dict[str, Any], message: str) -> None:
    """The error names the option and the value's type, and nothing in it holds a key."""
    client = RegoloClient()
    with pytest.raises(ValidationError) as caught:  # noqa: PT012 - four ways to the same error
        if how == "constructor":
            RegoloClient(**options)
        elif how == "model_validate":
            RegoloClient.model_validate(options)
        elif how == "model_copy":
            client.model_copy(update=options)
        else:
            for name, value in options.items():
                setattr(client, name, value)
    assert caught.match(message)
    assert KEY not in f"{caught.value!r} {caught.value} {caught.value.errors()} {caught.value.json()}"
    assert client.model_dump() == RegoloClient().model_dump()


def test_an_option_is_named_in_full_when_several_are_wrong() -> None:
    """Every wrong option of a constructor is in its error."""
    with pytest.raises(ValidationError, match=r"(?s)2 validation errors for RegoloClient.*model.*top_n"):
        RegoloClient(model="", top_n=0)


def test_assigning_an_option_takes_effect_at_the_next_call(rank: Rank, client: RegoloClient, stub: Stub) -> None:
    """Options may change at any time, the key and the server included."""
    rank(client, "q", ["a"])
    client.model, client.top_n, client.api_key, client.base_url = "other", 1, "sk-2", f"{stub.url}/v1"
    rank(client, "q", ["a"])
    second = stub.received[1]
    assert (second.json["model"], second.json["top_n"]) == ("other", 1)
    assert (second.headers["authorization"], second.path) == ("Bearer sk-2", "/v1/rerank")


@pytest.mark.parametrize("deep", [False, True])
def test_a_copy_has_its_own_options_key_and_connections(
    rank: Rank, client: RegoloClient, stub: Stub, *, deep: bool
) -> None:
    """model_copy changes the copy alone, and the copy never uses the original's key."""
    rank(client, "q", ["a"])
    copied = client.model_copy(update={"api_key": "sk-2", "top_n": 1}, deep=deep)
    rank(copied, "q", ["a"])
    rank(client, "q", ["a"])
    assert [request.headers["authorization"] for request in stub.received] == [
        f"Bearer {KEY}",
        "Bearer sk-2",
        f"Bearer {KEY}",
    ]
    assert client.top_n is None
    assert connections_of(copied) is not connections_of(client)
    copied.close()


def test_a_pickle_holds_no_key_and_leaves_the_original_alone(
    rank: Rank, stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pickled client keeps its options, drops key and http clients, and finds the key in the environment."""
    with httpx.Client() as mine:
        client = RegoloClient(KEY, base_url=stub.url, top_n=1, http_client=mine, prompt_format=PromptFormat())
        data = pickle.dumps(client)
        assert client.http_client is mine
    assert KEY.encode() not in data
    restored = pickle.loads(data)  # noqa: S301 - our own bytes
    assert (restored.top_n, restored.http_client, restored.prompt_format) == (1, None, PromptFormat())
    monkeypatch.setenv("REGOLO_API_KEY", "sk-env")
    rank(restored, "q", ["a"])
    assert stub.received[0].headers["authorization"] == "Bearer sk-env"
    assert client.api_key is not None


def test_a_pickle_keeps_the_decision_to_send_no_key(rank: Rank, stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty key is no secret: the copy sends none either, and neither does one made from a dump."""
    monkeypatch.setenv("REGOLO_API_KEY", "sk-env")
    client = RegoloClient("", base_url=stub.url)
    rank(pickle.loads(pickle.dumps(client)), "q", ["a"])  # noqa: S301 - our own bytes
    rank(RegoloClient.model_validate(client.model_dump()), "q", ["a"])
    assert all("authorization" not in request.headers for request in stub.received)


def test_a_deepcopy_keeps_the_key_and_shares_http_clients(rank: Rank, stub: Stub) -> None:
    """A deep copy can be used at once."""
    with httpx.Client() as mine:
        client = RegoloClient(KEY, base_url=stub.url, http_client=mine, default_headers={"x": "1"})
        copied = copy.deepcopy(client)
        assert copied.http_client is mine
        assert copied.default_headers is not client.default_headers
        rank(copied, "q", ["a"])
    assert stub.received[0].headers["authorization"] == f"Bearer {KEY}"


def test_dumps_hold_neither_key_nor_clients() -> None:
    """model_dump and its JSON can be stored and made into a client again."""
    client = RegoloClient(KEY, top_n=3, prompt_format="chat", http_client=httpx.Client(), scorer=brackets)
    dump = client.model_dump()
    assert dump["api_key"] is None
    assert not dump.keys() & {"http_client", "async_http_client", "scorer"}
    assert KEY not in client.model_dump_json() + repr(client) + str(client)
    assert RegoloClient.model_validate(dump).model_dump() == dump
    assert RegoloClient.model_validate_json(client.model_dump_json()).model_dump() == dump


def test_a_scorer_takes_the_place_of_the_embedded_one(rank: Rank) -> None:
    """A (query, documents) -> scores function scores on local://, pickled ones included."""
    client = pickle.loads(pickle.dumps(RegoloClient(base_url="local://", scorer=brackets)))  # noqa: S301 - our own bytes
    assert [result.index for result in rank(client, "q", ["a", "((", "("]).results] == [1, 2, 0]


def test_a_scorer_is_refused_where_a_server_scores(rank: Rank, stub: Stub) -> None:
    """A scorer that would never be called is an error."""
    with pytest.raises(InvalidInputError, match="scorer: only for base_url='local://'"):
        rank(RegoloClient(base_url=stub.url, scorer=brackets), "q", ["a"])


def test_json_schema_names_the_options() -> None:
    """Tools that read a model's JSON schema can read this one."""
    schema = RegoloClient.model_json_schema()
    assert schema["properties"].keys() >= {"model", "top_n", "timeout"}
    assert not schema["properties"].keys() & {"http_client", "scorer"}


def test_a_call_never_raises_pydantics_error(rank: Rank, client: RegoloClient) -> None:
    """In a call, a wrong argument is a RegoloError and a ValueError, not a ValidationError."""
    with pytest.raises(RegoloError) as caught:
        rank(client, "q", ["a"], top_n=0)
    assert isinstance(caught.value, ValueError)
    assert caught.value.__cause__ is caught.value.__context__ is None
