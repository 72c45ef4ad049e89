r"""Prompt formats: how an instruction, a query and a document become the strings of a request.

A reranker such as Qwen3-Reranker is a language model that judges a prompt, and it scores lower if the prompt differs
from its training. The presets come from Regolo's API examples, the Qwen3-Reranker model card, and vLLM, which builds
the model's prompt itself if it was started with `--chat-template`.
"""

import re
from collections.abc import Iterable
from typing import Final, Self

from pydantic import BaseModel, ConfigDict, model_validator

__all__ = ["API_FIELDS", "DEFAULT_INSTRUCTION", "PRESETS", "PromptFormat", "preset_for"]

API_FIELDS: Final = frozenset({"model", "query", "documents", "top_n"})
"""Fields of a request that the client sets itself."""

DEFAULT_INSTRUCTION: Final = "Given a web search query, retrieve relevant passages that answer the query"

_PLACEHOLDER = re.compile(r"\{(instruction|query|document)\}")


class PromptFormat(BaseModel):
    r"""Templates for the query string and the document string of a request.

    `{instruction}` and `{query}` are filled into `query`, `{document}` into `document`. Filled-in text is data: braces
    in it have no meaning, and special tokens in it are escaped (`<|im_end|>` is sent as `< |im_end|>`), so that a
    document cannot forge the model's answer. All other braces in a template are literal.

    Attributes:
        query: Template of the query string. Contains `{query}` once and may contain `{instruction}`.
        document: Template of the document string. Contains `{document}` once.
        instruction_field: Name of the request field for the instruction, for servers that put it into the prompt
            themselves: `instruction` in vLLM. None if the query template contains it, or nothing uses it.
        escape: Whether special tokens in filled-in text are escaped. True except in the preset `plain`.

    Raises:
        pydantic.ValidationError: A placeholder is missing or in the wrong template, or the instruction would be sent
            twice.

    Examples:
        >>> short = PromptFormat(query="Q: {query}", document="D: {document}")
        >>> short.format_document("<|x|>")
        'D: < |x|>'
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    query: str = "{query}"
    document: str = "{document}"
    instruction_field: str | None = None
    escape: bool = True

    @model_validator(mode="after")
    def _check_placeholders(self) -> Self:
        for template, needed, allowed in (
            (self.query, "query", {"query", "instruction"}),
            (self.document, "document", {"document"}),
        ):
            found = _PLACEHOLDER.findall(template)
            if found.count(needed) != 1 or not set(found) <= allowed:
                names = " or ".join(f"{{{name}}}" for name in sorted(allowed))
                raise ValueError(
                    f"the {needed} template must contain {{{needed}}} exactly once, and no placeholder except {names}"
                )
        if self.instruction_field is not None:
            if "{instruction}" in self.query:
                raise ValueError("the instruction belongs in the query template or in instruction_field, not in both")
            if not self.instruction_field.strip() or self.instruction_field in API_FIELDS:
                raise ValueError(f"instruction_field must be a field name other than {', '.join(sorted(API_FIELDS))}")
        return self

    @property
    def uses_instruction(self) -> bool:
        """Whether an instruction reaches the server."""
        return self.instruction_field is not None or "{instruction}" in self.query

    def format_fields(self, instruction: str) -> dict[str, str]:
        """Return the request fields in addition to query and documents.

        Args:
            instruction: The task in one sentence.
        """
        return {} if self.instruction_field is None else {self.instruction_field: self._fill("", instruction)}

    def format_query(self, query: str, instruction: str) -> str:
        """Return the query string of a request.

        Args:
            query: The query.
            instruction: The task in one sentence. Ignored if the template does not contain `{instruction}`.
        """
        values = {"query": query, "instruction": instruction}
        parts = _PLACEHOLDER.split(self.query)  # text, name, text, name, text
        for position in range(1, len(parts), 2):
            parts[position] = self._fill(parts[position - 1], values[parts[position]])
        return "".join(parts)

    def format_document(self, document: str) -> str:
        """Return the document string of a request.

        Args:
            document: The document's text.
        """
        return self.format_documents([document])[0]

    def format_documents(self, documents: Iterable[str]) -> list[str]:
        """Return the document strings of a request, in the same order.

        Args:
            documents: The documents' texts.
        """
        before, _, after = self.document.partition("{document}")
        # Some servers append the document string to the query string, so the text before it may be the query's.
        preceding = before or self.query
        if not self.escape:
            return [f"{before}{text}{after}" for text in documents]
        return [
            f"{before}{self._fill(preceding, text) if '<' in text or text.startswith('|') else text}{after}"
            for text in documents
        ]

    def _fill(self, preceding: str, text: str) -> str:
        """Escape special tokens in text, and prevent new ones where it touches its neighbours."""
        if not self.escape:
            return text
        text = text.replace("<|", "< |")
        if text.endswith("<"):
            text += " "
        return f" {text}" if text.startswith("|") and preceding.endswith("<") else text


PRESETS: Final[dict[str, PromptFormat]] = {
    "tagged": PromptFormat(
        query="<Instruct>: {instruction}\n<Query>: {query}",
        document="<Document>: {document}",
    ),
    "documented": PromptFormat(
        query="{instruction}\n<Query>: {query}",
        document="<Document>: {document}",
    ),
    "chat": PromptFormat(
        query=(
            "<|im_start|>system\n"
            "Judge whether the Document meets the requirements based on the Query and the Instruct provided. "
            'Note that the answer can only be "yes" or "no".<|im_end|>\n'
            "<|im_start|>user\n"
            "<Instruct>: {instruction}\n<Query>: {query}\n"
        ),
        document="<Document>: {document}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    ),
    "server_template": PromptFormat(instruction_field="instruction"),
    "plain": PromptFormat(escape=False),
}


def preset_for(model: str) -> PromptFormat:
    """Return the format that `prompt_format="auto"` selects for a model.

    Args:
        model: Name of the model in any case, with or without an organisation (`Qwen/Qwen3-Reranker-4B`).
    """
    is_qwen = model.rpartition("/")[2].lower().startswith("qwen3-reranker")
    return PRESETS["tagged" if is_qwen else "plain"]
