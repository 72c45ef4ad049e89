import re
import shutil
import sys
from base64 import b64decode
from collections.abc import Callable
from pathlib import Path

import matplotlib.font_manager  # noqa: F401 - lists the fonts now, as a kernel may warn when it has to
import pytest

pytest.importorskip("nbclient", reason="part of the extra [dev]")
pytest.importorskip("ipykernel", reason="part of the extra [dev]")

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

from tests.conftest import KEY
from tests.support.notebooks import fresh_kernels
from tests.support.stub import Stub

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
assert NOTEBOOKS

MAX_PICTURE_BYTES = 60_000
"""Stored ones stay in the repository's history for good."""

PROGRESS = re.compile(r"[^\r\n]*\d+%\|[^|]*\| \d+/\d+ \[[^\]]*\]")
SECONDS = re.compile(r"[\d,.]+ seconds")

pytestmark = [pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)]

Run = Callable[[Path], NotebookNode]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a notebook in a copy of its folder and a fresh kernel of this interpreter, without settings or network."""
    fresh_kernels(tmp_path, monkeypatch)
    for name in ("HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")

    def execute(path: Path) -> NotebookNode:
        if path.stem == "ray_data":
            pytest.importorskip("ray", reason="tests/external/ray runs it")
        folder = shutil.copytree(path.parent, tmp_path / "notebooks")
        return NotebookClient(read(path), resources={"metadata": {"path": str(folder)}}).execute()

    return execute


def read(path: Path) -> NotebookNode:
    """Return a stored notebook."""
    return nbformat.read(path, as_version=4)  # type: ignore[no-any-return, no-untyped-call]  # nbformat has no types


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    """Return the cells that run."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def shown(notebook: NotebookNode) -> list[str]:
    """Return what each code cell shows, a mark for a picture, without progress and times; a warning fails."""
    return ["".join(map(_shown, cell.outputs)) for cell in code_cells(notebook)]


def _shown(output: NotebookNode) -> str:
    if output.output_type == "stream":
        text = str(output.text) if output.name == "stdout" else PROGRESS.sub("", output.text)
        assert output.name == "stdout" or not text.strip(), text
        return text.strip("\r\n") and text
    assert output.output_type in {"display_data", "execute_result"}, output
    # The plain text beside a picture or a table may hold an address in memory or an id.
    if "image/png" in output.data:
        picture = b64decode(output.data["image/png"])
        assert picture.startswith(b"\x89PNG")
        assert len(picture) <= MAX_PICTURE_BYTES
        return "<picture>"
    return SECONDS.sub("", str(output.data["text/html"]))


def test_it_is_stored_as_it_was_run(path: Path) -> None:
    """A notebook is stored after one run from top to bottom, without times."""
    notebook = read(path)
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1))
    assert [cell.metadata for cell in notebook.cells if cell.metadata] == []


def test_it_runs_without_a_key(run: Run, path: Path) -> None:
    """Without key and network each cell shows what is stored, to the letter on the Python that stored it."""
    stored, fresh = read(path), run(path)
    assert list(map(bool, shown(stored))) == list(map(bool, shown(fresh)))
    if stored.metadata.language_info.version.split(".")[:2] == [str(part) for part in sys.version_info[:2]]:
        assert shown(stored) == shown(fresh)


def test_it_runs_with_a_key(run: Run, path: Path, stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a key, the same cells send their requests to the API with it, and it shows nowhere."""
    monkeypatch.setenv("REGOLO_API_KEY", KEY)
    monkeypatch.setenv("REGOLO_BASE_URL", stub.url)
    notebook = run(path)
    assert all(shown(notebook))
    assert {request.headers.get("authorization") for request in stub.received} == {f"Bearer {KEY}"}
    assert KEY not in str(notebook)
