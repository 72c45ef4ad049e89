"""The main job on real text, in one screen: which module of Python's standard library answers a question?

BM25 finds candidates among the modules' docstrings, and the reranker puts them in order, once inside a LangChain
retriever and once inside a LlamaIndex query engine. 100 questions say what that brings.
"""

import os
import shutil
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

from langchain_classic.retrievers import ContextualCompressionRetriever
from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever as LangChainRetriever
from llama_index.core.llms import MockLLM
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.response_synthesizers.no_text import NoText
from llama_index.core.retrievers import BaseRetriever as LlamaIndexRetriever
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode

from regolo_rerank import RegoloClient, langchain, llama_index
from regolo_rerank._cli.common import open_client, sees_a_bar
from regolo_rerank._display.tables import clip
from regolo_rerank._examples.stdlib import queries
from regolo_rerank._wire.checks import API_KEY_VARIABLE
from regolo_rerank._wire.endpoint import BASE_URL_VARIABLE
from regolo_rerank.evaluation import Evaluation, evaluate

__all__ = ["SHOWN", "report"]

SHOWN: Final = "csv", "filecmp", "secrets", "shelve"
"""The modules whose questions are shown."""

_KEPT: Final = 3
_WIDTHS: Final = 80, 120
"""Columns of the output at least and at most."""
_TOLERANCE: Final = 1e-5
"""A service's scores are the same but for float noise."""


class _Candidate(NamedTuple):
    id: str
    text: str


class _Ranked(NamedTuple):
    id: str
    score: float


def report(base_url: str | None = None) -> Iterator[str]:
    """Yield the lines of the demo, each question's as soon as it is answered.

    Args:
        base_url: Where to rerank; None takes what the environment says, else the embedded endpoint.

    Raises:
        InvalidInputError: The address is wrong, or a package is missing.
        RegoloError: The service refuses or fails.
    """
    options = _options(base_url)
    examples = {query["relevant"][0]: query for query in queries()}
    with open_client(options) as client:
        yield from _introduction(client, len(examples))
        agreed = True
        for module in SHOWN:
            query = examples[module]
            candidates = [_Candidate(each["id"], each["text"]) for each in query["documents"]]
            by_langchain = _by_langchain(query["query"], candidates, options)
            by_llama_index = _by_llama_index(query["query"], candidates, options)
            agreed &= _agree(by_langchain, by_llama_index)
            yield ""
            yield query["query"]
            yield from _beside(module, candidates, [each.id for each in by_langchain])
        yield ""
        how = "agree: the same documents, the same scores," if agreed else "do not agree"
        yield f"LangChain and LlamaIndex {how} each time."
        yield ""
        yield from _figures(evaluate(examples.values(), client, show_progress=sees_a_bar()))


def _options(base_url: str | None) -> dict[str, str]:
    if base_url is not None:
        return {"base_url": base_url}
    configured = any(os.environ.get(name, "").strip() for name in (API_KEY_VARIABLE, BASE_URL_VARIABLE))
    return {} if configured else {"base_url": "local://"}


def _introduction(client: RegoloClient, questions: int) -> Iterator[str]:
    endpoint = client.endpoint()
    if endpoint.embedded:
        yield f"Reranked on this machine, by word vectors. Set {API_KEY_VARIABLE} for a real model."
    else:
        requests = questions + 2 * len(SHOWN)
        yield f"Reranked by {client.model} at {endpoint.url.host}, with {requests} requests."
    yield "* is the module of Python's standard library that answers the question."


def _by_langchain(question: str, candidates: list[_Candidate], options: dict[str, Any]) -> list[_Ranked]:
    retriever = ContextualCompressionRetriever(
        base_compressor=langchain.RegoloRerank(top_n=_KEPT, **options),
        base_retriever=_LangChainCandidates(candidates=candidates),
    )
    found = retriever.invoke(question)
    return [_Ranked(str(document.id), document.metadata["relevance_score"]) for document in found]


def _by_llama_index(question: str, candidates: list[_Candidate], options: dict[str, Any]) -> list[_Ranked]:
    engine = RetrieverQueryEngine(
        _LlamaIndexCandidates(candidates),
        response_synthesizer=NoText(llm=MockLLM()),
        node_postprocessors=[llama_index.RegoloRerank(top_n=_KEPT, **options)],
    )
    return [_Ranked(node.node_id, node.get_score()) for node in engine.query(question).source_nodes]


class _LangChainCandidates(LangChainRetriever):
    candidates: list[_Candidate]

    def _get_relevant_documents(
        self,
        query: str,  # noqa: ARG002 - what was found for it is given
        *,
        run_manager: CallbackManagerForRetrieverRun,  # noqa: ARG002 - the base class passes it
    ) -> list[Document]:
        return [Document(each.text, id=each.id) for each in self.candidates]


class _LlamaIndexCandidates(LlamaIndexRetriever):
    def __init__(self, candidates: list[_Candidate]) -> None:
        self._candidates = candidates
        super().__init__()

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:  # noqa: ARG002 - the same
        return [NodeWithScore(node=TextNode(text=each.text, id_=each.id)) for each in self._candidates]


def _agree(one: list[_Ranked], other: list[_Ranked]) -> bool:
    return [each.id for each in one] == [each.id for each in other] and all(
        abs(left.score - right.score) <= _TOLERANCE for left, right in zip(one, other, strict=True)
    )


def _beside(right: str, candidates: list[_Candidate], reranked: list[str]) -> Iterator[str]:
    """Yield BM25's first documents beside the reranked ones."""
    narrowest, widest = _WIDTHS
    column = (max(narrowest, min(widest, shutil.get_terminal_size().columns)) - 4) // 2
    texts = {each.id: each.text for each in candidates}

    def cell(place: int, name: str) -> str:
        line = f"{place}. {'*' if name == right else ' '} {name}: {texts[name].splitlines()[0]}"
        return clip(line, column, "...").ljust(column)

    yield f"  {'BM25':{column}}  reranked"
    before = [each.id for each in candidates[:_KEPT]]
    for place, (old, new) in enumerate(zip(before, reranked, strict=False), 1):
        yield f"  {cell(place, old)}  {cell(place, new)}".rstrip()


def _figures(evaluation: Evaluation) -> Iterator[str]:
    (variant,) = evaluation.variants
    title = f"{evaluation.queries} such questions"
    yield f"{title:24} BM25  reranked  gain, with its 95 % interval"
    for name in ("nDCG@10", "MRR", "Recall@1", "Recall@10"):
        each = variant.measures[name]
        gain = f"{each.difference:+.3f}  ({each.low:+.3f} to {each.high:+.3f}), {each.verdict}"
        yield f"  {name:20}  {each.before:.3f}     {each.after:.3f}  {gain}"
    yield f"  {'top_n to keep 95 %':20}  {variant.top_n.before:5}  {variant.top_n.after:8}"
    if variant.failed:
        yield f"  {len(variant.failed)} of the questions failed and count nowhere."
