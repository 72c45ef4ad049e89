import json

import httpx
import pytest
from pydantic import SecretStr

from regolo_rerank import APIStatusError, RegoloClient
from regolo_rerank._redaction import redact
from tests.unit.calls import KEY, results_of


@pytest.mark.parametrize(
    ("key", "text", "redacted"),
    [
        (KEY, f"bad key {KEY}{KEY}, x{KEY}x", "bad key ******, x***x"),
        (KEY, "nothing here", "nothing here"),
        ('a"b\\c/d-12', json.dumps({"message": 'a"b\\c/d-12'}), '{"message": "***"}'),
        ('a"b\\c/d-12', r'{"message": "a\"b\\c\/d-12"}', '{"message": "***"}'),
        ("12345678", '{"score": 0.123456789, "count": 123456780, "key": "12345678"}', None),
        ("12345678", "key 12345678, or key=12345678.", "key ***, or key=***."),
        ("none", "none of the nonesuch", "none of the nonesuch"),
        ("1234567", "key 1234567", "key 1234567"),
        ("", "no key", "no key"),
        (None, "no key", "no key"),
    ],
)
def test_the_key_is_replaced_wherever_it_stands(key: str | None, text: str, redacted: str | None) -> None:
    """As it is or as JSON escapes it; a key of digits never changes a number, and short dummies are kept."""
    if redacted is None:
        redacted = '{"score": 0.123456789, "count": 123456780, "key": "***"}'
    assert redact(text, None if key is None else SecretStr(key)) == redacted


def client_for(reply: httpx.Response, key: str = KEY) -> RegoloClient:
    """Return a client of a server that is a function."""
    transport = httpx.MockTransport(lambda _: reply)
    own = httpx.Client(transport=transport)
    return RegoloClient(key, base_url="https://rerank.example", http_client=own, max_retries=0, prompt_format="plain")


def test_a_ranking_does_not_show_the_key(caplog: pytest.LogCaptureFixture) -> None:
    """Id, meta and request id of a good reply have *** in its place, before anything is parsed."""
    caplog.set_level("DEBUG", "regolo_rerank")
    body = results_of((1, 0.9), (0, 0.1), id=f"id-{KEY}", meta={KEY: [KEY, 1]})
    response = client_for(httpx.Response(200, headers={"x-litellm-call-id": f"call-{KEY}"}, json=body)).rerank(
        "q", ["a", "b"]
    )
    assert (response.id, response.meta, response.request_ids) == ("id-***", {"***": ["***", 1]}, ["call-***"])
    assert [result.index for result in response] == [1, 0]
    assert KEY not in caplog.text


@pytest.mark.parametrize("key", ["1", "1234", "true", "null", "e", "id", "EMPTY", "\\"])
def test_a_short_key_breaks_nothing(key: str) -> None:
    """A dummy that is part of JSON itself changes neither a ranking nor an error."""
    meta = {"billed_units": {"total_tokens": 1234}, "id": [1, True, None, "beef", 'a"b\\c1234']}
    response = client_for(httpx.Response(200, json=results_of((0, 0.9), id="1234-e", meta=meta)), key).rerank(
        "q", ["a"]
    )
    assert (response.meta, response.id, response.usage.total_tokens) == (meta, "1234-e", 1234)
    with pytest.raises(APIStatusError, match="no beef") as caught:
        client_for(httpx.Response(400, json={"error": {"message": "no beef", "code": "e-1"}}), key).rerank("q", ["a"])
    assert caught.value.code == "e-1"


def test_a_byte_order_mark_is_skipped() -> None:
    """Some servers on Windows begin with one, and bytes that are not UTF-8 become U+FFFD."""
    body = json.dumps(results_of((0, 0.5), id="x")).encode()
    assert client_for(httpx.Response(200, content=b"\xef\xbb\xbf" + body)).rerank("q", ["a"])[0].relevance_score == 0.5
    assert client_for(httpx.Response(200, content=body.replace(b'"x"', b'"\xff"'))).rerank("q", ["a"]).id == "\ufffd"
