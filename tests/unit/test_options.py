import ast
import copy
import inspect
import json
import pickle
import pydoc
import re
import warnings
from functools import partial
from pathlib import Path
from typing import Any, get_type_hints

import httpx
import numpy as np
import pytest
from pydantic import SecretStr

from regolo_rerank import InvalidInputError, MissingAPIKeyError, PromptFormat, RegoloClient, RerankWarning, SQLiteCache
from regolo_rerank.langchain import RegoloRerank as LangChainReranker
from regolo_rerank.llama_index import RegoloRerank as LlamaIndexReranker
from regolo_rerank.options import Options, Settings, resolve
from regolo_rerank.prompts import PRESETS
from tests.unit.calls import KEY

ADAPTERS: list[Any] = [LangChainReranker, LlamaIndexReranker]
ONLY_IN_ADAPTERS = {"on_error", "score_metadata_key"}
ROOT = Path(__file__).parents[2]


def scores_of(_query: str, documents: list[str]) -> list[float]:
    """Score by length; at module level, so that it can be pickled."""
    return [float(len(document)) for document in documents]


def settings_of(*, is_async: bool = False, arguments: dict[str, Any] | None = None, **options: Any) -> Settings:
    """Return the settings of a call with some options, on a server that needs no key."""
    own = Options(**{"base_url": "https://rerank.example", **options})
    return resolve(own, is_async=is_async, **(arguments or {}))


# --- checks -----------------------------------------------------------------------------------------------------------

WRONG: list[tuple[str, str, list[Any]]] = [
    ("top_n", r"must be greater than or equal to 1 \(None keeps all\), got (0|-1)$", [0, -1]),
    ("top_n", r"must be a valid integer, got (True|2\.0|'2')$", [True, 2.0, "2"]),
    ("batch_size", "must be greater than or equal to 1, got 0$", [0]),
    ("max_request_bytes", "must be a valid integer, got None$", [None]),
    ("max_concurrency", "must be greater", [0]),
    ("max_retries", "must be greater than or equal to 0, got -1$", [-1]),
    ("max_document_chars", "must be greater", [0]),
    ("timeout", "must be (greater than 0|less than or equal to 1000000), got", [0, 1e10]),
    ("timeout", "must be a (valid|finite) number, got (None|inf)$", [None, float("inf")]),
    ("total_timeout", "must be a (valid|finite) number, got (nan|'5')$", [float("nan"), "5"]),
    ("score_threshold", "must be a (valid|finite) number, got", [float("nan"), "0.5"]),
    ("model", "(must not be blank|must be a valid string), got (' '|None)$", [" ", None]),
    ("instruction", "must be a valid string, got 5$", [5]),
    ("allow_http", "must be a valid boolean, got 1$", [1]),
    ("long_documents", "must be 'cut' or 'split', got 'split '$", ["split "]),
    ("prompt_format", "must be 'auto', 'tagged', .* or 'plain', got 'fancy'$", ["fancy"]),
    ("prompt_format", "must be a valid dictionary or instance of PromptFormat, got 5$", [5]),
    (
        "prompt_format",
        r"(the query template must contain \{query\} exactly once|Extra inputs)",
        [{"query": "x"}, {KEY: 1}],
    ),
    ("base_url", "must start with https://", ["ftp://host"]),
    ("base_url", "must not contain a user, password or fragment. Pass the key as api_key$", [f"https://:{KEY}@host"]),
    ("base_url", "must be a valid string$", [5]),
    ("api_key", "must be a string$", [5]),
    (
        "api_key",
        "must be the key itself, without 'Bearer ' and without quotes$",
        [f"Bearer {KEY}", f"'{KEY}'", f'{KEY}"'],
    ),
    (
        "api_key",
        "contains a space, .* character at position 14$",
        [f"{KEY}\nx", f"{KEY}\u2013x", SecretStr(f"{KEY} x")],
    ),
    ("api_key", r"looks like a model. Pass it as model=\.\.\.$", ["Qwen3-Reranker-4B", "BAAI/bge-reranker-v2-m3"]),
    (
        "default_headers",
        "must not contain .*. Pass the key as api_key$",
        [{"Authorization": KEY}, {"proxy-authorization": KEY}],
    ),
    ("default_headers", "must not contain Content-Length, which the client sets itself$", [{"Content-Length": "3"}]),
    ("default_headers", "must be printable ASCII", [{"x y": KEY}, {"x": "a\nb"}, {"x": "a\t"}]),
    ("default_headers", "must be a valid string$", [{"x": 1}]),
    (
        "extra_body",
        "must not contain query, top_n. Pass it as an argument of the call$",
        [{"query": KEY, "top_n": 1}],
    ),
    ("extra_body", "must be plain JSON", [{"x": float("inf")}, {"x": object()}]),
    ("extra_body", "must be a valid dictionary$", [[KEY]]),
    ("cache", "must be a path or a mutable mapping, such as a dict, got (5|type|list)$", [5, dict, [1]]),
    ("scorer", "must be callable, got 5$", [5]),
    ("http_client", "must be an httpx.Client, got ('x'|httpx.AsyncClient)$", ["x", httpx.AsyncClient()]),
    ("async_http_client", "must be an httpx.AsyncClient, got httpx.Client$", [httpx.Client()]),
    ("apikey", "unknown option, did you mean api_key\\?$", [KEY]),
    ("cohere_api_key", "unknown option, did you mean api_key\\?$", [KEY]),
    ("top_k", "unknown option, did you mean top_n\\?$", [5]),
    ("model_name", "unknown option, did you mean model\\?$", [KEY]),
    ("max_length", "unknown option, did you mean max_document_chars\\? It counts characters, not tokens$", [5]),
    ("device", "unknown option, leave it out. The model runs on the server$", ["cuda"]),
    ("batchsize", "unknown option, did you mean batch_size\\?$", [5]),
    ("zork", "unknown option$", [KEY]),
]


@pytest.mark.parametrize(
    ("name", "message", "values"), WRONG, ids=lambda value: value if isinstance(value, str) else ""
)
@pytest.mark.parametrize("how", ["options", "with_options", "call", "assignment", "langchain", "llama_index"])
def test_a_wrong_option_is_rejected_by_name(how: str, name: str, message: str, values: list[Any]) -> None:
    """The message names the option and shows its value, unless that may be a key; nothing is changed."""
    client = RegoloClient()
    ways: dict[str, Any] = {
        "options": Options,
        "with_options": client.with_options,
        "call": partial(resolve, client.options, is_async=False),
        "assignment": lambda **option: setattr(client.options, *option.popitem()),
        "langchain": LangChainReranker,
        "llama_index": LlamaIndexReranker,
    }
    for value in values:
        if how == "call" and value is None:
            continue  # leaves the option as it is
        with pytest.raises(InvalidInputError, match=f"^{name}: {message}") as caught:
            ways[how](**{name: value})
        assert KEY not in f"{caught.value!r} {vars(caught.value)}"
        assert caught.value.__cause__ is caught.value.__context__ is None
        assert client.options == Options()


def test_every_wrong_option_is_named() -> None:
    """A constructor names all problems at once, and a long value by its length."""
    with pytest.raises(InvalidInputError, match=r"^model: must not be blank, got ''; top_n: .*, got -5; k: unk"):
        Options(model="", top_n=-5, k=3)
    with pytest.raises(InvalidInputError, match="got str of 61 characters"):
        Options(batch_size="x" * 61)
    with pytest.raises(TypeError, match="top_k"):
        RegoloClient(top_k=5)  # type: ignore[call-arg]


def test_integers_of_numpy_are_integers() -> None:
    """They become Python's, so that they can be sent as JSON; other arrays are rejected like any wrong value."""
    for number in (np.int64(3), np.int32(3), np.uint8(3)):
        options = settings_of(batch_size=number, max_retries=number, arguments={"top_n": number}).options
        assert [type(value) for value in (options.top_n, options.batch_size, options.max_retries)] == [int] * 3
    with pytest.raises(InvalidInputError, match=r"got numpy\.ndarray"):
        Options(batch_size=np.zeros(2))


def test_values_are_the_options_own() -> None:
    """A dict that the caller goes on changing changes no option; header names are in lower case; keys are stripped."""
    extra: dict[str, Any] = {"x": {"y": [1]}}
    headers = {"X-Team": "search"}
    options = Options(extra_body=extra, default_headers=headers, api_key=f" {KEY}\n", base_url=" https://h ")
    extra["x"]["y"].append(2)
    headers["x"] = "y"
    assert (options.extra_body, options.default_headers) == ({"x": {"y": [1]}}, {"x-team": "search"})
    assert options.api_key == SecretStr(KEY)
    assert options.base_url == "https://h"


def test_a_path_opens_a_cache(tmp_path: Path) -> None:
    """A string or path is a file, and a mapping is used as it is, also if it is empty."""
    mine: dict[str, float] = {}
    assert Options(cache=mine).cache is mine
    for path in (tmp_path / "a.db", str(tmp_path / "b.db")):
        opened = Options(cache=path).cache
        assert isinstance(opened, SQLiteCache)
        assert opened.path == str(path)
        opened.close()


# --- copies -----------------------------------------------------------------------------------------------------------


def full_options(**changes: Any) -> dict[str, Any]:
    """Return options of many kinds."""
    return {"api_key": KEY, "top_n": 3, "prompt_format": PromptFormat(document="D {document}"), **changes}


@pytest.mark.parametrize("kind", [Options, RegoloClient, *ADAPTERS])
def test_a_pickle_has_the_options_without_the_key(kind: Any) -> None:
    """Key, cache and HTTP clients stay here; "" is no key but a decision, and is kept."""
    own = {"on_error": "return_input"} if kind in ADAPTERS else {}
    with httpx.Client() as mine:
        original = kind(**full_options(http_client=mine, cache={}, scorer=scores_of, base_url="local://", **own))
        data = pickle.dumps(original)
    assert KEY.encode() not in data
    restored = pickle.loads(data)  # noqa: S301 - our own bytes
    assert type(restored) is kind
    options = getattr(restored, "options", restored)
    assert (options.top_n, options.scorer, options.api_key) == (3, scores_of, None)
    assert (options.http_client, options.cache) == (None, None)
    assert options.prompt_format.document == "D {document}"
    assert {name: getattr(options, name) for name in own} == own
    assert "timeout" not in options.model_fields_set
    keyless = pickle.loads(pickle.dumps(kind(api_key="")))  # noqa: S301 - our own bytes
    assert getattr(keyless, "options", keyless).api_key == SecretStr("")


@pytest.mark.parametrize("kind", [Options, RegoloClient, *ADAPTERS])
@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy])
def test_a_copy_shares_values_and_not_options(kind: Any, duplicate: Any) -> None:
    """A copy can be used at once, and its options can be changed without a change of the original."""
    mine, cache = httpx.Client(), dict[str, float]()
    original = kind(**full_options(http_client=mine, cache=cache))
    copied, before = duplicate(original), getattr(original, "options", original)
    options = getattr(copied, "options", copied)
    assert (options.http_client, options.api_key, options.top_n) == (mine, SecretStr(KEY), 3)
    assert options.cache is cache
    options.top_n = 1
    assert before.top_n == 3


@pytest.mark.parametrize("kind", [Options, *ADAPTERS])
def test_no_dump_or_repr_shows_the_key(kind: Any) -> None:
    """A dump is plain JSON, and makes the same options again."""
    options = kind(**full_options(default_headers={"x-tag": "a"}, cache={}, http_client=httpx.Client()))
    dump = options.model_dump(exclude={"callback_manager"})
    assert (dump["api_key"], kind(api_key="").model_dump()["api_key"]) == (None, "")
    assert not dump.keys() & {"http_client", "async_http_client", "scorer", "cache"}
    assert KEY not in f"{options!r} {options} {dump} {json.dumps(dump)} {RegoloClient(KEY)!r} {vars(options)}"
    assert kind(**dump).model_dump(exclude={"callback_manager"}) == dump
    assert "api_key" in Options.model_json_schema()["properties"]


# --- settings of a call -----------------------------------------------------------------------------------------------


def test_arguments_of_a_call_win_and_none_does_not() -> None:
    """The options themselves stay as they are, and later assignments do not reach a call that has begun."""
    options = Options(base_url="https://rerank.example", top_n=3, model="a", extra_body={"x": 1})
    settings = resolve(options, is_async=False, top_n=1, model=None, extra_body={"y": 2})
    options.model, options.top_n = "later", 9
    assert (settings.options.top_n, settings.options.model, settings.fields) == (1, "a", {"y": 2})
    assert (options.top_n, options.extra_body) == (9, {"x": 1})


@pytest.mark.parametrize(
    ("option", "environment", "key"),
    [(f" {KEY}\n", None, KEY), (None, f" {KEY}\n", KEY), ("a", "b", "a"), ("", "b", None), (None, None, None)],
)
def test_the_key_is_that_of_the_option_or_the_environment(
    monkeypatch: pytest.MonkeyPatch, option: str | None, environment: str | None, key: str | None
) -> None:
    """The environment is read at each call; "" sends no key."""
    options = Options(api_key=option, base_url="https://rerank.example")
    if environment is not None:
        monkeypatch.setenv("REGOLO_API_KEY", environment)
    assert resolve(options, is_async=False).key == (None if key is None else SecretStr(key))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("REGOLO_API_KEY", f"Bearer {KEY}", "REGOLO_API_KEY: must be the key itself"),
        ("REGOLO_API_KEY", f"{KEY}\n{KEY}", "REGOLO_API_KEY: contains a space, control .* position 14$"),
        ("REGOLO_API_KEY", "Qwen3-Reranker-4B", "REGOLO_API_KEY: looks like a model"),
        ("REGOLO_BASE_URL", "ftp://x", "REGOLO_BASE_URL: must start with"),
        ("REGOLO_BASE_URL", f"https://u:{KEY}@h", "REGOLO_BASE_URL: must not contain a user"),
    ],
)
def test_a_wrong_environment_is_rejected_by_name(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    """The message names the variable and shows no key."""
    monkeypatch.setenv(name, value)
    with pytest.raises(InvalidInputError, match=f"^{message}") as caught:
        resolve(Options(**({"base_url": "https://h"} if name == "REGOLO_API_KEY" else {})), is_async=False)
    assert KEY not in f"{caught.value!r} {caught.value.__context__!r}"


def test_the_environment_names_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it, and if it is blank, the server is Regolo's own, which needs a key and is asked for no substitutes."""
    options = Options(api_key=KEY)
    for value in ("", " "):
        monkeypatch.setenv("REGOLO_BASE_URL", value)
        settings = resolve(options, is_async=False)
        assert settings.endpoint.url == "https://api.regolo.ai/rerank"
        assert settings.fields == {"disable_fallbacks": True}
    monkeypatch.setenv("REGOLO_BASE_URL", " https://rerank.example/v1 ")
    settings = resolve(options, is_async=False)
    assert (settings.endpoint.url, settings.fields) == ("https://rerank.example/v1/rerank", {})
    assert settings_of(
        base_url="https://api.regolo.ai", api_key="k", extra_body={"disable_fallbacks": False}
    ).fields == {"disable_fallbacks": False}


def test_without_a_key_the_error_names_both_ways_out() -> None:
    """Only Regolo's own service always requires one."""
    for api_key in (None, ""):
        with pytest.raises(MissingAPIKeyError, match=r"for eu\.regolo\.ai: .* REGOLO_API_KEY .*base_url='local://'"):
            settings_of(base_url="https://eu.regolo.ai/v1", api_key=api_key)
    assert settings_of(base_url="https://notregolo.ai").key is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_url": "local://", "http_client": httpx.Client()}, "http_client: local:// sends nothing"),
        ({"base_url": "local://", "async_http_client": httpx.AsyncClient()}, "http_client: local:// sends nothing"),
        ({"scorer": scores_of}, "scorer: needs base_url='local://', got rerank.example"),
        ({"base_url": "local://", "scorer": scores_of, "cache": {}}, "cache: cannot tell the scores of two scorers"),
        (
            {"base_url": "http://10.0.0.1", "api_key": KEY},
            "base_url: would send the API key to 10.0.0.1 over plain http",
        ),
    ],
)
def test_options_that_contradict_each_other_are_rejected(options: dict[str, Any], message: str) -> None:
    """An option that would have no effect, or send the key in the open, is an error of the call."""
    with pytest.raises(InvalidInputError, match=f"^{re.escape(message)}"):
        settings_of(**options)


def test_plain_http_is_allowed_on_request_and_on_this_machine() -> None:
    """Nothing is readable by others then, or the caller has accepted it."""
    options: list[dict[str, Any]] = [{"allow_http": True}, {"api_key": ""}, {"base_url": "http://localhost:1"}]
    for option in options:
        settings_of(**{"base_url": "http://10.0.0.1", "api_key": KEY, **option})


@pytest.mark.parametrize(
    ("options", "sync_timeout", "async_timeout"),
    [
        ({}, 60.0, 60.0),
        ({"http_client": httpx.Client()}, None, 60.0),
        ({"async_http_client": httpx.AsyncClient()}, 60.0, None),
        ({"http_client": httpx.Client(), "timeout": 60.0}, 60.0, 60.0),
        ({"base_url": "local://"}, None, None),
    ],
)
def test_a_timeout_that_is_given_applies_to_the_callers_client(
    options: dict[str, Any], sync_timeout: float | None, async_timeout: float | None
) -> None:
    """The default does not, because that client has timeouts of its own; the client and its options agree."""
    assert settings_of(**options).timeout == sync_timeout
    assert settings_of(**options, is_async=True).timeout == async_timeout
    options = {"base_url": "https://rerank.example", **options}
    for is_async, timeout in ((False, sync_timeout), (True, async_timeout)):
        assert resolve(RegoloClient(**options).options, is_async=is_async).timeout == timeout


@pytest.mark.parametrize(
    ("options", "name", "fields"),
    [
        ({}, "tagged", {}),
        ({"model": "bge"}, "plain", {}),
        ({"prompt_format": "chat", "model": "bge"}, "chat", {}),
        ({"base_url": "local://"}, "plain", {}),
        ({"base_url": "local://", "prompt_format": "tagged"}, "tagged", {}),
        ({"prompt_format": "server_template", "instruction": "i <|"}, "server_template", {"instruction": "i < |"}),
    ],
)
def test_the_prompt_format_and_its_fields(options: dict[str, Any], name: str, fields: dict[str, Any]) -> None:
    """Auto goes by the model, and the offline scorer gets plain text; extra_body has the last word."""
    settings = settings_of(**options)
    assert settings.prompt_format is PRESETS[name]
    assert settings.fields == fields
    own = PromptFormat(query="Q {query}", instruction_field="a")
    settings = settings_of(prompt_format=own, extra_body={"a": "j"})
    assert (settings.prompt_format, settings.fields) == (own, {"a": "j"})


@pytest.mark.parametrize(
    ("options", "warns"), [({"model": "bge", "instruction": "i"}, 1), ({"instruction": "i"}, 0), ({"model": "bge"}, 0)]
)
def test_an_instruction_without_a_place_is_a_warning(options: dict[str, Any], warns: int) -> None:
    """An option that is given is honoured, or the caller hears about it."""
    with warnings.catch_warnings(record=True, action="always") as caught:
        settings_of(**options)
    assert [(warning.category, warning.filename) for warning in caught] == [(RerankWarning, __file__)] * warns


# --- one list of options ----------------------------------------------------------------------------------------------


def defaults_of(model: Any) -> dict[str, Any]:
    """Return name and default of each option of a model."""
    return {name: field.default for name, field in model.model_fields.items()}


def test_client_and_options_have_the_same_names_and_defaults() -> None:
    """The constructor, its docstring and `Options` list the same options in the same order."""
    parameters = list(inspect.signature(RegoloClient).parameters.values())
    defaults = {parameter.name: parameter.default for parameter in parameters}
    assert defaults == defaults_of(Options)
    assert [parameter.name for parameter in parameters] == list(Options.model_fields)
    assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in parameters[1:])
    documented = re.findall(r"(?m)^    (\w+): ", inspect.getdoc(RegoloClient) or "")
    assert [name for name in documented if name in Options.model_fields] == list(Options.model_fields)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapters_have_the_clients_options(adapter: Any) -> None:
    """Only the default of top_n differs."""
    shared = {name: default for name, default in defaults_of(adapter).items() if name in Options.model_fields}
    expected = {**defaults_of(Options), "top_n": 5}
    assert shared == expected
    assert not ONLY_IN_ADAPTERS - adapter.model_fields.keys()


@pytest.mark.parametrize("path", [ROOT / "README.md", *(ROOT / "docs").glob("*.md")], ids=lambda path: path.name)
def test_tables_of_options_have_the_real_defaults(path: Path) -> None:
    """A table that lists `total_timeout` lists every option, with its default."""
    rows = dict(re.findall(r"(?m)^\| (`\w+`(?:, `\w+`)*) \| ([^|]*?) \|", path.read_text("utf-8")))
    defaults = {name: default for names, default in rows.items() for name in re.findall(r"\w+", names)}
    if "total_timeout" not in defaults:
        return
    assert defaults.keys() >= {*Options.model_fields, *ONLY_IN_ADAPTERS}
    for name, default in {**defaults_of(LangChainReranker), **defaults_of(Options)}.items():
        for shown in re.findall(r"`([^`]*)`", defaults.get(name, ""))[-1:]:
            assert ast.literal_eval(shown) == default, name


def test_the_client_shows_what_it_can() -> None:
    """`dir` lists the public methods and little else, and `help` prints the docstring."""
    methods = {"rerank", "score", "rerank_many", "close"}
    public = {name for name in dir(RegoloClient()) if not name.startswith("_")}
    assert public == methods | {f"a{name}" for name in methods} | {"options", "with_options"}
    text = re.sub(r".\x08", "", pydoc.render_doc(RegoloClient))  # bold letters are written twice
    for name in [*public, *Options.model_fields]:
        assert name in text
    assert all(getattr(RegoloClient, name).__doc__ for name in public)
    assert get_type_hints(RegoloClient.options.fget)["return"] is Options  # type: ignore[attr-defined]
