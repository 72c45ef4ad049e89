"""Everything that can go wrong with a call.

    RegoloError
    ├── InvalidInputError(ValueError)   refused before sending
    ├── MissingAPIKeyError(ValueError)  no key for a host that demands one
    ├── APIConnectionError              the server could not be reached, or hung up
    │   └── APITimeoutError             no complete reply within `timeout`
    ├── APIStatusError                  the server said no
    │   ├── BadRequestError             400, 413, 422
    │   ├── AuthenticationError         401
    │   ├── PermissionDeniedError       403
    │   ├── NotFoundError               404
    │   ├── RateLimitError              429
    │   └── ServerError                 408, 5xx
    └── APIResponseError                a 2xx that cannot be trusted

Besides these, `RerankFallbackWarning` is what `on_error="return_input"` warns with, `RerankCacheWarning` tells of a
`cache` that fails, and `RerankSubstituteWarning` of a ranking that another model than `model` gave.
"""

import logging
import warnings
from types import TracebackType
from typing import Any

__all__ = [
    "APIConnectionError",
    "APIResponseError",
    "APIStatusError",
    "APITimeoutError",
    "AuthenticationError",
    "BadRequestError",
    "InvalidInputError",
    "MissingAPIKeyError",
    "NotFoundError",
    "PermissionDeniedError",
    "RateLimitError",
    "RegoloError",
    "RerankCacheWarning",
    "RerankFallbackWarning",
    "RerankSubstituteWarning",
    "ServerError",
]

_log = logging.getLogger("regolo_rerank")


class RegoloError(Exception):
    """Base of every error that this package raises for a call."""


class InvalidInputError(RegoloError, ValueError):
    """An argument was refused before anything was sent; the message names it."""


class MissingAPIKeyError(RegoloError, ValueError):
    """The host demands an API key, and neither `api_key` nor the environment has one."""


class APIConnectionError(RegoloError):
    """The server could not be reached, or the connection broke before the reply was complete."""


class APITimeoutError(APIConnectionError):
    """No complete reply came within `timeout` seconds."""


class APIStatusError(RegoloError):
    """The server answered with a status that is not 2xx.

    Attributes:
        status_code (int): The HTTP status.
        request_id (str | None): The gateway's name for the request (header `x-litellm-call-id`), where it gives one.
        code (str | None): The `code` of the error body.
        type (str | None): The `type` of the error body, such as `budget_exceeded`.
        body (str): The reply's body as text, clipped to 2,000 characters.
        retry_after (float | None): Seconds that the server asked to wait, from a header or from its message.
    """

    def __init__(
        self,
        message: str,
        *,
        status_code: int = 0,
        request_id: str | None = None,
        code: str | None = None,
        type: str | None = None,  # noqa: A002 - the field's name on the wire, and in openai-python
        body: str = "",
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status_code = status_code
        self.request_id = request_id
        self.code = code
        self.type = type
        self.body = body
        self.retry_after = retry_after


class BadRequestError(APIStatusError):
    """400, 413 or 422: the request itself is wrong; sending it again cannot help.

    LiteLLM, the gateway software, answers so to an unknown model, to a spent budget (`type` is `budget_exceeded`) and
    to a document over the model's context length.
    """


class AuthenticationError(APIStatusError):
    """401: the API key is missing or wrong."""


class PermissionDeniedError(APIStatusError):
    """403: the API key may not do this, or not with this model."""


class NotFoundError(APIStatusError):
    """404: nothing reranks at this address; see `base_url`."""


class RateLimitError(APIStatusError):
    """429: too many requests, even after the retries. Each request of a call, a retry included, counts."""


class ServerError(APIStatusError):
    """408 or 5xx: the service failed or timed out, even after the retries."""


class APIResponseError(RegoloError):
    """A 2xx reply that cannot be trusted.

    It is no JSON, has the wrong shape, holds an error, leaves a document out, names one twice or one that was not
    sent, gives a score that is not a finite number, or comes from another model than was asked for.

    Attributes:
        request_id (str | None): The gateway's name for the request (header `x-litellm-call-id`), where it gives one.
        code (str | None): The `code` of an error inside the reply.
        body (str): The reply's body as text, clipped to 2,000 characters.
    """

    def __init__(
        self,
        message: str,
        *,
        request_id: str | None = None,
        code: str | None = None,
        body: str = "",
    ) -> None:
        super().__init__(message)
        self.request_id = request_id
        self.code = code
        self.body = body


class RerankCacheWarning(UserWarning):
    """The mapping given as `cache` failed, and the call went on without it."""


class RerankFallbackWarning(UserWarning):
    """Reranking failed, and `on_error="return_input"` gave the input back in its own order."""


class RerankSubstituteWarning(UserWarning):
    """Another model than was asked for gave a ranking, and `allow_substitutes=True` took it."""


def warn(words: str, category: type[UserWarning]) -> None:
    """Warn, and log each: Python shows a warning once."""
    _log.warning("regolo_rerank: %s", words)
    warnings.warn(words, category, stacklevel=3)


class _EndsHere:
    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: TracebackType | None) -> None:
        if traceback is not None and isinstance(error, RegoloError):
            traceback.tb_next = None


ends_here = _EndsHere()
"""`with ends_here:` cuts an error's traceback off below the line it guards: the caller's line and ours are left."""

_BY_STATUS: dict[int, type[APIStatusError]] = {
    400: BadRequestError,
    401: AuthenticationError,
    403: PermissionDeniedError,
    404: NotFoundError,
    408: ServerError,
    413: BadRequestError,
    422: BadRequestError,
    429: RateLimitError,
}


def error_for_status(status_code: int, message: str, **fields: Any) -> APIStatusError:
    """Return the error of the class that stands for a status.

    Args:
        status_code: The HTTP status, outside 2xx.
        message: What went wrong.
        **fields: Further attributes of `APIStatusError`, by name.
    """
    fallback = ServerError if status_code >= 500 else APIStatusError
    return _BY_STATUS.get(status_code, fallback)(message, status_code=status_code, **fields)
