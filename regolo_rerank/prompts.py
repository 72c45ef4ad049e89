"""What a request says for an instruction, a query and a document: two strings, and for some servers a field.

A reranker is a language model that judges a prompt, and a prompt in another form than the one it was trained on scores
lower. The presets come from Regolo's API examples, from the Qwen3-Reranker model card, and from vLLM, which puts the
model's prompt together by itself where it was started with `--chat-template`.
"""

import re
from collections.abc import Iterable
from typing import Final, Self

from pydantic import BaseModel, ConfigDict, model_validator

__all__ = ["API_FIELDS", "DEFAULT_INSTRUCTION", "PRESETS", "PromptFormat", "preset_for"]

API_FIELDS: Final = frozenset({"model", "query", "documents", "top_n"})
"""What a request of the API holds; no other field may have such a name."""

DEFAULT_INSTRUCTION: Final = "Given a web search query, retrieve relevant passages that answer the query"

_PLACEHOLDER = re.compile(r"\{(instruction|query|document)\}")


class PromptFormat(BaseModel):
    r"""Templates for the query string and the document string of a request.

    `{instruction}` and `{query}` are filled into `query`, `{document}` into `document`. What is filled in is data:
    braces in it mean nothing, and special tokens in it are made harmless (`<|im_end|>` is sent as `< |im_end|>`), so
    that no document can forge the model's answer. All other braces in a template stand for themselves.

    Attributes:
        query: Template of the query string; holds `{query}` once and may hold `{instruction}`.
        document: Template of the document string; holds `{document}` once.
        instruction_field: Name of the field of the request that holds the instruction, for servers that put it into
            the prompt: `instruction` in vLLM. None where the query string holds it, or nothing does.
        escape: Whether special tokens in the filled-in text are made harmless. The preset `plain` does not.

    Raises:
        pydantic.ValidationError: A template lacks its placeholder, or holds the other's, or the instruction would be
            sent twice or in the place of something else.

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
                raise ValueError(
                    f"the {needed} template must hold {{{needed}}} exactly once, and no placeholder but "
                    f"{', '.join(f'{{{name}}}' for name in sorted(allowed))}"
                )
        if self.instruction_field is not None:
            if "{instruction}" in self.query:
                raise ValueError(
                    "the instruction goes into the query template or into instruction_field, not into both"
                )
            if not self.instruction_field.strip() or self.instruction_field in API_FIELDS:
                raise ValueError(
                    f"instruction_field must name a field of its own, which {', '.join(sorted(API_FIELDS))} are not"
                )
        return self

    def format_fields(self, instruction: str) -> dict[str, str]:
        """Return the fields of a request besides query and documents.

        Args:
            instruction: The task in a sentence.
        """
        return {} if self.instruction_field is None else {self.instruction_field: self._fill("", instruction)}

    def format_query(self, query: str, instruction: str) -> str:
        """Return the query string of a request.

        Args:
            query: The query.
            instruction: The task in a sentence; left out where the template has no place for it.
        """
        values = {"query": query, "instruction": instruction}
        parts = _PLACEHOLDER.split(self.query)  # text, name, text, name, text
        for place in range(1, len(parts), 2):
            parts[place] = self._fill(parts[place - 1], values[parts[place]])
        return "".join(parts)

    def format_document(self, document: str) -> str:
        """Return the document string of a request.

        Args:
            document: The document's text.
        """
        return self.format_documents([document])[0]

    def format_documents(self, documents: Iterable[str]) -> list[str]:
        """Return the document strings of a request.

        Args:
            documents: N texts.

        Returns:
            N strings, in the same order.
        """
        before, _, after = self.document.partition("{document}")
        if not self.escape:
            return [f"{before}{text}{after}" for text in documents]
        seam = before or self.query
        seam_opens = seam.endswith("<")
        return [f"{before}{self._fill(seam, text) if seam_opens or '<' in text else text}{after}" for text in documents]

    def _fill(self, before: str, text: str) -> str:
        if not self.escape:
            return text
        text = text.replace("<|", "< |")
        # A token must not come together at the seams either: the server may put document right behind query.
        if text.endswith("<"):
            text += " "
        return f" {text}" if text.startswith("|") and before.endswith("<") else text


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


def preset_for(model: str, *, embedded: bool) -> PromptFormat:
    """Return the format that `prompt_format="auto"` stands for.

    Args:
        model: The model's name, with or without an organisation in front (`Qwen/Qwen3-Reranker-4B`).
        embedded: Whether the embedded endpoint answers; its scorer would read the instruction's words.
    """
    tagged = model.rpartition("/")[2].startswith("Qwen3-Reranker") and not embedded
    return PRESETS["tagged" if tagged else "plain"]
