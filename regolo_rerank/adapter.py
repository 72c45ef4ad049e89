"""What both adapters share besides the core: their default top_n, and what to do when the service fails."""

import logging
import warnings
from typing import Literal, TypeVar

from regolo_rerank.client import Reranker
from regolo_rerank.errors import RegoloError, RerankFallbackWarning
from regolo_rerank.options import Count
from regolo_rerank.retry import is_passing

__all__ = ["AdapterOptions"]

T = TypeVar("T")

_log = logging.getLogger("regolo_rerank")


class AdapterOptions(Reranker):
    """The options that only adapters have.

    Raises:
        pydantic.ValidationError: On construction and on assignment, as in `Options`.
    """

    top_n: Count | None = 5
    """Documents kept, the best first; None keeps all."""

    on_error: Literal["raise", "return_input"] = "raise"
    """What happens when the service fails (no connection, a timeout, 408, 429, 5xx, an untrustworthy reply):
    "return_input" gives the first `top_n` documents in their own order, without a score and with a
    `RerankFallbackWarning`. The caller's mistakes, such as a wrong key or bad input, raise in any case."""

    def _fall_back(self, error: RegoloError, candidates: list[T]) -> list[T]:
        """Return what stands in for a ranking that failed, or raise the error again."""
        if self.on_error == "raise" or not is_passing(error):
            raise error
        kept = candidates[: self.top_n]
        words = (
            f"reranking failed, so the first {len(kept)} of {len(candidates)} documents are returned in their own "
            f"order: {type(error).__name__}: {error}"
        )
        # Python shows a warning once; the log has each.
        _log.warning(words)
        warnings.warn(words, RerankFallbackWarning, stacklevel=2)
        return kept
