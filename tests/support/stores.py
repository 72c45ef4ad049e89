"""The stores for scores that the page on caches recommends."""

import re
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from fakeredis import TcpFakeServer
from redis import Redis, RedisError
from redis_dict import RedisDict

from tests.support.observed import soon

__all__ = ["SQLITE_SCORES", "opened_redis", "opened_sqlite", "redis_server"]

_PAGE = (Path(__file__).parents[2] / "docs" / "cache.md").read_text("utf-8")

SQLITE_SCORES = re.findall(r"^import sqlite3\n.*?(?=^scores = )", _PAGE, re.DOTALL | re.MULTILINE)[0]
"""The page's code that defines `SQLiteScores`."""


@contextmanager
def opened_sqlite(path: Path) -> Iterator[Any]:
    """Give the page's table in a file."""
    names: dict[str, Any] = {}
    exec(SQLITE_SCORES, names)  # noqa: S102 - our own text
    scores = names["SQLiteScores"](str(path))
    try:
        yield scores
    finally:
        scores.close()


@contextmanager
def opened_redis(kind: str) -> Iterator[Any]:
    """Give a mapping on a Redis server of its own."""
    with redis_server(kind) as url, Redis.from_url(url) as redis:
        yield RedisDict("scores", redis=redis, expire=60)


@contextmanager
def redis_server(kind: str) -> Iterator[str]:
    """Run a server that speaks Redis's protocol on loopback, and give its URL.

    Args:
        kind: `redis-server` for the real one, where it is installed, or `fakeredis` for one in Python.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with ExitStack() as stack:
        if kind == "fakeredis":
            server = stack.enter_context(TcpFakeServer(("127.0.0.1", port)))
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
            stack.callback(server.shutdown)
        elif command := shutil.which("redis-server"):
            options = ["--port", str(port), "--bind", "127.0.0.1", "--save", ""]
            process = stack.enter_context(subprocess.Popen([command, *options], stdout=subprocess.DEVNULL))  # noqa: S603 - our own command
            stack.callback(process.terminate)
        else:
            pytest.skip("redis-server is not installed")
        url = f"redis://127.0.0.1:{port}"
        assert soon(lambda: _answers(url))
        yield url


def _answers(url: str) -> bool:
    try:
        with Redis.from_url(url) as redis:
            return bool(redis.ping())
    except RedisError:
        return False
