"""What the gateway loads into its own process: the keys it accepts, so that it needs no database."""

import os
import threading

from fastapi import Request  # type: ignore[import-not-found, unused-ignore]  # only where the gateway is installed
from litellm.proxy._types import (  # type: ignore[import-not-found, unused-ignore]  # only where it is installed
    UserAPIKeyAuth,
)

LIMITS: dict[str, dict[str, int]] = {
    "open": {},
    "five-a-window": {"rpm_limit": 5},
    "two-at-once": {"max_parallel_requests": 2},
}


async def authenticate(request: Request, api_key: str) -> UserAPIKeyAuth:
    """Accept a key such as `sk-five-a-window-1f0c`; each one has a count of its own."""
    del request
    limits = LIMITS.get(api_key.removeprefix("sk-").rpartition("-")[0])
    if limits is None:
        raise ValueError(f"no such key: {api_key}")
    return UserAPIKeyAuth(api_key=api_key, **limits)


def _end_with_the_tests() -> None:
    os.read(0, 1)  # until the tests' end of the pipe is closed, which it is even when they were killed
    os._exit(0)


threading.Thread(target=_end_with_the_tests, daemon=True).start()
