"""The Rerank API on the wire: the JSON of a request, and the ranking, error or wait of a reply.

The shapes are those of Regolo's API page and of recorded exchanges with LiteLLM in front of vLLM. SGLang, TEI and
llama.cpp differ in details. The API key is redacted before a reply comes here.
"""

import json
import math
import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Final, NamedTuple

from pydantic_core import PydanticSerializationError, from_json, to_json

from regolo_rerank.errors import APIResponseError, APIStatusError, ContextLengthError, error_for_status
from regolo_rerank.options import API_KEY_VARIABLE

__all__ = [
    "REQUEST_ID_HEADERS",
    "Ranking",
    "Reply",
    "Score",
    "encode",
    "invalid_reply",
    "read_reply",
    "replace_surrogates",
    "request_id_of",
]

_CLIP: Final = 2_000
_LARGEST: Final = sys.float_info.max  # JSON has integers that are larger, and Python reads NaN and Infinity


REQUEST_ID_HEADERS: Final = ("x-litellm-call-id", "x-request-id")
"""Headers with the id of a request, of LiteLLM and of vLLM."""


@dataclass(frozen=True, slots=True)
class Reply:
    """A complete reply, with the API key redacted.

    Attributes:
        status_code: The HTTP status.
        headers: The headers, their names in lower case.
        text: The body.
        seconds: Seconds from the start of the request to the last byte.
    """

    status_code: int
    headers: dict[str, str]
    text: str
    seconds: float


class Score(NamedTuple):
    """The score of one document of a request.

    Attributes:
        position: The document's position in the request.
        value: A finite number, higher is better.
        echo: The scored text, if the server repeats it.
    """

    position: int
    value: float
    echo: str | None


@dataclass(frozen=True, slots=True)
class Ranking:
    """The content of a valid reply.

    Attributes:
        scores: The scores, in the server's order.
        id: The server's id of the reply.
        model: The model that has answered, or None if the server does not report it.
        meta: The `meta` field, unchanged.
        request_id: The gateway's id of the request.
        total_tokens: Tokens as counted by the server, or None if unknown.
        cost: Cost as counted by the gateway, or None if unknown.
    """

    scores: list[Score]
    id: str | None
    model: str | None
    meta: Any
    request_id: str | None
    total_tokens: int | None
    cost: float | None


def encode(value: Any) -> bytes:
    """Return JSON as bytes. A lone surrogate, which UTF-8 cannot represent, becomes U+FFFD."""
    try:
        return to_json(value)
    except PydanticSerializationError:
        return to_json(replace_surrogates(value))


def replace_surrogates(value: Any) -> Any:
    """Return JSON with surrogate pairs joined and lone surrogates replaced by U+FFFD."""
    if isinstance(value, str):
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    if isinstance(value, list):
        return [replace_surrogates(item) for item in value]
    if isinstance(value, dict):
        return {key: replace_surrogates(item) for key, item in value.items()}
    return value


def request_id_of(reply: Reply) -> str | None:
    """Return the gateway's id of a request, if its reply has one."""
    return next(filter(None, map(reply.headers.get, REQUEST_ID_HEADERS)), None)


def read_reply(reply: Reply, *, url: str, model: str) -> Ranking:
    """Read a reply.

    Args:
        reply: The reply.
        url: Where the request was sent, for messages.
        model: The requested model.

    Raises:
        APIStatusError: The status is not 2xx.
        APIResponseError: The reply is not a valid ranking, or comes from another model.
    """
    if not 200 <= reply.status_code < 300:
        raise _read_error(reply, url)
    try:
        body = from_json(reply.text)
    except ValueError:
        if reply.text.lstrip().startswith("<"):
            raise invalid_reply(f"a web page answered at {url}, so check base_url", reply) from None
        # A broken connection may have cut the reply off, so another attempt can succeed.
        raise invalid_reply(f"not JSON: {reply.text[:80]!r}", reply, retryable=True) from None
    if isinstance(body, list):  # SGLang returns the bare list
        body = {"results": body}
    if isinstance(body, dict) and body.get("error") is not None:
        raise _read_error_in_success(body, reply)
    if not isinstance(body, dict) or not isinstance(body.get("results"), list):
        raise invalid_reply(f"must contain a list of results, got {_describe_shape(body)}", reply)
    return Ranking(
        scores=_read_scores(body["results"], reply),
        id=None if body.get("id") is None else str(body["id"]),
        model=_read_model(body, reply, model),
        meta=body.get("meta"),
        request_id=request_id_of(reply),
        total_tokens=_count_tokens(body),
        cost=_read_number(reply.headers.get("x-litellm-response-cost")) or None,  # the gateway writes 0 for "unknown"
    )


def _read_scores(results: list[Any], reply: Reply) -> list[Score]:
    scores = []
    for position, result in enumerate(results):
        if not isinstance(result, dict):
            raise invalid_reply(f"results[{position}] must be an object, got {_describe_shape(result)}", reply)
        index = result.get("index")
        value = result.get("relevance_score", result.get("score"))
        if not isinstance(index, int) or isinstance(index, bool):
            raise invalid_reply(f"results[{position}].index must be an integer, got {_describe_shape(index)}", reply)
        if not isinstance(value, int | float) or isinstance(value, bool) or not -_LARGEST <= value <= _LARGEST:
            raise invalid_reply(
                f"results[{position}].relevance_score must be a finite number, got {_describe_shape(value)}", reply
            )
        document = result.get("document")
        echo = document.get("text") if isinstance(document, dict) else document
        scores.append(Score(index, float(value), echo if isinstance(echo, str) else None))
    return scores


def _describe_shape(value: Any) -> str:
    """Return JSON in a few words, for the message about an unexpected shape."""
    if isinstance(value, dict):
        return f"an object with the fields {', '.join(map(str, list(value)[:8]))}" if value else "an empty object"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return json.dumps(value)[:60]


def _read_model(body: dict[str, Any], reply: Reply, requested: str) -> str | None:
    """Return the model that has answered. Reject a substitute, whose scores are on another scale.

    LiteLLM reports a fallback by `x-litellm-attempted-fallbacks`, and the substitute by `x-litellm-model-group`. The
    group alone proves nothing, because an alias keeps the requested name.
    """
    named = reply.headers.get("x-litellm-model-group") or body.get("model")
    model = named if isinstance(named, str) and named else None
    if _read_number(reply.headers.get("x-litellm-attempted-fallbacks")):
        name = "another model" if model is None else repr(model)
        raise invalid_reply(f"{requested!r} was requested, and {name} answered as its substitute", reply)
    return model


def _count_tokens(body: dict[str, Any]) -> int | None:
    meta = body["meta"] if isinstance(body.get("meta"), dict) else {}
    for counts, name in (
        (body.get("usage"), "total_tokens"),
        (body.get("usage"), "prompt_tokens"),
        (meta.get("billed_units"), "total_tokens"),
        (meta.get("billed_units"), "input_tokens"),
        (meta.get("tokens"), "input_tokens"),
    ):
        count = counts.get(name) if isinstance(counts, dict) else None
        if isinstance(count, int) and not isinstance(count, bool) and count > 0:  # LiteLLM writes 0 for "unknown"
            return count
    return None


def invalid_reply(problem: str, reply: Reply, *, code: str | None = None, retryable: bool = False) -> APIResponseError:
    """Return the error for a 2xx reply that cannot be used."""
    error = APIResponseError(
        f"invalid reply: {problem}", request_id=request_id_of(reply), code=code, body=reply.text[:_CLIP]
    )
    error.retryable = retryable
    return error


def _read_error_in_success(body: dict[str, Any], reply: Reply) -> APIResponseError:
    """Return the error for a 2xx that contains an error. One with a code of 4xx, except 408 and 429, is permanent."""
    message, _, code = _find_error(body)
    retryable = code in {None, "408", "429"} or not str(code).startswith("4")
    return invalid_reply(message or "an error instead of results", reply, code=code, retryable=retryable)


def _read_error(reply: Reply, url: str) -> APIStatusError:
    status = reply.status_code
    reason = kind = code = None
    with suppress(ValueError, RecursionError):
        reason, kind, code = _find_error(json.loads(reply.text))
    message = reason or _strip_tags(reply.text) or "the server gives no reason"
    if location := reply.headers.get("location"):
        message = f"the server redirects to {location}. Redirects are not followed, so set base_url to that address"
    fields: dict[str, Any] = {
        "request_id": request_id_of(reply),
        "code": code,
        "type": kind,
        "body": reply.text[:_CLIP],
        "retry_after": _find_wait(reply.headers, message),
    }
    where = f"HTTP {status}" + (f", request {fields['request_id']}" if fields["request_id"] else "")
    text = f"{message[:_CLIP]} [{where}]"
    if "key_model_access_denied" in (kind, code):
        text += ". The API key has no access to this model. Check the option model"
    elif status == 401:
        text += f". Check the API key: api_key, or the environment variable {API_KEY_VARIABLE}"
    elif status in {404, 405}:
        text += f". No rerank endpoint at {url}: check base_url"
    if status in {400, 413, 422, 500} and _TOO_LONG.search(message):
        return ContextLengthError(text, status_code=status, **fields)
    return error_for_status(status, text, **fields)


_TOO_LONG: Final = re.compile(
    r"(?i)maximum (context|model) length"  # vLLM, in two wordings
    r"|must have less than \d+ tokens"  # TEI
    r"|exceeds? (the )?maximum allowed token size"  # NIM
    r"|too large to process"  # llama.cpp
    r"|context[_ ]length[_ ]exceeded|exceeds? the (available )?context size"
)


def _find_error(body: Any) -> tuple[str | None, str | None, str | None]:
    """Return message, type and code from any of the known shapes of an error."""
    if not isinstance(body, dict):
        return None, None, None
    for error in (body.get("error"), body.get("detail"), body.get("message")):
        if isinstance(error, dict) and error:
            message = error.get("message") or error.get("error") or error
            return _as_text(message), _as_text(error.get("type")), _as_text(error.get("code"))
        if isinstance(error, str) and error:
            return _as_text(error), _as_text(body.get("type")), _as_text(body.get("code"))
        if isinstance(error, list) and error:
            return "; ".join(_describe_detail(line) for line in error), None, None
    return None, None, None


def _as_text(value: Any) -> str | None:
    """Return a field of an error as text. LiteLLM writes "None" into empty ones."""
    if value is None or isinstance(value, bool) or value in ("", "None"):
        return None
    return str(replace_surrogates(value if isinstance(value, str) else json.dumps(value)))


def _describe_detail(line: Any) -> str:
    """Return one entry of FastAPI's list of validation errors as text."""
    if isinstance(line, dict) and isinstance(line.get("msg"), str):
        location = line.get("loc")
        prefix = f"{'.'.join(map(str, location))}: " if isinstance(location, list) else ""
        return f"{prefix}{line['msg']}"
    return json.dumps(line)


def _strip_tags(text: str) -> str:
    """Return the beginning of an HTML page or plain text in one line."""
    if "<" in text[:100]:
        text = re.sub(r"(?s)<(style|script)\b.*?</\1>|<[^>]*>", " ", text[:20_000])
    return " ".join(text[:20_000].split())[:200]


_LONGEST_WAIT: Final = 86_400.0
"""Seconds. A server that asks for more than a day makes a mistake."""
_RESETS_AT: Final = re.compile(r"Limit resets at: (\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) UTC")
_TRY_AGAIN: Final = re.compile(r"[Tt]ry again in (\d+(?:\.\d+)?) seconds")


def _find_wait(headers: Mapping[str, str], message: str) -> float | None:
    """Return the seconds that the server asks to wait, from a header or its message, or None if it does not ask."""
    now = _parse_date(headers.get("date", "")) or datetime.now(UTC)
    waits = [_read_number(headers.get("retry-after-ms"), 0.001), _read_number(headers.get("retry-after"))]
    if date := _parse_date(headers.get("retry-after", "")):
        waits.append((date - now).total_seconds())
    # A limit on parallel requests frees as soon as another call ends, regardless of its window.
    if (found := _RESETS_AT.search(message)) and "max_parallel_requests" not in message:
        with suppress(ValueError):
            waits.append((datetime.fromisoformat(f"{found[1]}+00:00") - now).total_seconds())
    if found := _TRY_AGAIN.search(message):
        waits.append(_read_number(found[1]))
    return next((max(wait, 0.0) for wait in waits if wait is not None and wait <= _LONGEST_WAIT), None)


def _read_number(text: str | None, unit: float = 1.0) -> float | None:
    """Return a number of at least 0 from a header, or None."""
    try:
        number = float(text or "nan") * unit
    except ValueError:
        return None
    return number if math.isfinite(number) and number >= 0 else None


def _parse_date(text: str) -> datetime | None:
    try:
        date = parsedate_to_datetime(text)
    except (ValueError, OverflowError):
        return None
    return date if date.tzinfo else date.replace(tzinfo=UTC)
