import importlib
import os
import re
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest
from llama_index.core.postprocessor.types import BaseNodePostprocessor

import regolo_rerank

ROOT = Path(__file__).parents[2]

WITHOUT_EXTRAS = """
import sys
import regolo_rerank
assert not {"httpx", "pydantic", "langchain_core", "llama_index"} & sys.modules.keys()
from regolo_rerank import RegoloClient, InvalidInputError
from regolo_rerank._version import install_hint
client = RegoloClient(base_url="local://", scorer=lambda query, documents: [float(len(text)) for text in documents])
assert [result.index for result in client.rerank("q", ["a", "bb"]).results] == [1, 0]
try:
    RegoloClient(base_url="local://").rerank("q", ["a"])
except InvalidInputError as error:
    assert install_hint("local") in str(error)
extras = {"langchain": "langchain", "llama_index": "llama-index", "plot": "evaluate"}
for module, extra in extras.items():
    try:
        __import__(f"regolo_rerank.{module}")
    except ImportError as error:
        assert install_hint(extra) in str(error), error
    else:
        raise AssertionError(module)
print(regolo_rerank.__version__, regolo_rerank.__file__)
"""


def run(*command: str | Path, **environment: str) -> str:
    """Run a command and return what it printed."""
    done = subprocess.run(  # noqa: S603 - our own commands
        command, capture_output=True, text=True, check=False, env={**os.environ, **environment}, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel."""
    pytest.importorskip("build", reason="part of the extra [dev]")
    pytest.importorskip("hatchling", reason="part of the extra [dev]")
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_is_the_package_and_nothing_else(wheel: Path) -> None:
    """The wheel holds the modules, their data and the license, and is smaller than 200 kB."""
    names = zipfile.ZipFile(wheel).namelist()
    packaged = {name for name in names if ".dist-info/" not in name}
    files = [path.relative_to(ROOT) for path in (ROOT / "regolo_rerank").rglob("*") if path.is_file()]
    assert packaged == {path.as_posix() for path in files if path.suffix in {".json", ".jsonl", ".py", ".typed"}}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert wheel.stat().st_size < 200_000


@pytest.mark.parametrize("repository", ["", "https://git.example/regolo_rerank"])
def test_the_page_on_the_index_has_no_dead_links(repository: str) -> None:
    """All links and addresses are absolute. They lead to the repository only if its address is set."""
    hatch_build: Any = pytest.importorskip("hatch_build", reason="part of the extra [dev]")
    config = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["hatch"]["metadata"]["hooks"]["custom"]
    metadata: dict[str, Any] = {}
    hatch_build.ProjectMetadata(str(ROOT), {**config, "repository": repository}).update(metadata)
    page, urls = metadata["readme"]["text"], metadata["urls"]
    addresses = [*re.findall(r"\]\(([^)]*)\)", page), *urls.values()]
    assert [address for address in addresses if not address.startswith("https://")] == []
    views = set(re.findall(rf"(!?)\[[^]]*\]\({re.escape(repository)}/(raw|blob)/main/", page))
    assert views == ({("!", "raw"), ("", "blob")} if repository else set())
    assert ({"Repository", "Documentation", "Issues", "Changelog"} <= urls.keys()) is bool(repository)


def test_llama_hub_finds_the_class() -> None:
    """What LlamaHub is told to import is there, and is what it takes for a node postprocessor."""
    hub = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["llamahub"]
    module = importlib.import_module(hub["import_path"])
    assert hub["class_authors"].keys() == {"RegoloRerank"}
    assert issubclass(module.RegoloRerank, BaseNodePostprocessor)


def test_the_wheel_works_without_extras(wheel: Path, tmp_path: Path) -> None:
    """In a clean environment the client works, and each adapter says which extra to install."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", wheel)
    printed = run(python, "-I", "-W", "error", "-c", WITHOUT_EXTRAS).split()
    assert printed[0] == regolo_rerank.__version__
    assert printed[1].startswith(str(tmp_path))


def test_importing_the_package_loads_nothing_else() -> None:
    """`import regolo_rerank` loads neither a framework, nor httpx, nor pydantic."""
    code = "import sys; before = set(sys.modules); import regolo_rerank; print(*sorted(set(sys.modules) - before))"
    loaded = run(sys.executable, "-I", "-c", code).split()
    assert not [name for name in loaded if name.partition(".")[0] in {"httpx", "pydantic", "langchain_core"}]
    ours = [name for name in loaded if name.startswith("regolo_rerank")]
    assert ours == ["regolo_rerank", "regolo_rerank._version"]


def test_public_names_are_loaded_when_they_are_used() -> None:
    """Every public name can be imported and is listed, and no other is there."""
    for name in regolo_rerank.__all__:
        assert getattr(regolo_rerank, name) is not None
    assert dir(regolo_rerank) == sorted(regolo_rerank.__all__)
    with pytest.raises(ImportError, match=r"from regolo_rerank\.langchain or from regolo_rerank\.llama_index"):
        exec("from regolo_rerank import RegoloRerank")  # noqa: S102 - a type checker refuses it too
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        _ = regolo_rerank.Nonsense
