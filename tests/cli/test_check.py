import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from regolo_rerank import RegoloClient, RegoloError, __version__
from regolo_rerank._cli.findings import FITTING, PAIRS, Separation, Template, judge
from regolo_rerank._cli.main import main
from tests.conftest import KEY
from tests.support.models import concatenating, templating, told, without
from tests.support.stub import Received, Reply, Stub, error, results, scored

Answer = Callable[[Received], Reply]


@pytest.fixture
def checked(stub: Stub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Check the stub server, which answers as it is told; return exit status and report, as JSON or in lines."""

    def check(answer: Answer | None, *arguments: str, key: str | None = KEY, where: str = "argument") -> Any:
        if answer is not None:
            stub.reply = answer
        if key is not None:
            monkeypatch.setenv("REGOLO_API_KEY", key)
        if where == "environment":
            monkeypatch.setenv("REGOLO_BASE_URL", stub.url)
        status = main(["check", *(["--base-url", stub.url] if where == "argument" else []), *arguments])
        out, err = capsys.readouterr()
        assert err == ""
        assert KEY not in out
        return status, json.loads(out) if "--json" in arguments else out.splitlines()

    return check


@pytest.mark.parametrize(
    ("answer", "concatenates", "takes_instruction", "right"),
    [(concatenating, True, False, "chat"), (templating, False, True, "server_template")],
)
def test_the_right_format_is_found_by_what_the_server_scores(
    checked: Callable[..., Any],
    stub: Stub,
    answer: Answer,
    right: str,
    *,
    concatenates: bool,
    takes_instruction: bool,
) -> None:
    """On a server that concatenates and on one that templates, both findings name the format, with their numbers."""
    status, report = checked(answer, "--json")
    assert (status, report["problems"], len(stub.received)) == (0, [], 20)
    template = report["template"]
    assert (template["concatenates"], template["takes_instruction"]) == (concatenates, takes_instruction)
    assert (template["early"] == template["late"]) == concatenates
    assert (template["tasks"][0] != template["tasks"][1]) == takes_instruction
    assert report["formats"][right]["above"] == FITTING
    assert report["formats"][right]["difference"] == pytest.approx(0.7, abs=0.05)
    as_good = {right, "plain"} if answer is templating else {right}  # the template has an instruction of its own
    assert all(found["above"] < FITTING / 2 for name, found in report["formats"].items() if name not in as_good)
    assert report["verdict"] == {
        "prompt_format": right,
        "words": f"the findings agree: {right} goes with the server, and separates best",
        "agree": True,
    }
    assert report["line"] == f'RegoloClient(base_url="{stub.url}", prompt_format="{right}")'
    client: Any = eval(report["line"], {"RegoloClient": RegoloClient})  # noqa: S307 - our own
    assert (client.base_url, client.prompt_format) == (stub.url, right)


def test_a_person_reads_it_line_by_line(checked: Callable[..., Any], stub: Stub) -> None:
    """Versions first, then what was found in the order of the work, and the line of code last."""
    headers = {"x_litellm_model_group": "reranker", "x_litellm_call_id": "call-1", "x_litellm_key_rpm_limit": "5"}
    answer = told(concatenating, **headers, x_litellm_response_cost="0.001")
    status, lines = checked(answer)
    assert status == 0
    assert lines[0].startswith(f"regolo_rerank {__version__} · Python 3.")
    assert {"httpx", "langchain-core", "llama-index-core"} <= set(re.findall(r"· ([\w-]+) \d", lines[0]))
    assert lines[1:4] == [
        f"address     {stub.url}/rerank (argument)",
        "proxy       none",
        "key         set in REGOLO_API_KEY, accepted",
    ]
    assert re.fullmatch(r"reached     in \d+\.\d ms, the median of 5 \(\d+\.\d to \d+\.\d\)", lines[4])
    assert lines[5:9] == [
        "model       Qwen3-Reranker-4B, answered by reranker",
        "request     call-1",
        "limits      x-litellm-key-rpm-limit: 5",
        "cost        20 requests, 0.020000 US dollars",
    ]
    assert re.fullmatch(r"template    .* Rome.* score (0\.\d{6}) and \1: exactly the same, .* no template", lines[9])
    assert re.fullmatch(r" {12}two tasks .* score (0\.\d{6}) and \1: it changes nothing", lines[10])
    assert [line.split()[0] for line in lines[12:17]] == ["tagged", "documented", "chat", "server_template", "plain"]
    assert re.fullmatch(r"  chat +12 of 12, \+0\.\d{4}", lines[14])
    assert lines[-2].startswith("the findings agree: chat")
    assert lines[-1] == f'RegoloClient(base_url="{stub.url}", prompt_format="chat")'


def by_tags(request: Received) -> Reply:
    """Answer as a server with a template does whose model was trained on tags beside it."""
    scores = [float(templating(request).body["results"][0]["relevance_score"] % 0.1)] * len(request.documents)
    for index, text in enumerate(request.documents):
        fits = any(text.endswith(tuple(fitting)) for fitting, _ in PAIRS.values())
        scores[index] += 0.5 * (fits and text.startswith("<Document>"))
    return Reply(results(*enumerate(scores)))


def test_findings_that_disagree_are_told(checked: Callable[..., Any]) -> None:
    """Where the server takes an instruction, and tags separate better all the same, the report says both."""
    status, lines = checked(by_tags)
    assert status == 0
    assert lines[-2].startswith("the findings disagree: tagged separates best (12 of 12, +")
    assert "by what the server does with its strings it should be server_template (" in lines[-2]
    assert "prompt_format" not in lines[-1]


def test_a_model_that_separates_nothing_is_no_success(checked: Callable[..., Any]) -> None:
    """A server that scores at random gets no format named, and status 1."""
    status, report = checked(scored, "--json")
    assert (status, report["verdict"]["prompt_format"], "line" in report) == (1, None, False)
    assert report["problems"] == [
        "no format separates the pairs that fit from the others, so none can be named: is this model a reranker?"
    ]


def test_a_server_that_refuses_the_field_is_checked_too(checked: Callable[..., Any]) -> None:
    """A format that the server refuses is told with the server's words, and the others are measured."""
    status, report = checked(without("instruction", concatenating), "--json")
    assert (status, report["verdict"]["prompt_format"]) == (0, "chat")
    assert report["template"]["tasks"] is None
    assert "Extra inputs are not permitted" in report["formats"]["server_template"]["error"]
    _, lines = checked(None)
    assert "            the field instruction is refused" in lines
    assert any(re.match(r"  server_template +.*Extra inputs are not permitted", line) for line in lines)


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (lambda _: error("no such key", 401), "AuthenticationError: no such key .*; check the key in REGOLO_API_KEY"),
        (lambda _: error("not yours", 403), "PermissionDeniedError: not yours .*; check whether this key may use"),
        (lambda _: error("Invalid model name", 400), "BadRequestError: .*; check the model's name"),
        (lambda _: Reply({"detail": "Not Found"}, 404), "NotFoundError: .* see base_url"),
        (lambda _: error("slow down", 429), "RateLimitError: slow down .*; wait a minute"),
        (lambda _: error("down", 503), "ServerError: down .*; the service fails"),
        (lambda _: Reply(b"<html>"), "APIResponseError: the reply cannot be trusted"),
        (
            told(concatenating, x_litellm_attempted_fallbacks="1", x_litellm_model_group="other"),
            "APIResponseError: .*'Qwen3-Reranker-4B' was asked for, and 'other' has answered in its place",
        ),
    ],
)
def test_what_is_wrong_is_told_with_what_to_do(checked: Callable[..., Any], answer: Answer, problem: str) -> None:
    """A failure ends the check with status 1, after what was known before it."""
    status, lines = checked(answer)
    assert status == 1
    assert re.match(f"wrong       {problem}", lines[-1])
    refused = re.search("Authentication|Permission", problem)
    assert lines[3] == f"key         set in REGOLO_API_KEY, {'refused' if refused else 'not tried'}"


def test_a_missing_key_is_told_before_anything_is_sent(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Regolo's own address needs a key, and the report says where it belongs."""
    assert main(["check"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:4] == [
        "address     https://api.regolo.ai/rerank (default)",
        "proxy       none",
        "key         none is set in REGOLO_API_KEY",
    ]
    assert lines[-1].startswith("wrong       MissingAPIKeyError: no API key for api.regolo.ai: set the environment")


def test_an_address_that_is_none_is_told(checked: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrong environment is told by the variable's name, with status 1."""
    monkeypatch.setenv("REGOLO_BASE_URL", "api.regolo.ai")
    status, lines = checked(None, where="nowhere")
    assert (status, lines[1:]) == (
        1,
        ["wrong       InvalidInputError: REGOLO_BASE_URL: must start with https://, http:// or be local://"],
    )


def test_what_the_environment_says_stays_out_of_the_line(checked: Callable[..., Any], stub: Stub) -> None:
    """The address is told with where it comes from, and code needs only what neither default nor environment has."""
    _, lines = checked(concatenating, "--model", "BAAI/any", "--instruction", 'a "task"', where="environment", key=None)
    assert lines[1] == f"address     {stub.url}/rerank (environment)"
    assert lines[3] == "key         none is set in REGOLO_API_KEY"
    assert lines[-1] == 'RegoloClient(model="BAAI/any", instruction="a \\"task\\"", prompt_format="chat")'


def test_a_proxy_is_told_without_its_password(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Who is asked on the way to the server is named, and not how."""
    monkeypatch.setenv("HTTPS_PROXY", "http://user:secret@127.0.0.1:9")
    assert main(["check"]) == 1
    out = capsys.readouterr().out
    assert "proxy       http://127.0.0.1:9\n" in out
    assert "secret" not in out


def test_nothing_that_a_server_quotes_shows_the_key_or_moves_the_cursor(checked: Callable[..., Any]) -> None:
    """The key is masked in what is printed of a reply, and control characters are harmless."""
    answer = told(
        concatenating,
        x_litellm_model_group=f"\x9b2J{KEY}",
        x_litellm_call_id=f"call {KEY}",
        x_ratelimit_limit_requests=f"{KEY} 5",
    )
    for arguments in ((), ("--json",)):
        status, report = checked(answer, *arguments)
        assert status == 0
        assert "***" in str(report)
        assert "\x9b" not in str(report)


def test_the_embedded_endpoint_is_checked_too(capsys: pytest.CaptureFixture[str]) -> None:
    """`--local` needs nothing, and ends with the line that works there."""
    assert main(["check", "--local"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith('RegoloClient(base_url="local://"')


AT_RANDOM = Separation(3, 0.01)


@pytest.mark.parametrize(
    ("template", "separations", "chosen", "words"),
    [
        (Template(0.4, 0.5, 0.4, (0.4, 0.4)), {"tagged": Separation(12, 0.9)}, "tagged", "agree: tagged goes with"),
        (Template(0.4, 0.4, 0.4, (0.4, 0.4)), {"plain": Separation(6, 0.1)}, "plain", "agree: plain goes with"),
        (
            Template(0.4, 0.4, 0.4, (0.4, 0.4)),
            {"server_template": Separation(9, 0.5), "plain": Separation(9, 0.5), "chat": Separation(9, 0.499)},
            "chat",
            "agree: chat goes with the server",
        ),
        (
            Template(0.4, 0.4, 0.4, (0.4, 0.6)),
            {"server_template": Separation(12, 0.5)},
            "server_template",
            "disagree: .* put together as they are, yet the field instruction has an effect",
        ),
        (
            Template(0.4, 0.5, 0.4, (0.4, 0.6)),
            {"chat": Separation(12, 0.5), "server_template": AT_RANDOM},
            "chat",
            r"disagree: chat separates best .* it should be server_template \(3 of 12, \+0\.0100\)",
        ),
        (
            Template(0.4, 0.4, 0.4, (0.4, 0.4)),
            {"chat": Separation(8, 0.5), "tagged": Separation(12, 0.4)},
            "chat",
            r"disagree: .* more pairs that fit stand above every other with tagged \(12 of 12",
        ),
        (Template(0.4, 0.5, 0.4, (0.4, 0.6)), {"chat": AT_RANDOM}, None, "no format separates"),
        (Template(0.4, 0.5, 0.4, None), {"chat": RegoloError("no")}, None, "no format separates"),
        (Template(0.4, 0.5, 0.4, None), {"chat": Separation(12, -0.1)}, None, "no format separates"),
    ],
)
def test_both_findings_count(template: Template, separations: Any, chosen: str | None, words: str) -> None:
    """The best difference decides, what the server does breaks ties, and every contradiction is named."""
    verdict = judge(template, separations, "chat")
    assert verdict.prompt_format == chosen
    assert re.search(words, verdict.words)
    assert verdict.agree == ("findings agree" in verdict.words)


@pytest.mark.parametrize(
    ("template", "concatenates"),
    [
        (Template(0.4, 0.4 + 1e-7, 0.4, None), True),
        (Template(0.4, 0.4 + 1e-3, 0.4 + 1e-3, None), True),
        (Template(0.4, 0.41, 0.4, None), False),
        (Template(0.0, 0.0, 0.0, None), None),
        (Template(1.0, 1.0, 1.0, None), None),
        (Template(0.0, 0.5, 0.0, None), False),
    ],
)
def test_noise_is_no_template(template: Template, *, concatenates: bool | None) -> None:
    """Scores that differ by no more than those of one request are the same; at the ends of the scale who knows."""
    assert template.concatenates is concatenates


def test_a_dozen_pairs_fit_and_as_many_do_not() -> None:
    """There are twelve of each, all of them different texts."""
    texts = [text for fitting, others in PAIRS.values() for text in [*fitting, *others]]
    assert (FITTING, len(texts), len(set(texts))) == (12, 24, 24)
