"""Regolo.ai's Rerank API for Python, LangChain and LlamaIndex.

    from regolo_rerank import RegoloClient
    from regolo_rerank.langchain import RegoloRerank      # a BaseDocumentCompressor
    from regolo_rerank.llama_index import RegoloRerank    # a BaseNodePostprocessor

Importing the package loads neither framework nor httpx. Each name is loaded when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from regolo_rerank._version import __version__

if TYPE_CHECKING:
    from regolo_rerank.cache import SQLiteCache
    from regolo_rerank.client import RegoloClient
    from regolo_rerank.errors import (
        APIConnectionError,
        APIResponseError,
        APIStatusError,
        APITimeoutError,
        AuthenticationError,
        BadRequestError,
        ContextLengthError,
        InvalidInputError,
        MissingAPIKeyError,
        NotFoundError,
        PermissionDeniedError,
        RateLimitError,
        RegoloError,
        RerankCacheWarning,
        RerankFallbackWarning,
        RerankWarning,
        ServerError,
    )
    from regolo_rerank.prompts import PromptFormat
    from regolo_rerank.results import RerankResponse, RerankResult, Usage

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
    "PromptFormat",
    "RateLimitError",
    "RegoloClient",
    "RegoloError",
    "RerankCacheWarning",
    "RerankFallbackWarning",
    "RerankResponse",
    "RerankResult",
    "RerankWarning",
    "SQLiteCache",
    "ServerError",
    "Usage",
    "__version__",
]

_MODULES = {
    "PromptFormat": "prompts",
    "RegoloClient": "client",
    "RerankResponse": "results",
    "RerankResult": "results",
    "SQLiteCache": "cache",
    "Usage": "results",
}


def __getattr__(name: str) -> Any:
    if name == "RegoloRerank":
        raise ImportError("RegoloRerank: import it from regolo_rerank.langchain or from regolo_rerank.llama_index")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES.get(name, 'errors')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
