"""Whether key, address, model and prompt format work: `regolo-rerank check`, for a first try and for a bug report."""

import json
import os
import platform
import re
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from statistics import median
from typing import Any, Final

import httpx
from pydantic import PrivateAttr

from regolo_rerank._cli.common import find_encoding, open_client
from regolo_rerank._cli.findings import FITTING, Separation, judge, probe_template, separate
from regolo_rerank._core.config import RequestConfig
from regolo_rerank._display.tables import encodable, harmless
from regolo_rerank._transports.clients import proxy_for
from regolo_rerank._version import __version__
from regolo_rerank._wire.checks import API_KEY_VARIABLE, read_environment_key
from regolo_rerank._wire.endpoint import BASE_URL_VARIABLE
from regolo_rerank._wire.masking import mask
from regolo_rerank.client import RegoloClient
from regolo_rerank.errors import (
    APIConnectionError,
    AuthenticationError,
    BadRequestError,
    PermissionDeniedError,
    RateLimitError,
    RegoloError,
    ServerError,
)
from regolo_rerank.prompts import PRESETS, PromptFormat, preset_for

__all__ = ["run_check"]

_PACKAGES: Final = ("httpx", "pydantic", "langchain-core", "llama-index-core")
_ACCEPTED: Final = {True: "accepted", False: "refused", None: "not tried"}
_LIMITS: Final = re.compile(r"x-ratelimit-.*|x-litellm-key-.*|retry-after.*")
_ADVICE: Final[dict[type[RegoloError], str]] = {
    AuthenticationError: f"check the key in {API_KEY_VARIABLE}, and whether it belongs to this server",
    PermissionDeniedError: "check whether this key may use this model",
    BadRequestError: "check the model's name",
    RateLimitError: "wait a minute, and try again",
    APIConnectionError: "check the address, the network and the proxy",
    ServerError: "the service fails; try again later, and name the request where you report it",
}


class RecordingClient(RegoloClient):
    """A client that keeps the headers of its last reply.

    Raises:
        pydantic.ValidationError: As in `RegoloClient`.
    """

    _headers: httpx.Headers = PrivateAttr(default_factory=httpx.Headers)

    @property
    def headers(self) -> httpx.Headers:
        """The headers of the last reply; none before the first."""
        return self._headers

    def _client_for(self, config: RequestConfig) -> httpx.Client:
        client = super()._client_for(config)
        client.event_hooks = {"response": [self._note]}
        return client

    def _note(self, response: httpx.Response) -> None:
        self._headers = response.headers


class _Tally:
    """Asks a server, and adds up what that takes."""

    def __init__(self, client: RecordingClient) -> None:
        self._client = client
        self.milliseconds: list[float] = []
        self.models: dict[str | None, None] = {}
        self.request_id: str | None = None
        self.requests = 0
        self.tokens = self.cost = 0.0
        self.tells_tokens = self.tells_cost = False

    def ask(self, prompt_format: PromptFormat, query: str, documents: list[str], instruction: str) -> list[float]:
        self._client.prompt_format = prompt_format
        started = time.perf_counter()
        response = self._client.rerank(query, documents, top_n=len(documents), instruction=instruction)
        self.milliseconds.append(1_000 * (time.perf_counter() - started))
        self.models[response.model] = None
        self.request_id = next(reversed(response.request_ids), None)
        usage = response.usage
        self.requests += usage.requests
        self.tokens += usage.total_tokens or 0
        self.cost += usage.cost or 0.0
        self.tells_tokens |= usage.total_tokens is not None
        self.tells_cost |= usage.cost is not None
        scores = {result.index: result.relevance_score for result in response.results}
        return [scores[index] for index in range(len(documents))]


def run_check(*, as_json: bool, **options: Any) -> int:
    """Check, and print what was found.

    Args:
        as_json: Whether to print one JSON object.
        **options: Options of the client.

    Returns:
        The exit status: 0, or 1 where something is wrong.

    Raises:
        InvalidInputError: An option is wrong.
    """
    open_client(options)  # whose error is told in one line
    with RecordingClient(**options) as client:
        report = check(client)
    if as_json:
        print(json.dumps(report))
    else:
        print(*(encodable(line, find_encoding()) for line in describe(report)), sep="\n")
    return 1 if report["problems"] else 0


def check(client: RecordingClient) -> dict[str, Any]:
    """Find out what works, by about twenty requests.

    Args:
        client: Who asks, with the options to check.

    Returns:
        What was found, as JSON; nothing of the key. `problems` says what is wrong, `line` is the code to use.
    """
    problems: list[str] = []
    report: dict[str, Any] = {"versions": _versions(), "problems": problems}
    tally = _Tally(client)
    try:
        _add_settings(client, report)
        template = probe_template(tally.ask)
        report["milliseconds"] = {"median": median(tally.milliseconds), "all": list(tally.milliseconds)}
        separations = separate(tally.ask, client.instruction)
        preset = preset_for(client.model, embedded=client.endpoint().embedded)
        by_default = next(name for name, each in PRESETS.items() if each == preset)
        verdict = judge(template, separations, by_default)
        report["template"] = {
            **template._asdict(),
            "concatenates": template.concatenates,
            "takes_instruction": template.takes_instruction,
            "words": list(template.describe()),
        }
        report["formats"] = {
            name: found._asdict() if isinstance(found, Separation) else {"error": str(found)}
            for name, found in separations.items()
        }
        report["verdict"] = verdict._asdict()
        if verdict.prompt_format is None:
            problems.append(verdict.words)
        else:
            report["line"] = _line(client, verdict.prompt_format, by_default)
    except RegoloError as error:
        advice = next((words for kind, words in _ADVICE.items() if isinstance(error, kind)), None)
        problems.append(f"{type(error).__name__}: {error}" + (f"; {advice}" if advice else ""))
        if isinstance(error, AuthenticationError | PermissionDeniedError):
            report["key"]["accepted"] = False
    if tally.requests:
        report["key"]["accepted"] = True if client.key_for(client.endpoint()) else None
        report |= _replies(client, tally)
    return report


def _versions() -> dict[str, str]:
    found = {"regolo_rerank": __version__, "Python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _add_settings(client: RecordingClient, report: dict[str, Any]) -> None:
    """Add where requests would go and by what, and whether a key would go with them."""
    endpoint = client.endpoint()
    if client.base_url is not None:
        origin = "argument"
    else:
        origin = "environment" if os.environ.get(BASE_URL_VARIABLE, "").strip() else "default"
    proxy = proxy_for(endpoint)
    report["address"] = {"url": str(endpoint.url.copy_with(query=None)), "from": origin}
    report["proxy"] = None if proxy is None else str(httpx.URL(proxy).copy_with(userinfo=b""))
    report["model"] = {"asked": client.model, "answered": None}
    is_set = bool(read_environment_key().get_secret_value())
    report["key"] = {"set": is_set, "from": API_KEY_VARIABLE, "accepted": None}
    client.key_for(endpoint)  # refused before anything is sent


def _replies(client: RecordingClient, tally: _Tally) -> dict[str, Any]:
    """Return what replies tell besides scores."""
    key = client.key_for(client.endpoint())
    names = [name for name in tally.models if name is not None]
    return {
        "model": {"asked": client.model, "answered": names[0] if len(names) == 1 else names or None},
        "request_id": tally.request_id,
        "limits": {name: mask(text, key) for name, text in client.headers.items() if _LIMITS.fullmatch(name)},
        "usage": {
            "requests": tally.requests,
            "total_tokens": int(tally.tokens) if tally.tells_tokens else None,
            "cost": tally.cost if tally.tells_cost else None,
        },
    }


def _line(client: RecordingClient, prompt_format: str, by_default: str) -> str:
    """Return the code that makes a client of what was checked; what is so anyway is left out."""
    options = {
        name: getattr(client, name)
        for name in ("base_url", "model", "instruction")
        if getattr(client, name) != type(client).model_fields[name].default
    }
    if prompt_format != by_default:
        options["prompt_format"] = prompt_format
    return f"RegoloClient({', '.join(f'{name}={json.dumps(value)}' for name, value in options.items())})"


def describe(report: dict[str, Any]) -> Iterator[str]:
    """Yield what a person reads of a report, the code to use last, or what is wrong."""
    yield " · ".join(f"{name} {number}" for name, number in report["versions"].items())
    for name, words in _rows(report):
        yield f"{name:10}  {words}"
    for name, found in report.get("formats", {}).items():
        words = harmless(found["error"]) if "error" in found else str(Separation(**found))
        yield f"  {name:15}  {words}"
    if "verdict" in report and "line" in report:
        yield report["verdict"]["words"]
    for problem in report["problems"]:
        yield f"{'wrong':10}  {harmless(problem)}"
    if "line" in report:
        yield report["line"]


def _rows(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if "address" in report:
        yield "address", f"{report['address']['url']} ({report['address']['from']})"
        yield "proxy", report["proxy"] or "none"
    if "key" in report:
        yield "key", _describe_key(report["key"])
    if "milliseconds" in report:
        each = report["milliseconds"]["all"]
        middle = f"in {report['milliseconds']['median']:.1f} ms"
        yield "reached", f"{middle}, the median of {len(each)} ({min(each):.1f} to {max(each):.1f})"
    if "usage" in report:
        answered = report["model"]["answered"]
        said = "the server does not say which one answered" if answered is None else f"answered by {answered}"
        yield "model", harmless(f"{report['model']['asked']}, {said}")
        yield "request", harmless(report["request_id"] or "the server names none")
        limits = "; ".join(f"{name}: {text}" for name, text in report["limits"].items())
        yield "limits", harmless(limits or "the server names none")
        cost, tokens = report["usage"]["cost"], report["usage"]["total_tokens"]
        told = [f"{report['usage']['requests']} requests"]
        told += [] if tokens is None else [f"{tokens:,} tokens"]
        told += ["the server names no price" if cost is None else f"{cost:.6f} US dollars"]
        yield "cost", ", ".join(told)
    if "template" in report:
        yield from zip(("template", ""), report["template"]["words"], strict=False)
        yield "formats", f"pairs that fit and score above every other, of {FITTING}; mean difference of their scores"


def _describe_key(key: dict[str, Any]) -> str:
    if not key["set"]:
        return f"none is set in {key['from']}"
    return f"set in {key['from']}, {_ACCEPTED[key['accepted']]}"
