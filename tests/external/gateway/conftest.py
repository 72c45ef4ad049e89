import logging
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest

from tests.support.stub import Stub, scored

OPEN: Final = "sk-open-0"
"""A key without limits."""

WINDOW: Final = 3
"""Seconds of the gateway's rate limits, a minute by default."""

_START_UP_SECONDS: Final = 120
_READY: Final = re.compile(r"Uvicorn running on (http://127\.0\.0\.1:\d+)")


@dataclass(frozen=True)
class Gateway:
    """The gateway, as one test sees it."""

    url: str
    seen: pytest.LogCaptureFixture

    @property
    def statuses(self) -> list[object]:
        """The gateway's statuses, one per request, as the client logs them."""
        return [record.status for record in self.seen.records if str(record.msg).startswith("POST ")]  # type: ignore[attr-defined]  # of `extra`


@pytest.fixture(scope="session")
def _upstream() -> Iterator[Stub]:
    with Stub() as server:
        yield server


@pytest.fixture(scope="session")
def _gateway_url(_upstream: Stub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start the gateway in a process of its own, away from the machine's settings; it ends with the tests."""
    folder = tmp_path_factory.mktemp("gateway")
    log = folder / "log"
    with socket.socket() as closed, log.open("wb") as output:
        closed.bind(("127.0.0.1", 0))  # and does not listen
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(folder),
            "UPSTREAM_URL": _upstream.url,
            "CLOSED_URL": f"http://127.0.0.1:{closed.getsockname()[1]}",
            "LITELLM_MASTER_KEY": f"sk-{secrets.token_hex(32)}",
            "LITELLM_RATE_LIMIT_WINDOW_SIZE": str(WINDOW),
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
            "LITELLM_TELEMETRY": "False",
            "LITELLM_MODE": "PRODUCTION",  # reads no .env file
        }
        config = str(Path(__file__).with_name("config.yaml"))
        command = [sys.executable, "-m", "litellm.proxy.proxy_cli", "--config", config, "--host", "127.0.0.1"]
        with subprocess.Popen(  # noqa: S603 - our own command
            [*command, "--port", "0"],
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,  # auth.py ends the gateway when it closes
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ) as process:
            try:
                yield _url(process, log)
            finally:
                _end(process)


def _url(process: subprocess.Popen[bytes], log: Path) -> str:
    """Return where the gateway listens, once it does."""
    latest = time.monotonic() + _START_UP_SECONDS
    while not (found := _READY.search(log.read_text())):
        if process.poll() is not None or time.monotonic() > latest:
            pytest.fail(f"the gateway did not start; its log ends with:\n{log.read_text()[-4_000:]}", pytrace=False)
        time.sleep(0.1)
    return found[1]


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the gateway and whatever it started."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(10)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture
def upstream(_upstream: Stub) -> Stub:
    """The server behind the gateway, which answers as the service does until it is told otherwise."""
    _upstream.received.clear()
    _upstream.reply = scored
    return _upstream


@pytest.fixture
def gateway(_gateway_url: str, upstream: Stub, caplog: pytest.LogCaptureFixture) -> Gateway:
    """The running gateway, in front of `upstream`."""
    del upstream
    caplog.set_level(logging.DEBUG, logger="regolo_rerank")
    return Gateway(_gateway_url, caplog)
