import json
from pathlib import Path

import pytest

from tests.conftest import KEY
from tests.support.bulk import COUNT, Files, query
from tests.support.stub import Stub

DOCUMENTS = ["low score=0.1", "best score=0.9", "middle score=0.5"]


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


@pytest.fixture
def cities(tmp_path: Path) -> str:
    """A file with one document a line."""
    file = tmp_path / "cities.txt"
    file.write_text("\n".join(DOCUMENTS), "utf-8")
    return str(file)


def jsonl(tmp_path: Path, *documents: str) -> str:
    """Write documents that no plain line could hold, and return the file's name."""
    file = tmp_path / "documents.JSONL"
    file.write_text("\n".join(json.dumps({"text": document}) for document in documents), "utf-8")
    return str(file)
