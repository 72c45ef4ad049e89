"""What a server says: a ranking, or why there is none, in any of the shapes that were seen."""

import json
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Final

import httpx
from pydantic import SecretStr, ValidationError

from regolo_rerank._wire.checks import API_KEY_VARIABLE
from regolo_rerank._wire.masking import clean, mask, mask_all, spell
from regolo_rerank._wire.messages import Reply
from regolo_rerank._wire.request_ids import request_id_of
from regolo_rerank.errors import APIResponseError, APIStatusError, error_for_status

__all__ = ["advise_on_length", "may_mean", "parse_number", "read_error", "read_reply"]

_CLIP: Final = 2_000

_CONTEXT_LENGTH: Final = re.compile(r"context length is (\d{1,9})")
_USUAL_CONTEXT: Final = 4_096
_CHARACTERS_A_TOKEN: Final = 2
"""Fewer than in European languages, which have three to four: the tags, the query and the instruction need room too."""


def read_reply(
    body: bytes | bytearray,
    headers: Mapping[str, str],
    secret: SecretStr | None,
    url: httpx.URL,
) -> Reply:
    """Read the body of a 2xx.

    Args:
        body: The body's bytes, decompressed.
        headers: The reply's headers, their names in lower case.
        secret: The API key; where the server quotes it, "***" is shown.
        url: Where the request went.

    Raises:
        APIResponseError: The body is not what the API promises.
    """
    try:
        reply = Reply.model_validate_json(body)
    except ValidationError as error:
        line = error.errors(include_url=False, include_context=False)[0]
        problem = ": ".join(filter(None, [".".join(map(str, line["loc"])), line["msg"]]))
    else:
        if reply.error is None:
            return reply if secret is None else _mask_reply(secret, reply, body)
        problem = "an error in place of results"
    text, details = _read_error_text(body, secret)
    if text.lstrip().startswith("<"):
        problem = f"a web page has answered at {url}, and not the API: see base_url"
    raise APIResponseError(
        f"the reply cannot be trusted: {details.get('message') or problem}",
        request_id=request_id_of(headers, secret),
        code=details.get("code"),
        body=text,
    )


def read_error(
    status_code: int,
    body: bytes | bytearray,
    headers: Mapping[str, str],
    secret: SecretStr | None,
    url: httpx.URL,
) -> APIStatusError:
    """Return the error that a reply outside 2xx stands for.

    Args:
        status_code: The HTTP status.
        body: The body's bytes: JSON of any shape, HTML, plain text or nothing.
        headers: The reply's headers, their names in lower case.
        secret: The API key; where the server quotes it, "***" is shown.
        url: Where the request went.
    """
    text, details = _read_error_text(body, secret)
    message = details.get("message") or _strip_tags(text) or "the server gives no reason"
    if location := clean(headers.get("location"), secret):
        message = f"the server points to {location}, and redirects are not followed: set base_url to its address"
    request_id = request_id_of(headers, secret)
    where = f"HTTP {status_code}" + (f", request {request_id}" if request_id else "")
    return error_for_status(
        status_code,
        f"{message[:_CLIP]} [{where}]{_advise(status_code, secret, url)}",
        request_id=request_id,
        code=details.get("code"),
        type=details.get("type"),
        body=text,
        retry_after=_find_wait(headers, message),
    )


def advise_on_length(problem: str, index: int, length: int) -> str:
    """Return what to do where a document is over the model's context.

    Args:
        problem: The server's words, which in vLLM's case name the limit.
        index: The longest document's place in the caller's list.
        length: Its characters.
    """
    found = _CONTEXT_LENGTH.search(problem)
    tokens = int(found[1]) if found else _USUAL_CONTEXT
    return (
        f"the longest document sent is documents[{index}] with {length} characters; to cut what is scored, start with "
        f'max_document_chars={_CHARACTERS_A_TOKEN * tokens}, or with extra_body={{"truncate_prompt_tokens": {tokens}}} '
        f"where the server takes it, as vLLM does"
    )


def may_mean(echo: str, sent: str) -> bool:
    """Return whether a server may mean what was sent; it may have cut, stripped or lower-cased it, or left tags out.

    Args:
        echo: The document that it says it has scored.
        sent: The document string of the request.
    """
    shown = echo.strip()
    return (bool(shown) and shown in sent) or _begins_in(echo, sent) or _begins_in(sent, echo)


def _begins_in(part: str, whole: str) -> bool:
    begin, text = (re.sub(r"\W+", "", side).casefold() for side in (part[:200], whole[:1_000]))
    return bool(begin) and begin in text


def _advise(status_code: int, secret: SecretStr | None, url: httpx.URL) -> str:
    """Return what the caller can do about a status."""
    if status_code == 401:
        todo = "set" if secret is None else "check"
        return f"; {todo} the API key: api_key, or the environment variable {API_KEY_VARIABLE}"
    return f"; nothing to rerank with at {url}: see base_url" if status_code in {404, 405} else ""


def _read_error_text(body: bytes | bytearray, secret: SecretStr | None) -> tuple[str, dict[str, str | None]]:
    """Return a body as text, clipped, and what it says of an error, both without the key."""
    text = body.decode("utf-8", "replace")
    try:
        details = _find_error(json.loads(text))
    except (ValueError, RecursionError):
        details = {}
    shown = {name: clean(details.get(name), secret) for name in ("message", "code", "type")}
    return mask(text, secret)[:_CLIP], shown


def _mask_reply(secret: SecretStr, reply: Reply, body: bytes | bytearray) -> Reply:
    """Return a reply that does not quote the key in what callers see of it."""
    for quoted in spell(secret):
        if quoted.encode() in body:
            shown = {name: mask_all(getattr(reply, name), secret) for name in ("id", "model", "meta")}
            return reply.model_copy(update=shown)
    return reply


def _find_error(reply: Any) -> dict[str, Any]:
    """Return message, type and code from any of the known shapes of an error; empty where there is none."""
    if not isinstance(reply, dict):
        return {}
    for error in (reply.get("error"), reply.get("detail"), reply.get("message")):
        if isinstance(error, dict):
            message = error.get("message") or error.get("error") or (json.dumps(error) if error else "")
            return {**error, "message": message if isinstance(message, str) else json.dumps(message)}
        if isinstance(error, str) and error:
            return {"type": reply.get("type"), "code": reply.get("code"), "message": error}
        if isinstance(error, list) and error:
            return {"message": "; ".join(_describe_line(line) for line in error)}
    return {}


def _describe_line(line: Any) -> str:
    """Put one entry of FastAPI's list of validation errors into words."""
    if isinstance(line, dict) and isinstance(line.get("msg"), str):
        place = line.get("loc")
        return f"{'.'.join(map(str, place))}: {line['msg']}" if isinstance(place, list) else str(line["msg"])
    return json.dumps(line)


def _strip_tags(text: str) -> str:
    """Return a body that is no JSON in a line: without tags, and clipped."""
    if "<" in text[:100]:
        text = re.sub(r"(?s)<(style|script)\b.*?</\1>|<[^>]*>", " ", text[:20_000])
    return " ".join(text.split())[:200]


_RESETS_AT = re.compile(r"Limit resets at: (\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) UTC")
_TRY_AGAIN = re.compile(r"[Tt]ry again in (\d+(?:\.\d+)?) seconds")


def _find_wait(headers: Mapping[str, str], message: str) -> float | None:
    """Return the seconds that the server asks to wait, in a header or in its words; None where it does not say."""
    now = _parse_date(headers.get("date", "")) or datetime.now(UTC)
    waits = [parse_number(headers.get("retry-after-ms"), 0.001), parse_number(headers.get("retry-after"))]
    if date := _parse_date(headers.get("retry-after", "")):
        waits.append((date - now).total_seconds())
    # A limit on parallel requests frees as soon as another call ends, whatever its window says.
    if (found := _RESETS_AT.search(message)) and "Limit type: max_parallel_requests" not in message:
        with suppress(ValueError):
            waits.append((datetime.fromisoformat(f"{found[1]}+00:00") - now).total_seconds())
    if found := _TRY_AGAIN.search(message):
        waits.append(parse_number(found[1]))
    return next((max(wait, 0.0) for wait in waits if wait is not None), None)


def parse_number(text: str | None, unit: float = 1.0) -> float | None:
    """Return the number from 0 that a header holds; None where it holds none."""
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
