"""Notebooks, run in a fresh kernel of this interpreter."""

from pathlib import Path
from typing import Any

import nbformat
import pytest
from ipykernel.kernelspec import write_kernel_spec
from nbclient import NotebookClient
from nbformat import NotebookNode

__all__ = ["fresh_kernels", "ran"]


def fresh_kernels(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let kernels be of this interpreter, with no settings but those in a folder."""
    write_kernel_spec(folder / "kernels" / "python3")
    monkeypatch.setenv("JUPYTER_PATH", str(folder))
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(folder / name))


def ran(cells: list[str], folder: Path) -> list[NotebookNode]:
    """Run cells of code in a folder, and return them with their outputs."""
    new: Any = nbformat.v4
    notebook = new.new_notebook(cells=[new.new_code_cell(cell) for cell in cells])
    executed = NotebookClient(notebook, resources={"metadata": {"path": str(folder)}}).execute()
    return list(executed.cells)
