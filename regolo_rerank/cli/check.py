"""Check the API key, server, model and prompt format: `regolo-rerank check`.

The report has the verdict first, then the line of code to use, then the evidence. It never contains the key.
"""

import json
import platform
import re
import time
import warnings
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from statistics import mean, median
from typing import Any, Final
from urllib.request import getproxies, proxy_bypass

import httpx
from rich.table import Table
from rich.text import Text

from regolo_rerank import errors
from regolo_rerank._version import __version__
from regolo_rerank.cli.options import open_client, server_of, shell_words
from regolo_rerank.cli.terminal import clean, out, print_json, show
from regolo_rerank.client import RegoloClient
from regolo_rerank.prompts import DEFAULT_INSTRUCTION, PRESETS, PromptFormat, preset_for

__all__ = ["run"]

_CLEAR: Final = 3
"""A format is clearly better if it ranks this many more matching pairs above all others ..."""
_CLEAR_GAP: Final = 1.5
"""... or as many, with a score gap that is this many times as large."""
_NOISE: Final = 1e-5
"""Scores of one pair in two requests differ by less on a pointwise model (1.2e-7 was measured)."""
_LISTWISE: Final = 1e-3
_OTHER_TASK: Final = "Given the name of a dish, retrieve recipes"
_PACKAGES: Final = ("httpx", "pydantic", "langchain-core", "llama-index-core")
_LIMITS: Final = re.compile(r"x-ratelimit-.*|x-litellm-key-.*|retry-after.*")
_ADVICE: Final[dict[type[errors.RegoloError], str]] = {
    errors.AuthenticationError: "It may belong to another server.",
    errors.PermissionDeniedError: "Check whether this key may use this model.",
    errors.BadRequestError: "Check --model.",
    errors.APIConnectionError: "Check --base-url, the network and the proxy.",
}


class _Prober:
    """Sends requests, and adds up what they took."""

    def __init__(self, client: RegoloClient) -> None:
        self._client = client
        self.last: httpx.Response | None = None
        self.milliseconds: list[float] = []
        self.models: list[str] = []
        self.request_id: str | None = None
        self.usage = {"requests": 0, "total_tokens": 0, "cost": 0.0}
        self.scores: set[float] = set()

    def note(self, response: httpx.Response) -> None:
        """Remember a reply. The HTTP client calls this."""
        self.last = response

    def ask(self, prompt_format: PromptFormat, query: str, documents: list[str], task: str) -> list[float]:
        """Return the score of each document."""
        started = time.perf_counter()
        response = self._client.with_options(prompt_format=prompt_format).rerank(query, documents, instruction=task)
        self.milliseconds.append(1_000 * (time.perf_counter() - started))
        if response.model and response.model not in self.models:
            self.models.append(response.model)
        self.request_id = next(iter(response.request_ids), self.request_id)
        for name in self.usage:
            self.usage[name] += getattr(response.usage, name) or 0
        scores = {result.index: result.relevance_score for result in response}
        self.scores.update(scores.values())
        return [scores[index] for index in range(len(documents))]


def run(*, as_json: bool, **options: Any) -> int:
    """Run the command and return its exit status."""
    server = server_of(options)
    is_local = server.startswith("local:")
    report: dict[str, Any] = {"verdict": "", "problem": None, "line": None, "warnings": []}
    failure: errors.RegoloError | None = None
    # Each warning of the client is about a finding of the report.
    ignored = warnings.catch_warnings(action="ignore", category=errors.RerankWarning)
    with ignored, httpx.Client(timeout=options.setdefault("timeout", 60.0)) as http:
        with open_client(options, **({} if is_local else {"http_client": http})) as client:
            prober = _Prober(client)
            http.event_hooks = {"response": [prober.note]}
            try:
                _check(client, prober, report, is_local=is_local)
            except errors.InvalidInputError:
                raise
            except errors.RegoloError as error:
                failure = error
            http.event_hooks = {"response": []}
        models = _read_models(http, prober.last) if prober.last else {}
    if failure:
        has_key = prober.last is not None and "authorization" in prober.last.request.headers
        if isinstance(failure, errors.AuthenticationError | errors.MissingAPIKeyError) and not has_key:
            report["problem"] = (
                "No key was sent, and the server requires one: set the environment variable REGOLO_API_KEY."
            )
        else:
            advice = next((words for kind, words in _ADVICE.items() if isinstance(failure, kind)), "")
            report["problem"] = f"{shell_words(str(failure)).rstrip('.')}. {advice}".rstrip()
            if models and client.options.model not in models:
                report["problem"] += f" Rerank models of this server: {_name_models(models)}."
    report["verdict"] = report["problem"] or report["verdict"]
    if report["line"] is not None:
        used = {name: options[name] for name in ("base_url", "model", "instruction", "allow_http") if name in options}
        used |= {"base_url": server} if "base_url" in options else {}
        shown = {name: json.dumps(value) if isinstance(value, str) else value for name, value in used.items()}
        report["line"] = (
            f"RegoloClient({', '.join(f'{name}={value}' for name, value in (shown | report['line']).items())})"
        )
    report |= _describe(client, prober, models, server, is_local=is_local)
    if as_json:
        print_json({name: value for name, value in report.items() if value not in (None, [], {})})
    else:
        _print(report)
    return 1 if report["problem"] else 0


def _check(client: RegoloClient, prober: _Prober, report: dict[str, Any], *, is_local: bool) -> None:
    """Ask the server, and add the findings to the report."""
    task, given = client.options.instruction, client.options.prompt_format
    pairs = json.loads((files("regolo_rerank.cli") / "check_pairs.json").read_text("utf-8"))
    first = pairs[0]["query"], pairs[0]["matching"] + pairs[0]["others"]
    if is_local:
        prober.ask(PRESETS["plain"], *first, task)
        report |= {"verdict": "OK: the offline scorer works.", "line": {}}
        return
    preferred = preset_for(client.options.model) if given == "auto" else PRESETS[str(given)]
    default = next(name for name, preset in PRESETS.items() if preset == preferred)
    report["template"] = list(_probe_template(prober))
    formats = report["formats"] = _compare_formats(prober, pairs, task)
    alone, together = (prober.ask(preferred, first[0], first[1][:count], task)[0] for count in (1, len(first[1])))
    if abs(alone - together) > _LISTWISE:
        report["warnings"].append(
            f"a score changes from {alone:.4f} to {together:.4f} when other documents are added. With such a listwise "
            "model, a cache and rankings of several batches are not exact."
        )
    useful = {name: found for name, found in formats.items() if 2 * found.get("above", 0) >= found.get("of", 1)}
    if len(prober.scores) == 1:
        report["problem"] = f"All scores are equal ({alone:.4f}). Is this model a reranker?"
    elif not useful:
        report["problem"] = "No prompt format tells matching pairs from others. Is this model a reranker?"
    else:
        best = max(useful, key=lambda name: (name == default, useful[name]["above"], useful[name]["gap"]))
        for name, found in useful.items():
            more = found["above"] - useful[best]["above"]
            if more >= _CLEAR or (more >= 0 and found["gap"] > _CLEAR_GAP * useful[best]["gap"]):
                best = name
        how = f"{useful[best]['above']} of {useful[best]['of']} matching pairs rank above all others"
        if best == default and given == "auto":
            report |= {"verdict": f"OK: the default prompt format, {best}, works ({how}).", "line": {}}
        else:
            report["verdict"] = f'OK: use prompt_format="{best}" ({how}).'
            report["line"] = {"prompt_format": f'"{best}"'}


def _probe_template(prober: _Prober) -> Iterator[str]:
    """Find out whether the server applies a template, by splitting one text in two ways."""
    raw, with_task = PromptFormat(escape=False), PromptFormat(escape=False, instruction_field="instruction")
    late, early, again = (
        prober.ask(raw, query, [document], DEFAULT_INSTRUCTION)[0]
        for query, document in (("What is", " Rome?"), ("What", " is Rome?"), ("What is", " Rome?"))
    )
    noise = max(_NOISE, 2 * abs(late - again))
    if abs(late - early) > noise:
        found = "different scores: the server keeps query and document apart (template or separator)"
    elif late in {0.0, 1.0}:
        found = "inconclusive: the scores are at the end of the scale"
    else:
        found = "same score: the server concatenates query and document, so it applies no template"
    yield f'"What is" + " Rome?" {late:.6f}, "What" + " is Rome?" {early:.6f}: {found}'
    try:
        one, other = (
            prober.ask(with_task, "What is", [" Rome?"], task)[0] for task in (DEFAULT_INSTRUCTION, _OTHER_TASK)
        )
    except errors.BadRequestError:
        yield "the server rejects the field instruction"
    else:
        effect = "uses" if abs(one - other) > noise else "ignores"
        yield f"two instructions {one:.6f}, {other:.6f}: the server {effect} the field instruction"


def _compare_formats(prober: _Prober, pairs: list[dict[str, Any]], task: str) -> dict[str, dict[str, Any]]:
    """Measure how well each format tells matching pairs from others."""
    found: dict[str, dict[str, Any]] = {}
    for name, prompt_format in PRESETS.items():
        matching: list[float] = []
        others: list[float] = []
        try:
            for pair in pairs:
                scores = prober.ask(prompt_format, pair["query"], pair["matching"] + pair["others"], task)
                matching += scores[: len(pair["matching"])]
                others += scores[len(pair["matching"]) :]
        except errors.BadRequestError as error:
            found[name] = {"error": str(error)}
        else:
            above = sum(score > max(others) for score in matching)
            found[name] = {"above": above, "of": len(matching), "gap": mean(matching) - mean(others)}
    return found


def _read_models(http: httpx.Client, last: httpx.Response) -> dict[str, int | None]:
    """Return the server's rerank models and their context lengths, as far as it reports them."""
    headers = {name: value for name, value in last.request.headers.items() if not name.startswith("content-")}
    root = last.request.url.path.removesuffix("/rerank").removesuffix("/v1")
    found: dict[str, int | None] = {}
    for path in ("/v1/models", "/model/info"):
        try:
            url = last.request.url.copy_with(path=root + path)
            for entry in http.get(url, headers=headers, timeout=10.0).raise_for_status().json()["data"]:
                name, details = entry.get("id") or entry["model_name"], entry.get("model_info") or {}
                if "rerank" in name.lower() or details.get("mode") == "rerank":
                    found[name] = entry.get("max_model_len") or details.get("max_input_tokens") or found.get(name)
        except (httpx.HTTPError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return found


def _name_models(models: dict[str, int | None]) -> str:
    return ", ".join(f"{name} ({size:,} tokens)" if isinstance(size, int) else name for name, size in models.items())


def _describe(
    client: RegoloClient, prober: _Prober, models: dict[str, int | None], server: str, *, is_local: bool
) -> dict[str, Any]:
    """Return the evidence other than scores."""
    report: dict[str, Any] = {"server": "offline scorer" if is_local else server}
    if not is_local:
        url = httpx.URL(server)
        proxy = "" if proxy_bypass(url.host) else getproxies().get(url.scheme, "")
        key = prober.last.request.headers.get("authorization", "").removeprefix("Bearer ") if prober.last else ""
        headers = prober.last.headers if prober.last else {}
        limits = {name: value for name, value in headers.items() if _LIMITS.fullmatch(name)}
        report |= {
            "proxy": re.sub(r"(?<=//)[^/@]*@", "", proxy) or None,
            "api_key": "sent" if key else "not sent",
            "model": client.options.model,
            "answered_by": ", ".join(prober.models) or None,
            "models": _name_models(models) or None,
            "limits": {name: value for name, value in limits.items() if not key or key not in value},
        }
    if prober.milliseconds:
        report["latency_ms"] = {"median": median(prober.milliseconds), "max": max(prober.milliseconds)}
        report["request_id"] = prober.request_id
        report["usage"] = {name: round(value, 9) for name, value in prober.usage.items() if value}
    report["versions"] = {"regolo_rerank": __version__, "Python": platform.python_version()}
    for package in _PACKAGES:
        try:
            report["versions"][package] = version(package)
        except PackageNotFoundError:
            continue
    return report


def _print(report: dict[str, Any]) -> None:
    show(Text(clean(report["verdict"]), style="bold red" if report["problem"] else "bold green"))
    for warning in report["warnings"]:
        show(Text(f"Warning: {clean(warning)}", style="yellow"))
    out().print(Text(f"\n  {report['line']}\n" if report["line"] else ""), soft_wrap=True)
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for label, words in _rows(report):
        if words:
            table.add_row(label, Text(clean(words)))
    show(table)


def _rows(report: dict[str, Any]) -> Iterator[tuple[str, str | None]]:
    yield "server", report["server"]
    yield "proxy", report.get("proxy")
    yield "API key", report.get("api_key")
    answered = f", answered by {report['answered_by']}" if report.get("answered_by") else ""
    yield "model", report.get("model", "") + answered
    yield "rerank models", report.get("models")
    if latency := report.get("latency_ms"):
        yield "latency", f"median {latency['median']:.1f} ms, at most {latency['max']:.1f} ms"
    yield "request id", report.get("request_id")
    yield "limits", ", ".join(f"{name}: {value}" for name, value in report.get("limits", {}).items())
    yield "usage", ", ".join(f"{name}: {value:,}".replace("_", " ") for name, value in report.get("usage", {}).items())
    yield from zip(("template", ""), report.get("template", []), strict=False)
    if "formats" in report:
        yield "formats", "matching pairs ranked above all others, mean score gap"
    for name, found in report.get("formats", {}).items():
        yield f"  {name}", found.get("error") or f"{found['above']:2} of {found['of']}, {found['gap']:+.4f}"
    yield "versions", " · ".join(f"{name} {number}" for name, number in report["versions"].items())
