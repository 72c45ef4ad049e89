"""Runs notebooks in a fresh kernel of this interpreter, and reads their outputs."""

import re
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

if TYPE_CHECKING:
    from nbformat import NotebookNode

__all__ = ["NOTEBOOKS", "announced_requests", "check_outputs", "outputs", "read", "run"]

NOTEBOOKS: Final = Path(__file__).parents[2] / "notebooks"

TIME: Final = re.compile(r"[\d,.]+ seconds")


def read(path: Path) -> "NotebookNode":
    """Return a stored notebook."""
    nbformat: Any = pytest.importorskip("nbformat", reason="part of the extra [dev]")
    notebook: NotebookNode = nbformat.read(path, as_version=4)
    return notebook


def run(notebook: "NotebookNode", folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Run a notebook without its installation line, and return the outputs of each cell.

    The kernel runs in a copy of the notebooks and finds no settings outside of `folder`.
    """
    nbclient: Any = pytest.importorskip("nbclient", reason="part of the extra [dev]")
    kernelspec: Any = pytest.importorskip("ipykernel.kernelspec", reason="part of the extra [dev]")
    kernelspec.write_kernel_spec(folder / "kernels" / "python3")
    monkeypatch.setenv("JUPYTER_PATH", str(folder))
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(folder / name))
    copy = shutil.copytree(NOTEBOOKS, folder / "notebooks")
    cells = _code_cells(notebook)
    install, newline, rest = cells[0].source.partition("\n")
    assert install.startswith('%pip install -q "..[')
    cells[0].source = newline + rest
    nbclient.NotebookClient(notebook, resources={"metadata": {"path": str(copy)}}).execute()
    return outputs(notebook)


def outputs(notebook: "NotebookNode") -> list[str]:
    """Return the outputs of each code cell as text, without times. A chart is "<chart>", and a warning fails."""
    return ["".join(map(_text, cell.outputs)) for cell in _code_cells(notebook)]


def check_outputs(stored: list[str], fresh: list[str], python: str) -> None:
    """Compare outputs. The documentation of the standard library differs between versions of Python."""
    assert list(map(bool, fresh)) == list(map(bool, stored))
    if python == f"{sys.version_info.major}.{sys.version_info.minor}":
        assert fresh == stored


def announced_requests(notebook: "NotebookNode") -> int:
    """Return the number of requests that the notebook's first cell announces."""
    found = re.search(r"sends?\s+(\d+)\s+requests", notebook.cells[0].source.replace("\n> ", " "))
    assert found
    return int(found.group(1))


def _code_cells(notebook: "NotebookNode") -> "list[NotebookNode]":
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def _text(output: "NotebookNode") -> str:
    if output.output_type == "stream":
        assert output.name == "stdout", output.text
        return TIME.sub("", output.text)
    # The plain text beside a chart or a table may hold an address in memory or an id.
    return "<chart>" if "image/png" in output.data else TIME.sub("", output.data["text/html"])
