"""The documentation: each example runs and prints what the page shows, and the site can be built.

On a page, a block of `python` runs in the namespace of the blocks above it. A block of `text` right behind it is its
output. A block with a title is a file. In a block of `console`, a line that starts with `$` is a command, before its
output.
"""

import asyncio
import importlib.util
import io
import logging
import os
import re
import runpy
import shlex
import subprocess
import sys
import types
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from textwrap import dedent
from typing import Any, NamedTuple

import pytest

from regolo_rerank.options import Options
from tests.support.stub import Stub

ROOT = Path(__file__).parents[2]
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in sorted(ROOT.glob("docs/**/*.md"))}
PAGES["README.md"] = (ROOT / "README.md").read_text("utf-8")
PAGES.pop("docs/CHANGELOG.md")
PAGES.pop("docs/CONTRIBUTING.md")

OPTIONAL = ("fakeredis", "fastapi", "langchain", "langgraph", "openinference", "redis_dict", "respx", "vcr")
"""Packages of developers. A page that imports one of them is skipped without it."""
IS_RUN = re.compile(r"--local|^\$ (cat|head) ", re.MULTILINE)
"""Commands with --local, and those that show a file, are run. Others need a key or install something."""


class Block(NamedTuple):
    """A fenced block of a page."""

    language: str
    title: str
    text: str
    follows: bool
    """Whether only blank lines separate it from the block before."""


def blocks_of(text: str) -> list[Block]:
    """Return the fenced blocks of a page; those in tabs are indented."""
    found, end = [], 0
    for match in re.finditer(r"^( *)```(\w+)(?: title=\"([^\"\n]+)\")?\n(.*?)^\1```$", text, re.DOTALL | re.MULTILINE):
        _, language, title, code = match.groups()
        found.append(Block(language, title or "", dedent(code), not text[end : match.start()].strip()))
        end = match.end()
    return found


RUN = {path: text for path, text in PAGES.items() if any(b.language in {"python", "console"} for b in blocks_of(text))}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to run examples in, with the offline scorer as the server, and a Redis and a cross-encoder in memory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REGOLO_BASE_URL", "local://")
    monkeypatch.setitem(sys.modules, "sentence_transformers", _cross_encoders())
    if importlib.util.find_spec("fakeredis"):
        import fakeredis

        monkeypatch.setattr("redis.Redis.from_url", lambda _: fakeredis.FakeRedis())
    asyncio.set_event_loop(None)  # then LlamaIndex closes the loops that it opens
    log = logging.getLogger("regolo_rerank")
    yield tmp_path
    log.setLevel(logging.NOTSET)


def _cross_encoders() -> types.ModuleType:
    from regolo_rerank.local import local_scores

    class CrossEncoder:
        def __init__(self, name: str) -> None:
            assert name

        def predict(self, pairs: list[tuple[str, str]]) -> list[float]:
            return [score for query, document in pairs for score in local_scores(query, [document])]

    module = types.ModuleType("sentence_transformers")
    module.CrossEncoder = CrossEncoder  # type: ignore[attr-defined]
    return module


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the frameworks
@pytest.mark.parametrize("path", RUN)
def test_the_examples_of_a_page_print_what_it_shows(
    path: str, folder: Path, stub: Stub, capsys: pytest.CaptureFixture[str]
) -> None:
    """Python and commands run from top to bottom, and everything that they print is on the page."""
    if path.endswith("ray.md"):
        pytest.skip("tests/external/ray runs it")
    if "HTTPStatus" in RUN[path] and sys.version_info >= (3, 14):
        pytest.skip("Python 3.14 has other texts for HTTP statuses")
    for name in OPTIONAL:
        if re.search(rf"^ *(from|import) {name}\b", RUN[path], re.MULTILINE):
            pytest.importorskip(name)
    blocks = blocks_of(RUN[path])
    names: dict[str, Any] = {"__name__": "__main__"}
    for block, following in zip(blocks, [*blocks[1:], None], strict=True):
        shown = following.text if following and following.language == "text" and following.follows else ""
        if block.title:
            (folder / block.title).write_text(block.text, "utf-8")
        elif block.language == "python":
            exec(compile(_here(block.text, stub), f"example of {path}", "exec"), names)  # noqa: S102 - our own text
            assert capsys.readouterr().out == shown, block.text
        elif block.language == "console" and IS_RUN.search(block.text):
            pytest.importorskip("regolo_rerank.cli")
            assert _run(_here(block.text, stub)) == re.sub(r"^(\$|>) .*\n", "", block.text, flags=re.MULTILINE)


def _here(code: str, stub: Stub) -> str:
    """Return code for the stub server instead of a server on this machine."""
    return re.sub(r"http://localhost:\d+", stub.url, code)


def _run(console: str) -> str:
    """Run the commands of a block and return what they print, errors included."""
    from regolo_rerank.cli.main import main

    printed = io.StringIO()
    commands = console.replace("\\\n>", "")  # join continued lines
    for command in re.findall(r"^\$ (.+)", commands, re.MULTILINE):
        if "|" in command:
            script = f'regolo-rerank() {{ "{sys.executable}" -m regolo_rerank "$@"; }}; {command}'
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            printed.write(subprocess.check_output(["bash", "-c", script], env=environment, text=True))  # noqa: S603, S607
        else:
            with redirect_stdout(printed), redirect_stderr(printed):
                main(shlex.split(command)[1:])
    return re.sub(r"\d+\.\d s\)", "0.1 s)", printed.getvalue())  # how long it took


def test_code_and_output_fit_the_page() -> None:
    """Code has at most 80 columns and output 78, so that no block needs a scroll bar."""
    for path, text in PAGES.items():
        for block in blocks_of(text):
            limit = 78 if block.language in {"text", "console"} else 80
            assert [line for line in block.text.splitlines() if len(line) > limit] == [], path


def test_every_block_is_of_a_known_kind() -> None:
    """No fence is missed: each has a language, and README alone has the two blocks of bash."""
    for path, text in PAGES.items():
        blocks = blocks_of(text)
        assert len(re.findall(r"^ *(?:```|~~~)", text, re.MULTILINE)) == 2 * len(blocks), path
        languages = {"python", "text", "console", "json", "yaml"} | ({"bash"} if path == "README.md" else set())
        assert {block.language for block in blocks} <= languages, path


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site, made without network."""
    for name in ("material", "mkdocstrings", "mkdocs_llmstxt", "nbconvert"):
        pytest.importorskip(name)
    target = tmp_path_factory.mktemp("site")
    no_network = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    built = subprocess.run(  # noqa: S603 - our own command
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", target],
        cwd=ROOT,
        env=os.environ | no_network,
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    return target


def test_no_page_loads_anything_from_elsewhere(site: Path) -> None:
    """Scripts, styles, fonts and pictures of a page come with it."""
    for page in site.rglob("*.html"):
        loaded = re.findall(r'<(?:script|link|img|iframe)\b[^>]*?(?:src|href)="([^"]+)"', page.read_text("utf-8"))
        assert loaded
        assert not [address for address in loaded if re.match(r"(\w+:)?//", address)], page


@pytest.mark.parametrize("page", ["client", "langchain", "llama-index"])
def test_a_page_of_the_reference_lists_the_options_of_its_class(site: Path, page: str) -> None:
    """Every option of the client is among the parameters, and no type has a name of the library's inside."""
    text = (site / "reference" / page / "index.md").read_text("utf-8")
    listed = set(re.findall(r"^- \*\*`(\w+)`\*\*", text, re.MULTILINE))
    assert Options.model_fields.keys() <= listed
    assert not re.search(r"`(Count|Seconds|Text|SkipJsonSchema)\b|_Default|Unpack", text)


def test_language_models_find_each_page_as_markdown(site: Path) -> None:
    """llms.txt lists every page except Contributing, and llms-full.txt has their text."""
    listed = (site / "llms.txt").read_text("utf-8")
    for path in PAGES.keys() - {"README.md"}:
        name = path.removeprefix("docs/").removesuffix(".md")
        address = "index.md" if name == "index" else f"{name}/index.md"
        assert f"({'/' if '(/' in listed else ''}{address})" in listed or f"/{address})" in listed
        assert (site / address).is_file()
    assert "## How-to" in listed
    assert len((site / "llms-full.txt").read_text("utf-8")) > len(listed)


@pytest.mark.parametrize("repository", ["", "https://github.com/owner/name"])
def test_all_addresses_follow_from_one(repository: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The repository's address in pyproject.toml gives the link to it and those to edit a page; without it, none."""
    config = pytest.importorskip("mkdocs.config.defaults").MkDocsConfig()
    pytest.importorskip("nbconvert")
    pages = runpy.run_path(str(ROOT / "docs" / "pages.py"))
    text = f"[tool.hatch.metadata.hooks.custom]\nrepository = '{repository}'"
    (tmp_path / "pyproject.toml").write_text(text, "utf-8")
    monkeypatch.setitem(pages["on_config"].__globals__, "ROOT", tmp_path)
    pages["on_config"](config)
    assert (config.repo_url or "") == repository
    assert bool(config.edit_uri) == bool(repository)
    assert (config.site_url or "") == ("https://owner.github.io/name/" if repository else "")
