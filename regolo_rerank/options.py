"""Options of the client and both adapters, and the settings of one call that follow from them.

`Options` holds fields and validators only. `resolve` turns them into frozen `Settings` at the start of each call. A
later change of an option or environment variable affects the next call.
"""

import difflib
import inspect
import json
import operator
import os
import re
import sqlite3
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar, Final, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainSerializer,
    PlainValidator,
    SecretStr,
    Tag,
    ValidationError,
)
from pydantic.json_schema import SkipJsonSchema
from pydantic_core import to_json

from regolo_rerank._endpoint import DEFAULT_BASE_URL, Endpoint, parse_base_url
from regolo_rerank._version import __version__
from regolo_rerank.cache import SQLiteCache
from regolo_rerank.errors import InvalidInputError, MissingAPIKeyError, RerankWarning, warn
from regolo_rerank.prompts import API_FIELDS, DEFAULT_INSTRUCTION, PRESETS, PromptFormat, preset_for

__all__ = ["API_KEY_VARIABLE", "BASE_URL_VARIABLE", "Options", "Scorer", "Settings", "resolve"]

API_KEY_VARIABLE: Final = "REGOLO_API_KEY"
BASE_URL_VARIABLE: Final = "REGOLO_BASE_URL"

Scorer = Callable[[str, list[str]], Sequence[float]]
"""A function that scores for `local://`: (query, documents) -> one finite number per document, higher is better."""


def _check_integer(value: Any) -> Any:
    """Accept every integer type, such as numpy's, but not a bool."""
    try:
        return value if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return value  # which the field's own check rejects


def _check_text(text: str) -> str:
    if not text.strip():
        raise ValueError("must not be blank")
    return text


def _check_key(value: object) -> SecretStr | None:
    key = value.get_secret_value() if isinstance(value, SecretStr) else value
    if key is None:
        return None
    if not isinstance(key, str):
        raise ValueError("must be a string")  # noqa: TRY004 - pydantic turns a ValueError into its own error
    key = key.strip()
    if key.lower().startswith("bearer ") or key[:1] in {"'", '"'} or key[-1:] in {"'", '"'}:
        raise ValueError("must be the key itself, without 'Bearer ' and without quotes")
    if re.fullmatch(r"(?i)(?!sk-)([\w.-]+/)?[\w.-]*rerank[\w.-]*", key):
        raise ValueError("looks like a model. Pass it as model=...")
    for position, character in enumerate(key):
        if not "!" <= character <= "~":
            raise ValueError(f"contains a space, control or non-ASCII character at position {position}")
    return SecretStr(key)


def _dump_key(key: SecretStr | None) -> str | None:
    """Leave a key out of every dump, but keep "", which means "send no key"."""
    return "" if key is not None and not key.get_secret_value() else None


def _check_base_url(base_url: str) -> str:
    parse_base_url(base_url.strip())
    return base_url.strip()


_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_HEADER_VALUE = re.compile(r"([!-~]([\t -~]*[!-~])?)?")


def _check_headers(headers: dict[str, str]) -> dict[str, str]:
    for name, value in headers.items():
        if name.lower() in {"authorization", "proxy-authorization"}:
            raise ValueError(f"must not contain {name}. Pass the key as api_key")
        if name.lower() in {"content-length", "transfer-encoding", "accept-encoding", "content-type"}:
            raise ValueError(f"must not contain {name}, which the client sets itself")
        if not _HEADER_NAME.fullmatch(name) or not _HEADER_VALUE.fullmatch(value):
            raise ValueError("must be printable ASCII: names without spaces, values without spaces around them")
    return {name.lower(): value for name, value in headers.items()}


def _check_extra_body(fields: dict[str, Any]) -> dict[str, Any]:
    if ours := fields.keys() & API_FIELDS:
        raise ValueError(f"must not contain {', '.join(sorted(ours))}. Pass it as an argument of the call")
    try:
        copied: dict[str, Any] = json.loads(json.dumps(fields, allow_nan=False))
        to_json(copied)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"must be plain JSON: {error}") from None
    return copied


def _check_cache(cache: Any) -> Any:
    if isinstance(cache, str | os.PathLike):
        try:
            return SQLiteCache(cache)
        except (sqlite3.Error, OSError) as error:
            raise ValueError(f"cannot open {os.fspath(cache)!r} as an SQLite file: {error}") from None
    is_mapping = all(hasattr(cache, name) for name in ("get", "__getitem__", "__setitem__"))
    if cache is not None and (isinstance(cache, type) or not is_mapping):
        raise ValueError("must be a path or a mutable mapping, such as a dict")
    return cache


def _check_http_client(client: Any, *, is_async: bool) -> Any:
    """Accept every object with the methods that we call: the client may be of another library than httpx."""
    send = getattr(client, "send", None)
    has_send = callable(send) and inspect.iscoroutinefunction(send) is is_async
    if client is not None and not (has_send and hasattr(client, "build_request")):
        raise ValueError(f"must be an {'httpx.AsyncClient' if is_async else 'httpx.Client'}")
    return client


Count = Annotated[int, BeforeValidator(_check_integer), Field(strict=True, ge=1)]
Seconds = Annotated[float, Field(strict=True, allow_inf_nan=False, gt=0, le=1_000_000)]
Text = Annotated[str, Field(strict=True), AfterValidator(_check_text)]


def _hidden() -> Any:
    """Return the default of an option that is left out of reprs and dumps."""
    return Field(default=None, exclude=True, repr=False)


class Options(BaseModel):
    """Options that the client and both adapters share.

    Every option is checked at construction and at assignment.

    Raises:
        InvalidInputError: An option is unknown or has a wrong value. The message contains its name and never a key.
    """

    model_config = ConfigDict(
        arbitrary_types_allowed=True, extra="forbid", hide_input_in_errors=True, validate_assignment=True
    )

    api_key: Annotated[
        SecretStr | str | None, BeforeValidator(_check_key), PlainSerializer(_dump_key, return_type=str | None)
    ] = None
    """API key. None reads the environment variable `REGOLO_API_KEY` at each call. "" sends no key."""

    base_url: Annotated[str, AfterValidator(_check_base_url)] | None = None
    """Server, with or without `/v1`, `/rerank` or a trailing slash. None reads the environment variable
    `REGOLO_BASE_URL`, else uses `https://api.regolo.ai`. `local://` is the offline scorer: no key, no network."""

    model: Text = "Qwen3-Reranker-4B"
    """Name of the reranking model."""

    top_n: Count | None = None
    """Number of results to keep, at least 1. None keeps all."""

    instruction: Text = DEFAULT_INSTRUCTION
    """The task in one sentence, for prompt formats that use one. The default is the web search task of Regolo's
    examples."""

    prompt_format: Annotated[
        Annotated[PromptFormat, Tag("format")]
        | Annotated[Literal["auto", "tagged", "documented", "chat", "server_template", "plain"], Tag("name")],
        Discriminator(lambda value: "name" if isinstance(value, str) else "format"),
    ] = "auto"
    """Prompt format for query and document: a preset name or a `PromptFormat`. "auto" is `tagged` for
    `Qwen3-Reranker*`, and `plain` for other models and for `local://`."""

    score_threshold: Annotated[float, Field(strict=True, allow_inf_nan=False)] | None = None
    """Drop results with a lower score, after `top_n` was applied. On the model's own scale: 0 to 1 for
    `Qwen3-Reranker*`. A blank document never passes."""

    timeout: Seconds = 60.0
    """Seconds per attempt, from connecting to the last byte of the reply. In sync calls it limits each network
    operation, so a reply that arrives in small pieces may take longer, and connecting takes at most 5 seconds per
    address."""

    total_timeout: Seconds | None = 90.0
    """Seconds for a whole call: all requests, retries and waits. None means no limit. In a sync call that sends its
    only request in the caller's thread, it limits each network operation, but not the lookup of the host name."""

    max_retries: Annotated[int, BeforeValidator(_check_integer), Field(strict=True, ge=0)] = 3
    """Further attempts per request, at least 0. Refusals because of too many parallel requests are not counted if
    `total_timeout` is set."""

    batch_size: Count = 100
    """Maximum number of documents per request."""

    max_request_bytes: Count = 1_000_000
    """Maximum bytes of JSON per request. A single longer document is sent alone."""

    max_concurrency: Count = 4
    """Maximum number of concurrent requests per call."""

    max_document_chars: Count | None = None
    """Characters of a document that are scored. See `long_documents` for longer ones. The caller's document is returned
    whole."""

    long_documents: Literal["cut", "split"] = "cut"
    """What happens to documents over `max_document_chars`: "cut" scores only their beginning, "split" scores
    overlapping passages and takes the best one."""

    default_headers: Annotated[dict[str, str], AfterValidator(_check_headers)] | None = Field(default=None, repr=False)
    """Additional HTTP headers, such as a gateway's tags, but never the key."""

    extra_body: Annotated[dict[str, Any], AfterValidator(_check_extra_body)] | None = Field(default=None, repr=False)
    """Additional JSON fields of each request."""

    allow_http: bool = Field(default=False, strict=True)
    """Allow sending the key over plain http to another machine."""

    cache: SkipJsonSchema[Annotated[MutableMapping[str, float] | None, PlainValidator(_check_cache)]] = _hidden()
    """Where scores are kept: the path of an SQLite file, or any mutable mapping from strings to floats. Only pairs
    without a cached score are sent."""

    scorer: SkipJsonSchema[Scorer | None] = Field(default=None, exclude=True)
    """For `local://`: a function (query, documents) -> scores instead of the offline scorer."""

    http_client: SkipJsonSchema[Annotated[Any, PlainValidator(partial(_check_http_client, is_async=False))]] = _hidden()
    """The caller's own `httpx.Client` for sync calls. Its proxies, certificates and pool apply. It is never closed. Its
    timeouts apply unless `timeout` is given."""

    async_http_client: SkipJsonSchema[Annotated[Any, PlainValidator(partial(_check_http_client, is_async=True))]] = (
        _hidden()
    )
    """The caller's own `httpx.AsyncClient` for async calls."""

    user_agent: ClassVar[str] = f"regolo_rerank/{__version__}"
    """The `User-Agent` of requests. Adapters add their framework."""

    def __init__(self, **options: Any) -> None:
        explained(type(self), super().__init__, **options)

    def __setattr__(self, name: str, value: Any) -> None:
        explained(type(self), super().__setattr__, name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the explicit options, without the key, the cache and the caller's HTTP clients."""
        explicit = {
            name: getattr(self, name)
            for name, field in type(self).model_fields.items()
            if name in self.model_fields_set and (name == "scorer" or not field.exclude)
        }
        if "api_key" in explicit:
            explicit["api_key"] = _dump_key(explicit["api_key"])
        return partial(type(self), **explicit), ()

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:  # noqa: ARG002 - pydantic's
        """Return a copy with some options changed, each of them checked.

        Args:
            update: The options to change, by name.
            deep: Ignored: values are always shared, because none is ever changed in place.

        Raises:
            InvalidInputError: An option is unknown or has a wrong value.
        """
        copy = super().model_copy()
        for name, value in (update or {}).items():
            setattr(copy, name, value)
        return copy

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        """Share the values: a connection or cache cannot be copied, and no other value is ever changed in place."""
        return self.model_copy()


_OTHER_NAMES: Final = {
    "top_n": ("k", "top_k"),
    "model": ("model_name", "model_id"),
    "base_url": ("api_base", "endpoint", "url"),
    "score_threshold": ("similarity_cutoff", "threshold"),
    "timeout": ("request_timeout",),
    "max_retries": ("retries",),
    "total_timeout": ("max_retry_seconds",),
    "http_client": ("client",),
    "reranker": ("base_compressor",),
}
"""Our options, and their names in other rerankers."""

_HINTS: Final = {
    **{other: f"did you mean {name}?" for name, others in _OTHER_NAMES.items() for other in others},
    **dict.fromkeys(
        ("max_length", "max_tokens_per_doc", "truncation", "truncate"),
        "did you mean max_document_chars? It counts characters, not tokens",
    ),
    **dict.fromkeys(("device", "use_fp16"), "leave it out. The model runs on the server"),
    "llm": "pass the model's name as model. The server runs it",
}
"""Options of other rerankers, and what to use instead."""

_MAY_HOLD_A_SECRET: Final = {"api_key", "regolo_api_key", "base_url", "default_headers", "extra_body"}


def explained(cls: type[BaseModel], action: Callable[..., None], /, *args: Any, **kwargs: Any) -> None:
    """Call a function of pydantic. Its ValidationError becomes an InvalidInputError."""
    try:
        action(*args, **kwargs)
    except ValidationError as error:
        problem = _explain(error, cls)
    else:
        return
    raise problem  # outside of `except`, so that pydantic's error, which may hold a key, is not its context


def _explain(error: ValidationError, cls: type[BaseModel]) -> InvalidInputError:
    """Return pydantic's error as one of ours: each option with its problem and, if it cannot be a key, its value."""
    problems = []
    for line in error.errors(include_url=False, include_context=False):
        name, value = str(line["loc"][0]) if line["loc"] else "", line["input"]
        problem = line["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
        if line["type"] in {"extra_forbidden", "no_such_attribute"} and len(line["loc"]) == 1:
            problems.append(f"{name}: {_describe_unknown(cls, name)}")
        elif name in _MAY_HOLD_A_SECRET or line["type"] == "missing":
            problems.append(f"{name}: {problem}")
        else:
            if name == "top_n" and line["type"] == "greater_than_equal":
                problem += " (None keeps all)"
            problems.append(f"{name}: {problem}, got {_show(value)}" if name else problem)
    return InvalidInputError("; ".join(dict.fromkeys(problems)))


def _show(value: object) -> str:
    """Return a short value as it is, and the type of anything else."""
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value) if len(str(value)) <= 60 else f"{type(value).__name__} of {len(str(value))} characters"
    package = type(value).__module__.partition(".")[0]
    return type(value).__name__ if package == "builtins" else f"{package}.{type(value).__name__}"


def _describe_unknown(cls: type[BaseModel], name: str) -> str:
    if name.endswith("api_key"):
        return "unknown option, did you mean api_key?"
    close = difflib.get_close_matches(name, cls.model_fields, n=1, cutoff=0.8)
    hint = _HINTS.get(name) or (f"did you mean {close[0]}?" if close else "")
    return f"unknown option, {hint}" if hint else "unknown option"


@dataclass(frozen=True, slots=True)
class Settings:
    """Options and environment of one call, resolved once at its start.

    Attributes:
        options: A copy of the options, with the arguments of the call.
        endpoint: The address of the server.
        key: The API key to send, or None to send none.
        prompt_format: The format that `prompt_format` selects.
        fields: Fields of each request in addition to model, query, documents and top_n.
        timeout: Seconds per attempt. None for `local://`, and for a caller's own client without the option `timeout`:
            then only that client and `total_timeout` set limits.
    """

    options: Options
    endpoint: Endpoint
    key: SecretStr | None
    prompt_format: PromptFormat
    fields: dict[str, Any]
    timeout: float | None


def resolve(options: Options, *, is_async: bool, **arguments: Any) -> Settings:
    """Return the settings of one call.

    Args:
        options: The options of the client.
        is_async: Whether the caller's own async client applies, or the sync one.
        **arguments: Arguments of the call, by option. None leaves the option unchanged.

    Raises:
        InvalidInputError: An argument or an environment variable is wrong, or options contradict each other.
        MissingAPIKeyError: The server requires a key, but no key is set.
    """
    options = options.model_copy(update={name: value for name, value in arguments.items() if value is not None})
    endpoint = _find_endpoint(options)
    if endpoint.is_local and (options.http_client or options.async_http_client):
        raise InvalidInputError("http_client: local:// sends nothing. Remove http_client, or set another base_url")
    if options.scorer is not None and not endpoint.is_local:
        raise InvalidInputError(f"scorer: needs base_url='local://', got {endpoint.host}. Remove one of them")
    if options.scorer is not None and options.cache is not None:
        raise InvalidInputError("cache: cannot tell the scores of two scorers apart. Remove cache or scorer")
    prompt_format = _find_format(options, endpoint)
    # Regolo documents this field. Other servers may reject it. Substitutes are rejected in any case.
    fields = {"disable_fallbacks": True} if endpoint.is_regolo else {}
    fields |= prompt_format.format_fields(options.instruction) | (options.extra_body or {})
    if options.instruction != DEFAULT_INSTRUCTION and not prompt_format.uses_instruction:
        warn(
            "instruction has no effect: the prompt format has no place for it. Set prompt_format, such as 'tagged'",
            RerankWarning,
        )
    own_client = options.async_http_client if is_async else options.http_client
    has_own_timeout = own_client is not None and "timeout" not in options.model_fields_set
    return Settings(
        options=options,
        endpoint=endpoint,
        key=_find_key(options, endpoint),
        prompt_format=prompt_format,
        fields=fields,
        timeout=None if has_own_timeout or endpoint.is_local else options.timeout,
    )


def _find_endpoint(options: Options) -> Endpoint:
    if options.base_url is not None:
        return parse_base_url(options.base_url)
    base_url = os.environ.get(BASE_URL_VARIABLE, "").strip()
    try:
        return parse_base_url(base_url or DEFAULT_BASE_URL)
    except ValueError as error:
        raise InvalidInputError(f"{BASE_URL_VARIABLE}: {error}") from None


def _find_format(options: Options, endpoint: Endpoint) -> PromptFormat:
    if isinstance(options.prompt_format, PromptFormat):
        return options.prompt_format
    if options.prompt_format != "auto":
        return PRESETS[options.prompt_format]
    # The offline scorer compares words, so the words of an instruction would only disturb it.
    return PRESETS["plain"] if endpoint.is_local else preset_for(options.model)


def _find_key(options: Options, endpoint: Endpoint) -> SecretStr | None:
    if endpoint.is_local:
        return None
    key = options.api_key
    if key is None:
        try:
            key = _check_key(os.environ.get(API_KEY_VARIABLE, ""))
        except ValueError as error:
            raise InvalidInputError(f"{API_KEY_VARIABLE}: {error}") from None
    assert isinstance(key, SecretStr)  # noqa: S101 - the field's type only admits what may be assigned
    if not key.get_secret_value():
        if endpoint.is_regolo:
            raise MissingAPIKeyError(
                f"no API key for {endpoint.host}: set the environment variable {API_KEY_VARIABLE} or pass api_key. "
                f"To try the package without a key, set base_url='local://'"
            )
        return None
    if not endpoint.is_https and not endpoint.is_loopback and not options.allow_http:
        raise InvalidInputError(
            f"base_url: would send the API key to {endpoint.host} over plain http, readable by everyone in between. "
            f"Use https, set api_key='' to send no key, or set allow_http=True"
        )
    return key
