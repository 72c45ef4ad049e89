"""LangChain's own tests of retrievers. They need langchain-tests, which the extra [dev] brings."""

from typing import Any

import pytest
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import Runnable, RunnableLambda

from regolo_rerank.langchain import RegoloRerank, RerankRetriever

integration_tests = pytest.importorskip("langchain_tests.integration_tests")
TEXTS = ["Rome is in Italy.", "Beijing is the capital of China.", "Paris is in France.", "Tea is from China."]


@pytest.mark.anyio
class TestRerankRetriever(integration_tests.RetrieversIntegrationTests):  # type: ignore[misc, name-defined]
    """The suite for retrievers; `k` is part of it."""

    @property
    def retriever_constructor(self) -> type[BaseRetriever]:
        return RerankRetriever

    @property
    def retriever_constructor_params(self) -> dict[str, Any]:
        base: Runnable[str, list[Document]] = RunnableLambda(lambda _: [Document(text) for text in TEXTS])
        return {"base_retriever": base, "reranker": RegoloRerank(base_url="local://")}

    @property
    def retriever_query_example(self) -> str:
        return "capital of China"
