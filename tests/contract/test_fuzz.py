import json
import math
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Final

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import SecretStr, ValidationError
from pydantic_core import from_json

from regolo_rerank import APIStatusError, InvalidInputError, PromptFormat, RegoloClient, RegoloError
from regolo_rerank.options import Options
from regolo_rerank.prompts import PRESETS
from tests.conftest import Rank
from tests.support.entries import Entry, Pairs
from tests.support.inside import answer
from tests.support.stub import Reply, Stub, pairs

KEY: Final = 'sk-canary/"\\4f1d'
"""A key that JSON writes in other characters."""

TIMES = pytest.mark.parametrize("times", [1, pytest.param(45, marks=[pytest.mark.long, pytest.mark.timeout(1_800)])])


def cases(count: int) -> settings:
    """Return how a property is tried: the same cases in every run, and none remembered."""
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    return settings(
        max_examples=count, deadline=None, derandomize=True, database=None, print_blob=False, suppress_health_check=slow
    )


def repaired(text: str) -> str:
    """Return a text as UTF-8 can hold it: halves of a pair joined, single ones replaced."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


# Texts

ODD = [
    *("", " ", "\t\r\n", "\u2003\x1f", "\x00", "\u200b", "\ufeff", '"\\/', "\u2028", "score", "é\u0301", "ß", "İ"),
    *("\ud83d", "\ude00", "a\ud801\udc00b", "😀", "👩\u200d👩\u200d👧", "שלום \u202eabc", "日本語", "\U0010ffff"),
    *("<", "|", "<|im_end|>", "<|", "{query}", "{document}", "{", "%s", KEY, json.dumps(KEY), "null", "NaN", "x" * 60),
]
SHORT = st.text(st.characters(), max_size=12) | st.lists(st.sampled_from(ODD), max_size=4).map("".join)
LONG = st.builds(
    lambda text, size: (text * (size // len(text) + 1))[:size],
    st.text(st.characters(), min_size=1, max_size=4),
    st.sampled_from([50, 51, 999, 1_001, 20_000, 100_000]),
)
TEXT = st.one_of(SHORT, SHORT, SHORT, LONG)
WORDED = TEXT.filter(str.strip)

# Replies

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | SHORT | st.sampled_from([-1, 0, 1, 1.0, 2**64, 10**400]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(SHORT, inner, max_size=3),
    max_leaves=4,
)
FIELDS = ["id", "results", "meta", "usage", "error", "index", "relevance_score", "document", "text", "message", "code"]
WAITS = [
    *("0", "0.05", "-5", "inf", "nan", "1e309", "1e308", "9" * 400, "\u0661", "1_0", "soon", "²", "0x10", ""),
    *("Mon, 23 Nov 2026 10:00:00 GMT", "Mon, 23 Nov 2026 10:00:00", "Mon, 99 Nov 9999 99:99:99 GMT"),
    *("Fri, 31 Dec 9999 23:59:59 -2359", "Mon, 01 Jan 0001 00:00:00 +2359", "1 Jan 1 1 +99999999999", ", , , , ,"),
    *("Limit resets at: 9999-99-99 99:99:99 UTC", "Try again in 1e5 seconds", "Try again in 5 seconds", KEY),
]
HEADER_NAMES = ["retry-after", "retry-after-ms", "date", "x-litellm-call-id", "x-request-id", "location"]
HEADERS = st.dictionaries(
    st.sampled_from(HEADER_NAMES) | st.from_regex(r"x-[!#$%&'*+.^_`|~0-9a-z-]{1,9}", fullmatch=True),
    st.sampled_from([wait for wait in WAITS if wait.isascii()])
    | st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=20).map(str.strip),
    max_size=3,
)
STATUSES = st.sampled_from([200] * 8 + [201, 299, 400, 401, 402, 403, 404, 408, 413, 422, 429, 500, 502, 503])
STATUSES |= st.integers(100, 999)


@dataclass(frozen=True)
class Case:
    """Distinct texts, sent in one request as they are, and the reply."""

    texts: list[str]
    top_n: int | None
    status: int
    headers: dict[str, str]
    body: bytes


def places(value: Any) -> list[tuple[Any, Any]]:
    """Return every place in a JSON value that can be changed, as its container and its key there."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [place for key in keys for place in [(value, key), *places(value[key])]]


def change(draw: st.DrawFn, reply: dict[str, Any]) -> None:
    """Change one place of a reply."""
    container, key = draw(st.sampled_from(places(reply) or [(reply, "results")]))
    how = draw(st.sampled_from(["replace", "replace", "drop", "repeat", "reverse", "extra"]))
    if how == "drop":
        container.pop(key, None) if isinstance(container, dict) else container.pop(key)
    elif how == "repeat" and isinstance(container, list):
        container.append(container[key])
    elif how == "reverse" and isinstance(container, list):
        container.reverse()
    elif how == "extra" and isinstance(container, dict):
        container[draw(st.sampled_from(FIELDS))] = draw(JSON)
    else:
        container[key] = draw(JSON)


def garble(draw: st.DrawFn, body: bytes) -> bytes:
    """Change a reply's bytes."""
    how = draw(st.sampled_from(["cut", "flip", "insert", "deep", "twice", "rename"]))
    at = draw(st.integers(0, len(body) - 1))
    if how == "cut":
        return body[:at]
    if how == "flip":
        return body[:at] + bytes([body[at] ^ draw(st.integers(1, 255))]) + body[at + 1 :]
    if how == "insert":
        return body[:at] + draw(st.binary(max_size=4)) + body[at:]
    if how == "deep":
        depth = draw(st.sampled_from([10, 150, 250, 900, 960, 980, 990, 5_000]))
        deep = b"[" * depth + b"]" * depth
        return draw(st.sampled_from([body.replace(b"null", deep, 1), b'{"error": {"x": %b}}' % deep]))
    if how == "twice":
        field = draw(st.sampled_from(FIELDS))
        return body.replace(b'"%b":' % field.encode(), b'"%b": 0, "%b":' % (field.encode(), field.encode()), 1)
    return body.replace(b'"results"', b'"%b"' % draw(st.sampled_from(FIELDS)).encode(), 1)


@st.composite
def exchanges(draw: st.DrawFn, texts: st.SearchStrategy[str] = WORDED) -> Case:
    """Texts and a reply to them: right, changed, garbled or anything at all."""
    sent = draw(st.lists(texts, min_size=1, max_size=5, unique_by=repaired))
    scores = draw(st.lists(st.floats(-1, 1), min_size=len(sent), max_size=len(sent)))
    top_n = draw(st.none() | st.integers(1, 6))
    order = sorted(range(len(sent)), key=lambda index: -scores[index])[: draw(st.sampled_from([top_n, None]))]
    shape = draw(st.sampled_from(["object", "string", "null"]))
    echoes: list[Any] = [
        {"object": {"text": text}, "string": text, "null": None}[shape] for text in map(repaired, sent)
    ]
    results = [{"index": index, "relevance_score": scores[index], "document": echoes[index]} for index in order]
    reply = {"id": "fuzz-1", "results": results, "meta": None}
    kind = draw(st.sampled_from(["right", "changed", "changed", "changed", "garbled", "error", "json", "bytes"]))
    for _ in range(draw(st.integers(1, 3)) if kind == "changed" else 0):
        change(draw, reply)
    body = json.dumps(reply, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")
    if kind == "garbled":
        body = garble(draw, body)
    elif kind == "error":
        message = draw(st.sampled_from(WAITS) | JSON)
        error = {"message": message, "code": draw(JSON), "type": draw(JSON), "detail": draw(JSON)}
        body = json.dumps(draw(st.sampled_from([error, {"error": error}, {"detail": [message]}]))).encode()
    elif kind in {"json", "bytes"}:
        body = json.dumps(draw(JSON)).encode() if kind == "json" else draw(st.binary(max_size=50))
    return Case(sent, top_n, draw(STATUSES), draw(HEADERS), body)


def reference(case: Case) -> Pairs | None:
    """Rank in the plainest way; None where the reply cannot be trusted."""
    scores: dict[int, float] = {}
    try:
        reply = from_json(case.body)
        for result in reply["results"]:
            index, score = result["index"], result["relevance_score"]
            if type(index) is not int or type(score) is bool or index in scores or not math.isfinite(score):
                return None
            scores[index] = float(score)
        if reply.get("error") is not None or len(scores) < min(case.top_n or 99, len(case.texts)):
            return None
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        return None
    if not 200 <= case.status < 300 or not scores.keys() <= set(range(len(case.texts))):
        return None
    return sorted(scores.items(), key=lambda pair: (-pair[1], pair[0]))[: case.top_n]


def echoes_others(case: Case) -> bool:
    """Return whether a reply with a ranking echoes a text that is not quite the one sent."""
    for result in from_json(case.body)["results"]:
        document = result.get("document")
        echo = document.get("text") if isinstance(document, dict) else document
        if isinstance(echo, str) and echo != repaired(case.texts[result["index"]]):
            return True
    return False


def check_error(error: RegoloError) -> None:
    """An error can be printed, does not show the key, and asks for a sensible wait if for any."""
    shown = f"{error} {error!r} {' '.join(map(str, vars(error).values()))}"
    assert shown.encode()
    assert KEY not in shown
    assert json.dumps(KEY)[1:-1] not in shown
    if isinstance(error, APIStatusError) and error.retry_after is not None:
        assert 0 <= error.retry_after < math.inf


def check(case: Case, rank: Callable[[], Pairs]) -> None:
    """A reply gives the reference's ranking, or an error if the reference trusts it no more than that."""
    expected = reference(case)
    try:
        ranking = rank()
    except RegoloError as error:
        check_error(error)
        assert expected is None or echoes_others(case), error  # noqa: PT017 - one outcome of two
    else:
        assert ranking == expected


def client_of(
    answers: Callable[[bytes], tuple[int, bytes]], headers: dict[str, str] | None = None, **options: Any
) -> RegoloClient:
    """Return a client of a service in this process: a function from a request's body to a status and a body."""

    def handle(request: httpx.Request) -> httpx.Response:
        status, body = answers(request.content)
        return httpx.Response(status, headers=headers, content=body)

    service = httpx.Client(transport=httpx.MockTransport(handle))
    return RegoloClient(KEY, http_client=service, max_retries=0, max_concurrency=1, **options)


@TIMES
def test_any_reply_gives_the_ranking_or_an_error_of_ours(times: int) -> None:
    """Whatever a server sends, it is read as a ten-line reader would read it, or refused without showing the key."""

    @cases(200 * times)
    @given(exchanges())
    def holds(case: Case) -> None:
        service = client_of(lambda _: (case.status, case.body), case.headers, prompt_format="plain", top_n=case.top_n)
        check(case, lambda: pairs(service.rerank("q", case.texts).results))

    holds()


# Documents

AFFIX = st.text("<|{}>%\n aé", max_size=4)
FORMATS = st.sampled_from(list(PRESETS.values())) | st.builds(
    lambda a, b, c, d, e, *, escape: PromptFormat(
        query=f"{a}{{instruction}}{b}{{query}}{c}", document=f"{d}{{document}}{e}", escape=escape
    ),
    *[AFFIX] * 5,
    escape=st.booleans(),
)
OPTIONS = st.fixed_dictionaries(
    {
        "top_n": st.none() | st.integers(1, 12),
        "batch_size": st.sampled_from([1, 2, 3, 100]),
        "max_request_bytes": st.sampled_from([400, 600, 1_000, 100_000, 1_000_000]),
        "score_threshold": st.none() | st.sampled_from([-0.5, 0.0, 0.25]),
        "max_document_chars": st.none() | st.sampled_from([1, 3, 50, 10_000]),
        "instruction": st.text(max_size=9).filter(str.strip),
    }
)


@st.composite
def candidates(draw: st.DrawFn) -> list[str]:
    """Documents, some of them more than once."""
    pool = draw(st.lists(TEXT, min_size=1, max_size=5))
    return draw(st.lists(st.sampled_from(pool), max_size=10))


def relevance(text: str) -> float:
    """Score a text by nothing but itself, with ties and below zero too."""
    return zlib.crc32(text.encode()) % 11 / 8 - 0.5


def scorer(_query: str, documents: list[str]) -> list[float]:
    """Score for the embedded endpoint, and for the stub."""
    return [relevance(text) for text in documents]


def ranked(sent: Sequence[str | None], options: Options) -> Pairs:
    """Rank in the plainest way what is sent for each document, None for a blank one."""
    scored = [(index, relevance(text)) for index, text in enumerate(sent) if text is not None]
    scored.sort(key=lambda pair: (-pair[1], pair[0]))
    lowest = min([0.0, *(value for _, value in scored)])
    blank = [(index, lowest) for index, text in enumerate(sent) if text is None]
    kept = (scored + blank)[: options.top_n]
    if options.score_threshold is None:
        return kept
    return [(index, value) for index, value in kept if sent[index] is not None and value >= options.score_threshold]


@TIMES
def test_any_documents_are_sent_once_and_ranked(times: int) -> None:
    """Any Unicode, format and limits: requests are JSON within the limits, each text goes once, none of them blank."""

    @cases(150 * times)
    @given(WORDED, candidates(), OPTIONS, FORMATS)
    def holds(query: str, documents: list[str], arguments: dict[str, Any], form: PromptFormat) -> None:
        options = Options(**arguments)
        texts = [text[: options.max_document_chars] for text in documents]
        bare = {
            "model": options.model,
            "query": repaired(form.format_query(query, options.instruction)),
            "documents": [],
        }
        bodies: list[bytes] = []

        def answers(body: bytes) -> tuple[int, bytes]:
            bodies.append(body)
            return answer(body, scorer)

        try:
            results = client_of(answers, prompt_format=form, **arguments).rerank(query, documents).results
        except InvalidInputError as error:
            check_error(error)
            assert not bodies
            assert len(json.dumps(bare, ensure_ascii=False).encode()) + 20 > options.max_request_bytes
            return
        sent: list[str] = []
        for body in bodies:
            request = json.loads(body.decode())
            strings = request["documents"]
            assert request["query"] == bare["query"]
            assert 1 <= len(strings) <= options.batch_size
            assert len(body) <= options.max_request_bytes or len(strings) == 1
            if form.escape:
                tokens = (form.query + form.document).count("<|")
                assert {(bare["query"] + string).count("<|") for string in strings} == {tokens}
            sent += strings
        as_sent = [repaired(form.format_document(text)) if text.strip() else None for text in texts]
        assert Counter(sent) == Counter(repaired(form.format_document(text)) for text in {*texts} if text.strip())
        assert pairs(results) == ranked(as_sent, options)
        assert all(result.document is documents[result.index] for result in results)

    holds()


# Options


class Shy:
    """Shows a key to whoever prints it."""

    def __repr__(self) -> str:
        return KEY

    __str__ = __repr__


def nested(depth: int) -> list[Any]:
    """Return a list in a list in a list."""
    return [nested(depth - 1)] if depth else []


SECRETS = [
    *(KEY, KEY.encode(), SecretStr(KEY), SecretStr(f"{KEY}\n"), f"{KEY}é", Shy(), Shy, ValueError(KEY), {KEY}, [Shy()]),
    *(
        f"https://{KEY}",
        f"https://{KEY}@h",
        f"https://h:{KEY}",
        f"https://[{KEY}]",
        f"http://h#{KEY}",
        f"local://{KEY}",
    ),
    *({"x": KEY}, {"x": Shy()}, {"x": [KEY, Shy()]}, {"authorization": KEY}, {"query": KEY}, {"document": KEY}),
]
NUMBERS = [0, -1, 1, 2**63, 10**30, 10**400, 10**5_000, -(10**5_000), 1e10, 1e308, 5e-324, -0.0, Decimal(1), 1j]
LIKELY = [
    "",
    " ",
    "auto",
    "chat",
    "raise",
    "https://api.regolo.ai/v1",
    "local://",
    "http://",
    "https://[::1",
    "//",
    "x:1",
]
OTHERS = [None, True, ..., len, int, object(), PromptFormat(), range(3), nested(100), nested(240), nested(900)]
SAMPLES = st.sampled_from([*SECRETS, *NUMBERS, *LIKELY, *OTHERS])
VALUES = st.one_of(
    SAMPLES,
    JSON,
    st.binary(max_size=4),
    st.lists(SAMPLES, max_size=3),
    st.tuples(SHORT, SAMPLES),
    st.dictionaries(SHORT.filter(lambda name: KEY not in name), SAMPLES, max_size=2),
)


@TIMES
def test_any_value_of_an_option_is_taken_or_refused_by_name(kind: Any, times: int) -> None:
    """A value for an option is accepted, or refused in a ValidationError that names the option and shows no key."""

    @cases(60 * times)
    @given(st.sampled_from([*kind.model_fields, "zork"]), VALUES, st.booleans())
    def holds(name: str, value: Any, assigned: bool) -> None:
        reranker = kind()
        try:
            if assigned:
                setattr(reranker, name, value)
            else:
                reranker = kind(**{name: value})
        except ValidationError as error:
            assert {line["loc"][0] for line in error.errors()} == {name}  # noqa: PT017 - one outcome of two
            assert KEY not in f"{error!r} {error} {error.errors()} {error.json()}"  # noqa: PT017 - the same
        else:
            assert name != "zork"
            assert name != "api_key" or KEY not in repr(reranker)

    holds()


ARGUMENTS = st.fixed_dictionaries(
    {"query": st.one_of(WORDED, VALUES), "documents": st.one_of(candidates(), VALUES)},
    optional=dict.fromkeys(("top_n", "model", "instruction", "score_threshold", "extra_body"), VALUES),
)


@TIMES
def test_any_argument_is_taken_or_refused_by_name(rank: Rank, times: int) -> None:
    """A call with any arguments gives a ranking, or an InvalidInputError that names one of them and shows no key."""
    client = RegoloClient(KEY, base_url="local://", scorer=scorer)

    @cases(60 * times)
    @given(ARGUMENTS)
    def holds(arguments: dict[str, Any]) -> None:
        try:
            response = rank(client, **arguments)
        except InvalidInputError as error:
            check_error(error)
            assert str(error).startswith(tuple(arguments))  # noqa: PT017 - one outcome of two
        else:
            assert all(result.document == list(arguments["documents"])[result.index] for result in response.results)

    holds()
    client.close()


# Over a real socket

UNICODE = WORDED.map(repaired)
"""Texts that a framework's document can hold: pydantic refuses half a pair."""


@TIMES
def test_any_reply_over_a_socket(entry: Entry, stub: Stub, times: int) -> None:
    """Every entry point makes of a reply what the reference does, or an error of ours."""

    @cases(15 * times)
    @given(exchanges(UNICODE).filter(lambda case: case.status not in {*range(200), 204, 304}))
    def holds(case: Case) -> None:
        stub.received.clear()
        stub.always(Reply(case.body, case.status, case.headers))
        check(case, lambda: entry(case.texts, api_key=KEY, top_n=case.top_n, prompt_format="plain", max_retries=0))
        assert len(stub.received) == 1

    holds()


LIMITS = st.fixed_dictionaries(
    {},
    optional={
        "timeout": st.floats(0.5, 1e6) | st.integers(1, 10**6),
        "max_retries": st.integers(0, 10**20),
        "max_retry_seconds": st.floats(0, 1e6),
        "max_concurrency": st.integers(1, 10**20),
        "default_headers": st.dictionaries(
            st.sampled_from(["x-tag", "accept", "user-agent"]), st.text("a ~\t", max_size=3).map(str.strip)
        ),
        "extra_body": st.dictionaries(st.sampled_from(["user", "é"]), st.text(max_size=5) | st.integers(), max_size=2),
    },
)


@TIMES
def test_any_documents_over_a_socket(entry: Entry, stub: Stub, times: int) -> None:
    """Every entry point ranks any documents as a plain sort does, with whatever options are accepted."""
    stub.reply = lambda request: Reply(answer(request.body, scorer)[1])

    @cases(10 * times)
    @given(WORDED, candidates(), OPTIONS, LIMITS)
    def holds(query: str, documents: list[str], arguments: dict[str, Any], limits: dict[str, Any]) -> None:
        options = Options(prompt_format="plain", **(arguments | limits))
        texts = [repaired(document) for document in documents]
        sent = [text[: options.max_document_chars] for text in texts]
        try:
            ranking = entry(texts, query, **options.model_dump(exclude_unset=True))
        except InvalidInputError as error:
            assert len(query) * 6 + 200 > options.max_request_bytes, error  # noqa: PT017 - the other outcome of two
        else:
            assert ranking == ranked([text if text.strip() else None for text in sent], options)

    holds()
