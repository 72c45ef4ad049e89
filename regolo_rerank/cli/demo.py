"""Reranking on real text, in one screen: `regolo-rerank demo`.

Which module of Python's standard library answers a question? BM25 finds candidates, and the reranker sorts them, once
through LangChain and once through LlamaIndex. Then 100 questions show the improvement.
"""

import os
from typing import TYPE_CHECKING, Any, Final

from rich.table import Table
from rich.text import Text

from regolo_rerank._version import install_hint
from regolo_rerank.cli.options import open_client, server_of
from regolo_rerank.cli.terminal import show
from regolo_rerank.errors import InvalidInputError

if TYPE_CHECKING:
    from regolo_rerank.evaluation import Evaluation

__all__ = ["SHOWN", "run"]

SHOWN: Final = "csv", "filecmp", "secrets", "shelve"
"""Modules whose questions are shown."""
_ROWS: Final = 3

_NEXT: Final = """
Next steps:
  1. Rank your documents:   regolo-rerank rank {local}"your question" FILE
  2. Measure your queries:  regolo-rerank evaluate --help
  3. Use it in your code:   regolo_rerank.langchain, regolo_rerank.llama_index"""


def run(**options: Any) -> int:
    """Run the command and return its exit status."""
    # The frameworks take seconds to load, so print a line first.
    show(Text("Which module of Python's standard library answers a question?", "bold"))
    if not any(os.environ.get(name, "").strip() for name in ("REGOLO_API_KEY", "REGOLO_BASE_URL")):
        options.setdefault("base_url", "local://")
    server = server_of(options)
    try:
        from regolo_rerank.evaluation import evaluate, example_queries

        queries = {query["relevant"][0]: query for query in example_queries()}
        if server.startswith("local:"):
            show("The offline scorer runs. Set REGOLO_API_KEY to use a reranking model.")
        else:
            count = len(queries) + 2 * len(SHOWN)
            show(f"Sending {count} requests to {server}. Add --local to send none.")
        agree = True
        for module in [each for each in SHOWN if each in (found["id"] for found in queries[each]["documents"])]:
            after = _rank_with_langchain(queries[module], options)
            agree &= after == _rank_with_llama_index(queries[module], options)
            _print_question(module, queries[module], after)
    except ImportError as error:
        if (error.name or "").startswith("regolo_rerank"):
            raise
        raise InvalidInputError(f"the demo needs more packages: {install_hint('demo')}") from None
    show(f"\nLangChain and LlamaIndex return {'the same' if agree else 'different'} documents.\n")
    with open_client(options) as client:
        _print_figures(evaluate(list(queries.values()), client))
    show(_NEXT.format(local="--local " if server.startswith("local:") else ""))
    return 0


def _rank_with_langchain(query: dict[str, Any], options: dict[str, Any]) -> list[str]:
    from langchain_core.documents import Document
    from langchain_core.runnables import RunnableLambda

    from regolo_rerank.langchain import RegoloRerank, RerankRetriever

    documents = [Document(each["text"], id=each["id"]) for each in query["documents"]]
    bm25: RunnableLambda[str, list[Document]] = RunnableLambda(lambda _question: documents)
    retriever = RerankRetriever(base_retriever=bm25, reranker=RegoloRerank(top_n=len(documents), **options))
    return [str(document.id) for document in retriever.invoke(query["query"])]


def _rank_with_llama_index(query: dict[str, Any], options: dict[str, Any]) -> list[str]:
    from llama_index.core.schema import NodeWithScore, TextNode

    from regolo_rerank.llama_index import RegoloRerank

    nodes = [NodeWithScore(node=TextNode(text=each["text"], id_=each["id"])) for each in query["documents"]]
    reranker = RegoloRerank(top_n=len(nodes), **options)
    return [node.node_id for node in reranker.postprocess_nodes(nodes, query_str=query["query"])]


def _print_question(module: str, query: dict[str, Any], after: list[str]) -> None:
    """Print the first documents before and after reranking, and the change of the right one."""
    texts = {each["id"]: each["text"] for each in query["documents"]}
    table = Table.grid(padding=(0, 2), expand=True)
    for _ in range(2):
        table.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
    table.add_row("BM25", "reranked", style="dim")
    for place, names in enumerate(zip(list(texts)[:_ROWS], after, strict=False), 1):
        cells = (f"{place}. {name}: {texts[name].splitlines()[0]}" for name in names)
        table.add_row(*(Text(cell, "green" if name == module else "") for cell, name in zip(cells, names, strict=True)))
    before, now = (_ordinal(names.index(module) + 1) for names in (list(texts), after))
    show(Text(f"\n{query['query']}", "bold"), table, Text(f"{module}: {before} -> {now}", "bold green"))


def _ordinal(number: int) -> str:
    ending = {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{'th' if 10 < number % 100 < 20 else ending}"


def _print_figures(evaluation: "Evaluation") -> None:
    (variant,) = evaluation.variants
    table = Table.grid(padding=(0, 2))
    table.add_row(f"{evaluation.queries} questions", "BM25", "reranked", "gain with its 95% interval", style="dim")
    for name in ("nDCG@10", "MRR", "Recall@10"):
        each = variant.measures[name]
        gain = f"{each.difference:+.3f} ({each.low:+.3f} to {each.high:+.3f}), {each.verdict}"
        table.add_row(name, f"{each.before:.3f}", f"{each.after:.3f}", gain)
    table.add_row("top_n to keep 95%", str(variant.top_n.before), str(variant.top_n.after))
    show(table)
    if variant.failed:
        show(f"{len(variant.failed)} questions failed and are excluded.")
