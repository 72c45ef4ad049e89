import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from regolo_rerank._cli.main import main
from regolo_rerank._cli.scores import kept_scores
from tests.conftest import KEY
from tests.support.stub import Stub, error

QUERIES = [
    {
        "query": "capital of China",
        "documents": ["pizza", "Rome is in Italy.", "Beijing is the capital of China."],
        "relevant": [2],
    },
    {
        "query": "how to bake bread",
        "documents": [{"id": "b", "text": "Beijing"}, {"id": "f", "text": "Flour and water make a dough for a loaf."}],
        "relevant": {"f": 2},
    },
]


@pytest.fixture
def judged(tmp_path: Path) -> str:
    """A file of judged queries, with a blank line."""
    return written(tmp_path / "judged.jsonl", *map(json.dumps, QUERIES), " ")


@pytest.fixture
def at_stub(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> Stub:
    """The stub server, set up in the environment as a user would, with a key."""
    monkeypatch.setenv("REGOLO_API_KEY", KEY)
    monkeypatch.setenv("REGOLO_BASE_URL", stub.url)
    return stub


def written(path: Path, *lines: str) -> str:
    """Write lines into a file and return its name."""
    path.write_text("".join(f"{line}\n" for line in lines), "utf-8")
    return str(path)


def as_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """Return what the command prints with --json."""
    assert main(["evaluate", *arguments, "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    loaded: dict[str, Any] = json.loads(out)
    return loaded


def test_it_measures_on_this_machine(judged: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Without key and network it says what reranking brings, in 80 columns."""
    assert main(["evaluate", judged, "--local"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith("2 queries with something relevant, 5 candidates.")
    assert "Recall@1    0.000  1.000      +1.000" in out
    assert max(map(len, out.splitlines())) <= 80


def test_json_has_every_number(judged: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One object says the same and more, for programs."""
    found = as_json(capsys, judged, "--local")
    (variant,) = found["variants"]
    assert (found["queries"], variant["name"], variant["requests"]) == (2, "reranked", 2)
    assert variant["measures"]["Recall@1"]["after"] == 1.0
    assert variant["changes"][0]["place_after"] == 1


def test_standard_input_is_read(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A hyphen is standard input."""
    given = "\n".join(map(json.dumps, QUERIES)).encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given)))
    assert as_json(capsys, "-", "--local")["queries"] == 2


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (["--prompt-format", "tagged,chat"], ["tagged", "chat"]),
        (["--prompt-format", "tagged", "--prompt-format", "chat"], ["tagged", "chat"]),
        (["--prompt-format", "tagged"], ["reranked"]),
        (["--instruction", "one", "--instruction", "two"], ["one", "two"]),
        (
            ["--model", "a", "--model", "b", "--prompt-format", "plain,tagged"],
            ["a, plain", "a, tagged", "b, plain", "b, tagged"],
        ),
    ],
)
def test_variants_are_set_side_by_side(
    arguments: list[str], names: list[str], judged: str, at_stub: Stub, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each combination of what is given more than once is measured, and called by what differs."""
    found = as_json(capsys, judged, *arguments)
    assert [variant["name"] for variant in found["variants"]] == names
    assert len({request.body for request in at_stub.received}) == 2 * len(names)


def test_scores_are_kept_in_a_file(
    judged: str, tmp_path: Path, at_stub: Stub, capsys: pytest.CaptureFixture[str]
) -> None:
    """An evaluation that was stopped goes on where it was, and one that was done sends nothing."""
    cache = ["--cache", str(tmp_path / "scores.db")]
    at_stub.script(*[error("bad key", 401)])
    assert main(["evaluate", judged, *cache, "--max-concurrency", "1"]) == 1
    assert (
        capsys.readouterr().err
        == "regolo-rerank: bad key [HTTP 401]; check the API key: api_key, or the environment variable REGOLO_API_KEY\n"
    )
    sent = [as_json(capsys, judged, *cache)["variants"][0]["requests"] for _ in range(2)]
    assert sent == [2, 0]
    assert KEY.encode() not in (tmp_path / "scores.db").read_bytes()


def test_the_picture_is_written(judged: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A PNG stands where it is asked for."""
    as_json(capsys, judged, "--local", "--picture", str(tmp_path / "gain.png"))
    assert (tmp_path / "gain.png").read_bytes().startswith(b"\x89PNG")


def test_a_query_that_fails_is_status_1(judged: str, at_stub: Stub, capsys: pytest.CaptureFixture[str]) -> None:
    """What could not be measured is told, and what could be is shown."""
    at_stub.script(error("too long", 400))
    assert main(["evaluate", judged, "--max-concurrency", "1"]) == 1
    out, err = capsys.readouterr()
    assert err == ""
    assert "queries failed and count nowhere; queries[0]: too long" in " ".join(out.split())


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["{"], "line 1: not JSON"),
        ([json.dumps(QUERIES[0]), "", '{"query": "q"}'], "line 3: has no documents"),
        (['{"query": "q", "documents": ["a"], "relevant": [1]}'], "line 1: relevant: '1' is no index of 1 documents"),
        ([], "none of them has a relevant document"),
    ],
)
def test_a_wrong_file_is_status_2(
    lines: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The line is named, and what is wrong with it."""
    assert main(["evaluate", written(tmp_path / "judged.jsonl", *lines), "--local"]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["missing.jsonl"], "missing.jsonl: No such file"),
        (["FILE", "--prompt-format", "tagged,wrong"], "prompt_format: "),
        (["FILE", "--cache", "FILE"], "not a file of scores"),
        (["FILE", "--top-n", "3"], "unknown argument --top-n"),
        (["FILE", "--api-key", KEY], "REGOLO_API_KEY only"),
    ],
)
def test_wrong_use_is_status_2(
    arguments: list[str], said: str, judged: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each is told in one line, without the key."""
    assert main(["evaluate", *(judged if each == "FILE" else each for each in arguments), "--local"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert said in err
    assert KEY not in err


@pytest.mark.parametrize(
    ("missing", "arguments", "extra"),
    [("ir_measures", [], "evaluate"), ("matplotlib", ["--picture", "gain.png"], "plot")],
)
def test_a_missing_package_is_named(
    missing: str,
    arguments: list[str],
    extra: str,
    judged: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The line says which extra to install."""
    monkeypatch.chdir(tmp_path)
    ours = ("evaluation", "_evaluation", "plot", "_evaluation.picture", "_display.picture")
    for name in list(sys.modules):
        if name.startswith(tuple(f"regolo_rerank.{each}" for each in ours)):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    assert main(["evaluate", judged, "--local", *arguments]) == 2
    assert f'pip install "regolo_rerank[{extra}]"' in capsys.readouterr().err


def test_a_file_of_scores_is_a_mapping(tmp_path: Path) -> None:
    """What was kept is there when the file is opened again, and what was not is a KeyError."""
    with kept_scores(tmp_path / "scores.db") as scores:
        scores["pair"] = 0.25
    with kept_scores(tmp_path / "scores.db") as scores:
        assert (scores["pair"], scores.get("pair"), scores.get("other", 1.0)) == (0.25, 0.25, 1.0)
        with pytest.raises(KeyError):
            _ = scores["other"]
