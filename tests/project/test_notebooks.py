import re
import tomllib
from base64 import b64decode
from pathlib import Path

import matplotlib.font_manager  # noqa: F401 - caches the list of fonts; a kernel prints a warning when it does so
import pytest

from tests.conftest import KEY
from tests.support.notebooks import NOTEBOOKS, announced_requests, check_outputs, outputs, read, run
from tests.support.stub import Stub

pytest.importorskip("nbclient", reason="part of the extra [dev]")

MAX_CHART_BYTES = 60_000
"""Charts stay in the history of the repository."""

REMOVED_MODULES = re.compile(
    r"\b(aifc|asynchat|asyncore|audioop|cgi|cgitb|chunk|crypt|distutils|imghdr|imp|lib2to3|mailcap|nntplib|pipes|smtpd"
    r"|sndhdr|sunau|telnetlib|uu|xdrlib)\b"
)
"""Modules of Python 3.11 that later versions lack."""

ALL = sorted(NOTEBOOKS.glob("*.ipynb"))
RUNNABLE = [path for path in ALL if path.stem != "ray_data"]  # tests/external/ray runs that one


def stem(path: Path) -> str:
    """Return the id of a test."""
    return path.stem


pytestmark = pytest.mark.timeout(240)  # a kernel takes many seconds to start on a busy machine


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")


@pytest.mark.parametrize("path", ALL, ids=stem)
def test_stored_outputs_are_fit_to_publish(path: Path) -> None:
    """They come from one run, fit the page, keep charts small and name no module that newer Pythons lack."""
    notebook = read(path)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        for output in cell.outputs:
            charts = output.get("data", {}).get("image/png", "")
            assert len(b64decode(charts)) <= MAX_CHART_BYTES
            assert all(len(line) <= 78 for line in output.get("text", "").splitlines())
    assert not REMOVED_MODULES.findall("".join(outputs(notebook)))


@pytest.mark.parametrize("path", ALL, ids=stem)
def test_its_first_line_installs_extras_that_exist(path: Path) -> None:
    """The extras in `%pip install "..[...]"` are those of the project."""
    project = tomllib.loads((NOTEBOOKS.parent / "pyproject.toml").read_text("utf-8"))["project"]
    code = next(cell.source for cell in read(path).cells if cell.cell_type == "code")
    extras = re.match(r'%pip install -q "\.\.\[([\w,-]+)\]"', code)
    assert extras
    assert set(extras.group(1).split(",")) <= project["optional-dependencies"].keys()


@pytest.mark.parametrize("path", RUNNABLE, ids=stem)
def test_it_reproduces_its_outputs_without_a_key(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without key and network each cell shows its stored output."""
    notebook = read(path)
    stored, python = outputs(notebook), notebook.metadata.language_info.version
    check_outputs(stored, run(notebook, tmp_path, monkeypatch), python)


@pytest.mark.parametrize("path", RUNNABLE, ids=stem)
def test_it_sends_the_announced_requests_with_a_key(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stub: Stub
) -> None:
    """With a key the cells send as many requests as the first cell announces, and never show the key."""
    monkeypatch.setenv("REGOLO_API_KEY", KEY)
    monkeypatch.setenv("REGOLO_BASE_URL", stub.url)
    notebook = read(path)
    run(notebook, tmp_path, monkeypatch)
    assert len(stub.received) == announced_requests(notebook)
    assert {request.headers["authorization"] for request in stub.received} == {f"Bearer {KEY}"}
    assert KEY not in str(notebook)
