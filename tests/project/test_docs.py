import html
import json
import logging
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from llama_index.core import Settings as LlamaIndexSettings
from llama_index.core.llms import MockLLM

from regolo_rerank import RegoloClient
from regolo_rerank.evaluation import evaluate, example_queries
from regolo_rerank.options import Options
from tests.support.corpus import TEXTS, Everything, Llm, chat_model, index
from tests.support.inside import main
from tests.support.public import CLASSES, OPTIONS, PUBLIC, fields_of, methods_of, parameters_of
from tests.support.rerankers import MODULES
from tests.support.stores import redis_server

ROOT = Path(__file__).parents[2]
DOCS = [path.relative_to(ROOT).as_posix() for path in sorted(ROOT.glob("docs/**/*.md"))]
PAGES = {path: (ROOT / path).read_text("utf-8") for path in ["README.md", *DOCS]}
EXAMPLES = {
    f"{path} {number}": code
    for path, text in PAGES.items()
    for number, code in enumerate(re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE), 1)
}


@pytest.fixture
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """What examples find around them: their reader's retriever and index, settings, and a folder to write to."""
    monkeypatch.setenv("REGOLO_BASE_URL", "local://")
    for name, module in MODULES.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(LlamaIndexSettings, "_llm", MockLLM())
    monkeypatch.chdir(tmp_path)
    log = logging.getLogger("regolo_rerank")
    with redis_server("fakeredis") as url:
        monkeypatch.setenv("REDIS_URL", url)
        yield {"my_retriever": Everything(), "my_model": chat_model(), "index": index(), "my_llm": Llm()}
    log.setLevel(logging.NOTSET)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of LlamaIndex's own agents
@pytest.mark.parametrize("code", EXAMPLES.values(), ids=list(EXAMPLES))
def test_every_example_runs(
    code: str,
    request: pytest.FixtureRequest,
    surroundings: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Each Python block runs as it stands, ranks what it says, and prints what the comments behind its prints say."""
    if "docs/ray.md" in request.node.name:
        pytest.importorskip("ray", reason="tests/external/ray runs it")
    if "import vcr" in code:
        pytest.importorskip("vcr", reason="part of the extra [dev]")
    names = surroundings
    exec(compile(code, "example.py", "exec"), names)  # noqa: S102 - our own text
    printed = capsys.readouterr().out
    if said := re.findall(r"^ *print\(.*\)  # (.*)$", code, re.MULTILINE):
        assert printed.splitlines() == said
    elif "documents" in names:
        assert names["documents"][0].page_content == TEXTS[0]
        assert 0 < names["documents"][0].metadata["relevance_score"] <= 1
    elif "answer" in names:
        assert names["answer"].source_nodes[0].text == TEXTS[0]
    else:
        assert not printed


def test_the_bulk_page_is_true(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its command makes its line of OUT from its line of IN, but for the scores, and its line of OUT.errors."""
    (command, *_), (given, ranked, failed) = (
        re.findall(rf"^```{kind}\n(.*?)^```$", PAGES["docs/bulk.md"], re.DOTALL | re.MULTILINE)
        for kind in ("bash", "json")
    )
    name, *arguments = shlex.split(command)
    assert name == "regolo-rerank"
    queries = [json.loads(given), json.loads(failed)["input"]]
    (tmp_path / "queries.jsonl").write_text("\n".join(map(json.dumps, queries)), "utf-8")
    monkeypatch.chdir(tmp_path)
    assert main([*arguments, "--local"]) == 1
    assert json.loads((tmp_path / "rankings.jsonl.errors").read_text("utf-8")) == json.loads(failed)
    out, said = json.loads((tmp_path / "rankings.jsonl").read_text("utf-8")), json.loads(ranked)
    for result in [*out["results"], *said["results"]]:
        assert 0 <= result.pop("relevance_score") <= 1
    assert out == said


def test_the_evaluate_page_is_true(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its lines are judged queries, its command measures them, and what it shows is what the 100 questions come to."""
    blocks = dict(re.findall(r"^```(json|bash|text)\n(.*?)^```$", PAGES["docs/evaluate.md"], re.DOTALL | re.MULTILINE))
    (tmp_path / "judged.jsonl").write_text(blocks["json"], "utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REGOLO_BASE_URL", "local://")
    assert main(shlex.split(blocks["bash"])[1:]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"judged.jsonl", "scores.db", "gain.png"}
    assert without_time(blocks["text"]).startswith("100 queries with something relevant")
    if sys.version_info[:2] == (3, 11):  # whose docstrings were asked
        assert without_time(blocks["text"]) == without_time(f"{evaluate(example_queries(), RegoloClient())}\n")


def without_time(text: str) -> str:
    """Leave out how long it took."""
    return re.sub(r"[\d.]+ seconds", "", text)


COMMANDS = re.findall(r"^```bash\n(.*?)^```$", PAGES["docs/cli.md"], re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("command", [command for command in COMMANDS if command != "regolo-rerank demo\n"])
def test_every_command_runs(command: str, tmp_path: Path) -> None:
    """Each command of the page ranks Beijing first among lines."""
    cities = ["Rome is the capital of Italy.", "Beijing is the capital of China.", "Oslo is in Norway."]
    (tmp_path / "cities.txt").write_text("\n".join(cities), "utf-8")
    (tmp_path / "cities.jsonl").write_text("\n".join(json.dumps({"text": city}) for city in cities), "utf-8")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "REGOLO_BASE_URL": "local://", "PATH": path}
    shell = ["bash", "-euo", "pipefail", "-c", command]
    printed = subprocess.run(shell, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout  # noqa: S603 - our own text
    assert re.search(r"(Beijing|Rome).*", printed).group(1) == "Beijing"  # type: ignore[union-attr]


def test_the_page_has_every_option_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    """Options in its table are those that help lists."""
    with pytest.raises(SystemExit):
        main(["rank", "--help"])
    listed = set(re.findall(r"^  (--[a-z-]+)", capsys.readouterr().out, re.MULTILINE))
    assert set(re.findall(r"^\| `(--[a-z-]+)", PAGES["docs/cli.md"], re.MULTILINE)) == listed - {"--json"}


def test_no_code_of_the_documentation_is_left_out() -> None:
    """Every fence belongs to a block that is run, and no code stands outside of one."""
    run = {path: sum(name.startswith(f"{path} ") for name in EXAMPLES) for path in PAGES}
    run["README.md"] += 2  # the first is run in the demo's tests, the second runs all of them
    run["docs/bulk.md"] += 4
    run["docs/evaluate.md"] += 3
    run["docs/cli.md"] += 5
    run["docs/index.md"] += 2  # to install, and to set the key
    for path, text in PAGES.items():
        assert len(re.findall(r"^\s*(?:```|~~~)", text, re.MULTILINE)) == 2 * run[path], path
        outside = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
        indented = re.findall(r"^\n(?: {4}|\t)(?!options:).*$", outside, re.MULTILINE)
        assert not indented, path


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the documentation by its one command, where no other machine answers."""
    pytest.importorskip("mkdocs", reason="part of the extra [dev]")
    folder = tmp_path_factory.mktemp("site")
    nobody = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    built = subprocess.run(  # noqa: S603 - our own command
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=ROOT,
        env=os.environ | nobody,
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    return folder


def test_no_page_loads_anything_from_elsewhere(site: Path) -> None:
    """Scripts, styles, fonts and pictures of a page come with it."""
    pages = list(site.rglob("*.html"))
    assert len(pages) > len(DOCS)
    for page in pages:
        loaded = re.findall(r'<(?:script|link|img|iframe)\b[^>]*?(?:src|href)="([^"]+)"', page.read_text("utf-8"))
        assert loaded
        assert not [address for address in loaded if re.match(r"(\w+:)?//", address)], page


def test_our_side_of_the_migration_tables_exists() -> None:
    """What the right column calls by a name is an option, an argument, an attribute, a class or a variable."""
    rows = re.findall(r"^\| .* \| (.*) \|$", PAGES["docs/migration.md"], re.MULTILINE)
    codes = [code for row in rows for code in re.findall(r"`([^`]+)`", row)]
    named = {name for code in codes for name in re.findall(r"^\w+|(?<=rerank\()\w+", code)} - {"regolo_rerank"}
    known = {"REGOLO_API_KEY", "REGOLO_BASE_URL", "None"}
    for cls in CLASSES:
        known.update({cls.__name__}, fields_of(cls), methods_of(cls), *map(parameters_of, methods_of(cls).values()))
    assert len(named) > 20
    assert named <= known


INSIDE = {"endpoint", "fields_for", "for_call", "format_for", "key_for", "class_name"}
"""Methods of a reranker that the package calls, or a framework."""


def test_the_api_page_has_everything_public(site: Path) -> None:
    """Every public class, method and option has a heading there, everything that an object holds is named, no more."""
    page = (site / "api" / "index.html").read_text("utf-8")
    anchors = set(re.findall(r'<h\d id="(regolo_rerank[\w.]+)"', page))
    words = set(re.findall(r"\w+", re.sub(r"<[^>]+>", "", page)))
    shared = {f"regolo_rerank.options.Options.{name}" for name in [*OPTIONS, "model_copy"]} & anchors
    functions = "evaluation.evaluate", "evaluation.example_queries", "plot.evaluation_summary", "plot.rank_changes"
    expected = {"regolo_rerank.options.Options", *(f"regolo_rerank.{name}" for name in functions)} | shared
    for cls in PUBLIC:
        path = next(iter({f"{cls.__module__}.{cls.__name__}", f"regolo_rerank.{cls.__name__}"} & anchors), "missing")
        bases = [base for base in cls.__mro__ if base in CLASSES and base is not Options]
        members = set().union(*map(methods_of, bases)) - INSIDE
        if issubclass(cls, Options):
            members.update(*(fields_of(base) & set(base.__annotations__) for base in bases))
        expected |= {path, *(f"{path}.{name}" for name in members)}
        assert fields_of(cls) <= words, cls
    assert anchors == expected
    assert {name.rpartition(".")[2] for name in shared} == {*OPTIONS, "model_copy"} - {"on_error"}
    assert {"postprocess_nodes", "apostprocess_nodes", "__version__"} <= words  # the methods are LlamaIndex's own


def test_the_api_page_can_be_read(site: Path) -> None:
    """Sections are recognised, signatures are broken, and what only pydantic reads is left out."""
    page = html.unescape(re.sub(r"<[^>]+>", "", (site / "api" / "index.html").read_text("utf-8")))
    for section in ("Parameters:", "Returns:", "Raises:", "Examples:", "Attributes:"):
        assert f"\n{section}\n" in page, section
    assert "rerank(\n    query: str,\n    documents: Iterable[str],\n" in page
    assert not re.findall(r"Example:|SkipJsonSchema|Annotated|Field\(|>>> .* >>>", page)


def test_a_notebook_is_a_page(site: Path) -> None:
    """Each is there with its code, what it printed and its pictures, is found in the navigation, and links pages."""
    front = (site / "index.html").read_text("utf-8")
    notebooks = sorted(ROOT.glob("notebooks/*.ipynb"))
    assert notebooks
    for notebook in notebooks:
        page = site / "notebooks" / notebook.stem / "index.html"
        assert f'href="notebooks/{notebook.stem}/"' in front
        cells = json.loads(notebook.read_text("utf-8"))["cells"]
        outputs = [output for cell in cells for output in cell.get("outputs", ())]
        pictures = [output for output in outputs if "image/png" in output.get("data", {})]
        text = page.read_text("utf-8")
        assert text.count("<code>") >= sum(cell["cell_type"] == "code" for cell in cells)
        shown = re.findall(rf'<img [^>]*src="([^"]*{notebook.stem}_[^"]*\.png)"', text)
        assert len(shown) == len(pictures)
        assert all((page.parent / each).is_file() for each in shown)
        assert not re.findall(r'alt="png"|href="[^"]*\.(?:ipynb|md)[#"]|<code>[^<]*\.(?:ipynb|md)</code>', text)


def test_code_is_80_columns_wide_at_most(site: Path) -> None:
    """On no page has code to be scrolled beside text that has not; what a notebook has printed stays as it is."""
    code = {name: re.findall(r"^```\w+\n(.*?)^```$", text, re.DOTALL | re.MULTILINE) for name, text in PAGES.items()}
    for page in site.glob("*/index.html"):
        blocks = re.findall(r"<pre>(.*?)</pre>", page.read_text("utf-8"), re.DOTALL)
        code[str(page)] = [html.unescape(re.sub(r"<[^>]+>", "", block)) for block in blocks]
    assert len(code) > 20
    for name, blocks in code.items():
        assert [line for block in blocks for line in block.splitlines() if len(line) > 80] == [], name
