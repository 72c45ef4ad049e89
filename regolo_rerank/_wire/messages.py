"""What goes over the wire: the request, the reply, and what a server says when it says no.

The shapes are those of Regolo's API page and of recorded exchanges with the gateway software it runs (LiteLLM 1.80 and
1.106 in front of vLLM).
"""

import json
import math
import re
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError
from pydantic_core import PydanticSerializationError, to_json

from regolo_rerank._wire.names import NAME_HEADERS
from regolo_rerank.errors import APIResponseError, APIStatusError, error_for_status

__all__ = ["Reply", "Request", "Result", "encode", "mask", "read_error", "read_reply", "repair", "request_id_of"]

_CLIP: Final = 2_000

_SHORT_KEY: Final = 8
"""Characters from which on no word holds a key by chance."""


class Request(BaseModel):
    """The JSON of a request."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: str
    query: str
    documents: list[str]
    top_n: Annotated[int, Field(ge=0)] | None = None


class Result(BaseModel):
    """One document's score in a reply; `index` counts the documents of the request."""

    model_config = ConfigDict(strict=True)

    index: int
    relevance_score: Annotated[float, Field(allow_inf_nan=False)]
    document: Any = None

    @property
    def echo(self) -> str | None:
        """The text that the server says it has scored, from whichever of the known places has it."""
        text = self.document.get("text") if isinstance(self.document, dict) else self.document
        return text if isinstance(text, str) else None


class Reply(BaseModel):
    """The JSON of a reply."""

    id: Any = None
    results: list[Result]
    meta: Any = None
    usage: Any = None
    error: Any = None

    @property
    def total_tokens(self) -> int | None:
        """Tokens that the service counted, from whichever of the known places has them."""
        for place in (
            ("usage", "total_tokens"),
            ("usage", "prompt_tokens"),
            ("meta", "billed_units", "total_tokens"),
            ("meta", "tokens", "input_tokens"),
        ):
            value = _find({"usage": self.usage, "meta": self.meta}, *place)
            if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
                return value
        return None


def encode(body: Any) -> bytes:
    """Return JSON as bytes, whatever strings it holds."""
    try:
        return to_json(body)
    except PydanticSerializationError:
        return to_json(repair(body))


def repair(value: Any) -> Any:
    """Return JSON as UTF-8 can hold it: halves of a surrogate pair joined, single ones replaced by U+FFFD."""
    if isinstance(value, str):
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    if isinstance(value, list):
        return [repair(item) for item in value]
    if isinstance(value, dict):
        return {key: repair(item) for key, item in value.items()}
    return value


def request_id_of(headers: Mapping[str, str], secret: SecretStr | None = None) -> str | None:
    """Return the server's name for a request, where it gives one."""
    return _clean(next(filter(None, map(headers.get, NAME_HEADERS)), None), secret)


def read_reply(body: bytes | bytearray, headers: Mapping[str, str], secret: SecretStr | None = None) -> Reply:
    """Read the body of a 2xx.

    Args:
        body: The body's bytes, decompressed.
        headers: The reply's headers, their names in any case.
        secret: The API key; where the server quotes it, "***" is shown.

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
    raise APIResponseError(
        f"the reply cannot be trusted: {details.get('message') or problem}",
        request_id=request_id_of(headers, secret),
        code=details.get("code"),
        body=text,
    )


def read_error(
    status_code: int, body: bytes | bytearray, headers: Mapping[str, str], secret: SecretStr | None = None
) -> APIStatusError:
    """Return the error that a reply outside 2xx stands for.

    Args:
        status_code: The HTTP status.
        body: The body's bytes: JSON of any shape, HTML, plain text or nothing.
        headers: The reply's headers, their names in any case.
        secret: The API key; where the server quotes it, "***" is shown.
    """
    text, details = _read_error_text(body, secret)
    message = details.get("message") or _strip_tags(text) or "the server gives no reason"
    if location := _clean(headers.get("location"), secret):
        message = f"the server points to {location}, and redirects are not followed: set base_url to its address"
    request_id = request_id_of(headers, secret)
    where = f"HTTP {status_code}" + (f", request {request_id}" if request_id else "")
    return error_for_status(
        status_code,
        f"{message[:_CLIP]} [{where}]",
        request_id=request_id,
        code=details.get("code"),
        type=details.get("type"),
        body=text,
        retry_after=_find_wait(headers, message),
    )


def _read_error_text(body: bytes | bytearray, secret: SecretStr | None) -> tuple[str, dict[str, str | None]]:
    """Return a body as text, clipped, and what it says of an error, both without the key."""
    text = body.decode("utf-8", "replace")
    try:
        details = _find_error(json.loads(text))
    except (ValueError, RecursionError):
        details = {}
    shown = {name: _clean(details.get(name), secret) for name in ("message", "code", "type")}
    return mask(text, secret)[:_CLIP], shown


def _mask_reply(secret: SecretStr, reply: Reply, body: bytes | bytearray) -> Reply:
    """Return a reply that does not quote the key in what callers see of it."""
    if not any(quoted.encode() in body for quoted in _spell(secret)):
        return reply
    return reply.model_copy(update={"id": _mask_all(reply.id, secret), "meta": _mask_all(reply.meta, secret)})


def _mask_all(value: Any, secret: SecretStr) -> Any:
    """Return JSON in whose strings the key is "***"."""
    if isinstance(value, str):
        return mask(value, secret)
    if isinstance(value, list):
        return [_mask_all(item, secret) for item in value]
    if isinstance(value, dict):
        return {mask(key, secret): _mask_all(item, secret) for key, item in value.items()}
    return value


def _spell(secret: SecretStr | None) -> set[str]:
    """Return the key as it is, and as JSON may write it."""
    key = secret.get_secret_value() if secret else ""
    written = json.dumps(key)[1:-1]
    return {key, written, written.replace("/", "\\/")} - {""}


def mask(text: str, secret: SecretStr | None) -> str:
    """Return a text in which the key, where it is quoted, is "***"; a short one, such as "1", only as a whole word."""
    for quoted in _spell(secret):
        if len(quoted) < _SHORT_KEY:
            text = re.sub(rf"(?<!\w){re.escape(quoted)}(?!\w)", "***", text)
        else:
            text = text.replace(quoted, "***")
    return text


def _clean(value: Any, secret: SecretStr | None) -> str | None:
    """Return what a server says in a field as text that can be printed; None where it says nothing."""
    if isinstance(value, bool) or not isinstance(value, str | int) or value in {"", "None"}:
        return None
    return mask(repair(str(value)), secret)


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


def _find(value: Any, *names: str) -> Any:
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    return value


_RESETS_AT = re.compile(r"Limit resets at: (\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) UTC")
_TRY_AGAIN = re.compile(r"[Tt]ry again in (\d+(?:\.\d+)?) seconds")


def _find_wait(headers: Mapping[str, str], message: str) -> float | None:
    """Return the seconds that the server asks to wait, in a header or in its words; None where it does not say."""
    now = _parse_date(headers.get("date", "")) or datetime.now(UTC)
    waits = [_parse_number(headers.get("retry-after-ms", ""), 0.001), _parse_number(headers.get("retry-after", ""))]
    if date := _parse_date(headers.get("retry-after", "")):
        waits.append((date - now).total_seconds())
    # A limit on parallel requests frees as soon as another call ends, whatever its window says.
    if (found := _RESETS_AT.search(message)) and "Limit type: max_parallel_requests" not in message:
        with suppress(ValueError):
            waits.append((datetime.fromisoformat(f"{found[1]}+00:00") - now).total_seconds())
    if found := _TRY_AGAIN.search(message):
        waits.append(_parse_number(found[1]))
    return next((max(wait, 0.0) for wait in waits if wait is not None), None)


def _parse_number(text: str, unit: float = 1.0) -> float | None:
    try:
        seconds = float(text) * unit
    except ValueError:
        return None
    return seconds if math.isfinite(seconds) and seconds >= 0 else None


def _parse_date(text: str) -> datetime | None:
    try:
        date = parsedate_to_datetime(text)
    except (ValueError, OverflowError):
        return None
    return date if date.tzinfo else date.replace(tzinfo=UTC)
