"""What it means that no complete reply came."""

import logging
from typing import Final

import httpx
from pydantic import SecretStr

from regolo_rerank._wire.masking import mask
from regolo_rerank.errors import APIConnectionError, APITimeoutError, RegoloError

__all__ = ["translate_error"]

_BELOW: Final = {"aiohttp", "anyio", "h11", "httpcore"}
"""Packages below an httpx client, of which an error may come through it as it is."""

_log = logging.getLogger("regolo_rerank")


def translate_error(
    error: Exception, url: httpx.URL, secret: SecretStr | None, seconds_left: float | None
) -> RegoloError:
    """Return this package's error for what went wrong with a request.

    Args:
        error: What was raised; what is safe to log of an error of httpx becomes the cause of ours.
        url: Where the request went.
        secret: The API key; where the server quotes it, "***" is shown.
        seconds_left: What is left of the timeout, a tenth of it left out; None where the client has its own.

    Raises:
        Exception: The error itself, where it is neither of httpx nor of what lies below it: a mistake in a hook of the
            caller's client, say, or a timeout that a signal handler of the caller's has raised.
    """
    if isinstance(error, RegoloError):
        return error.with_traceback(None)
    if callers := _find_callers_timeout(error, seconds_left):
        raise callers from None
    host, words = url.netloc.decode(), mask(str(error), secret)
    from_below = _is_from_below(error)
    failure: RegoloError
    if isinstance(error, httpx.TimeoutException | TimeoutError):
        failure = APITimeoutError(f"no complete reply from {host} within the timeout ({type(error).__name__})")
    elif from_below or isinstance(error, httpx.HTTPError | httpx.StreamError | httpx.InvalidURL | OSError):
        failure = APIConnectionError(f"no complete reply from {host}: {words or type(error).__name__}")
    elif isinstance(error, RuntimeError):
        failure = APIConnectionError(
            f"the http client cannot be used: {words} An httpx client that was passed must be open, and an async one "
            f"belongs to the event loop that it was first used in"
        )
    else:
        raise error
    _forget_origin(error)
    error.args = (words,)
    if isinstance(error, httpx.HTTPError):
        error.request = httpx.Request("POST", url)
    failure.__cause__ = None if from_below else error  # what else those hold is not known
    _log.debug("%s has not answered: %s", url, failure)
    return failure


def _find_callers_timeout(error: Exception, seconds_left: float | None) -> TimeoutError | None:
    """Return a TimeoutError that the caller's own code has raised, a signal handler say; None for the request's own.

    A signal handler raises in the middle of a read, and httpcore takes that for the read's own.
    """
    origin: BaseException | None = error
    if isinstance(error, httpx.TimeoutException) and seconds_left is not None:
        origin = error.__cause__
        while origin is not None and _is_from_below(origin):
            origin = origin.__cause__ or origin.__context__
    early = seconds_left is None or seconds_left > 0
    # The operating system's own has an errno.
    return origin if isinstance(origin, TimeoutError) and early and origin.errno is None else None


def _is_from_below(error: BaseException) -> bool:
    return type(error).__module__.partition(".")[0] in _BELOW


def _was_caught_below(error: BaseException) -> bool:
    frames = error.__traceback__
    return frames is not None and frames.tb_frame.f_globals.get("__name__", "").partition(".")[0] in _BELOW


def _forget_origin(error: BaseException) -> None:
    """Cut an error off from what may hold the key, or the documents: its frames, and what it comes from.

    Errors of h11, and from Python 3.12 those of sockets in httpcore, are in frames of their own tracebacks: those must
    be cut off too, or they are never freed. What the caller is just handling is left alone.
    """
    origin = error.__cause__ or error.__context__
    error.__traceback__ = error.__cause__ = error.__context__ = None
    if origin is not None and (_is_from_below(origin) or _was_caught_below(origin)):
        _forget_origin(origin)
