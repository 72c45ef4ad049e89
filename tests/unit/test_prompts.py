from itertools import product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from regolo_rerank import PromptFormat
from regolo_rerank.prompts import DEFAULT_INSTRUCTION, PRESETS, preset_for
from tests.unit.calls import cases

TEMPLATES = {
    "tagged": ("<Instruct>: {instruction}\n<Query>: {query}", "<Document>: {document}", None, True),
    "documented": ("{instruction}\n<Query>: {query}", "<Document>: {document}", None, True),
    "chat": (
        (
            "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
            'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
            "<Instruct>: {instruction}\n<Query>: {query}\n"
        ),
        "<Document>: {document}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        None,
        True,
    ),
    "server_template": ("{query}", "{document}", "instruction", True),
    "plain": ("{query}", "{document}", None, False),
}


def test_the_presets_are_the_documented_ones() -> None:
    """There are these presets, byte for byte, and the default task is that of web search."""
    assert {
        name: (preset.query, preset.document, preset.instruction_field, preset.escape)
        for name, preset in PRESETS.items()
    } == TEMPLATES
    assert DEFAULT_INSTRUCTION == "Given a web search query, retrieve relevant passages that answer the query"


@pytest.mark.parametrize("name", TEMPLATES)
def test_placeholders_are_filled_in_once(name: str) -> None:
    """Braces in the filled-in texts mean nothing."""
    preset, (query, document, field, _) = PRESETS[name], TEMPLATES[name]
    text, task = "{document} {query}?", "Find {query} \\1 %s"
    assert preset.format_query(text, task) == query.replace("{instruction}", "@").replace("{query}", text).replace(
        "@", task
    )
    assert preset.format_documents([text, "b"]) == [document.replace("{document}", each) for each in (text, "b")]
    assert preset.format_fields(task) == ({field: task} if field else {})
    assert preset.uses_instruction is (name != "plain")


def test_other_braces_of_a_template_are_literal() -> None:
    """A template may be JSON."""
    own = PromptFormat(query='{"task": "{instruction}", {0} {{query}}', document="{} {{document}} {other}")
    assert own.format_query("{instruction}", "{query} {}") == '{"task": "{query} {}", {0} {{instruction}}'
    assert own.format_document("{document}") == "{} {{document}} {other}"
    assert own.uses_instruction


ESCAPING = [
    *(preset for name, preset in PRESETS.items() if name != "plain"),
    PromptFormat(query="{instruction}{query}", document="{document}|im_end|>"),
    PromptFormat(query="<{query}", document="<{document}"),
    PromptFormat(query="{query}|im_end|>", document="|im_start|>{document}<"),
    PromptFormat(query="{query}<"),
    PromptFormat(query="<{instruction}|{query}<", document="<{document}|"),
]


@pytest.mark.parametrize("prompt_format", ESCAPING, ids=repr)
def test_no_text_brings_a_special_token(prompt_format: PromptFormat) -> None:
    """Wherever `<` and `|` are, also where query and document meet, they never touch; otherwise texts stay as is."""
    of_template = (prompt_format.query + prompt_format.document).count("<|")
    texts = ["".join(letters) for size in (1, 2, 3) for letters in product("<|x", repeat=size)]
    for query, document in product(texts, repeat=2):
        filled = prompt_format.format_query(query, document) + prompt_format.format_document(document)
        assert filled.count("<|") == of_template, (query, document)
        assert "<|" not in prompt_format.format_fields(document).get("instruction", "")


@given(st.text("<|> ax{}", max_size=8))
@cases(100)
def test_escaping_only_adds_blanks(text: str) -> None:
    """What makes a token harmless can be seen in a log, and nothing is lost."""
    for prompt_format in ESCAPING:
        before, _, after = prompt_format.document.partition("{document}")
        filled = prompt_format.format_document(text).removeprefix(before).removesuffix(after)
        assert filled.replace(" ", "") == text.replace(" ", "")
        if "<" not in text and "|" not in text:
            assert filled == text
    assert PRESETS["plain"].format_document(text) == PRESETS["plain"].format_query(text, "i") == text


def test_a_special_token_can_still_be_read() -> None:
    """One blank makes it harmless, and angle brackets and bars alone stay as they are."""
    tagged = PRESETS["tagged"]
    assert tagged.format_document("<|im_end|>") == "<Document>: < |im_end|>"
    assert tagged.format_query("<|a", "<|b") == "<Instruct>: < |b\n<Query>: < |a"
    assert PromptFormat(document="<{document}").format_document("|im_end|>") == "< |im_end|>"
    assert PromptFormat(document="{document}|im_end|>").format_document("a <") == "a < |im_end|>"
    for text in ("a < b", "a | b", "|a", "|", "a <b> c", "||", "< |im_end|>", "<Query>: a"):
        assert tagged.format_document(text) == f"<Document>: {text}"


@pytest.mark.parametrize(
    ("templates", "problem"),
    [
        ({"query": "q"}, r"the query template must contain \{query\} exactly once"),
        ({"query": "{instruction}"}, r"the query template must contain \{query\} exactly once"),
        ({"query": "{query} {query}"}, r"the query template must contain \{query\} exactly once"),
        ({"query": "{query} {document}"}, r"no placeholder except \{instruction\} or \{query\}"),
        ({"document": "d"}, r"the document template must contain \{document\} exactly once"),
        ({"document": "{document} {document}"}, r"must contain \{document\} exactly once"),
        ({"document": "{document} {instruction}"}, r"no placeholder except \{document\}"),
        ({"query": 7}, "query"),
        ({"documents": "{document}"}, "documents"),
        ({"query": "{instruction} {query}", "instruction_field": "instruction"}, "not in both"),
        ({"instruction_field": "query"}, "must be a field name other than documents, model, query, top_n"),
        ({"instruction_field": " "}, "must be a field name other than"),
    ],
)
def test_a_wrong_template_is_rejected(templates: dict[str, Any], problem: str) -> None:
    """A placeholder that is missing, repeated or in the wrong template is named."""
    with pytest.raises(ValidationError, match=problem):
        PromptFormat(**templates)


def test_a_format_cannot_be_changed() -> None:
    """All clients share the presets."""
    with pytest.raises(ValidationError, match="frozen"):
        PRESETS["tagged"].query = "{query}"


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("Qwen3-Reranker-4B", "tagged"),
        ("qwen3-reranker-8b-fp8", "tagged"),
        ("Qwen/Qwen3-Reranker-0.6B", "tagged"),
        ("BAAI/bge-reranker-v2-m3", "plain"),
        ("Qwen3-Embedding-8B", "plain"),
        ("not-Qwen3-Reranker-4B", "plain"),
        ("Qwen3-Reranker/other", "plain"),
    ],
)
def test_auto_goes_by_the_model(model: str, name: str) -> None:
    """The Qwen3 rerankers are recognised in any case, with or without an organisation."""
    assert preset_for(model) is PRESETS[name]
