"""What goes over the wire: the JSON of a request and of a reply.

The shapes are those of Regolo's API page and of recorded exchanges with the gateway software it runs (LiteLLM 1.80 and
1.106 in front of vLLM).
"""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import PydanticSerializationError, to_json

__all__ = ["Reply", "Request", "Result", "encode", "repair"]


class Request(BaseModel):
    """The JSON of a request."""

    model_config = ConfigDict(extra="allow", strict=True)

    model: str
    query: str
    documents: list[str]
    top_n: Annotated[int, Field(ge=0)] | None = None


class Result(BaseModel):
    """One document's score in a reply; `index` counts the documents of the request."""

    model_config = ConfigDict(strict=True)

    index: int
    relevance_score: Annotated[float, Field(allow_inf_nan=False)]
    document: Any = None

    @property
    def echo(self) -> str | None:
        """The text that the server says it has scored, from whichever of the known places has it."""
        text = self.document.get("text") if isinstance(self.document, dict) else self.document
        return text if isinstance(text, str) else None


class Reply(BaseModel):
    """The JSON of a reply."""

    id: Any = None
    model: Any = None
    results: list[Result]
    meta: Any = None
    usage: Any = None
    error: Any = None

    @property
    def total_tokens(self) -> int | None:
        """Tokens that the service counted, from whichever of the known places has them."""
        meta = self.meta if isinstance(self.meta, dict) else {}
        for counts, name in (
            (self.usage, "total_tokens"),
            (self.usage, "prompt_tokens"),
            (meta.get("billed_units"), "total_tokens"),
            (meta.get("billed_units"), "input_tokens"),
            (meta.get("tokens"), "input_tokens"),
        ):
            count = counts.get(name) if isinstance(counts, dict) else None
            if isinstance(count, int) and not isinstance(count, bool) and count >= 0:
                return count
        return None


def encode(body: Any) -> bytes:
    """Return JSON as bytes, whatever strings it holds."""
    try:
        return to_json(body)
    except PydanticSerializationError:
        return to_json(repair(body))


def repair(value: Any) -> Any:
    """Return JSON as UTF-8 can hold it: halves of a surrogate pair joined, single ones replaced by U+FFFD."""
    if isinstance(value, str):
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    if isinstance(value, list):
        return [repair(item) for item in value]
    if isinstance(value, dict):
        return {key: repair(item) for key, item in value.items()}
    return value
