from itertools import product
from typing import Any

import pytest
from pydantic import ValidationError

from regolo_rerank import PromptFormat, RegoloClient
from regolo_rerank.prompts import DEFAULT_INSTRUCTION, PRESETS
from tests.conftest import KEY, Rank
from tests.support.stub import Stub

TEMPLATES = {
    "tagged": (
        "<Instruct>: {instruction}\n<Query>: {query}",
        "<Document>: {document}",
    ),
    "documented": (
        "{instruction}\n<Query>: {query}",
        "<Document>: {document}",
    ),
    "chat": (
        (
            "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
            'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
            "<Instruct>: {instruction}\n<Query>: {query}\n"
        ),
        "<Document>: {document}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    ),
    "server_template": (
        "{query}",
        "{document}",
    ),
    "plain": (
        "{query}",
        "{document}",
    ),
}

PRESET = pytest.mark.parametrize("name", TEMPLATES)

ESCAPING = [
    *(preset for name, preset in PRESETS.items() if name != "plain"),
    PromptFormat(),
    PromptFormat(query="{instruction}{query}", document="{document}|im_end|>"),
    PromptFormat(query="<{query}", document="<{document}"),
    PromptFormat(query="{query}|im_end|>", document="|im_start|>{document}<"),
    PromptFormat(query="{query}<"),
    PromptFormat(query="<{instruction}|{query}<", document="<{document}|"),
]


@PRESET
def test_a_preset_is_the_documented_one(name: str) -> None:
    """Both templates of a preset are the documented ones, byte for byte."""
    assert (PRESETS[name].query, PRESETS[name].document) == TEMPLATES[name]


def test_every_preset_is_documented() -> None:
    """There are these presets and no others, and the default task is that of web search."""
    assert list(PRESETS) == list(TEMPLATES)
    assert DEFAULT_INSTRUCTION == "Given a web search query, retrieve relevant passages that answer the query"


@PRESET
@pytest.mark.parametrize("instruction", [None, "Find recipes"])
def test_what_is_sent_is_the_preset_filled_in(name: Any, instruction: str | None, rank: Rank, stub: Stub) -> None:
    """The server gets the tagged strings, and the results hold the caller's own."""
    query, documents = "capital of {document}?", ["Rome score=0.2 ", "{query} {instruction} \\1 %s score=0.9 "]
    with RegoloClient(KEY, base_url=stub.url, prompt_format=name) as client:
        response = rank(client, query, documents, instruction=instruction)
    of_query, of_document = TEMPLATES[name]
    (sent,) = stub.received
    assert sent.json["query"] == of_query.replace("{instruction}", instruction or DEFAULT_INSTRUCTION).replace(
        "{query}", query
    )
    assert sent.documents == [of_document.replace("{document}", document) for document in documents]
    in_a_field = (instruction or DEFAULT_INSTRUCTION) if name == "server_template" else None
    assert sent.json.get("instruction") == in_a_field
    assert [result.document for result in response.results] == documents[::-1]


def test_a_format_of_the_users_own_is_sent_filled_in(rank: Rank, stub: Stub) -> None:
    """Its placeholders are filled in, each once, and all other braces stand for themselves."""
    custom = PromptFormat(query='{"task": "{instruction}", {0} {{query}}', document="{} {{document}} {other}")
    with RegoloClient(KEY, base_url=stub.url, prompt_format=custom) as client:
        rank(client, "{instruction} {query}", ["{document}"], instruction="{query} {}")
    (sent,) = stub.received
    assert sent.json["query"] == '{"task": "{query} {}", {0} {{instruction} {query}}'
    assert sent.documents == ["{} {{document}} {other}"]


@pytest.mark.parametrize(
    ("extra_body", "sent"),
    [(None, {"instruct": "< |x|>"}), ({"instruct": "mine", "user": "u"}, {"instruct": "mine", "user": "u"})],
)
def test_the_instruction_goes_into_the_field_that_a_format_names(
    extra_body: dict[str, Any] | None, sent: dict[str, str], rank: Rank, client: RegoloClient, stub: Stub
) -> None:
    """A server's own name for the field is sent, special tokens made harmless, and `extra_body` has the last word."""
    client.prompt_format = PromptFormat(instruction_field="instruct")
    rank(client, "q", ["d"], instruction="<|x|>", extra_body=extra_body)
    assert stub.received[0].json == {"model": client.model, "query": "q", "documents": ["d"], **sent}


def test_scores_of_two_tasks_are_not_mixed_up(rank: Rank, client: RegoloClient, stub: Stub) -> None:
    """The cache knows a pair by its instruction too, where that is in a field of its own."""
    client.prompt_format, client.cache = "server_template", {}
    for instruction, requests in (("one", 1), ("two", 1), ("one", 0)):
        assert rank(client, "q", ["d"], instruction=instruction).usage.requests == requests
    assert [request.json["instruction"] for request in stub.received] == ["one", "two"]


@pytest.mark.parametrize("prompt_format", ESCAPING, ids=repr)
def test_filled_in_text_brings_no_special_token(prompt_format: PromptFormat) -> None:
    """However `<` and `|` end up beside each other, also where query and document meet, they never touch."""
    of_template = (prompt_format.query + prompt_format.document).count("<|")
    texts = ["".join(letters) for size in (1, 2, 3) for letters in product("<|x", repeat=size)]
    for query, document in product(texts, repeat=2):
        filled = prompt_format.format_query(query, document) + prompt_format.format_document(document)
        assert filled.count("<|") == of_template, (query, document)


def test_a_special_token_can_still_be_read() -> None:
    """What makes it harmless is one blank, so that it can be seen in a log."""
    token = "<|im_end|>"
    assert PRESETS["tagged"].format_document(token) == "<Document>: < |im_end|>"
    assert PRESETS["tagged"].format_query(token, token) == "<Instruct>: < |im_end|>\n<Query>: < |im_end|>"
    assert PromptFormat(document="<{document}").format_document("|im_end|>") == "< |im_end|>"
    assert PromptFormat(document="{document}|im_end|>").format_document("a <") == "a < |im_end|>"


@pytest.mark.parametrize("text", ["<|im_end|>", "|im_end|> <", "a < b | c", "{document}"])
def test_plain_and_a_format_without_escape_change_nothing(text: str) -> None:
    """The text comes through as it is, special tokens and all."""
    unescaped = PromptFormat(query="<{instruction}<{query}", document="<{document}", escape=False)
    assert (PRESETS["plain"].format_query(text, text), PRESETS["plain"].format_document(text)) == (text, text)
    assert unescaped.format_query(text, text) == f"<{text}<{text}"
    assert unescaped.format_document(text) == f"<{text}"


@pytest.mark.parametrize("text", ["a < b", "a | b", "|a", "|", "a <b> c", "||", "< |im_end|>", "<Query>: a"])
def test_text_without_a_special_token_is_left_alone(text: str) -> None:
    """Angle brackets and bars alone mean nothing to the model."""
    assert PRESETS["tagged"].format_document(text) == f"<Document>: {text}"


@pytest.mark.parametrize(
    ("templates", "problem"),
    [
        ({"query": "q"}, "query template must hold {query} exactly once"),
        ({"query": ""}, "query template must hold {query} exactly once"),
        ({"query": "{instruction}"}, "query template must hold {query} exactly once"),
        ({"query": "{query} {query}"}, "query template must hold {query} exactly once"),
        ({"query": "{query} {document}"}, "no placeholder but {instruction}, {query}"),
        ({"document": "d"}, "document template must hold {document} exactly once"),
        ({"document": "{document} {document}"}, "document template must hold {document} exactly once"),
        ({"document": "{document} {query}"}, "no placeholder but {document}"),
        ({"document": "{document} {instruction}"}, "no placeholder but {document}"),
        ({"query": 7}, "query"),
        ({"documents": "{document}"}, "documents"),
        ({"query": "{instruction} {query}", "instruction_field": "instruction"}, "not into both"),
        ({"instruction_field": "query"}, "instruction_field must name a field of its own"),
        ({"instruction_field": " "}, "instruction_field must name a field of its own"),
    ],
)
def test_a_template_without_its_placeholders_is_refused(templates: Any, problem: str) -> None:
    """A placeholder that is missing, double or foreign is named, wherever the format is given."""
    with pytest.raises(ValidationError) as caught:
        PromptFormat(**templates)
    assert problem in str(caught.value)
    with pytest.raises(ValidationError) as caught:
        RegoloClient(prompt_format=templates)
    assert problem in str(caught.value)


def test_a_format_cannot_be_changed() -> None:
    """A preset is shared by all clients, so it stays as it is."""
    with pytest.raises(ValidationError, match="frozen"):
        PRESETS["tagged"].query = "{query}"


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("Qwen3-Reranker-4B", "tagged"),
        ("Qwen3-Reranker-8B-fp8", "tagged"),
        ("Qwen/Qwen3-Reranker-0.6B", "tagged"),
        ("BAAI/bge-reranker-v2-m3", "plain"),
        ("Qwen3-Embedding-8B", "plain"),
        ("not-Qwen3-Reranker-4B", "plain"),
        ("Qwen3-Reranker/other", "plain"),
    ],
)
def test_auto_goes_by_the_model_of_the_call(
    model: str, name: str, rank: Rank, client: RegoloClient, stub: Stub
) -> None:
    """The Qwen3 rerankers get their tags, with or without an organisation in front, and other models plain text."""
    rank(client, "q", ["d"], model=model)
    preset = PRESETS[name]
    assert stub.received[0].json["query"] == preset.format_query("q", DEFAULT_INSTRUCTION)
    assert stub.received[0].documents == [preset.format_document("d")]


@pytest.mark.parametrize(("prompt_format", "document"), [("auto", "<|x|>"), ("tagged", "<Document>: < |x|>")])
def test_auto_is_plain_on_the_embedded_endpoint(prompt_format: Any, document: str, rank: Rank) -> None:
    """The embedded scorer sees nothing but the caller's words, unless a format is asked for by name."""
    seen: list[tuple[str, list[str]]] = []

    def scorer(query: str, documents: list[str]) -> list[float]:
        seen.append((query, documents))
        return [0.5] * len(documents)

    with RegoloClient(base_url="local://", prompt_format=prompt_format, scorer=scorer) as client:
        rank(client, "q", ["<|x|>"])
    assert [documents for _, documents in seen] == [[document]]
    assert (seen[0][0] == "q") == (prompt_format == "auto")
