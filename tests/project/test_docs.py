import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from llama_index.core import Settings as LlamaIndexSettings
from llama_index.core.llms import MockLLM

from regolo_rerank.options import Options
from tests.support.corpus import TEXTS, Everything, Llm, chat_model, index
from tests.support.inside import main
from tests.support.public import CLASSES, fields_of, methods_of, parameters_of

ROOT = Path(__file__).parents[2]
DOCS = [path.relative_to(ROOT).as_posix() for path in sorted(ROOT.glob("docs/**/*.md"))]
PAGES = {path: (ROOT / path).read_text("utf-8") for path in ["README.md", *DOCS]}
EXAMPLES = {
    f"{path} {number}": code
    for path, text in PAGES.items()
    for number, code in enumerate(re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE), 1)
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of LlamaIndex's own agents
@pytest.mark.parametrize("code", EXAMPLES.values(), ids=list(EXAMPLES))
def test_every_example_runs(
    code: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each Python block runs as it stands, ranks what it says, and prints what the comments behind its prints say."""
    if "docs/ray.md" in request.node.name:
        pytest.importorskip("ray", reason="tests/external/ray runs it")
    monkeypatch.setenv("REGOLO_BASE_URL", "local://")
    monkeypatch.setattr(LlamaIndexSettings, "_llm", MockLLM())
    names: dict[str, Any] = {
        "my_retriever": Everything(),
        "my_model": chat_model(),
        "index": index(),
        "my_llm": Llm(),
    }
    exec(compile(code, "example.py", "exec"), names)  # noqa: S102 - our own text
    printed = capsys.readouterr().out
    if said := re.findall(r"^ *print\(.*\)  # (.*)$", code, re.MULTILINE):
        assert printed.splitlines() == said
    elif "documents" in names:
        assert names["documents"][0].page_content == TEXTS[0]
        assert 0 < names["documents"][0].metadata["relevance_score"] <= 1
    elif "answer" in names:
        assert names["answer"].source_nodes[0].text == TEXTS[0]
    elif "response" in names:
        assert printed == "1 1.0 Beijing is the capital of China.\n"
    else:
        assert not printed


def test_the_bulk_page_is_true(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its command makes its line of OUT from its line of IN, but for the scores."""
    (command, *_), (given, ranked) = (
        re.findall(rf"^```{kind}\n(.*?)^```$", PAGES["docs/bulk.md"], re.DOTALL | re.MULTILINE)
        for kind in ("bash", "json")
    )
    name, *arguments = shlex.split(command)
    assert name == "regolo-rerank"
    (tmp_path / "queries.jsonl").write_text(given, "utf-8")
    monkeypatch.chdir(tmp_path)
    assert main([*arguments, "--local"]) == 0
    out, said = json.loads((tmp_path / "rankings.jsonl").read_text("utf-8")), json.loads(ranked)
    for result in [*out["results"], *said["results"]]:
        assert 0 <= result.pop("relevance_score") <= 1
    assert out == said


def test_no_code_of_the_documentation_is_left_out() -> None:
    """Every fence belongs to a block that is run, and no code stands outside of one."""
    run = {path: sum(name.startswith(f"{path} ") for name in EXAMPLES) for path in PAGES}
    run["README.md"] += 2  # the first is run in the demo's tests, the second runs all of them
    run["docs/bulk.md"] += 3
    for path, text in PAGES.items():
        assert len(re.findall(r"^\s*(?:```|~~~)", text, re.MULTILINE)) == 2 * run[path], path
        outside = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
        indented = re.findall(r"^\n(?: {4}|\t)(?!options:).*$", outside, re.MULTILINE)
        assert not indented, path


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the documentation by its one command, where no other machine answers."""
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


def test_the_api_page_has_everything_public(site: Path) -> None:
    """Every public class, method and option has a heading there, and everything that an object holds is named."""
    page = (site / "api" / "index.html").read_text("utf-8")
    anchors = set(re.findall(r'id="([\w.]+)"', page))
    words = set(re.findall(r"\w+", re.sub(r"<[^>]+>", "", page)))
    for cls in CLASSES:
        path = next(iter({f"{cls.__module__}.{cls.__name__}", f"regolo_rerank.{cls.__name__}"} & anchors), "missing")
        options = [name for name in fields_of(cls) & set(cls.__annotations__) if issubclass(cls, Options)]
        assert {path, *(f"{path}.{name}" for name in [*methods_of(cls), *options])} <= anchors, cls
        assert fields_of(cls) <= words, cls
    assert {"postprocess_nodes", "apostprocess_nodes", "__version__"} <= words  # the methods are LlamaIndex's own
