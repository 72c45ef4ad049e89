"""What tests of `regolo-rerank bulk` share: its files, its queries and what answers them."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from regolo_rerank._cli.main import main
from tests.support.stub import Received, Reply, Stub, scored

COUNT = 24


class Files:
    """IN, OUT, OUT.errors and OUT.state in a folder.

    Attributes:
        given: IN.
        out: OUT.
        errors: OUT.errors.
        state: OUT.state.
    """

    def __init__(self, folder: Path) -> None:
        self.given = folder / "queries.jsonl"
        self.out = folder / "rankings.jsonl"
        self.errors = folder / "rankings.jsonl.errors"
        self.state = folder / "rankings.jsonl.state"

    def write(self, *lines: Any) -> None:
        """Write IN: bytes as they are, anything else as JSON."""
        encoded = (line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines)
        self.given.write_bytes(b"".join(line + b"\n" for line in encoded))

    def run(self, *options: str) -> int:
        """Run the command."""
        return main(["bulk", str(self.given), str(self.out), *options])

    def command(self, *options: str) -> list[str]:
        """Return the command as a process of its own."""
        return [sys.executable, "-m", "regolo_rerank", "bulk", str(self.given), str(self.out), *options]

    def contents(self) -> tuple[bytes, bytes]:
        """Return the bytes of OUT and OUT.errors; a file that is not there counts as empty."""
        return content(self.out), content(self.errors)


def content(file: Path) -> bytes:
    """Return the bytes of a file that may not be there."""
    return file.read_bytes() if file.exists() else b""


def read(file: Path) -> list[dict[str, Any]]:
    """Return the objects of a file's lines, each of which must be a whole one."""
    *lines, rest = content(file).split(b"\n")
    assert rest == b""
    return [json.loads(line) for line in lines]


def query(number: int) -> dict[str, Any]:
    """Return a line of IN; its documents' scores depend on its number, and some have ids."""
    texts = [f"low score={number / 100}", f"high score={number / 100 + 0.5}"]
    return {
        "id": f"id-{number}",
        "query": f"q{number}",
        "documents": [texts[0], {"id": f"d{number}", "text": texts[1], "other": [1]}],
    }


def ranking(number: int) -> dict[str, Any]:
    """Return the right line of OUT for it."""
    return {
        "id": f"id-{number}",
        "results": [
            {"index": 1, "relevance_score": number / 100 + 0.5, "id": f"d{number}"},
            {"index": 0, "relevance_score": number / 100},
        ],
    }


def number_of(request: Received) -> int | None:
    """Return the number of the query that a request is for; the probe has none."""
    found = re.search(r"<Query>: q(\d+)$", request.json["query"])
    return int(found[1]) if found else None


def probes(stub: Stub) -> int:
    """Return how many requests were for no query."""
    return sum(number_of(request) is None for request in stub.received)


def numbers(stub: Stub) -> list[int]:
    """Return the numbers of the queries that were sent, in their order."""
    return sorted({number for request in stub.received if (number := number_of(request)) is not None})


def failing(which: Callable[[int | None], bool], reply: Reply | Callable[[], Reply]) -> Callable[[Received], Reply]:
    """Answer as the service does, except for some queries."""

    def answer(request: Received) -> Reply:
        if not which(number_of(request)):
            return scored(request)
        return reply if isinstance(reply, Reply) else reply()

    return answer


def hang_up() -> Reply:
    """Close the connection without a reply."""
    raise ConnectionAbortedError
