"""A few texts, and what finds them: the parts of a user's program that are not reranking."""

from collections.abc import Sequence
from typing import Any

from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.language_models import GenericFakeChatModel
from langchain_core.messages import AIMessage
from langchain_core.retrievers import BaseRetriever
from langchain_core.tools import BaseTool
from llama_index.core import MockEmbedding, VectorStoreIndex
from llama_index.core.llms import CompletionResponse, CompletionResponseGen, CustomLLM, LLMMetadata
from llama_index.core.schema import TextNode
from pydantic import Field

QUERY = "How do I read a CSV file?"
TEXTS = ["csv: read a CSV file", "json: read a JSON file", "os: the operating system"]
"""The first one answers the query."""


class Everything(BaseRetriever):
    """Retrieves all documents, the best one last."""

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:
        del query, run_manager
        return [Document(text) for text in reversed(TEXTS)]


def index() -> VectorStoreIndex:
    """Return an index that finds all nodes, in no useful order."""
    return VectorStoreIndex([TextNode(text=text) for text in TEXTS], embed_model=MockEmbedding(embed_dim=4))


class ChatModel(GenericFakeChatModel):
    """Asks the tool `search_docs` for the query, and then answers."""

    def bind_tools(self, tools: Sequence[BaseTool], **_: Any) -> "ChatModel":  # type: ignore[override]
        assert [tool.name for tool in tools] == ["search_docs"]
        return self


def chat_model() -> ChatModel:
    """Return such a model, for one conversation."""
    asks = AIMessage("", tool_calls=[{"name": "search_docs", "args": {"query": QUERY}, "id": "1"}])
    return ChatModel(messages=iter([asks, AIMessage("With the module csv.")]))


class Llm(CustomLLM):
    """Does the same in LlamaIndex's words."""

    says: list[str] = Field(
        default_factory=lambda: [
            f'Thought: I need a tool.\nAction: search_docs\nAction Input: {{"input": "{QUERY}"}}',
            "Thought: I can answer.\nAnswer: With the module csv.",
        ]
    )

    @property
    def metadata(self) -> LLMMetadata:
        return LLMMetadata()

    def complete(self, *_: Any, **__: Any) -> CompletionResponse:
        return CompletionResponse(text=self.says.pop(0))

    def stream_complete(self, *_: Any, **__: Any) -> CompletionResponseGen:
        response = self.complete()
        return (CompletionResponse(text=text, delta=text) for text in [response.text])
