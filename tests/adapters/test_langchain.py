"""The LangChain adapter: documents, `metadata_fields` and the `rerank` method."""

import math
from typing import Any

import numpy as np
import pytest
from langchain_classic.retrievers import ContextualCompressionRetriever, MultiQueryRetriever
from langchain_core.documents import Document
from langchain_core.language_models.fake_chat_models import FakeListChatModel
from pydantic import ConfigDict

from regolo_rerank import InvalidInputError, RerankFallbackWarning
from regolo_rerank.langchain import RegoloRerank
from tests.adapters.helpers import DOWN, Everything, documents, texts_of
from tests.conftest import KEY
from tests.support.modes import Call
from tests.support.stub import Stub


class Page(Document):
    """A document with another field."""

    number: int


class DocumentWithState(Document):
    """A document with arrays, as LangChain's transformers return it."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    state: dict[str, Any]


def test_class_id_type_and_metadata_are_kept(call: Call, langchain: RegoloRerank) -> None:
    """A document keeps its class and all its fields, plus the score."""
    page = Page(page_content="a score=0.4", id="p-7", number=7, metadata={"source": "x", "nested": {"tags": ["y"]}})
    (kept,) = call(langchain.compress_documents, [page], "q")
    assert type(kept) is Page
    assert kept == page.model_copy(update={"metadata": {**page.metadata, "relevance_score": 0.4}})


@pytest.mark.parametrize("fails", [False, True])
def test_a_class_that_cannot_be_serialised_comes_back_as_a_plain_document(
    call: Call, langchain: RegoloRerank, stub: Stub, fails: bool
) -> None:
    """Otherwise a trace or a store could not write the result. Id and metadata are kept, also in a fallback."""
    given = DocumentWithState(
        page_content="a score=0.4",
        id="p-7",
        metadata={"source": "x", "relevance_score": 0.1},
        state={"embedded_doc": np.zeros(3)},
    )
    if fails:
        langchain.on_error = "return_input"
        stub.always(DOWN)
        with pytest.warns(RerankFallbackWarning):
            (kept,) = call(langchain.compress_documents, [given], "q")
    else:
        (kept,) = call(langchain.compress_documents, [given], "q")
    metadata = {"source": "x"} if fails else {"source": "x", "relevance_score": 0.4}
    assert type(kept) is Document
    assert kept == Document("a score=0.4", id="p-7", metadata=metadata)
    assert '"id":"p-7"' in kept.model_dump_json()


def test_a_single_document_is_rejected_with_advice(call: Call, langchain: RegoloRerank) -> None:
    """A document is iterable, so without the check it would be taken for a list of its fields."""
    wrong: Any = Document("a")
    with pytest.raises(InvalidInputError, match=r"must be a list, got Document. Pass \[document\]"):
        call(langchain.compress_documents, wrong, "q")


@pytest.mark.parametrize(
    ("metadata", "sent"),
    [
        ({"year": 1999, "title": "T", "other": "o"}, "title: T\nyear: 1999\na"),
        ({"title": None, "year": math.nan}, "a"),
        ({"title": "  ", "year": []}, "a"),
        ({"title": [None, ""], "year": 0}, "year: 0\na"),
        ({"title": ("x", " y ", 2.0), "year": 1999.0}, "title: x, y, 2\nyear: 1999\na"),
        ({"title": False, "year": 0.25}, "title: False\nyear: 0.25\na"),
        ({"title": math.inf}, "title: inf\na"),
        ({"year": np.float64("nan"), "title": np.str_("T")}, "title: T\na"),
    ],
)
def test_metadata_fields_are_scored_as_a_person_would_write_them(
    call: Call, langchain: RegoloRerank, stub: Stub, metadata: dict[str, Any], sent: str
) -> None:
    """Each present value is a `key: value` line in front of the text, in the order of the option, and only there."""
    langchain.metadata_fields = ("title", "year")
    (kept,) = call(langchain.compress_documents, [Document("a", metadata=metadata)], "q")
    assert stub.documents == [[sent]]
    assert kept.page_content == "a"


def test_a_multi_query_retriever_finds_equal_documents_over_a_reranker(langchain: RegoloRerank) -> None:
    """It drops duplicates by equality, which a score of each query in the metadata would prevent."""
    langchain.score_metadata_key = None
    base = ContextualCompressionRetriever(base_compressor=langchain, base_retriever=Everything())
    model = FakeListChatModel(responses=["query one\nquery two"])
    assert texts_of(MultiQueryRetriever.from_llm(base, model).invoke("q")) == ["b score=0.9", "c score=0.5"]


def test_rerank_accepts_strings_documents_and_dicts(call: Call, langchain: RegoloRerank, stub: Stub) -> None:
    """It returns plain dicts of index and score, best first, as LangChain's other rerankers do."""
    langchain.metadata_fields = ("title",)
    given: list[Any] = ["a score=0.1", Document("b score=0.9", metadata={"title": "T"}), {"text": "c score=0.5"}]
    assert call(langchain.rerank, given, "q") == [
        {"index": 1, "relevance_score": 0.9},
        {"index": 2, "relevance_score": 0.5},
    ]
    assert stub.documents == [["a score=0.1", "title: T\nb score=0.9", "c score=0.5"]]


def test_rerank_accepts_the_options_of_one_call(call: Call, langchain: RegoloRerank, stub: Stub) -> None:
    """They replace the reranker's options in this call only."""
    langchain.prompt_format = "tagged"
    kept = call(
        langchain.rerank,
        documents(),
        "q",
        top_n=3,
        model="other",
        instruction="Find it",
        score_threshold=0.2,
        extra_body={"user": "me"},
        total_timeout=30.0,
    )
    assert [result["index"] for result in kept] == [1, 2]
    assert [result["index"] for result in call(langchain.rerank, documents(), "q", score_threshold=0.6)] == [1]
    first, second = [request.json for request in stub.received]
    assert (first["model"], first["top_n"], first["user"]) == ("other", 3, "me")
    assert first["query"] == "<Instruct>: Find it\n<Query>: q"
    assert (second["model"], second["top_n"], "user" in second) == ("Qwen3-Reranker-4B", 2, False)
    assert second["query"] == f"<Instruct>: {langchain.instruction}\n<Query>: q"


@pytest.mark.parametrize(
    ("document", "problem"),
    [
        ({"content": "a"}, r"documents\[1\]: must be a string, got None"),
        ({"text": 7}, r"documents\[1\]: must be a string, got int"),
        (7, r"documents\[1\]: must be a string, got int"),
        (None, r"documents\[1\]: must be a string, got None"),
    ],
)
def test_rerank_rejects_documents_without_a_text(
    call: Call, langchain: RegoloRerank, stub: Stub, document: Any, problem: str
) -> None:
    """The error has position and type, and nothing is sent."""
    with pytest.raises(InvalidInputError, match=problem):
        call(langchain.rerank, ["a", document], "q")
    assert stub.received == []


def test_the_key_has_a_second_name(call: Call, stub: Stub) -> None:
    """`regolo_api_key` is `api_key` under the name that LangChain's conventions give it. Both at once are rejected."""
    options: dict[str, Any] = {"regolo_api_key": KEY, "base_url": stub.url}
    call(RegoloRerank(**options).compress_documents, documents(), "q")
    assert stub.received[0].headers["authorization"] == f"Bearer {KEY}"
    assert RegoloRerank(api_key=None, **options).api_key is not None
    with pytest.raises(InvalidInputError, match="api_key and regolo_api_key are the same option") as rejected:
        RegoloRerank(api_key="sk-other-key", **options)
    assert KEY not in str(rejected.value)
    assert "sk-other-key" not in str(rejected.value)
