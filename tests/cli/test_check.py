import json
import re
import zlib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from importlib.resources import files
from socketserver import TCPServer
from threading import Thread
from typing import Any, ClassVar

import pytest

from regolo_rerank import RegoloClient
from regolo_rerank.prompts import DEFAULT_INSTRUCTION, PRESETS
from tests.cli.conftest import Run
from tests.conftest import KEY
from tests.support.stub import Received, Reply, Stub, error, results, scored

PAIRS = json.loads((files("regolo_rerank.cli") / "check_pairs.json").read_text("utf-8"))
MATCHING = {pair["query"]: pair["matching"] for pair in PAIRS}
TRAINED = PRESETS["chat"]
PROMPT = re.compile(r"(?s)<\|im_start\|>system.*<Query>: (.*)\n<Document>: (.*)<\|im_end\|>\n<\|im_start\|>assistant.*")


def judge(prompt: str) -> float:
    """Score a prompt as a model that was trained on one format: other prompts get next to nothing at random."""
    noise = zlib.crc32(prompt.encode()) % 1_000 / 10_000
    seen = PROMPT.fullmatch(prompt)
    if seen is None or "<" in seen[1] + seen[2]:
        return noise
    return (0.8 if seen[2] in MATCHING.get(seen[1], ()) else 0.1) + noise


def concatenating(request: Received) -> Reply:
    """Answer as vLLM without a template."""
    return Reply(results(*enumerate(judge(request.json["query"] + text) for text in request.documents)))


def templating(request: Received) -> Reply:
    """Answer as vLLM with the template of the model, which has the instruction."""
    task = request.json.get("instruction", DEFAULT_INSTRUCTION)
    query = TRAINED.query.replace("{instruction}", task).replace("{query}", request.json["query"])
    prompts = (query + TRAINED.document.replace("{document}", text) for text in request.documents)
    return Reply(results(*enumerate(map(judge, prompts))))


def tagged(request: Received) -> Reply:
    """Answer as a model for which two formats are almost equally good."""
    is_documented = not request.json["query"].startswith("<Instruct>")
    matching = [text for texts in MATCHING.values() for text in texts]
    return Reply(
        results(
            *(
                (
                    index,
                    0.1 + 0.6 * (text.removeprefix("<Document>: ") in matching) + 0.01 * is_documented * (index < 4),
                )
                if text.startswith("<Document>")
                else (index, zlib.crc32(text.encode()) % 100 / 1_000)
                for index, text in enumerate(request.documents)
            )
        )
    )


@pytest.mark.parametrize(
    ("answer", "right", "template"),
    [
        (concatenating, "chat", "the server concatenates query and document"),
        (templating, "server_template", "the server uses the field instruction"),
    ],
)
def test_a_format_that_is_clearly_better_is_recommended(
    answer: Callable[[Received], Reply], right: str, template: str, at_stub: Stub, run: Run
) -> None:
    """The verdict is first, then a line of code that works, then the evidence in 80 columns."""
    at_stub.reply = answer
    done = run("check", "--base-url", at_stub.url)
    lines = done.out.splitlines()
    assert (done.status, done.err) == (0, "")
    assert " ".join(lines[0].split()).startswith(f'OK: use prompt_format="{right}" (12 of 12 matching pairs rank')
    line = next(line.strip() for line in lines if "RegoloClient(" in line)
    client: RegoloClient = eval(line, {"RegoloClient": RegoloClient})  # noqa: S307 - our own line
    assert (client.options.base_url, client.options.prompt_format) == (at_stub.url, right)
    assert template in " ".join(done.out.split())
    assert all(len(each) <= 80 for each in lines if "RegoloClient(" not in each)
    assert len(at_stub.received) == 22


def test_a_format_that_the_server_rejects_is_evidence(at_stub: Stub, run: Run) -> None:
    """The other formats are compared."""
    at_stub.reply = lambda request: (
        error("Extra inputs are not permitted", 422) if "instruction" in request.json else concatenating(request)
    )
    out = " ".join(run("check").out.split())
    assert out.startswith('OK: use prompt_format="chat"')
    assert "the server rejects the field instruction" in out
    assert "server_template Extra inputs are not permitted" in out


def test_more_pairs_count_more_than_a_large_gap(at_stub: Stub, run: Run) -> None:
    """The default ranks 8 of 12 pairs right with a large gap, and another format 12 with a small one."""

    def answer(request: Received) -> Reply:
        tagged = request.json["query"].startswith("<Instruct>")
        good, bad = (0.9, 0.1) if tagged else (0.12, 0.1)
        texts = [text.removeprefix("<Document>: ") for text in request.documents]
        matching = [text for texts in list(MATCHING.values())[: 2 if tagged else 3] for text in texts]
        return Reply(results(*((i, good if text in matching else bad) for i, text in enumerate(texts))))

    at_stub.reply = answer
    report = json.loads(run("check", "--json").out)
    assert [report["formats"][name]["above"] for name in ("tagged", "documented")] == [8, 12]
    assert report["formats"]["tagged"]["gap"] > report["formats"]["documented"]["gap"]
    assert report["line"] == 'RegoloClient(prompt_format="documented")'


def test_a_tie_keeps_the_default(at_stub: Stub, run: Run) -> None:
    """Another format with a slightly larger gap is not a finding."""
    at_stub.reply = tagged
    report = json.loads(run("check", "--json").out)
    assert report["formats"]["documented"]["gap"] > report["formats"]["tagged"]["gap"]
    assert report["verdict"].startswith("OK: the default prompt format, tagged, works (12 of 12")
    assert report["line"] == "RegoloClient()"


def test_the_format_test_is_skipped_for_the_offline_scorer(run: Run) -> None:
    """One request is enough, and no row is about a server."""
    done = run("check", "--local")
    assert (done.status, done.err) == (0, "")
    assert done.out.startswith('OK: the offline scorer works.\n\n  RegoloClient(base_url="local://")\n\n')
    assert not re.search("tagged|template|model |request id|limits|API key|proxy", done.out)


def test_rows_have_the_information_of_the_server(at_stub: Stub, run: Run) -> None:
    """Rows without information are left out, and so is the key."""
    headers = {"x-litellm-call-id": "call-1", "x-litellm-key-rpm-limit": "5", "x-litellm-response-cost": "0.001"}
    headers["x-litellm-key-name"] = KEY
    at_stub.reply = lambda request: Reply(json.loads(concatenating(request).encoded()), headers=headers)
    out = run("check").out
    rows = dict(re.findall(r"(?m)^([\w ]{2,}?)  +(\S.*?) *$", out))
    assert rows["server"] == at_stub.url
    assert (rows["API key"], rows["request id"]) == ("sent", "call-1")
    assert rows["limits"] == "x-litellm-key-rpm-limit: 5"
    assert rows["usage"] == "requests: 22, cost: 0.022"
    assert "rerank models" not in rows
    assert KEY not in out


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (lambda request: Reply(results(*((i, 0.5) for i, _ in enumerate(request.documents)))), "All scores are equal"),
        (scored, "No prompt format tells matching pairs from others."),
    ],
)
def test_a_model_that_is_no_reranker_is_a_problem(
    answer: Callable[[Received], Reply], problem: str, at_stub: Stub, run: Run
) -> None:
    """No line of code is recommended."""
    at_stub.reply = answer
    done = run("check")
    assert done.status == 1
    assert done.out.startswith(problem)
    assert "RegoloClient(" not in done.out


def test_a_listwise_model_is_a_warning(at_stub: Stub, run: Run) -> None:
    """Scores that depend on other documents are reported."""

    def listwise(request: Received) -> Reply:
        body = json.loads(concatenating(request).encoded())
        for each in body["results"]:
            each["relevance_score"] /= len(request.documents)
        return Reply(body)

    at_stub.reply = listwise
    done = run("check")
    assert done.status == 0
    assert "Warning: a score changes from" in done.out
    at_stub.reply = concatenating
    assert "Warning" not in run("check").out


def test_a_key_that_is_not_set_is_not_blamed(at_stub: Stub, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The advice differs for a wrong key and for a missing one."""
    at_stub.always(error("no", 401))
    rejected = run("check")
    assert rejected.status == 1
    assert "Check the API key: the environment variable REGOLO_API_KEY. It may belong to another server." in " ".join(
        rejected.out.split()
    )
    for arguments in (["--no-key"], []):
        if not arguments:
            monkeypatch.delenv("REGOLO_API_KEY")
        done = run("check", *arguments)
        assert done.status == 1
        assert done.out.startswith("No key was sent, and the server requires one: set the environment variable")
        assert "Check the API key" not in done.out


def test_without_a_connection_the_address_is_blamed(run: Run) -> None:
    """The report has the address that was tried."""
    done = run("check", "--base-url", "http://127.0.0.1:9", "--max-retries", 0)
    assert done.status == 1
    assert "Check --base-url, the network and the proxy." in " ".join(done.out.split())
    assert "http://127.0.0.1:9" in done.out


class Catalog(BaseHTTPRequestHandler):
    """A server that knows its models, and rejects others."""

    catalogs: ClassVar[dict[str, Any]] = {}
    keys: ClassVar[list[str | None]] = []

    def do_GET(self) -> None:
        self.keys.append(self.headers["authorization"])
        self.respond(200 if self.path in self.catalogs else 404, self.catalogs.get(self.path, {}))

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.respond(400, {"error": {"message": "Invalid model name"}})

    def respond(self, status: int, body: Any) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def catalog(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Catalog]]:
    """A server with a list of models."""
    Catalog.catalogs.clear()
    Catalog.keys.clear()
    with TCPServer(("127.0.0.1", 0), Catalog) as server:
        Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setenv("REGOLO_BASE_URL", f"http://127.0.0.1:{server.server_address[1]}/v1")
        monkeypatch.setenv("REGOLO_API_KEY", KEY)
        yield Catalog
        server.shutdown()


def test_an_unknown_model_ends_with_the_models_of_the_server(catalog: type[Catalog], run: Run) -> None:
    """Both kinds of lists are read, with context lengths and the key."""
    catalog.catalogs["/v1/models"] = {"data": [{"id": "bge-reranker", "max_model_len": 8192}, {"id": "llama"}]}
    catalog.catalogs["/model/info"] = {
        "data": [
            {"model_name": "ranker", "model_info": {"mode": "rerank", "max_input_tokens": 4096}},
            {"model_name": 3},
        ]
    }
    done = run("check", "--model", "nope")
    assert done.status == 1
    models = "bge-reranker (8,192 tokens), ranker (4,096 tokens)"
    assert f"Invalid model name [HTTP 400]. Check --model. Rerank models of this server: {models}." in " ".join(
        done.out.split()
    )
    assert catalog.keys == [f"Bearer {KEY}"] * 2


def test_a_catalog_that_is_malformed_is_ignored(catalog: type[Catalog], run: Run) -> None:
    """A server may return anything."""
    catalog.catalogs |= {"/v1/models": ["bge-reranker"], "/model/info": {"data": None}}
    done = run("check")
    assert done.status == 1
    assert "Rerank models" not in done.out
