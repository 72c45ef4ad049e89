"""Every option once: its type, default, check and environment variable.

`RegoloClient` and both adapters inherit these fields, so an option has the same name and meaning in all of them. An
argument of a single call is checked by the option that it stands in for.
"""

import os
from collections.abc import Mapping, MutableMapping
from copy import copy
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import httpx
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

from regolo_rerank._display.help import OptionsDocstring, OptionsSignature
from regolo_rerank._wire.checks import (
    API_KEY_VARIABLE,
    check_base_url,
    check_cache,
    check_extra_body,
    check_headers,
    check_key,
    check_text,
    client_check,
    dump_key,
    explain,
    read_environment_key,
)
from regolo_rerank._wire.endpoint import BASE_URL_VARIABLE, DEFAULT_BASE_URL, Endpoint, Scorer, read_base_url
from regolo_rerank.errors import InvalidInputError, MissingAPIKeyError
from regolo_rerank.prompts import DEFAULT_INSTRUCTION, PRESETS, PromptFormat, preset_for

__all__ = ["Count", "Options"]

Count = Annotated[int, Field(strict=True, ge=1)]
Seconds = Annotated[float, Field(strict=True, allow_inf_nan=False, le=1_000_000)]
"""Eleven days at most: the clocks of sockets and threads end somewhere."""
Text = Annotated[str, Field(strict=True), AfterValidator(check_text)]


class Options(BaseModel):
    """The options that the client and both adapters share.

    A `Count` is an integer from 1, `Seconds` is a number of seconds, a `Text` is a string that is not blank, and a
    `Scorer` is a function of a query and N documents that gives N finite numbers, higher for better.

    Raises:
        pydantic.ValidationError: On construction and on assignment; it names the option and the value's type, and
            never holds the value itself, which might be a key.
    """

    model_config = ConfigDict(
        arbitrary_types_allowed=True,
        defer_build=True,  # of the classes in between, nobody makes an object
        extra="forbid",
        hide_input_in_errors=True,
        validate_assignment=True,
    )

    api_key: Annotated[
        SecretStr | str | None,
        BeforeValidator(check_key),
        PlainSerializer(dump_key, return_type=str | None),
    ] = Field(default=None, kw_only=False)
    """API key; None takes the environment's `REGOLO_API_KEY` at each call, "" sends none."""

    base_url: Annotated[str, AfterValidator(check_base_url)] | None = None
    """Server, with or without `/v1` and `/rerank`; None takes `REGOLO_BASE_URL`, else `https://api.regolo.ai`.
    `local://` is the embedded endpoint: no key, no network."""

    model: Text = "Qwen3-Reranker-4B"
    """Name of the reranking model; the default is the one in Regolo's API examples."""

    top_n: Count | None = None
    """Results kept, the best first; None keeps all."""

    instruction: Text = DEFAULT_INSTRUCTION
    """The task in a sentence, for prompt formats that have a place for it, in the query or in a field of its own; the
    default is a web search, as in Regolo's API examples."""

    prompt_format: Annotated[
        Annotated[PromptFormat, Tag("format")]
        | Annotated[Literal["auto", "tagged", "documented", "chat", "server_template", "plain"], Tag("name")],
        Discriminator(lambda value: "name" if isinstance(value, str) else "format"),
    ] = "auto"
    """How query and document are put into words for the model: a `PromptFormat` or a preset's name. "auto" is `tagged`
    for `Qwen3-Reranker*`, and `plain` for other models and on `local://`. Without the tags that it was trained on, a
    model scores lower, as Regolo's page says; a server that has the model's template puts them in by itself, and gets
    `server_template`."""

    score_threshold: Annotated[float, Field(strict=True, allow_inf_nan=False)] | None = None
    """Results that score lower are dropped, after `top_n` has been chosen from all candidates. On the model's own
    scale: from 0 to 1 for `Qwen3-Reranker*`."""

    timeout: Annotated[Seconds, Field(gt=0)] = 60.0
    """Seconds for one attempt, from connecting to the last byte of the reply. In a sync call it bounds each wait while
    connecting, sending and reading headers, and the body has to be complete by then."""

    max_retries: Annotated[int, Field(strict=True, ge=0)] = 3
    """Further attempts after the first, at least 0, for one request."""

    max_retry_seconds: Annotated[Seconds, Field(ge=0)] = 90.0
    """Seconds, from when a request could first be sent, after which no further attempt starts."""

    batch_size: Count = 100
    """Documents in one request at most."""

    max_request_bytes: Count = 1_000_000
    """Bytes of JSON in one request at most; a single longer document goes alone."""

    max_concurrency: Count = 4
    """Requests of one call in flight at once, at most."""

    max_document_chars: Count | None = None
    """Characters of a document that are scored at most; the caller's document comes back whole."""

    default_headers: Annotated[dict[str, str], AfterValidator(check_headers)] | None = Field(default=None, repr=False)
    """Further HTTP headers, such as a gateway's tags; never the key."""

    extra_body: Annotated[dict[str, Any], AfterValidator(check_extra_body)] | None = None
    """Further JSON fields of the request."""

    allow_substitutes: bool = Field(default=False, strict=True)
    """Lets another model than `model` give a ranking, where the gateway has replaced one that fails: with a
    `RerankSubstituteWarning`, for whole calls only, and never into the `cache`. A model's name is a promise in other
    clients too, so by default such a reply is an `APIResponseError`; and regolo.ai is asked not to replace a model."""

    allow_http: bool = Field(default=False, strict=True)
    """Lets the key go over plain http to a host that is not this machine."""

    cache: SkipJsonSchema[Annotated[MutableMapping[str, float] | None, PlainValidator(check_cache)]] = Field(
        default=None, exclude=True, repr=False
    )
    """Where scores are kept: a dict, `cachetools.LRUCache`, or any other mapping to floats. Only pairs that it does not
    hold are sent. It is used in the caller's thread or event loop, and left out of dumps and pickles."""

    scorer: SkipJsonSchema[Scorer | None] = Field(default=None, exclude=True)
    """For `local://`: a function (query, documents) -> scores in place of the embedded one. Left out of dumps."""

    http_client: SkipJsonSchema[Annotated[httpx.Client | None, PlainValidator(client_check(httpx.Client))]] = Field(
        default=None, exclude=True, repr=False
    )
    """The caller's own httpx client for sync calls: its timeout, proxies and pool count; it is never closed here."""

    async_http_client: SkipJsonSchema[
        Annotated[httpx.AsyncClient | None, PlainValidator(client_check(httpx.AsyncClient))]
    ] = Field(default=None, exclude=True, repr=False)
    """The same for async calls, an `httpx.AsyncClient`."""

    if not TYPE_CHECKING:  # A type checker reads the fields: api_key by position or name, all others by name.
        __signature__ = OptionsSignature()

        @classmethod
        def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
            super().__pydantic_init_subclass__(**kwargs)
            if cls.__doc__:
                cls.__doc__ = OptionsDocstring(cls.__doc__)

        @classmethod
        def __pydantic_on_complete__(cls) -> None:
            super().__pydantic_on_complete__()
            cls.__signature__ = vars(Options)["__signature__"]  # pydantic's shows how types are checked

        def __init__(self, api_key: SecretStr | str | None = None, **options: Any) -> None:
            """Take the options, each of them checked."""
            try:
                super().__init__(api_key=api_key, **options)
            except ValidationError as error:
                problem = explain(error, type(self))
            else:
                return
            # A mistyped `apikey=` must not show in a traceback with locals, which misses what is deleted.
            api_key = options = None
            raise problem

        def __setattr__(self, name: str, value: Any) -> None:
            try:
                super().__setattr__(name, value)
            except ValidationError as error:
                problem = explain(error, type(self))
            else:
                return
            value = None
            raise problem

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Return a copy with some options changed, each of them checked.

        Args:
            update: The options to change, by name.
            deep: Whether values are copied too; what a dump leaves out is shared in any case.

        Raises:
            pydantic.ValidationError: An option in `update` is unknown or has a wrong value.
        """
        copied = super().model_copy(deep=deep)
        copied._part_from_original()  # noqa: SLF001 - of its own class
        problem = _assign(copied, update or {})
        if problem is None:
            return copied
        update = None
        raise problem

    def _part_from_original(self) -> None:
        """Give a copy its own of what copies do not share: connections, and the wait after a 429."""

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        """Copy everything, the key included, but share what a dump leaves out: http clients, scorer, cache."""
        shared = (getattr(self, name) for name, field in type(self).model_fields.items() if field.exclude)
        return super().__deepcopy__({**(memo or {}), **{id(value): value for value in shared if value is not None}})

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the options that were set, without the key, the cache and the callers' http clients."""
        kept = {
            name: getattr(self, name)
            for name, field in type(self).model_fields.items()
            if name in self.model_fields_set and (name == "scorer" or not field.exclude)
        }
        if "api_key" in kept:
            kept["api_key"] = dump_key(kept["api_key"])
        return _rebuild, (type(self), kept)

    def for_call(self, **arguments: Any) -> Self:
        """Return these options as they are now, with the arguments of one call in their place.

        Args:
            **arguments: Values by option; None takes the object's own.

        Raises:
            InvalidInputError: An argument is wrong, or options contradict each other.
        """
        settings = copy(self)
        changes = {name: value for name, value in arguments.items() if value is not None}
        for name in ("default_headers", "extra_body"):
            # A dict can be changed in place, past every check, and while the call is under way.
            if (value := getattr(self, name)) is not None:
                changes.setdefault(name, value)
        problem = _assign(settings, changes)
        if problem is None:
            return settings
        raise InvalidInputError(
            "; ".join(f"{'.'.join(map(str, line['loc']))}: {line['msg']}" for line in problem.errors())
        )

    def endpoint(self) -> Endpoint:
        """Return where requests go.

        Raises:
            InvalidInputError: The environment's `REGOLO_BASE_URL` is no URL, or an option does not go with it.
        """
        name, base_url = "base_url", self.base_url
        if base_url is None:
            name, base_url = BASE_URL_VARIABLE, os.environ.get(BASE_URL_VARIABLE, "").strip()
        try:
            endpoint = read_base_url(base_url or DEFAULT_BASE_URL)
        except ValueError as error:
            problem = f"{name}: {error}"
        else:
            if endpoint.embedded and (self.http_client or self.async_http_client):
                problem = "http_client: not with base_url='local://', which sends nothing; leave one of them out"
            elif self.scorer and not endpoint.embedded:
                problem = f"scorer: only for base_url='local://', not for {endpoint.url.host}; leave one of them out"
            else:
                return endpoint
        raise InvalidInputError(problem)

    def fields_for(self, endpoint: Endpoint, prompt_format: PromptFormat) -> dict[str, Any]:
        """Return the fields of a request to an endpoint besides those that the API names.

        Args:
            endpoint: Where requests go.
            prompt_format: How their strings are written.
        """
        # Regolo documents this one; other servers may refuse it, and what they reply is checked in any case.
        refusal = {"disable_fallbacks": True} if endpoint.is_regolo and not self.allow_substitutes else {}
        return refusal | prompt_format.format_fields(self.instruction) | (self.extra_body or {})

    def key_for(self, endpoint: Endpoint) -> SecretStr | None:
        """Return the API key to send to an endpoint, or None to send none.

        Args:
            endpoint: Where requests go.

        Raises:
            MissingAPIKeyError: The endpoint demands a key, and there is none.
            InvalidInputError: The environment's key is malformed, or the key would travel in the clear.
        """
        if endpoint.embedded:
            return None
        key = self.api_key if isinstance(self.api_key, SecretStr) else read_environment_key()
        if not key.get_secret_value():
            if endpoint.is_regolo:
                raise MissingAPIKeyError(
                    f"no API key for {endpoint.url.host}: set the environment variable {API_KEY_VARIABLE} or pass "
                    f"api_key; to try without one, base_url='local://' scores on this machine"
                )
            return None
        if endpoint.url.scheme == "http" and not endpoint.loopback and not self.allow_http:
            raise InvalidInputError(
                f"base_url: the API key would go to {endpoint.url.host} over plain http, for everyone on the way to "
                f"read; use https, pass api_key='' to send none, or allow_http=True"
            )
        return key

    def format_for(self, endpoint: Endpoint) -> PromptFormat:
        """Return the prompt format to use with an endpoint.

        Args:
            endpoint: Where requests go.
        """
        if isinstance(self.prompt_format, PromptFormat):
            return self.prompt_format
        if self.prompt_format == "auto":
            return preset_for(self.model, embedded=endpoint.embedded)
        return PRESETS[self.prompt_format]


def _rebuild(cls: type[Options], fields: dict[str, Any]) -> Options:
    return cls(**fields)


def _assign(options: Options, values: Mapping[str, Any]) -> ValidationError | None:
    """Set options, each of them checked; return what was wrong, without the frames that hold the values."""
    try:
        for name, value in values.items():
            setattr(options, name, value)
    except ValidationError as error:
        return error.with_traceback(None)
    return None
