from collections.abc import Iterator

import pytest

from tests.support.inside import workers
from tests.support.many import Many
from tests.support.observed import soon


@pytest.fixture
def many(mode: str) -> Many:
    """Call a client in every way."""
    return Many(mode)


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    """After each test, the threads of ours end by themselves."""
    yield
    assert soon(lambda: not workers())
