"""The main job on real text: which module of Python's standard library answers a question?

A keyword search finds candidates among the modules' docstrings, and Regolo.ai's reranker puts them in order, once
inside a LangChain retriever and once inside a LlamaIndex query engine.
"""

import ast
import functools
import math
import os
import re
import shutil
import sys
import sysconfig
import textwrap
from collections.abc import Callable, Iterator
from importlib.machinery import PathFinder, SourceFileLoader
from typing import Any, Final

from langchain_classic.retrievers import ContextualCompressionRetriever
from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever as LangChainRetriever
from llama_index.core.llms import MockLLM
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.response_synthesizers.no_text import NoText
from llama_index.core.retrievers import BaseRetriever as LlamaIndexRetriever
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode

from regolo_rerank import langchain, llama_index
from regolo_rerank._wire.endpoint import BASE_URL_VARIABLE
from regolo_rerank.options import API_KEY_VARIABLE

__all__ = ["QUESTIONS", "keyword_search", "report", "standard_library"]

QUESTIONS: Final = (
    "How can I store a dictionary on disk?",
    "How can I compare two lists of lines?",
    "How can I write a small network server?",
    "How can I time some code?",
    "How can I compute statistics such as the median?",
)

_CANDIDATES: Final = 10
_KEPT: Final = 3
_WIDTHS: Final = 80, 100
"""Columns of the output at least and at most."""

Search = Callable[[str], dict[str, str]]
"""From a question to the texts of its candidates, by module, the best first."""


def report() -> Iterator[str]:
    """Yield the lines of the demo, each question's as soon as it is answered."""
    documents = standard_library()

    def search(question: str) -> dict[str, str]:
        return keyword_search(question, documents)

    settings = _settings()
    by_langchain = langchain.RegoloRerank(top_n=_KEPT, **settings)
    by_llama_index = llama_index.RegoloRerank(top_n=_KEPT, **settings)
    endpoint = by_langchain.endpoint()
    if endpoint.embedded:
        yield "Using the embedded lexical scorer (local://): it compares words, not meanings."
        yield f"For the model's judgement, set {API_KEY_VARIABLE}."
    else:
        yield f"Reranking with {by_langchain.model} at {endpoint.url.host}."
    yield f"Documents: the docstrings of {len(documents)} modules of Python's standard library."
    retriever = ContextualCompressionRetriever(
        base_compressor=by_langchain,
        base_retriever=_LangChainKeywords(search=search),
    )
    engine = RetrieverQueryEngine(
        _LlamaIndexKeywords(search),
        response_synthesizer=NoText(llm=MockLLM()),
        node_postprocessors=[by_llama_index],
    )
    for question in QUESTIONS:
        candidates = search(question)
        yield ""
        yield question
        yield from _listed(candidates)
        found = retriever.invoke(question)
        yield from _ranked("LangChain", candidates, [(str(d.id), d.metadata["relevance_score"]) for d in found])
        nodes = engine.query(question).source_nodes
        yield from _ranked("LlamaIndex", candidates, [(node.node_id, node.get_score()) for node in nodes])


@functools.cache
def standard_library() -> dict[str, str]:
    """Return "name: docstring" of each public module that has one, by name; no module is imported."""
    documents = {}
    for name in sorted(sys.stdlib_module_names):
        if not name.startswith("_") and (docstring := _docstring(name)):
            documents[name] = f"{name}: {docstring}"
    return documents


def _docstring(name: str) -> str | None:
    spec = PathFinder.find_spec(name, [sysconfig.get_path("stdlib")])
    if spec is None or not isinstance(spec.loader, SourceFileLoader):
        return None
    try:
        return ast.get_docstring(ast.parse(spec.loader.get_data(spec.loader.path)))
    except SyntaxError:
        return None


def keyword_search(question: str, documents: dict[str, str]) -> dict[str, str]:
    """Return the documents that share the most words with a question, rare words counting more.

    Args:
        question: What is searched.
        documents: N texts by name.

    Returns:
        Those that share a word of four letters or more, the best first, ten at most.
    """
    words = {name: _words(text) for name, text in documents.items()}
    scores = dict.fromkeys(documents, 0.0)
    for word in sorted(_words(question)):
        holders = [name for name in documents if word in words[name]]
        for name in holders:
            scores[name] += math.log(1 + len(documents) / len(holders))
    best = sorted((name for name in documents if scores[name]), key=lambda name: -scores[name])
    return {name: documents[name] for name in best[:_CANDIDATES]}


def _words(text: str) -> set[str]:
    return set(re.findall(r"\w{4,}", text.lower()))


class _LangChainKeywords(LangChainRetriever):
    search: Search

    def _get_relevant_documents(
        self,
        query: str,
        *,
        run_manager: CallbackManagerForRetrieverRun,  # noqa: ARG002 - the base class passes it
    ) -> list[Document]:
        return [Document(text, id=name) for name, text in self.search(query).items()]


class _LlamaIndexKeywords(LlamaIndexRetriever):
    def __init__(self, search: Search) -> None:
        self._search = search
        super().__init__()

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        found = self._search(query_bundle.query_str)
        return [NodeWithScore(node=TextNode(text=text, id_=name)) for name, text in found.items()]


def _settings() -> dict[str, Any]:
    """Return what sends requests to the API where the environment says how, and to the embedded endpoint elsewhere."""
    configured = any(os.environ.get(name, "").strip() for name in (API_KEY_VARIABLE, BASE_URL_VARIABLE))
    return {} if configured else {"base_url": "local://"}


def _listed(candidates: dict[str, str]) -> list[str]:
    names = " ".join(f"{place}.{name}" for place, name in enumerate(candidates, 1))
    return textwrap.wrap(names, _width(), initial_indent="  keywords    ", subsequent_indent=" " * 14)


def _ranked(framework: str, candidates: dict[str, str], ranking: list[tuple[str, float]]) -> Iterator[str]:
    """Yield a line for each module that was kept: its place, score, way up or down, and what it is."""
    places = list(candidates)
    for place, (name, score) in enumerate(ranking):
        moved = places.index(name) - place
        way = f"up {moved}" if moved > 0 else f"down {-moved}" if moved else "stays"
        line = f"  {'' if place else framework:10}  {place + 1}. {score:.4f}  {way:6}  "
        yield line + textwrap.shorten(candidates[name].splitlines()[0], _width() - len(line), placeholder="...")


def _width() -> int:
    narrowest, widest = _WIDTHS
    return max(narrowest, min(widest, shutil.get_terminal_size().columns))
