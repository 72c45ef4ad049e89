import json
import re
from contextlib import suppress
from typing import Any

import httpx
import pytest
from pydantic import SecretStr

from regolo_rerank import APIResponseError, APIStatusError, RegoloClient, RegoloError, RerankResponse
from regolo_rerank._wire.replies import advise_on_length, read_error, read_reply
from tests.conftest import KEY, Rank
from tests.support.exchanges import CLASSES, DOCUMENTS, MODEL, OWN, QUERY, RECORDINGS, Exchange, recorded
from tests.support.stub import Reply, Stub, results

RECORDED = list(recorded())
URL = httpx.URL("https://rerank.invalid/rerank")


def arguments_of(exchange: Exchange) -> dict[str, Any]:
    """Return the arguments of the recorded call, and valid ones in place of those that the client refuses."""
    try:
        fields = json.loads(exchange.request, parse_constant=int)  # NaN is no int, so it is no JSON either
    except ValueError:
        fields = None
    fields = dict(fields) if isinstance(fields, dict) else {}
    model, query = fields.pop("model", None) or MODEL, fields.pop("query", None)
    documents, top_n = fields.pop("documents", None), int(fields.pop("top_n", None) or 0)
    are_texts = isinstance(documents, list) and bool(documents) and all(isinstance(text, str) for text in documents)
    return {
        "model": model,
        "query": query if isinstance(query, str) and query.strip() else QUERY,
        "documents": documents if are_texts else DOCUMENTS,
        "top_n": top_n if top_n > 0 else None,
        "extra_body": fields or None,
    }


def sent_texts(documents: list[str]) -> list[str]:
    """Return the documents that the client sends: no blank one, and none twice."""
    return list(dict.fromkeys(filter(str.strip, documents)))


def is_sent_as_recorded(exchange: Exchange) -> bool:
    """Say whether the client can send what was recorded, and need not change a thing."""
    arguments = arguments_of(exchange)
    arguments |= arguments.pop("extra_body") or {}
    if arguments["top_n"] is None:
        del arguments["top_n"]
    with suppress(ValueError):
        fields = json.loads(exchange.request)
        return bool(fields == arguments and sent_texts(fields["documents"]) == fields["documents"])
    return False


def replayed(kind: str) -> pytest.MarkDecorator:
    """Parametrise a test with exchanges: the rankings, the refusals, the untrustworthy ones or those sent as is."""
    belongs = {
        "rankings": lambda exchange: exchange.is_ranking,
        "refusals": lambda exchange: exchange.status != 200,
        "untrustworthy": lambda exchange: exchange.status == 200 and not exchange.is_ranking,
        "sent as recorded": is_sent_as_recorded,
    }[kind]
    chosen = [pytest.param(exchange, id=exchange.name) for exchange in OWN + RECORDED if belongs(exchange)]
    if not RECORDED:
        reason = f"there is no folder of recorded exchanges at {RECORDINGS}"
        chosen.append(pytest.param(None, id="recorded", marks=pytest.mark.skip(reason)))
    return pytest.mark.parametrize("exchange", chosen)


def replay(rank: Rank, stub: Stub, exchange: Exchange, arguments: dict[str, Any]) -> RerankResponse:
    """Make a call that is sent as the recorded one was: in the same words, to the same path, once."""
    url = stub.url + exchange.path
    with RegoloClient(KEY, base_url=url, prompt_format="plain", batch_size=1_000, max_retries=0) as client:
        return rank(client, **arguments)


@replayed("rankings")
def test_a_good_reply_becomes_the_right_ranking(exchange: Exchange, rank: Rank, stub: Stub) -> None:
    """Results are sorted and cut, hold the caller's own strings, and come with request id, tokens and meta."""
    arguments = arguments_of(exchange)
    documents, reply = arguments["documents"], json.loads(exchange.reply)
    scores = {documents[result["index"]]: result["relevance_score"] for result in reply["results"]}
    texts = sent_texts(documents)
    raw = Reply(exchange.reply.encode(), headers=exchange.headers)
    by_text = results(*((index, scores[text]) for index, text in enumerate(texts) if text in scores))
    stub.always(raw if texts == documents else Reply(by_text, headers=exchange.headers))
    response = replay(rank, stub, exchange, arguments)
    known = [(index, scores.get(text) if text.strip() else 0.0) for index, text in enumerate(documents)]
    expected = sorted(((-score, index) for index, score in known if score is not None))[: arguments["top_n"]]
    assert [result.index for result in response.results] == [index for _, index in expected]
    assert [-result.relevance_score for result in response.results] == pytest.approx(
        [score for score, _ in expected], abs=1e-5
    )
    assert all(result.document is documents[result.index] for result in response.results)
    assert response.usage.requests == len(stub.received) == (1 if texts else 0)
    counted = reply.get("usage") or (reply.get("meta") or {}).get("billed_units") or {}
    assert response.usage.total_tokens == counted.get("total_tokens")
    assert response.meta == (reply.get("meta") if texts else None)
    assert response.request_ids == ([exchange.request_id] if exchange.request_id else [])


@replayed("refusals")
def test_a_refusal_becomes_the_error_of_its_status(exchange: Exchange, rank: Rank, stub: Stub) -> None:
    """The class follows the status, and the error holds what the server said in words and in fields."""
    stub.always(Reply(exchange.reply.encode(), exchange.status, exchange.headers))
    with pytest.raises(APIStatusError) as caught:
        replay(rank, stub, exchange, arguments_of(exchange))
    error = caught.value
    assert type(error) is CLASSES[exchange.status]
    assert error.status_code == exchange.status
    assert exchange.message
    assert exchange.message[:2_000] in str(error)
    assert error.request_id == exchange.request_id
    assert error.body == exchange.reply[:2_000]
    with suppress(ValueError):
        said = json.loads(exchange.reply).get("error", {})
        assert error.code == said.get("code")
        assert error.type == (None if said.get("type") == "None" else said.get("type"))
    assert len(stub.received) == 1


@replayed("untrustworthy")
def test_a_200_without_a_ranking_cannot_be_trusted(exchange: Exchange, rank: Rank, stub: Stub) -> None:
    """An error, null or nothing in place of the results is an error that says so."""
    stub.always(Reply(exchange.reply.encode(), exchange.status, exchange.headers))
    with pytest.raises(APIResponseError, match=r"^the reply cannot be trusted: ") as caught:
        replay(rank, stub, exchange, arguments_of(exchange))
    assert exchange.message in str(caught.value)
    assert caught.value.request_id == exchange.request_id
    assert caught.value.code == json.loads(exchange.reply).get("error", {}).get("code")
    assert len(stub.received) == 1


@replayed("sent as recorded")
def test_the_request_is_the_recorded_one(exchange: Exchange, rank: Rank, stub: Stub) -> None:
    """The JSON that is sent equals the recorded one, but asks for no more documents than there are."""
    stub.always(Reply(exchange.reply.encode(), exchange.status, exchange.headers))
    with suppress(RegoloError):
        replay(rank, stub, exchange, arguments_of(exchange))
    (sent,) = stub.received
    lone_surrogate = re.compile("[\ud800-\udfff]")
    wanted = json.loads(lone_surrogate.sub("\ufffd", json.dumps(json.loads(exchange.request), ensure_ascii=False)))
    if "top_n" in wanted:
        wanted["top_n"] = min(wanted["top_n"], len(wanted["documents"]))
    assert sent.json == wanted
    assert sent.path == exchange.path


def test_the_error_for_the_context_length_names_the_longest_document(rank: Rank, stub: Stub) -> None:
    """The server's words are kept, and followed by which document it was and which option would help."""
    (exchange,) = (exchange for exchange in OWN if exchange.name == "context_length")
    stub.always(Reply(exchange.reply.encode(), exchange.status))
    with pytest.raises(APIStatusError, match=r"documents\[1\] with 25000 characters; .*max_document_chars") as caught:
        replay(rank, stub, exchange, {"query": QUERY, "documents": ["pizza", "word " * 5_000]})
    assert str(caught.value).startswith(exchange.message)


@pytest.mark.parametrize(
    ("body", "message", "code", "kind"),
    [
        ('{"error": {"message": "m", "type": "t", "param": null, "code": "c"}}', "m", "c", "t"),
        ('{"error": {"message": "m", "type": "None", "param": "None", "code": 500}}', "m", "500", None),
        ('{"error": {"error": "m"}}', "m", None, None),
        ('{"error": {"reason": "m"}}', '{"reason": "m"}', None, None),
        ('{"error": {"message": ["m"], "code": ["c"]}}', '["m"]', None, None),
        ('{"error": "m"}', "m", None, None),
        ('{"error": null, "message": "m", "type": "t", "code": 7}', "m", "7", "t"),
        ('{"detail": "m"}', "m", None, None),
        ('{"detail": {"error": "m"}}', "m", None, None),
        (
            '{"detail": [{"loc": ["body", "top_n"], "msg": "m"}, {"msg": "n"}, "o"]}',
            'body.top_n: m; n; "o"',
            None,
            None,
        ),
        ("[1, 2]", "[1, 2]", None, None),
        ("{}", "{}", None, None),
        ("null", "null", None, None),
        ("Internal Server Error", "Internal Server Error", None, None),
        ("x" * 300, "x" * 200, None, None),
        ("[" * 100_000, "[" * 200, None, None),
        ("<html><style>p {}</style>\n<h1>502\n Bad Gateway</h1>", "502 Bad Gateway", None, None),
        ("", "the server gives no reason", None, None),
        ("<html></html>", "the server gives no reason", None, None),
        ("\xff", "\ufffd", None, None),
        (r'{"error": {"message": "bad \ud83d end", "code": true}}', "bad \ufffd end", None, None),
    ],
)
def test_every_shape_of_an_error_body_is_read(body: str, message: str, code: str | None, kind: str | None) -> None:
    """The reason, the code and the type are found wherever a server puts them, and a body of no shape is quoted."""
    error = read_error(500, body.encode("latin-1"), httpx.Headers(), None, URL)
    assert str(error) == f"{message} [HTTP 500]"
    assert (error.code, error.type) == (code, kind)


@pytest.mark.parametrize("depth", range(900, 1_000, 7))
def test_no_depth_of_an_error_body_is_too_much(depth: int) -> None:
    """An error that is nested as deep as Python can just read is still an error of ours."""
    body = '{"detail": [' + "[" * depth + "]" * depth + "]}"
    assert read_error(400, body.encode(), httpx.Headers(), None, URL).status_code == 400


def test_a_long_error_is_clipped() -> None:
    """Message and body of an error hold at most 2,000 characters of the server's."""
    error = read_error(500, json.dumps({"error": "x" * 9_000}).encode(), httpx.Headers(), None, URL)
    assert str(error) == "x" * 2_000 + " [HTTP 500]"
    assert len(error.body) == 2_000


def test_a_redirect_says_where_the_server_points_to() -> None:
    """A redirect is an error that names the address and the option to set."""
    error = read_error(308, b"moved", httpx.Headers({"location": "https://api.example/v2"}), None, URL)
    assert type(error) is APIStatusError
    assert str(error).startswith("the server points to https://api.example/v2, ")
    assert "base_url" in str(error)


DATE = {"date": "Mon, 23 Nov 2026 01:22:00 GMT"}
RESET = "Limit type: {}. Current limit: 5, Remaining: 0. Limit resets at: 2026-11-23 01:22:42 UTC"


@pytest.mark.parametrize(
    ("headers", "message", "seconds"),
    [
        ({"retry-after": "7"}, "", 7.0),
        ({"retry-after": "0"}, "", 0.0),
        ({"retry-after": "0.25"}, "", 0.25),
        ({"retry-after-ms": "250"}, "", 0.25),
        ({"retry-after": "7", "retry-after-ms": "250"}, "", 0.25),
        ({"retry-after": "7", "retry-after-ms": "soon"}, "", 7.0),
        ({"retry-after": "Mon, 23 Nov 2026 01:22:42 GMT", **DATE}, "", 42.0),
        ({"retry-after": "Mon, 23 Nov 2026 01:22:42 -0000", **DATE}, "", 42.0),
        ({"retry-after": "Mon, 23 Nov 2026 01:21:00 GMT", **DATE}, "", 0.0),
        ({"retry-after": "Mon, 23 Nov 1998 01:21:00 GMT"}, "", 0.0),
        ({"retry-after": "-7"}, "", None),
        ({"retry-after": "nan"}, "", None),
        ({"retry-after": "inf"}, "", None),
        ({"retry-after": "soon"}, "", None),
        ({"retry-after": "Mon, 32 Nov 2026 01:22:42 GMT"}, "", None),
        ({"retry-after": "Mon, 20 Nov 2025 00:00:00 +99999999999999"}, "", None),
        ({"retry-after": "1 Jan 99999999999999999999 00:00:00 GMT"}, "", None),
        ({"retry-after": "7"}, "Try again in 5 seconds", 7.0),
        ({}, "Limit resets at: 2026-13-45 99:99:99 UTC", None),
        ({}, f"Try again in {'9' * 400} seconds", None),
        (DATE, RESET.format("requests"), 42.0),
        ({"date": "Mon, 23 Nov 2026 01:23:00 GMT"}, RESET.format("requests"), 0.0),
        (DATE, RESET.format("max_parallel_requests"), None),
        (DATE, "Limit resets at: tomorrow UTC", None),
        ({}, "No deployments available, Try again in 5 seconds.", 5.0),
        ({}, "try again in 0.5 seconds", 0.5),
        ({}, "Try again in a while", None),
        ({}, "", None),
    ],
)
def test_the_wait_that_the_server_asks_for(headers: dict[str, str], message: str, seconds: float | None) -> None:
    """Headers count before words, dates by the server's own clock, and nonsense not at all."""
    error = read_error(429, json.dumps({"error": message}).encode(), httpx.Headers(headers), None, URL)
    assert error.retry_after == seconds


@pytest.mark.parametrize(
    ("fields", "tokens"),
    [
        ({"usage": {"prompt_tokens": 5, "total_tokens": 7}}, 7),
        ({"usage": {"prompt_tokens": 5}}, 5),
        ({"meta": {"billed_units": {"total_tokens": 9}, "tokens": {"input_tokens": 8}}}, 9),
        ({"meta": {"tokens": {"input_tokens": 8}}}, 8),
        ({"meta": {"billed_units": {"input_tokens": 6}}}, 6),
        ({"meta": {"billed_units": {"total_tokens": 9, "input_tokens": 6}}}, 9),
        ({"usage": {"total_tokens": 0}}, 0),
        ({"usage": {"total_tokens": 7}, "meta": {"tokens": {"input_tokens": 8}}}, 7),
        ({"usage": {"total_tokens": None}, "meta": {"tokens": {"input_tokens": 8}}}, 8),
        ({"usage": {"total_tokens": True}}, None),
        ({"usage": {"total_tokens": -1}}, None),
        ({"usage": {"total_tokens": "7"}}, None),
        ({"usage": "much", "meta": ["more"]}, None),
        ({"usage": None, "meta": None}, None),
        ({}, None),
    ],
)
def test_tokens_are_found_wherever_a_backend_counts_them(fields: dict[str, Any], tokens: int | None) -> None:
    """Each known place is read, and anything but a count is no count."""
    reply = read_reply(json.dumps({"results": [], **fields}).encode(), httpx.Headers(), None, URL)
    assert reply.total_tokens == tokens


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (b"", "Invalid JSON"),
        (b"<html>", "a web page has answered at https://rerank.invalid/rerank"),
        (b'{"results": [{"index": 0, "relevance_score": 0.5}]', "Invalid JSON"),
        (b'{"results": [{"index": 0, "relevance_score": 0.5}], "id": "\xff"}', "Invalid JSON"),
        (b"[]", "object"),
        (b"{}", "results: Field required"),
        (b'{"results": null}', "results: "),
        (b'{"results": {"index": 0, "relevance_score": 0.5}}', "results: "),
        (b'{"results": [0.5]}', "results.0: "),
        (b'{"results": [{"relevance_score": 0.5}]}', "results.0.index: "),
        (b'{"results": [{"index": "0", "relevance_score": 0.5}]}', "results.0.index: "),
        (b'{"results": [{"index": true, "relevance_score": 0.5}]}', "results.0.index: "),
        (b'{"results": [{"index": 0}]}', "results.0.relevance_score: "),
        (b'{"results": [{"index": 0, "relevance_score": null}]}', "results.0.relevance_score: "),
        (b'{"results": [{"index": 0, "relevance_score": "0.5"}]}', "results.0.relevance_score: "),
        (b'{"results": [{"index": 0, "relevance_score": NaN}]}', "results.0.relevance_score: "),
        (b'{"results": [{"index": 0, "relevance_score": 1e999}]}', "results.0.relevance_score: "),
        (b'{"results": [], "error": {"message": "out of memory", "code": 7}}', "out of memory"),
        (b'{"results": [], "error": ""}', "an error in place of results"),
        (b'{"detail": "gone"}', "gone"),
    ],
)
def test_a_2xx_of_the_wrong_shape_cannot_be_trusted(body: bytes, problem: str) -> None:
    """The error says what is wrong, and holds the body and the request id."""
    with pytest.raises(APIResponseError, match=r"^the reply cannot be trusted: ") as caught:
        read_reply(body, httpx.Headers({"x-litellm-call-id": "call-1"}), None, URL)
    assert problem in str(caught.value)
    assert caught.value.body == body.decode("utf-8", "replace")
    assert caught.value.request_id == "call-1"


def test_a_lone_surrogate_is_replaced_on_the_wire_only(rank: Rank, client: RegoloClient, stub: Stub) -> None:
    """What has no UTF-8 is sent as U+FFFD, with all other characters kept, and comes back as the caller's own."""
    documents = ["low \udc00 score=0.1", "high \ud83d score=0.9", "🍕 score=0.5"]
    response = rank(client, "bad \ud83d, good 🍕", documents)
    assert stub.received[0].json["query"].endswith("bad \ufffd, good 🍕")
    assert [text.partition(": ")[2] for text in stub.received[0].documents] == [
        "low \ufffd score=0.1",
        "high \ufffd score=0.9",
        "🍕 score=0.5",
    ]
    assert [result.document for result in response.results] == [documents[1], documents[2], documents[0]]


@pytest.mark.parametrize("status", [200, 400, 401])
@pytest.mark.parametrize(
    "body",
    [
        json.dumps({"error": {"message": f"Received API Key = {KEY}, unknown", "code": "c"}}),
        json.dumps({"detail": f"Received API Key = {KEY}, unknown"}),
        f"Received API Key = {KEY}, unknown",
    ],
    ids=["error", "detail", "text"],
)
def test_a_key_that_the_server_quotes_is_not_shown(
    status: int, body: str, rank: Rank, client: RegoloClient, stub: Stub
) -> None:
    """In the message and in the body of the error, *** stands where the server quoted the key."""
    stub.always(Reply(body.encode(), status, {"retry-after-ms": "0"}))
    with pytest.raises((APIStatusError, APIResponseError)) as caught:
        rank(client, QUERY, DOCUMENTS)
    error: Any = caught.value
    assert error.body == body.replace(KEY, "***")
    assert KEY not in f"{error!s} {error!r} {error.__dict__}"
    if status != 200 or body.startswith("{"):
        assert "Received API Key = ***, unknown" in str(error)


def test_no_spelling_of_the_key_is_shown() -> None:
    """A key that JSON escapes, or that a header quotes, is masked too."""
    key = 'sk-"a/b<c\\'
    body = json.dumps({"error": {"message": f"bad key {key}", "type": key, "code": key}}).replace("/", r"\/")
    headers = httpx.Headers({"location": f"https://x/?k={key}", "x-litellm-call-id": f"id-{key}"})
    refused = read_error(403, body.encode(), httpx.Headers(), SecretStr(key), URL)
    assert str(refused) == "bad key *** [HTTP 403]"
    assert (refused.type, refused.code) == ("***", "***")
    assert key not in json.loads(refused.body)["error"]["message"]
    redirected = read_error(302, b"", headers, SecretStr(key), URL)
    assert redirected.request_id == "id-***"
    assert key not in str(redirected)
    with pytest.raises(APIResponseError) as caught:
        read_reply(body.encode(), headers, SecretStr(key), URL)
    assert key not in f"{caught.value} {caught.value.__dict__}"


def test_a_ranking_does_not_show_a_key_that_the_server_quotes(
    rank: Rank, client: RegoloClient, stub: Stub, caplog: pytest.LogCaptureFixture
) -> None:
    """What callers and logs see of a good reply, its id, meta and request id, has *** in place of the key."""
    body = {**results((1, 0.9), (0, 0.1)), "id": f"id-{KEY}", "meta": {KEY: [KEY, 1]}}
    stub.always(Reply(body, headers={"x-litellm-call-id": f"call-{KEY}"}))
    caplog.set_level("DEBUG", "regolo_rerank")
    response = rank(client, QUERY, DOCUMENTS[:2])
    assert (response.id, response.meta, response.request_ids) == ("id-***", {"***": ["***", 1]}, ["call-***"])
    assert [result.index for result in response.results] == [1, 0]
    assert KEY not in caplog.text


@pytest.mark.parametrize("key", ["1", "123", "1234", "true", "null", "e", "id", "EMPTY", "\\"])
@pytest.mark.parametrize("status", [200, 400])
def test_a_short_key_breaks_nothing(key: str, status: int, rank: Rank, stub: Stub) -> None:
    """A key that is part of JSON's own signs, as made-up ones are, changes neither a ranking nor an error's fields."""
    meta = {"billed_units": {"total_tokens": 1234}, "id": [1, True, None, "beef", 'a"b\\c1234']}
    body = {**results((0, 0.9)), "id": "1234-true-e1", "meta": meta}
    stub.always(Reply(body if status == 200 else {"error": {"message": "no beef", "code": "e-1x"}}, status))
    client = RegoloClient(key, base_url=stub.url, max_retries=0)
    if status == 200:
        response = rank(client, QUERY, ["a"])
        assert response.meta["billed_units"] == {"total_tokens": 1234}
        assert (response.usage.total_tokens, response.results[0].relevance_score) == (1234, 0.9)
    else:
        with pytest.raises(APIStatusError, match="no beef") as caught:
            rank(client, QUERY, ["a"])
        assert caught.value.code == ("***-1x" if key == "e" else "e-1x")


def test_a_short_key_is_masked_as_a_whole_word() -> None:
    """A key of fewer than eight characters is masked where it stands alone, a longer one anywhere."""
    refused = read_error(403, b"bad key 123, not 1234 or x123", httpx.Headers(), SecretStr("123"), URL)
    assert str(refused) == "bad key ***, not 1234 or x123 [HTTP 403]"
    refused = read_error(403, b"bad key x12345678x", httpx.Headers(), SecretStr("12345678"), URL)
    assert str(refused) == "bad key x***x [HTTP 403]"


def test_a_200_with_an_empty_error_says_that_it_has_one() -> None:
    """An error without words is still an error in place of results."""
    with pytest.raises(APIResponseError, match="an error in place of results"):
        read_reply(b'{"results": [], "error": {}}', httpx.Headers(), None, URL)


@pytest.mark.parametrize("secret", [None, SecretStr("")])
def test_without_a_key_nothing_is_masked(secret: SecretStr | None) -> None:
    """Where no key was sent, the server's words stay as they are."""
    assert str(read_error(403, b"no key passed in", httpx.Headers(), secret, URL)) == "no key passed in [HTTP 403]"


@pytest.mark.parametrize(
    ("problem", "characters", "tokens"),
    [
        ("This model's maximum context length is 40960 tokens. However, ...", 81_920, 40_960),
        ("the prompt is over the context length", 8_192, 4_096),
        ("context length is 99999999999999999999", 1_999_999_998, 999_999_999),
    ],
)
def test_what_is_too_long_is_told_with_numbers_to_start_from(problem: str, characters: int, tokens: int) -> None:
    """The numbers follow the limit that the server names, and are those of a small model where it names none."""
    advice = advise_on_length(problem, 3, 50_000)
    assert "documents[3] with 50000 characters" in advice
    assert f"max_document_chars={characters}" in advice
    assert f'extra_body={{"truncate_prompt_tokens": {tokens}}}' in advice
