"""Errors and warnings of this package.

RegoloError
├── InvalidInputError(ValueError)   rejected before anything was sent
├── MissingAPIKeyError(ValueError)  the server requires an API key
├── APIConnectionError              no connection, or it broke before the reply was complete
│   └── APITimeoutError             no complete reply within `timeout` or `total_timeout`
├── APIStatusError                  the server answered with a status outside 2xx
│   ├── BadRequestError             400, 413, 422
│   │   └── ContextLengthError      longer than the model's context, with any status
│   ├── AuthenticationError         401
│   ├── PermissionDeniedError       403
│   ├── NotFoundError               404
│   ├── RateLimitError              429
│   └── ServerError                 408, 5xx
└── APIResponseError                a 2xx reply that is not a valid ranking

RerankWarning(UserWarning)
├── RerankFallbackWarning           `on_error="return_input"` returned the input
└── RerankCacheWarning              the `cache` failed, and the call continued without it
"""

import inspect
import warnings
from typing import Any, Final

__all__ = [
    "APIConnectionError",
    "APIResponseError",
    "APIStatusError",
    "APITimeoutError",
    "AuthenticationError",
    "BadRequestError",
    "ContextLengthError",
    "InvalidInputError",
    "MissingAPIKeyError",
    "NotFoundError",
    "PermissionDeniedError",
    "RateLimitError",
    "RegoloError",
    "RerankCacheWarning",
    "RerankFallbackWarning",
    "RerankWarning",
    "ServerError",
]


class RegoloError(Exception):
    """Base class of every error that a call raises.

    Attributes:
        index (int | None): Position of the failed pair in `rerank_many`, from 0, or None in other calls.
        retryable (bool): Whether the same request may succeed later. The client retries it within `max_retries` and
            `total_timeout`.
    """

    index: int | None = None
    retryable: bool = False


class InvalidInputError(RegoloError, ValueError):
    """An argument was rejected before anything was sent. Its name is in the message."""


class MissingAPIKeyError(RegoloError, ValueError):
    """The server requires an API key, and neither `api_key` nor the environment has one."""


class APIConnectionError(RegoloError):
    """The server could not be reached, or the connection broke before the reply was complete."""

    retryable = True


class APITimeoutError(APIConnectionError):
    """No complete reply within `timeout` seconds, or no ranking within `total_timeout` seconds."""


class APIStatusError(RegoloError):
    """The server answered with a status outside 2xx.

    Attributes:
        status_code (int): The HTTP status.
        request_id (str | None): The gateway's id of the request (header `x-litellm-call-id`), if it reports one.
        code (str | None): The `code` of the error body.
        type (str | None): The `type` of the error body, such as `budget_exceeded`.
        body (str): The reply's body as text, clipped to 2,000 characters.
        retry_after (float | None): Seconds that the server asked to wait, from a header or its message.
    """

    def __init__(
        self,
        message: str,
        *,
        status_code: int = 0,
        request_id: str | None = None,
        code: str | None = None,
        type: str | None = None,  # noqa: A002 - the field's name in the API, and in openai-python
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
    """400, 413 or 422: the request itself is wrong, and repeating it cannot help.

    The gateway also answers 400 to an unknown model, and 400 or 422 to a spent budget (`type` is `budget_exceeded`).
    """


class ContextLengthError(BadRequestError):
    """The query or a document is longer than the model's context. The longest text is in the message.

    Servers report this with different statuses (400, 413, 422, 500).
    """


class AuthenticationError(APIStatusError):
    """401: the API key is missing or wrong."""


class PermissionDeniedError(APIStatusError):
    """403: the API key has no access to this model or endpoint."""


class NotFoundError(APIStatusError):
    """404: no rerank endpoint at this address. Check `base_url`."""


class RateLimitError(APIStatusError):
    """429: too many requests. Every request counts, retries included."""

    retryable = True


class ServerError(APIStatusError):
    """408 or 5xx: the server failed or timed out."""

    retryable = True


class APIResponseError(RegoloError):
    """A 2xx reply that is not a valid ranking.

    The reply is not JSON, has the wrong shape, contains an error, omits or repeats a document, contains an unknown
    index or a score that is not a finite number, or comes from another model.

    Attributes:
        request_id (str | None): The gateway's id of the request (header `x-litellm-call-id`), if it reports one.
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


class RerankWarning(UserWarning):
    """Base class of this package's warnings: an option without effect, or scores that cannot be right."""


class RerankFallbackWarning(RerankWarning):
    """Reranking failed, and `on_error="return_input"` returned the input in its own order."""


class RerankCacheWarning(RerankWarning):
    """The mapping given as `cache` failed, and the call continued without it."""


_BY_STATUS: Final[dict[int, type[APIStatusError]]] = {
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
    """Return an error of the class that belongs to a status.

    Args:
        status_code: The HTTP status, outside 2xx.
        message: The description of the error.
        **fields: Further attributes of `APIStatusError`.
    """
    default = ServerError if status_code >= 500 else APIStatusError
    error = _BY_STATUS.get(status_code, default)(message, status_code=status_code, **fields)
    if error.type == "budget_exceeded":
        error.retryable = False
    return error


def warn(message: str, category: type[RerankWarning]) -> None:
    """Issue a warning that points at the caller's line, below the frames of this package and of the frameworks."""
    frame, level = inspect.currentframe(), 0
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _FRAMES_TO_SKIP:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level + 1)


_FRAMES_TO_SKIP: Final = {
    "regolo_rerank",
    "asyncio",
    "langchain_core",
    "langchain_classic",
    "llama_index",
    "llama_index_instrumentation",
    "wrapt",
}
