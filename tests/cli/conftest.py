from pathlib import Path

import pytest

from tests.conftest import KEY
from tests.support.bulk import COUNT, Files, query
from tests.support.stub import Stub


@pytest.fixture
def files(tmp_path: Path) -> Files:
    """The files of a run over some queries."""
    files = Files(tmp_path)
    files.write(*map(query, range(COUNT)))
    return files


@pytest.fixture
def at_stub(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> Stub:
    """The stub server, set up in the environment as a user would, with a key."""
    monkeypatch.setenv("REGOLO_API_KEY", KEY)
    monkeypatch.setenv("REGOLO_BASE_URL", stub.url)
    return stub
