import errno
import io
import json
import os
import pty
import runpy
import shutil
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from regolo_rerank import RegoloClient, __version__
from regolo_rerank._cli.main import main
from tests.cli.conftest import DOCUMENTS, jsonl
from tests.conftest import KEY
from tests.support.stub import Received, Reply, Stub, error, results, scored


def test_a_table_shows_rank_score_bar_and_text_the_best_first(
    at_stub: Stub, cities: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each document is one line, in the order of the scores, its bar as long as its score."""
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["rank", "q", cities]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == [
        "1  0.9000  █████████   best score=0.9",
        "2  0.5000  █████       middle score=0.5",
        "3  0.1000  █           low score=0.1",
    ]
    assert err == ""
    assert at_stub.received[0].headers["authorization"] == f"Bearer {KEY}"


def test_documents_come_from_all_sources_in_the_order_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines, `text` fields and standard input add up; blank lines do not count, and only line feeds end a line."""
    lines = tmp_path / "lines.txt"
    lines.write_bytes("\ufeffuno\r\n\r\n  \ndue\u2028due\n".encode())
    records = tmp_path / "records.jsonl"
    records.write_bytes('{"text": "tre\u2028\\ntre", "id": 3}\n\n{"text": " "}'.encode())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("quattro è\n".encode()), encoding="ascii"))
    assert main(["rank", "--local", "q", str(lines), "--json", str(records), "-"]) == 0
    ranked = json.loads(capsys.readouterr().out)["results"]
    documents = [result["document"] for result in sorted(ranked, key=lambda result: result["index"])]
    assert documents == ["uno", "due\u2028due", "tre\u2028\ntre", " ", "quattro è"]
    places = {result["index"]: (result["file"], result["line"], result.get("id")) for result in ranked}
    files = [str(lines), str(lines), str(records), str(records), "-"]
    assert [places[index] for index in range(5)] == list(
        zip(files, [1, 4, 1, 3, 1], [None, None, 3, None, None], strict=True)
    )


def test_standard_input_is_read_where_no_file_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a FILE, the documents are the lines of standard input."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"alpha\nbeta")))
    assert main(["rank", "beta", "--local", "--top-n", "1"]) == 0
    assert capsys.readouterr().out.split() == ["1", "0.9999", "██████████", "beta"]


def test_a_terminal_is_told_what_is_awaited(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever is asked to type documents is told so, and standard output holds the ranking alone."""
    typist, terminal = pty.openpty()
    os.write(typist, b"alpha\n\x04")
    with open(terminal, encoding="utf-8") as stdin:  # noqa: PTH123 - a descriptor has no path
        monkeypatch.setattr(sys, "stdin", stdin)
        assert main(["rank", "alpha", "--local"]) == 0
    os.close(typist)
    out, err = capsys.readouterr()
    assert out.startswith("1  0.9999")
    assert err == "reading documents, one a line, until the end of input\n"


def test_options_reach_the_service_between_any_arguments(
    at_stub: Stub, cities: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each option has its effect, wherever it stands."""
    before = ["--model", "Qwen3-Reranker-8B", "--threshold", "0.6"]
    after = ["--top-n", "2", "--json"]
    assert main(["rank", *before, "q", "--instruction", "Be strict", cities, *after]) == 0
    request = at_stub.received[0].json
    assert (request["model"], request["top_n"]) == ("Qwen3-Reranker-8B", 2)
    assert "Be strict" in request["query"]
    assert [result["index"] for result in json.loads(capsys.readouterr().out)["results"]] == [1]


def test_what_is_left_out_is_the_clients_default(at_stub: Stub, cities: str) -> None:
    """Without options the request is, byte for byte, the one that the client sends."""
    assert main(["rank", "q", cities]) == 0
    RegoloClient().rerank("q", DOCUMENTS)
    assert at_stub.received[0].body == at_stub.received[1].body


def test_base_url_and_local_win_over_the_environment(stub: Stub, cities: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--base-url` names the server, and `--local` sends nothing."""
    monkeypatch.setenv("REGOLO_BASE_URL", "http://127.0.0.1:1")
    assert main(["rank", "q", cities, "--base-url", stub.url]) == 0
    assert main(["rank", "q", cities, "--local"]) == 0
    assert len(stub.received) == 1


def test_two_dashes_end_the_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A query and a file may begin with a dash behind `--`."""
    monkeypatch.chdir(tmp_path)
    Path("-f").write_text("one", "utf-8")
    assert main(["rank", "--local", "--", "-q", "-f"]) == 0


@pytest.mark.parametrize(
    ("encoding", "documents"),
    [
        ("utf-8", ["北京 è", "half \ud800", "\x1b[31m\u2028"]),
        ("utf-8", ["北京 è", "città", "\x1b[31m\u2028"]),
        ("ascii", ["北京 è", "città", "\x1b[31m\u2028"]),
        ("cp1252", ["è", "città", "\x1b[31m"]),
    ],
)
def test_json_holds_the_response_in_valid_utf_8(
    encoding: str, documents: list[str], stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a program reads back is what the client returned, whatever the encoding of standard output."""
    body = results((0, 0.7), (1, 0.9), (2, 0.2), usage={"total_tokens": 12})
    stub.always(
        Reply(
            body,
            headers={
                "x-litellm-call-id": "call-1",
                "x-litellm-model-group": "reranker",
                "x-litellm-response-cost": "0.25",
            },
        )
    )
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding=encoding))
    file = jsonl(tmp_path, *documents)
    assert main(["rank", "q", file, "--json", "--base-url", stub.url]) == 0
    assert json.loads(out.getvalue().decode("utf-8")) == {
        "id": "stub-1",
        "results": [
            {
                "index": index,
                "relevance_score": score,
                "document": documents[index],
                "file": file,
                "line": index + 1,
            }
            for index, score in [(1, 0.9), (0, 0.7), (2, 0.2)]
        ],
        "usage": {"total_tokens": 12, "requests": 1, "cost": 0.25},
        "request_ids": ["call-1"],
        "model": "reranker",
    }


def test_json_stays_readable_where_it_can(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Text of any language is written as itself on a UTF-8 standard output."""
    assert main(["rank", "北京", jsonl(tmp_path, "北京 è"), "--json", "--local"]) == 0
    assert '"北京 è"' in capsys.readouterr().out


def test_ascii_output_gets_an_ascii_table(cities: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where standard output cannot take blocks, bars are hashes, ellipses are dots, and other text question marks."""
    monkeypatch.setenv("COLUMNS", "40")
    out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(out, encoding="ascii", newline="\n"))
    assert main(["rank", "low score", cities, jsonl(tmp_path, "città, low score and very much more"), "--local"]) == 0
    lines = out.getvalue().decode("ascii").splitlines()
    assert "#####" in lines[0]
    assert [line for line in lines if line.endswith("citt?, low score an...")]
    assert all(len(line) <= 40 for line in lines)


@pytest.mark.parametrize(("lines", "said"), [(b"alpha", "none of 1 reaches the threshold"), (b"\n \n", "no documents")])
def test_nothing_found_is_said(
    lines: bytes, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty ranking is told from silence, and is no failure."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
    assert main(["rank", "omega", "--local", "--threshold", "0.9"]) == 0
    assert capsys.readouterr() == ("", f"regolo-rerank: nothing found: {said}\n")


def assert_refused(capsys: pytest.CaptureFixture[str], said: str) -> None:
    """Assert that all that was printed is one harmless line on standard error, without the key."""
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("regolo-rerank: ")
    assert err.count("\n") == 1
    assert said in err
    assert KEY not in err
    assert not [character for character in err[:-1] if not character.isprintable()]


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (error(f"no such key {KEY}\n\x1b[31m", 401), r"no such key *** \x1b[31m [HTTP 401]"),
        (error("unknown model", 400), "unknown model [HTTP 400]"),
        (error("overloaded", 500), "overloaded [HTTP 500]"),
        (Reply(b"<html>"), "cannot be trusted"),
        (Reply(results((7, 0.5))), "cannot be trusted"),
    ],
)
def test_a_failure_of_the_service_is_status_1(
    reply: Reply, said: str, at_stub: Stub, cities: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the service gets wrong, or says no to, is told in one line, retries included, without the key."""
    at_stub.always(reply)
    assert main(["rank", "q", cities]) == 1
    assert_refused(capsys, said)


def test_no_connection_is_status_1(cities: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A server that is not there is told in one line."""
    assert main(["rank", "q", cities, "--base-url", "http://127.0.0.1:1"]) == 1
    assert_refused(capsys, "127.0.0.1:1")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "COMMAND"),
        (["rank"], "QUERY"),
        (["rank", "q", "--top-n", "many"], "--top-n: invalid int value"),
        (["rank", "q", "--top-n", "0", "--local"], "top_n: "),
        (["rank", "q", "--threshold", "nan", "--local"], "score_threshold: "),
        (["rank", "q", "--base-url", "ftp://host"], "base_url: must start with https://"),
        (["rank", "q", "--local", "--base-url", "http://host"], "not allowed with"),
        (["rank", " ", "--local"], "query: must not be blank"),
        (["rank", "q"], "set the environment variable REGOLO_API_KEY"),
        (["rank", "q", "--api-key", KEY], "REGOLO_API_KEY only"),
        (["--api-key", KEY, "rank", "q"], "REGOLO_API_KEY only"),
        (["rank", "q", f"--key={KEY}"], "unknown argument --key "),
        (["rank", "q", "--token", KEY], "unknown argument --token "),
        (["demo", "--json"], "unknown argument --json "),
        (["rank", "q", "no such\n\x1bfile"], r"no such \x1bfile: No such file or directory"),
        (["rank", "q", "."], ".: Is a directory"),
    ],
)
def test_wrong_use_is_status_2(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wrong arguments, options, a missing key and a missing file are each told in one line, without the key."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"document")))
    assert main(arguments) == 2
    assert_refused(capsys, said)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("latin.txt", b"caf\xe9\n", "latin.txt: not UTF-8 at byte 3"),
        ("bad.jsonl", b'{"text": "fine"}\n\n{"text": "cut', "bad.jsonl, line 3: not JSON"),
        ("deep.jsonl", b"[" * 100_000, "deep.jsonl, line 1: not JSON"),
        ("other.jsonl", b'{"body": "x"}', 'other.jsonl, line 1: not an object with a string in its field "text"'),
        ("list.jsonl", b'["text"]', "list.jsonl, line 1: not an object"),
        ("number.jsonl", b'{"text": 7}', "number.jsonl, line 1: not an object"),
    ],
)
def test_an_unreadable_file_is_status_2(
    name: str, content: bytes, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file that is not what its name says is refused, with the place."""
    (tmp_path / name).write_bytes(content)
    assert main(["rank", "q", str(tmp_path / name), "--local"]) == 2
    assert_refused(capsys, said)


@pytest.mark.parametrize(
    ("stdin", "said"),
    [(None, "standard input: closed"), (io.TextIOWrapper(io.BytesIO(b"\xff")), "standard input: not UTF-8 at byte 0")],
)
def test_an_unreadable_standard_input_is_status_2(
    stdin: io.TextIOWrapper | None, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same holds for standard input."""
    monkeypatch.setattr(sys, "stdin", stdin)
    assert main(["rank", "q", "--local"]) == 2
    assert_refused(capsys, said)


def test_ctrl_c_is_silent_and_status_130(at_stub: Stub, cities: str, capsys: pytest.CaptureFixture[str]) -> None:
    """An interrupt while a request is under way ends the command without a word."""

    def interrupt(request: Received) -> Reply:
        os.kill(os.getpid(), signal.SIGINT)
        return scored(request)

    at_stub.reply = interrupt
    assert main(["rank", "q", cities]) == 130
    assert capsys.readouterr() == ("", "")


def nobody_reads() -> int:
    """Return the writing end of a closed pipe."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.mark.parametrize(
    ("opened", "status", "said"),
    [(nobody_reads, 0, ""), (lambda: os.open(os.devnull, os.O_RDONLY), 1, "regolo-rerank: [Errno 9] Bad file")],
)
def test_output_that_goes_nowhere_ends_without_a_traceback(
    opened: Callable[[], int],
    status: int,
    said: str,
    cities: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A closed pipe ends the command quietly, any other failure in one line, and nothing is left to fail at exit."""
    with open(opened(), "w", encoding="utf-8") as stdout:  # noqa: PTH123 - a descriptor has no path
        monkeypatch.setattr(sys, "stdout", stdout)
        assert main(["rank", "q", cities, "--local"]) == status
    err = capsys.readouterr().err
    assert err.startswith(said)
    assert err.count("\n") == status


@pytest.mark.parametrize("stdout", [None, io.StringIO()])
def test_a_replaced_or_closed_standard_output_is_no_failure(
    stdout: io.StringIO | None, cities: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ranking goes where standard output goes, be it nowhere."""
    monkeypatch.setattr(sys, "stdout", stdout)
    assert main(["rank", "q", cities, "--local"]) == 0
    assert stdout is None or stdout.getvalue().count("\n") == 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--version"], f"regolo-rerank {__version__}\n"),
        (["--help"], 'regolo-rerank rank "capital of China" cities.txt --top-n 3'),
        (["rank", "--help"], "REGOLO_API_KEY, and never from\nan argument"),
        (["rank", "--help"], "--threshold X"),
        (["demo", "--help"], "LlamaIndex"),
    ],
)
def test_help_and_version(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """They are printed on standard output, in 80 columns, and do not mention the option that refuses keys."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    out, err = capsys.readouterr()
    assert (ended.value.code, err) == (0, "")
    assert said in out
    assert "--api-key" not in out
    assert all(len(line) <= 80 for line in out.splitlines())


def test_the_module_runs_the_command_line(
    cities: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`python -m regolo_rerank` takes the process's arguments, and ends with the status."""
    monkeypatch.setattr(sys, "argv", ["regolo_rerank", "rank", "low", cities, "--local", "--top-n", "1"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("regolo_rerank", run_name="__main__")
    assert ended.value.code == 0
    assert "low score=0.1" in capsys.readouterr().out


def script() -> list[str]:
    """Return the command that the package installs."""
    found = shutil.which("regolo-rerank", path=sysconfig.get_path("scripts"))
    assert found is not None
    return [found]


@pytest.mark.parametrize("command", [script, lambda: [sys.executable, "-m", "regolo_rerank"]], ids=["script", "module"])
def test_the_installed_command_ranks_and_fails_as_it_should(command: Callable[[], list[str]], at_stub: Stub) -> None:
    """As a process of its own it reads standard input, tries again in silence, and ends with the right status."""
    at_stub.script(error("overloaded", 503))
    arguments = [*command(), "rank", "q", "--json"]
    ranked = subprocess.run(arguments, input="\n".join(DOCUMENTS).encode(), capture_output=True, check=True)  # noqa: S603 - our own command
    assert [result["index"] for result in json.loads(ranked.stdout)["results"]] == [1, 2, 0]
    assert ranked.stderr == b""
    at_stub.always(error("no", 401))
    refused = subprocess.run(arguments, input=b"document", capture_output=True, check=False)  # noqa: S603 - our own command
    assert (refused.returncode, refused.stdout) == (1, b"")
    advice = b"check the API key: api_key, or the environment variable REGOLO_API_KEY"
    assert refused.stderr == b"regolo-rerank: no [HTTP 401]; " + advice + b"\n"


def test_a_pipe_that_was_closed_on_windows_is_quiet_too(
    cities: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows has another number for writing into a closed pipe."""

    class Closed(io.FileIO):
        def write(self, data: Any) -> int:
            if os.path.samestat(os.fstat(self.fileno()), pipe):
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
            return super().write(data)

    writer = nobody_reads()
    pipe = os.fstat(writer)
    with io.TextIOWrapper(io.BufferedWriter(Closed(writer, "w")), "utf-8") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert main(["rank", "q", cities, "--local"]) == 0
    assert not capsys.readouterr().err


def test_a_closed_pipe_is_quiet_to_the_end(cities: str) -> None:
    """Python has nothing to complain about either when the process ends."""
    writer = nobody_reads()
    arguments = [sys.executable, "-m", "regolo_rerank", "rank", "q", cities, "--local"]
    ended = subprocess.run(arguments, stdout=writer, stderr=subprocess.PIPE, check=False)  # noqa: S603 - our own command
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (0, b"")


def test_each_command_loads_what_it_needs(cities: str) -> None:
    """Ranking loads neither framework, and help not even the client."""
    code = (
        "import sys; from regolo_rerank._cli.main import main\n"
        "def loaded(): return [name for name in ('httpx', 'langchain_core', 'llama_index') if name in sys.modules]\n"
        "try: main(['--help'])\n"
        "except SystemExit: print(loaded())\n"
        "main(['rank', 'q', sys.argv[1], '--local']); print(loaded())"
    )
    ran = subprocess.run([sys.executable, "-c", code, cities], capture_output=True, text=True, check=True)  # noqa: S603 - our own command
    assert [line for line in ran.stdout.splitlines() if line.startswith("[")] == ["[]", "['httpx']"]
