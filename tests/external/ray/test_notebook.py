"""notebooks/ray_data.ipynb, which the ordinary environment only reads, as it has no Ray."""

import importlib.util
import shutil
import sys
from pathlib import Path
from typing import Final

import pytest

pytest.importorskip("nbclient", reason="part of the extra [ray]")

import nbformat
from ipykernel.kernelspec import write_kernel_spec
from nbclient import NotebookClient
from nbformat import NotebookNode

from regolo_rerank.options import API_KEY_VARIABLE, BASE_URL_VARIABLE
from tests.conftest import KEY
from tests.external.ray.page import RECIPE
from tests.support.stub import Stub

if importlib.util.find_spec("ray") is None:
    pytest.skip('Ray is not installed: python3 -m pip install -e ".[ray]"', allow_module_level=True)

PATH: Final = Path(__file__).parents[3] / "notebooks" / "ray_data.ipynb"
NOTEBOOK: Final[NotebookNode] = nbformat.read(PATH, as_version=4)  # type: ignore[no-untyped-call]  # nbformat has no types

pytestmark = [pytest.mark.timeout(180), pytest.mark.usefixtures("ray_settings")]  # it starts a Ray of its own


def executed(folder: Path, patch: pytest.MonkeyPatch) -> NotebookNode:
    """Run the notebook in a fresh kernel of this interpreter, in a folder of its own."""
    write_kernel_spec(folder / "kernels" / "python3")
    patch.setenv("JUPYTER_PATH", str(folder))
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        patch.setenv(name, str(folder / name))
    copy = shutil.copy(PATH, folder)
    notebook = nbformat.read(copy, as_version=4)  # type: ignore[no-untyped-call]  # nbformat has no types
    return NotebookClient(notebook, resources={"metadata": {"path": str(folder)}}).execute()


def printed(notebook: NotebookNode) -> list[str]:
    """Return what each code cell prints, a mark for a picture; anything else that it shows fails."""
    return ["".join(map(_shown, cell.outputs)) for cell in notebook.cells if cell.cell_type == "code"]


def _shown(output: NotebookNode) -> str:
    if output.output_type == "execute_result":
        assert "image/png" in output.data
        return "<picture>"
    assert output.get("name") == "stdout", output
    return str(output.text)


def test_its_recipe_is_the_page_s() -> None:
    """The notebook's cell and the block of docs/how-to/ray.md are the same text."""
    assert RECIPE.rstrip("\n") in [cell.source for cell in NOTEBOOK.cells]


def test_it_runs_without_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each cell prints what is stored, to the letter on the Python that stored it."""
    stored, fresh = printed(NOTEBOOK), printed(executed(tmp_path, monkeypatch))
    assert list(map(bool, stored)) == list(map(bool, fresh))
    if NOTEBOOK.metadata.language_info.version.split(".")[:2] == [str(part) for part in sys.version_info[:2]]:
        assert stored == fresh


def test_it_runs_with_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stub: Stub) -> None:
    """With a key the same cells send as many requests as they say, with the key, which shows nowhere."""
    monkeypatch.setenv(API_KEY_VARIABLE, KEY)
    monkeypatch.setenv(BASE_URL_VARIABLE, stub.url)
    notebook = executed(tmp_path, monkeypatch)
    assert "100 of 100 rankings are the same." in "".join(printed(notebook))
    assert len(stub.received) == 200
    assert {request.headers["authorization"] for request in stub.received} == {f"Bearer {KEY}"}
    assert KEY not in str(notebook)
