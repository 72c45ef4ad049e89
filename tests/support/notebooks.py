"""Notebooks, run in a fresh kernel of this interpreter."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from nbformat import NotebookNode

__all__ = ["fresh_kernels", "ran"]


def fresh_kernels(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let kernels be of this interpreter, with no settings but those in a folder."""
    kernelspec: Any = pytest.importorskip("ipykernel.kernelspec", reason="part of the extra [dev]")
    kernelspec.write_kernel_spec(folder / "kernels" / "python3")
    monkeypatch.setenv("JUPYTER_PATH", str(folder))
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(folder / name))


def ran(cells: list[str], folder: Path) -> "list[NotebookNode]":
    """Run cells of code in a folder, and return them with their outputs."""
    nbclient: Any = pytest.importorskip("nbclient", reason="part of the extra [dev]")
    nbformat: Any = pytest.importorskip("nbformat", reason="part of the extra [dev]")
    new = nbformat.v4
    notebook = new.new_notebook(cells=[new.new_code_cell(cell) for cell in cells])
    executed = nbclient.NotebookClient(notebook, resources={"metadata": {"path": str(folder)}}).execute()
    return list(executed.cells)
