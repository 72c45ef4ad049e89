"""A few texts, and what finds them: the parts of a user's program that are not reranking."""

from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from llama_index.core import MockEmbedding, VectorStoreIndex
from llama_index.core.schema import TextNode

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
