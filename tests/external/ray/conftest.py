import os
import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from regolo_rerank.options import API_KEY_VARIABLE, BASE_URL_VARIABLE
from tests.conftest import KEY
from tests.support.stub import Stub, scored

PROXIES: Final = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy")

RAY_SETTINGS: Final = {
    "RAY_AUTH_TOKEN": secrets.token_hex(32),  # without one, Ray writes its own into the home folder
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # one machine: it listens on loopback alone, on Linux too
    "RAY_USAGE_STATS_ENABLED": "0",
}


@pytest.fixture(scope="session")
def ray_settings() -> Iterator[pytest.MonkeyPatch]:
    """Set the environment that Ray reads, with a folder of its own and without this machine's proxies."""
    # Not pytest's own folder: the path of a socket may be 107 bytes long, and Ray adds 70.
    with (
        tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as folder,
        pytest.MonkeyPatch.context() as patch,
    ):
        for name in PROXIES:
            patch.delenv(name, raising=False)
        for name, value in (RAY_SETTINGS | {"RAY_TMPDIR": folder}).items():
            patch.setenv(name, value)
        yield patch


@pytest.fixture(scope="session")
def _service() -> Iterator[Stub]:
    with Stub() as server:
        yield server


@pytest.fixture(scope="session")
def ray_folder(ray_settings: pytest.MonkeyPatch, _service: Stub) -> Iterator[Path]:
    """Run Ray on this machine, its workers' environment with the key, and give the folder of its logs."""
    ray_settings.setenv(API_KEY_VARIABLE, KEY)
    ray_settings.setenv(BASE_URL_VARIABLE, _service.url)
    import psutil  # type: ignore[import-untyped, unused-ignore]  # its stubs are a package of their own
    import ray  # type: ignore[import-not-found, unused-ignore]  # only where the extra is installed

    ray.init(
        address="local",
        num_cpus=2,
        object_store_memory=100_000_000,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
    )
    try:
        ray.data.DataContext.get_current().enable_progress_bars = False
        yield Path(os.environ["RAY_TMPDIR"])
    finally:
        started = psutil.Process().children(recursive=True)
        ray.shutdown()
        left = psutil.wait_procs(started, timeout=20)[1]
        for process in left:
            process.kill()
        assert not left


@pytest.fixture
def service(_service: Stub, ray_folder: Path) -> Stub:
    """The server that Ray's workers send to; it answers as the service does until it is told otherwise."""
    del ray_folder
    _service.received.clear()
    _service.most_at_once = 0
    _service.reply = scored
    return _service
