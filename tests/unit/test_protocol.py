import copy
import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from regolo_rerank import (
    APIResponseError,
    APIStatusError,
    BadRequestError,
    ContextLengthError,
    RateLimitError,
    RegoloError,
    ServerError,
)
from regolo_rerank._protocol import Ranking, Reply, encode, read_reply, replace_surrogates, request_id_of
from regolo_rerank.errors import error_for_status
from tests.unit.calls import URL, begin, cases, join_surrogates, rank, reply_of, results_of

MODEL = "Qwen3-Reranker-4B"
RECORDINGS = Path(__file__).parents[1] / "recordings"


def read(reply: Reply, model: str = MODEL) -> Ranking:
    """Read a reply of the server at `URL`."""
    return read_reply(reply, url=URL, model=model)


def error_of(reply: Reply) -> Any:
    """Return the error that a reply is read as."""
    with pytest.raises((APIStatusError, APIResponseError)) as caught:
        read(reply)
    return caught.value


# --- recorded exchanges -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exchange:
    """A recorded request, and its reply."""

    request: str
    reply: Reply

    def json(self) -> Any:
        """Return the JSON of the reply; None if it has none, or was clipped."""
        try:
            return json.loads(self.reply.text)
        except ValueError:
            return None

    @property
    def model(self) -> str:
        try:
            return str(json.loads(self.request)["model"])
        except (ValueError, KeyError, TypeError):
            return MODEL


def recorded() -> dict[str, Exchange]:
    """Return all recorded exchanges by file and name."""
    exchanges = {}
    for file in sorted(RECORDINGS.glob("*.jsonl")):
        for line in file.read_bytes().splitlines():
            exchange = json.loads(line)
            response = exchange["response"]
            headers = {name.lower(): value for name, value in response["headers"]}
            reply = Reply(response["status"], headers, response["body"], 0.1)
            exchanges[f"{file.stem}-{exchange['name']}"] = Exchange(exchange["request"]["body"], reply)
    return exchanges


RECORDED = recorded()


def names_of(belongs: Callable[[Exchange], bool]) -> list[str]:
    """Return the names of some recorded exchanges."""
    return [name for name, exchange in RECORDED.items() if belongs(exchange)]


def is_ranking(exchange: Exchange) -> bool:
    """Return whether a recorded reply is a ranking by the requested model, from the plainest look at it."""
    body = exchange.json()
    results = body.get("results") if isinstance(body, dict) else None
    has_fallen_back = exchange.reply.headers.get("x-litellm-attempted-fallbacks", "0") != "0"
    return (
        exchange.reply.status_code == 200
        and isinstance(results, list)
        and "error" not in body
        and not has_fallen_back
        and all(result["relevance_score"] is not None for result in results)
    )


RANKINGS = names_of(is_ranking)
REFUSALS = names_of(lambda exchange: exchange.reply.status_code != 200)
OTHERS = [name for name in RECORDED if name not in {*RANKINGS, *REFUSALS}]


def test_every_recorded_exchange_is_read() -> None:
    """Each file of recordings is there, and each of its exchanges belongs to one of the tests below."""
    assert (len(RANKINGS), len(REFUSALS), len(OTHERS)) == (80, 80, 11)


@pytest.mark.parametrize("name", RANKINGS)
def test_a_recorded_ranking_is_read(name: str) -> None:
    """Scores, id, model, meta and request id come from where the gateway writes them; a cost of 0 is unknown."""
    exchange = RECORDED[name]
    body, headers = exchange.json(), exchange.reply.headers
    ranking = read(exchange.reply, exchange.model)
    assert [(score.position, score.value) for score in ranking.scores] == [
        (result["index"], result["relevance_score"]) for result in body["results"]
    ]
    assert (ranking.id, ranking.meta) == (body.get("id"), body.get("meta"))
    assert ranking.request_id == headers.get("x-litellm-call-id")
    assert ranking.model == headers.get("x-litellm-model-group", body.get("model"))
    assert ranking.cost == (float(headers.get("x-litellm-response-cost", 0)) or None)
    counted = [body.get("usage"), (body.get("meta") or {}).get("billed_units")]
    assert ranking.total_tokens == next((units["total_tokens"] for units in counted if units), None)


@pytest.mark.parametrize("name", REFUSALS)
def test_a_recorded_refusal_is_the_error_of_its_status(name: str) -> None:
    """The error has the server's message, and its type, code and request id."""
    exchange = RECORDED[name]
    reply, body = exchange.reply, exchange.json()
    error = error_of(reply)
    is_too_long = "maximum context length" in reply.text
    assert type(error) is (ContextLengthError if is_too_long else type(error_for_status(reply.status_code, "")))
    assert (error.status_code, error.body) == (reply.status_code, reply.text[:2_000])
    assert error.request_id == reply.headers.get("x-litellm-call-id")
    said = body.get("error") if isinstance(body, dict) else None
    if isinstance(said, dict):
        assert said["message"][:2_000] in str(error)
        assert error.code == str(said["code"])
        assert error.type == (None if said["type"] == "None" else said["type"])
    is_permanent = 400 <= reply.status_code < 500 and reply.status_code not in {408, 429}
    assert error.retryable is (not is_permanent and not is_too_long and error.type != "budget_exceeded")


@pytest.mark.parametrize("name", OTHERS)
def test_a_recorded_success_without_a_ranking_is_an_error(name: str) -> None:
    """An error inside a 200, null scores, the reply of a substitute and other pages are never a ranking."""
    reply = RECORDED[name].reply
    error = error_of(reply)
    assert type(error) is APIResponseError
    assert str(error).startswith("invalid reply: ")
    assert error.request_id == reply.headers.get("x-litellm-call-id")
    if reply.headers.get("x-litellm-attempted-fallbacks", "0") != "0":
        assert f"'{MODEL}' was requested, and 'other-reranker' answered" in str(error)


# --- rankings ---------------------------------------------------------------------------------------------------------


def test_a_document_is_echoed_in_many_shapes() -> None:
    """The echoed text is an object, a string or absent, depending on the backend; other values are ignored."""
    documents = [{"text": "a"}, {"text": "b", "multi_modal": None}, "c", None, {"text": 5}, ["a"], {}]
    results = [{"index": 3, "relevance_score": 1, "document": document} for document in documents]
    scores = read(reply_of({"results": [*results, {"index": 3, "relevance_score": 1}]})).scores
    assert [score.echo for score in scores] == ["a", "b", "c", None, None, None, None, None]
    assert {(score.position, score.value, type(score.value)) for score in scores} == {(3, 1.0, float)}


def test_a_bare_list_is_read() -> None:
    """SGLang returns a list of results, with `score` instead of `relevance_score`."""
    results = [{"score": 0.9, "document": "b", "index": 1, "meta_info": {"id": "x"}}, {"score": 0.1, "index": 0}]
    ranking = read(reply_of(results))
    assert [(score.position, score.value, score.echo) for score in ranking.scores] == [(1, 0.9, "b"), (0, 0.1, None)]
    assert (ranking.id, ranking.model, ranking.meta, ranking.total_tokens) == (None, None, None, None)
    assert read(reply_of(results_of(id=7))).id == "7"


def test_the_model_that_answered() -> None:
    """The gateway's header counts before the body; without a fallback it may be an alias."""

    def model_of(group: str | None, model: Any, fallbacks: str = "0") -> str | None:
        headers = {"x-litellm-attempted-fallbacks": fallbacks} | (
            {} if group is None else {"x-litellm-model-group": group}
        )
        return read(reply_of(results_of(model=model), headers=headers)).model

    found = [model_of("a", "m"), model_of(None, "m"), model_of("", "m"), model_of("", ""), model_of(None, 5)]
    assert found == ["a", "m", "m", None, None]
    assert model_of(None, "m", "none") == "m"


@pytest.mark.parametrize(
    ("headers", "name"), [({"x-litellm-model-group": "other"}, "'other' answered"), ({}, "another model answered")]
)
def test_a_substitute_is_an_error(headers: dict[str, str], name: str) -> None:
    """Scores of another model are on another scale, and asking again gives the substitute again."""
    error = error_of(reply_of(results_of((0, 0.5)), headers={"x-litellm-attempted-fallbacks": "2", **headers}))
    assert name in str(error)
    assert error.retryable is False


@pytest.mark.parametrize(
    ("fields", "tokens"),
    [
        ({"usage": {"prompt_tokens": 5, "total_tokens": 7}}, 7),
        ({"usage": {"prompt_tokens": 5}}, 5),
        ({"usage": {"prompt_tokens": 5, "total_tokens": 0}}, 5),
        ({"meta": {"billed_units": {"total_tokens": 9}, "tokens": {"input_tokens": 8}}}, 9),
        ({"meta": {"tokens": {"input_tokens": 8}}}, 8),
        ({"meta": {"billed_units": {"input_tokens": 6}}}, 6),
        ({"usage": {"total_tokens": 7}, "meta": {"tokens": {"input_tokens": 8}}}, 7),
        ({"usage": {"total_tokens": None}, "meta": {"tokens": {"input_tokens": 8}}}, 8),
        *(({"usage": {"total_tokens": count}}, None) for count in (0, -1, True, "7", 7.0)),
        *((fields, None) for fields in ({"usage": "much", "meta": ["more"]}, {"meta": {"billed_units": [1]}}, {})),
    ],
)
def test_tokens_are_found_wherever_a_backend_counts_them(fields: dict[str, Any], tokens: int | None) -> None:
    """Each known place is read; 0 and anything but a count are unknown."""
    assert read(reply_of(results_of(**fields))).total_tokens == tokens


def test_a_cost_of_zero_is_unknown() -> None:
    """The gateway writes 0 for models without a price."""
    headers = [{"x-litellm-response-cost": cost} for cost in ("1.5e-05", "0.0", "0", "-1", "inf", "nan", "free")]
    assert [read(reply_of(results_of(), headers=each)).cost for each in headers] == [1.5e-05, *[None] * 6]


def test_the_request_id_is_that_of_the_gateway() -> None:
    """LiteLLM's id counts before vLLM's, in rankings and in errors."""
    for own, other, request_id in (("a", "b", "a"), ("", "b", "b"), ("", "", None)):
        headers = {"x-litellm-call-id": own, "x-request-id": other}
        assert request_id_of(reply_of("", headers=headers)) == request_id
        assert read(reply_of(results_of(), headers=headers)).request_id == request_id
        assert error_of(reply_of("", 500, headers)).request_id == request_id
        assert error_of(reply_of("", 200, headers)).request_id == request_id


@pytest.mark.parametrize(
    ("body", "problem", "retryable"),
    [
        ("", "not JSON: ''", True),
        ('{"results": [{"index": 0, "relevance_score": 0.5}]', 'not JSON: \'{"results"', True),
        ("[" * 100_000, "not JSON", True),
        (" \n<!doctype html>", f"a web page answered at {URL}, so check base_url", False),
        ("{}", "must contain a list of results, got an empty object", False),
        ("null", "must contain a list of results, got null", False),
        ('"' + "x" * 99 + '"', f'got "{"x" * 59}', False),
        ('{"results": null, "id": "x"}', "a list of results, got an object with the fields results, id", False),
        ('{"results": {"index": 0}}', "must contain a list of results", False),
        ('{"detail": "gone"}', "got an object with the fields detail", False),
        *(
            (json.dumps({"results": [], "error": {"message": "m", "code": code}}), "invalid reply: m", code != "401")
            for code in (None, 500, "429", 408, "401")
        ),
        ('{"error": ""}', "an error instead of results", True),
        ('{"results": [], "error": {}}', "an error instead of results", True),
    ],
)
def test_a_success_of_the_wrong_shape_is_an_error(body: str, problem: str, *, retryable: bool) -> None:
    """The error names the shape that was found. Only an error or a cut reply is worth another attempt."""
    error = error_of(reply_of(body, 201, {"x-litellm-call-id": "call-1"}))
    assert type(error) is APIResponseError
    assert problem in str(error)
    assert (error.body, error.request_id, error.retryable) == (body[:2_000], "call-1", retryable)


@pytest.mark.parametrize(
    ("result", "problem"),
    [
        ("0.5", " must be an object, got 0.5"),
        ("[1, 2]", " must be an object, got a list of 2"),
        ('{"relevance_score": 0.5}', ".index must be an integer, got null"),
        ('{"relevance_score": 0.5, "index": "0"}', '.index must be an integer, got "0"'),
        ('{"relevance_score": 0.5, "index": true}', ".index must be an integer, got true"),
        ('{"relevance_score": 0.5, "index": 0.0}', ".index must be an integer, got 0.0"),
        ('{"index": 1}', ".relevance_score must be a finite number, got null"),
        ('{"index": 1, "relevance_score": null}', ".relevance_score must be a finite number, got null"),
        ('{"index": 1, "relevance_score": null, "score": 0.5}', ".relevance_score must be a finite number, got null"),
        ('{"index": 1, "relevance_score": "0.5"}', '.relevance_score must be a finite number, got "0.5"'),
        ('{"index": 1, "relevance_score": true}', ".relevance_score must be a finite number, got true"),
        ('{"index": 1, "relevance_score": {}}', ".relevance_score must be a finite number, got an empty object"),
        ('{"index": 1, "relevance_score": NaN}', ".relevance_score must be a finite number, got NaN"),
        ('{"index": 1, "relevance_score": -1e999}', ".relevance_score must be a finite number, got -Infinity"),
        ('{"index": 1, "relevance_score": 1' + "0" * 400 + "}", ".relevance_score must be a finite number, got 10"),
    ],
)
def test_a_malformed_result_is_named_by_its_position(result: str, problem: str) -> None:
    """A well-formed reply of the wrong shape is not worth another attempt."""
    error = error_of(reply_of('{"results": [{"index": 0, "relevance_score": 1}, ' + result + "]}"))
    assert str(error).startswith(f"invalid reply: results[1]{problem}")
    assert error.retryable is False


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "message", "code", "kind"),
    [
        ('{"error": {"message": "m", "type": "t", "param": null, "code": "c"}}', "m", "c", "t"),
        ('{"error": {"message": "m", "type": "None", "param": "None", "code": 500}}', "m", "500", None),
        ('{"error": {"error": "m"}}', "m", None, None),
        ('{"error": {"reason": "m"}}', '{"reason": "m"}', None, None),
        ('{"error": {"message": ["m"], "code": ["c"]}}', '["m"]', '["c"]', None),
        ('{"error": "m", "error_type": "t"}', "m", None, None),
        ('{"error": null, "message": "m", "type": "t", "code": 7}', "m", "7", "t"),
        ('{"detail": "m"}', "m", None, None),
        ('{"detail": {"error": "m"}}', "m", None, None),
        ('{"detail": [{"loc": ["body", 1], "msg": "m"}, {"msg": "n"}, "o"]}', 'body.1: m; n; "o"', None, None),
        *((text, text, None, None) for text in ("[1, 2]", "{}", "null", "Internal Server Error")),
        ("x" * 300, "x" * 200, None, None),
        ("[" * 100_000, "[" * 200, None, None),
        ("<html><style>p {}</style>\n<h1>502\n Bad Gateway</h1>", "502 Bad Gateway", None, None),
        ("", "the server gives no reason", None, None),
        ("<html></html>", "the server gives no reason", None, None),
        (r'{"error": {"message": "bad \ud83d end", "code": true}}', "bad \ufffd end", None, None),
    ],
)
def test_every_shape_of_an_error_is_read(body: str, message: str, code: str | None, kind: str | None) -> None:
    """Reason, code and type are found wherever a server writes them; any other body is quoted."""
    error = error_of(reply_of(body, 500))
    assert str(error) == f"{message} [HTTP 500]"
    assert (error.code, error.type, error.status_code) == (code, kind, 500)


@pytest.mark.parametrize("depth", range(900, 1_100, 7))
def test_no_depth_of_an_error_is_too_deep(depth: int) -> None:
    """An error that is nested as deep as Python can read, or deeper, is still read."""
    assert error_of(reply_of('{"detail": [' + "[" * depth + "]" * depth + "]}", 400)).status_code == 400


def test_a_long_error_is_clipped() -> None:
    """Message and body of an error have at most 2,000 characters of the server's."""
    error = error_of(reply_of({"error": "x" * 9_000}, 500))
    assert str(error) == "x" * 2_000 + " [HTTP 500]"
    assert len(error.body) == len(error_of(reply_of("x" * 9_000)).body) == 2_000


@pytest.mark.parametrize(
    ("status", "headers", "text"),
    [
        (500, {"x-request-id": "call-1"}, "m [HTTP 500, request call-1]"),
        (401, {}, "m [HTTP 401]. Check the API key: api_key, or the environment variable REGOLO_API_KEY"),
        (404, {}, f"m [HTTP 404]. No rerank endpoint at {URL}: check base_url"),
        (405, {}, f"m [HTTP 405]. No rerank endpoint at {URL}: check base_url"),
        (308, {"location": "https://b/"}, "the server redirects to https://b/. Redirects are not"),
    ],
)
def test_an_error_says_what_to_do(status: int, headers: dict[str, str], text: str) -> None:
    """If key or address are wrong, the message names the option."""
    assert str(error_of(reply_of({"error": "m"}, status, headers))).startswith(text)


@pytest.mark.parametrize("status", [400, 413, 422, 500])
@pytest.mark.parametrize(
    "words",
    [
        "This model's maximum context length is 4096 tokens. However, your prompt contains 4097",
        "The prompt is longer than the maximum model length of 512",
        "Input validation error: `inputs` must have less than 512 tokens. Given: 5000",
        "input length 9000 exceeds maximum allowed token size 4096",
        "input (2868 tokens) is too large to process. increase the physical batch size",
        "request exceeds the available context size",
        "context_length_exceeded",
    ],
)
def test_a_request_over_the_context_length_is_recognised(status: int, words: str) -> None:
    """vLLM, TEI, NIM and llama.cpp have words of their own, and it is never worth another attempt."""
    error = error_of(reply_of({"error": {"message": words}}, status))
    assert type(error) is ContextLengthError
    assert (error.retryable, error.status_code) == (False, status)


@pytest.mark.parametrize(("status", "kind"), [(503, ServerError), (429, RateLimitError), (400, BadRequestError)])
def test_other_words_and_statuses_are_not_the_context_length(status: int, kind: type[APIStatusError]) -> None:
    """A server that is down is down, whatever it says."""
    words = "max tokens per minute reached" if status == 400 else "maximum context length is 4096 tokens"
    assert type(error_of(reply_of({"error": words}, status))) is kind


def test_a_spent_budget_is_permanent() -> None:
    """The gateway reports a spent budget with many statuses, and no wait helps."""
    for status in (400, 422, 429):
        assert not error_of(reply_of({"error": {"message": "m", "type": "budget_exceeded"}}, status)).retryable


DATE = {"date": "Mon, 23 Nov 2026 01:22:00 GMT"}
RESET = "Limit type: {}. Current limit: 5, Remaining: 0. Limit resets at: 2026-11-23 01:22:42 UTC"


@pytest.mark.parametrize(
    ("headers", "message", "seconds"),
    [
        ({"retry-after": "7"}, "", 7.0),
        ({"retry-after": "0"}, "", 0.0),
        ({"retry-after": "0.25"}, "", 0.25),
        ({"retry-after": "7", "retry-after-ms": "250"}, "", 0.25),
        ({"retry-after": "7", "retry-after-ms": "soon"}, "", 7.0),
        ({"retry-after": "Mon, 23 Nov 2026 01:22:42 GMT", **DATE}, "", 42.0),
        ({"retry-after": "Mon, 23 Nov 2026 01:22:42 -0000", **DATE}, "", 42.0),
        ({"retry-after": "Mon, 23 Nov 2026 01:21:00 GMT", **DATE}, "", 0.0),
        ({"retry-after": "Mon, 23 Nov 1998 01:21:00 GMT"}, "", 0.0),
        *(({"retry-after": wait}, "", None) for wait in ("-7", "nan", "inf", "soon", "Mon, 32 Nov 2026 01:22:42 GMT")),
        *(({"retry-after": f"{day} 00:00:00 GMT"}, "", None) for day in ("1 Jan 99999999999999999999", "1 Jan +9999")),
        ({"retry-after": "Mon, 20 Nov 2025 00:00:00 +99999999999999"}, "", None),
        ({"retry-after": "7"}, "Try again in 5 seconds", 7.0),
        ({}, "Limit resets at: 2026-13-45 99:99:99 UTC", None),
        ({}, f"Try again in {'9' * 400} seconds", None),
        (DATE, RESET.format("requests"), 42.0),
        ({"date": "Mon, 23 Nov 2026 01:23:00 GMT"}, RESET.format("requests"), 0.0),
        (DATE, RESET.format("max_parallel_requests"), None),
        (DATE, "Limit resets at: tomorrow UTC", None),
        ({}, "No deployments available, Try again in 5 seconds.", 5.0),
        ({}, "try again in 0.5 seconds", 0.5),
        ({}, "", None),
    ],
)
def test_the_wait_that_a_server_asks_for(headers: dict[str, str], message: str, seconds: float | None) -> None:
    """Headers count before the message, dates by the server's own clock, and nonsense not at all."""
    error = error_of(reply_of({"error": message}, 429, headers))
    assert type(error) is RateLimitError
    assert error.retry_after == seconds


# --- requests ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.text(st.characters(), max_size=9), max_size=3))
@cases(100)
def test_any_text_can_be_sent(texts: list[str]) -> None:
    """JSON is UTF-8: surrogate pairs are joined, lone ones replaced, and all other characters are kept."""
    expected = {"documents": [join_surrogates(text) for text in texts], "n": 5}
    assert json.loads(encode({"documents": texts, "n": 5})) == replace_surrogates(expected) == expected


# --- changed replies --------------------------------------------------------------------------------------------------

ODD: list[Any] = [None, True, "0", -1, 99, 0.5, 10**30, math.nan, math.inf, {}, [], "", "0.5", 10**400]
WORDS = st.text(st.characters(), max_size=4).filter(str.strip)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Return every place in JSON that can be changed, as its container and its key there."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [place for key in keys for place in [(value, key), *places(value[key])]]


def change(chosen: random.Random, reply: dict[str, Any]) -> None:
    """Change one place of a reply."""
    container, key = chosen.choice(places(reply) or [(reply, "results")])
    odd = copy.deepcopy(chosen.choice(ODD))
    how = chosen.choice(["replace", "replace", "drop", "repeat", "swap", "extra"])
    if how == "drop":
        container.pop(key)
    elif how == "repeat" and isinstance(container, list):
        container.insert(chosen.randrange(len(container) + 1), container[key])
    elif how == "swap" and isinstance(reply.get("results"), list):
        results = [result for result in reply["results"] if isinstance(result, dict)] or [{}]
        one, other, name = chosen.choice(results), chosen.choice(results), chosen.choice(["index", "document"])
        one[name], other[name] = other.get(name), one.get(name)
    elif how == "extra" and isinstance(container, dict):
        container[chosen.choice(["error", "message", "score", "index", "usage"])] = odd
    else:
        container[key] = odd


def garble(chosen: random.Random, text: str) -> str:
    """Cut, double or change a part of a reply's text."""
    start, stop = sorted(chosen.choices(range(len(text) + 1), k=2))
    return chosen.choice([text[:start], text[:start] + text[stop:], text + text, text[:start] + "\x00" + text[start:]])


def plain_reading(text: str, texts: list[str]) -> dict[int, float] | None:
    """Return the scores of a ranking in the plainest way; None if there is no ranking of these texts."""
    scores: dict[int, float] = {}
    try:
        body = json.loads(text)
        if isinstance(body, dict) and body.get("error") is not None:
            return None
        for result in body["results"] if isinstance(body, dict) else body:
            index, score = result["index"], result.get("relevance_score", result.get("score"))
            if type(index) is not int or type(score) not in {int, float} or index in scores or not math.isfinite(score):
                return None
            scores[index] = float(score)
            document = result.get("document")
            echo = document.get("text") if isinstance(document, dict) else document
            if isinstance(echo, str) and echo in texts and echo != texts[index]:
                return None
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        return None
    return scores if sorted(scores) == list(range(len(texts))) else None


@pytest.mark.parametrize("seed", range(40))
def test_a_changed_success_is_the_right_ranking_or_an_error(seed: int) -> None:
    """A reply is read as the plainest reader reads it, or rejected with an APIResponseError; 100 changes per seed."""
    chosen = random.Random(seed)  # noqa: S311 - repeatable cases, no secrets
    ranked = 0
    for _ in range(100):
        texts = [f"{index} {chosen.randrange(99)}" for index in range(chosen.randint(1, 5))]
        call = begin(texts)
        (batch,) = call.batches
        reply = rank(json.loads(call.request_body(batch)))
        for _ in range(chosen.randrange(3)):
            change(chosen, reply)
        text = json.dumps(reply)
        if chosen.random() < 0.3:
            text = garble(chosen, text)
        expected = plain_reading(text, texts)
        try:
            call.accept(batch, reply_of(text))
        except APIResponseError:
            assert expected is None, text
            continue
        assert expected is not None, text
        order = sorted(expected.items(), key=lambda pair: (-pair[1], pair[0]))
        assert [(result.index, result.relevance_score) for result in call.response()] == order
        ranked += 1
    assert 10 < ranked < 90


FIELDS = st.sampled_from(["results", "index", "relevance_score", "error", "code"])
JSON = st.recursive(
    st.none() | st.integers() | st.floats() | WORDS | st.sampled_from(ODD),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(FIELDS, inner, max_size=3),
    max_leaves=6,
)
HEADERS = st.dictionaries(
    st.sampled_from(["retry-after", "retry-after-ms", "date", "x-litellm-call-id", "location"]),
    st.text(max_size=8) | st.sampled_from(["1e308", "9" * 400, "\u0661", "1_0", "Fri, 31 Dec 9999 23:59:59 -2359"]),
)


@given(JSON | st.text(), st.sampled_from([200, 299, 300, 400, 401, 404, 408, 429, 500]), HEADERS)
@cases(300)
def test_any_reply_is_read_or_an_error_of_ours(body: Any, status: int, headers: dict[str, str]) -> None:
    """Whatever a server sends, no other exception comes out, and a wait is a finite number of seconds."""
    try:
        ranking = read(reply_of(body, status, headers))
    except RegoloError as error:
        assert isinstance(error, APIResponseError if status < 300 else APIStatusError)  # noqa: PT017 - one outcome of two
        seconds = getattr(error, "retry_after", None)
        assert seconds is None or 0 <= seconds < math.inf
    else:
        assert status < 300
        assert all(math.isfinite(score.value) for score in ranking.scores)
