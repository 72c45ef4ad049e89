"""What a reply says besides its scores: who has answered, and what it cost, as far as the server says it.

LiteLLM, the gateway software, may answer with another model than was asked for, where that one fails and a fallback is
set up. Then `x-litellm-attempted-fallbacks` is above 0, and `x-litellm-model-group` names the model that has answered;
the name alone tells nothing, because an alias keeps the one that was asked for.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from pydantic import SecretStr

from regolo_rerank._wire.masking import mask
from regolo_rerank._wire.messages import Reply
from regolo_rerank._wire.replies import parse_number
from regolo_rerank._wire.request_ids import request_id_of
from regolo_rerank.errors import APIResponseError, RerankSubstituteWarning, warn

__all__ = ["CACHE", "Source", "agree_on_model", "read_source", "refuse_substitute"]


class Source(NamedTuple):
    """What a reply says besides its scores.

    Attributes:
        model: The model that has answered; None where the server does not say.
        is_substitute: Whether it is another one than was asked for.
        request_id: The server's name for the request.
        id: The reply's own name.
        meta: What else the reply says.
        requests: Requests sent until it came.
        tokens: Tokens that the service has counted; None where it does not say.
        cost: US dollars, as the gateway counts them; None where it does not say.
    """

    model: str | None = None
    is_substitute: bool = False
    request_id: str | None = None
    id: str | None = None
    meta: Any = None
    requests: int = 1
    tokens: int | None = None
    cost: float | None = None


CACHE: Final = Source()
"""Scores that were known already: those of the model that was asked for, since no other's are kept."""


def read_source(headers: Mapping[str, str], reply: Reply, secret: SecretStr | None, requests: int) -> Source:
    """Return what a reply says of itself.

    Args:
        headers: The reply's headers, their names in lower case.
        reply: Its body; vLLM and Infinity name the model there.
        secret: The API key; where the server quotes it, "***" is shown.
        requests: Requests sent until it came.
    """
    group = headers.get("x-litellm-model-group")
    named = reply.model if isinstance(reply.model, str) else None
    return Source(
        mask(group, secret) if group else named or None,
        (parse_number(headers.get("x-litellm-attempted-fallbacks")) or 0) > 0,
        request_id_of(headers, secret),
        None if reply.id is None else str(reply.id),
        reply.meta,
        requests,
        reply.total_tokens,
        parse_number(headers.get("x-litellm-response-cost")),
    )


def refuse_substitute(asked: str, substitute: Source) -> APIResponseError:
    """Return the error for scores of another model than was asked for; it names both."""
    return APIResponseError(
        f"the reply cannot be trusted: {asked!r} was asked for, and {_name(substitute)} has answered in its place; the "
        f"option allow_substitutes takes such rankings",
        request_id=substitute.request_id,
    )


def agree_on_model(asked: str, sources: Sequence[Source]) -> str | None:
    """Return the model that all scores of a ranking come from, and warn where it is a substitute.

    Args:
        asked: The model that was asked for.
        sources: Where the scores come from.

    Raises:
        APIResponseError: They come from several models, which score on scales of their own.
    """
    models = {source.model: None for source in sources if source.model is not None}
    substitutes = {source.is_substitute for source in sources}
    if len(models) > 1 or len(substitutes) > 1:
        names = dict.fromkeys(
            _name(source) if source.is_substitute else repr(source.model or asked) for source in sources
        )
        raise APIResponseError(
            f"the replies cannot be trusted: {asked!r} was asked for, and the scores come from "
            f"{' and from '.join(names)}, each on a scale of its own"
        )
    if True in substitutes:
        words = f"{asked!r} was asked for, and the ranking is that of {_name(sources[0])}, on a scale of its own"
        warn(words, RerankSubstituteWarning)
    return next(iter(models), None)


def _name(substitute: Source) -> str:
    return "another model" if substitute.model is None else repr(substitute.model)
