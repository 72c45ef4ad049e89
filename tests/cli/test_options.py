import re
import subprocess
import sys
from pathlib import Path

import pytest

from regolo_rerank import RegoloClient, __version__
from regolo_rerank._version import install_hint
from regolo_rerank.cli.options import shell_words
from tests.cli.conftest import Run, write_lines
from tests.conftest import KEY
from tests.support.stub import Stub

COMMANDS = "rank", "bulk", "evaluate", "check", "demo"
SHARED = re.findall(
    "--[a-z-]+",
    "--base-url --local --model --instruction --prompt-format --timeout --total-timeout --max-retries "
    "--max-concurrency --batch-size --max-document-chars --header --extra-body --allow-http --no-key",
)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_80_columns_and_has_its_own_examples_only(command: str, run: Run) -> None:
    """No line wraps in a small terminal."""
    done = run(command, "--help")
    assert done.status == 0
    assert max(map(len, done.out.splitlines())) <= 80
    others = {each for each in COMMANDS if f"regolo-rerank {each} " in done.out} - {command}
    assert not others


@pytest.mark.parametrize("command", ["rank", "bulk", "evaluate", "check"])
def test_four_commands_have_the_same_options(command: str, run: Run) -> None:
    """A server that `rank` can use can be checked and measured too."""
    assert set(SHARED) <= set(re.findall(r"--[a-z-]+", run(command, "--help").out))


def test_help_shows_defaults_and_choices(run: Run) -> None:
    """The defaults are those of the client, and names keep their capitals."""
    assert "Check the API key, server" in run("check", "--help").out
    words = " ".join(run("rank", "--help").out.split())
    options = RegoloClient(base_url="local://").options
    for name in ("model", "timeout", "total_timeout", "max_retries", "max_concurrency", "batch_size"):
        assert re.search(rf"--{name.replace('_', '-')} [A-Z]+ [^(]*\(default: {getattr(options, name)}\)", words)
    assert "auto, tagged, documented, chat, server_template, plain (default: auto)" in words


def test_without_arguments_the_help_is_printed(run: Run) -> None:
    """It lists the commands."""
    done = run()
    assert (done.status, done.out) == (0, run("--help").out)
    assert all(f"\n    {command} " in done.out for command in COMMANDS)
    assert run("--version").out == f"regolo-rerank {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["rank", "q", "--top-n", "0"], "--top-n must be at least 1, got 0 (see regolo-rerank rank --help)"),
        (["rank", "q", "--top-n", "x"], "--top-n must be a whole number, got 'x'"),
        (["rank", "q", "--threshold", "nan"], "--threshold must be a number, got nan"),
        (["check", "--max-retries", "-1"], "--max-retries must be at least 0, got -1"),
        (["check", "--timeout", "0"], "--timeout must be at least 0.001, got 0"),
        (["check", "--topn", "3"], "unknown argument --topn (see regolo-rerank check --help)"),
        (["rank", "q", "--topn", "3"], "unknown argument --topn, did you mean --top-n?"),
        (["rnak", "q"], "unknown command rnak, did you mean rank? (see regolo-rerank --help)"),
        (["rank", "q", "--prompt-format", "taged"], "got 'taged', did you mean tagged?"),
        (["rank", "q", "--extra-body", "[1]"], "--extra-body must be a JSON object"),
        (["check", "--extra-body", '{"query": 1}'], "--extra-body: must not contain query"),
        (["rank"], "required: QUERY (see regolo-rerank rank --help)"),
        (["rank", "q", "--local", "--base-url", "http://x"], "not allowed with argument --local"),
        (["bulk", "a", "-"], "OUT must be a file"),
    ],
)
def test_errors_use_shell_words_and_name_the_next_step(arguments: list[str], words: str, run: Run) -> None:
    """One line, without Python names."""
    done = run(*arguments)
    assert (done.status, done.out) == (2, "")
    assert words in done.err
    assert done.err.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--api-key", KEY], [f"--api-key={KEY}"], ["--header", KEY], [f"--kye={KEY}"]])
def test_no_error_repeats_what_may_be_a_key(arguments: list[str], run: Run) -> None:
    """A key may stand in the place of anything."""
    done = run("rank", "q", *arguments)
    assert done.status == 2
    assert KEY not in done.err


def test_options_reach_the_request(at_stub: Stub, tmp_path: Path, run: Run) -> None:
    """Options may stand between QUERY and FILE, and each reaches the request."""
    file = tmp_path / "texts.txt"
    file.write_text("one\ntwo\nthree\n")
    options = ["--model", "m", "--prompt-format", "documented", "--instruction", "Find", "--batch-size", 2, "--no-key"]
    more = ["--header", "x-team: red", "--extra-body", '{"truncate_prompt_tokens": 9}', "--max-document-chars", 3]
    assert run("rank", "q", *options, file, *more).status == 0
    first, second = at_stub.received
    assert {len(first.documents), len(second.documents)} == {1, 2}
    assert (first.json["model"], first.json["query"]) == ("m", "Find\n<Query>: q")
    assert first.json["truncate_prompt_tokens"] == 9
    assert first.headers["x-team"] == "red"
    assert "authorization" not in first.headers
    assert all(len(text) <= len("<Document>: ") + 3 for text in first.documents + second.documents)


def test_a_key_over_http_needs_an_option_of_the_shell(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message names options that exist in a shell."""
    monkeypatch.setenv("REGOLO_API_KEY", KEY)
    (tmp_path / "a.txt").write_text("a\n")
    command = ["rank", "q", tmp_path / "a.txt", "--base-url", "http://vllm.invalid:8000", "--max-retries", "0"]
    done = run(*command)
    assert done.status == 2
    assert "--allow-http" in done.err
    assert "--no-key" in done.err
    assert not re.search("allow_http|api_key|base_url", done.err)
    assert run(*command, "--allow-http").status == 1  # the host does not exist


def test_messages_of_the_library_are_translated() -> None:
    """Names of options that are also words stay words."""
    assert shell_words("model: must not be blank") == "--model: must not be blank"
    assert shell_words("use another model, or raise total_timeout") == "use another model, or raise --total-timeout"
    assert shell_words("score_threshold: x; set base_url='local://'") == "--threshold: x; add --local"
    assert shell_words("x. Check api_key, or the environment variable K") == "x. Check the environment variable K"
    assert shell_words("pip install x. Or pass a scorer") == "pip install x"
    assert shell_words("pass api_key='' or set allow_http=True") == "add --no-key or add --allow-http"


def test_warnings_are_one_line_each(at_stub: Stub, tmp_path: Path, run: Run) -> None:
    """They are printed once, after the result, without the place in the code."""
    file = write_lines(tmp_path / "in.jsonl", *({"query": f"q{n}", "documents": ["a"]} for n in range(3)))
    done = run("bulk", file, tmp_path / "out.jsonl", "--instruction", "Find recipes", "--prompt-format", "plain")
    (warning,) = [line for line in done.err.splitlines() if "warning" in line]
    assert warning.startswith("regolo-rerank: warning: instruction has no effect")
    assert "Set --prompt-format" in warning
    assert run("check", "--instruction", "Find recipes").err == ""
    assert at_stub.received


def test_without_rich_the_command_to_install_it_is_printed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no traceback."""
    monkeypatch.setattr("regolo_rerank.cli.main.find_spec", lambda _name: None)
    done = run("rank", "q")
    assert (done.status, done.err) == (2, f"regolo-rerank needs rich: {install_hint('cli')}\n")


def test_help_loads_neither_httpx_nor_a_framework() -> None:
    """Help appears at once."""
    code = (
        "import sys; from regolo_rerank.cli.main import main\n"
        "try: main(['rank', '--help'])\nexcept SystemExit: pass\n"
        "print([name for name in ('httpx', 'langchain_core', 'llama_index', 'rich', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)  # noqa: S603
    assert done.stdout.splitlines()[-1] == "[]"
