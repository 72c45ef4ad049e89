"""What it means that no complete reply came."""

import logging
from typing import Final, TypeGuard

import httpx
from pydantic import SecretStr

from regolo_rerank._wire.masking import mask
from regolo_rerank.errors import APIConnectionError, APITimeoutError, RegoloError

__all__ = ["translate_error"]

_BELOW: Final = {"aiohttp", "anyio", "h11", "httpcore"}
"""Packages below an httpx client, of which an error may come through it as it is."""

_log = logging.getLogger("regolo_rerank")


def translate_error(error: Exception, url: httpx.URL, secret: SecretStr | None) -> RegoloError:
    """Return this package's error for what went wrong with a request.

    Args:
        error: What was raised; what is safe to log of an error of httpx becomes the cause of ours.
        url: Where the request went.
        secret: The API key; where the server quotes it, "***" is shown.

    Raises:
        Exception: The error itself, where it is neither of httpx nor of what lies below it: a mistake in a hook of the
            caller's client, say.
    """
    if isinstance(error, RegoloError):
        return error.with_traceback(None)
    host, words = url.netloc.decode(), mask(str(error), secret)
    failure: RegoloError
    if isinstance(error, httpx.TimeoutException | TimeoutError):
        failure = APITimeoutError(f"no complete reply from {host} within the timeout ({type(error).__name__})")
    elif isinstance(error, httpx.HTTPError | httpx.StreamError | httpx.InvalidURL | OSError):
        failure = APIConnectionError(f"no complete reply from {host}: {words or type(error).__name__}")
    elif isinstance(error, RuntimeError):
        failure = APIConnectionError(
            f"the http client cannot be used: {words} An httpx client that was passed must be open, and an async one "
            f"belongs to the event loop that it was first used in"
        )
    elif _is_below(error):
        return APIConnectionError(f"no complete reply from {host}: {words or type(error).__name__}")
    else:
        raise error
    # Its frames, its request and what it comes from may hold the key.
    error.args = (words,)
    if isinstance(error, httpx.HTTPError):
        error.request = httpx.Request("POST", url)
    below, error.__cause__, error.__context__ = error.__context__, None, None
    while _is_below(below):  # h11's errors are held by their own frames, and hold the call's with its documents
        below.__traceback__, below = None, below.__context__
    failure.__cause__ = error.with_traceback(None)
    _log.debug("%s has not answered: %s", url, failure)
    return failure


def _is_below(error: BaseException | None) -> TypeGuard[BaseException]:
    return type(error).__module__.partition(".")[0] in _BELOW
