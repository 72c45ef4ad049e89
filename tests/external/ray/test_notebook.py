"""notebooks/ray_data.ipynb, which needs Ray."""

import importlib.util
from pathlib import Path

import pytest

from regolo_rerank.options import API_KEY_VARIABLE, BASE_URL_VARIABLE
from tests.conftest import KEY
from tests.external.ray.page import RECIPE
from tests.support.notebooks import NOTEBOOKS, announced_requests, check_outputs, outputs, read, run
from tests.support.stub import Stub

pytest.importorskip("nbclient", reason="part of the extra [ray]")
if importlib.util.find_spec("ray") is None:
    pytest.skip('Ray is not installed: python3 -m pip install -e ".[ray]"', allow_module_level=True)

PATH = NOTEBOOKS / "ray_data.ipynb"

pytestmark = [pytest.mark.timeout(180), pytest.mark.usefixtures("ray_settings")]  # it starts a Ray of its own


def test_its_recipe_is_that_of_the_guide() -> None:
    """A cell of the notebook and the block of the guide are the same text."""
    assert RECIPE.rstrip("\n") in [cell.source for cell in read(PATH).cells]


def test_it_reproduces_its_outputs_without_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a key each cell shows its stored output."""
    notebook = read(PATH)
    stored, python = outputs(notebook), notebook.metadata.language_info.version
    check_outputs(stored, run(notebook, tmp_path, monkeypatch), python)


def test_it_sends_the_announced_requests_with_a_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stub: Stub
) -> None:
    """With a key Ray's workers send as many requests as the first cell announces, and the key shows nowhere."""
    monkeypatch.setenv(API_KEY_VARIABLE, KEY)
    monkeypatch.setenv(BASE_URL_VARIABLE, stub.url)
    notebook = read(PATH)
    run(notebook, tmp_path, monkeypatch)
    assert len(stub.received) == announced_requests(notebook)
    assert {request.headers["authorization"] for request in stub.received} == {f"Bearer {KEY}"}
    assert KEY not in str(notebook)
