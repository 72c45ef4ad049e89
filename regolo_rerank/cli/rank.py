"""Rank the documents of files: `regolo-rerank rank QUERY FILE...`."""

from typing import Any, NamedTuple

from rich.bar import Bar
from rich.table import Table
from rich.text import Text

from regolo_rerank._files import Document, read_documents
from regolo_rerank.cli.options import open_client
from regolo_rerank.cli.terminal import announce_input, clean, out, print_json, say
from regolo_rerank.errors import InvalidInputError
from regolo_rerank.results import RerankResponse

__all__ = ["run"]


class _Found(NamedTuple):
    """A document and the file that it is from."""

    file: str
    document: Document


def run(query: str, files: list[str], *, as_json: bool, text_field: str, title_field: str, **options: Any) -> int:
    """Run the command and return its exit status."""
    for file in files:
        announce_input(file, "documents, one per line")
    found = [
        _Found(file, document)
        for file in files
        for document in read_documents(file, text_field=text_field, title_field=title_field)
    ]
    if not found:
        raise InvalidInputError("no documents: the input is empty")
    with open_client(options) as client:
        response = client.rerank(query, found, text=lambda each: each.document.text)
    if any(each.document.title for each in found):
        say("titles were scored in front of the texts")
    if as_json:
        print_json(_fields(response))
    elif not response.results:
        say(f"no results: all {len(found)} documents scored below {options.get('score_threshold')}")
    else:
        _print(response)
    return 0


def _print(response: RerankResponse[_Found]) -> None:
    """Print a ranking: a table on a terminal, elsewhere one line per document with the whole text."""
    console = out()
    rows = [(result.relevance_score, clean(result.document.document.text)) for result in response.results]
    width = len(str(len(rows)))
    if not console.is_terminal:
        for place, (score, text) in enumerate(rows, 1):
            print(f"{place:{width}}  {score:.4f}  {text}")
        return
    table = Table.grid(padding=(0, 2))
    for _ in range(3):
        table.add_column(justify="right", no_wrap=True)
    table.add_column()
    # Scores between 0 and 1 are shown as they are. Other scales, such as logits, are stretched to the bar.
    low = min(0.0, *(score for score, _ in rows))
    high = max(1.0, *(score for score, _ in rows))
    for place, (score, text) in enumerate(rows, 1):
        bar = Bar(high - low, 0, score - low, width=10, color="green")
        table.add_row(str(place), f"{score:.4f}", bar, Text(text, no_wrap=True, overflow="ellipsis"))
    console.print(table)


def _fields(response: RerankResponse[_Found]) -> dict[str, Any]:
    results = []
    for result in response.results:
        document = result.document.document
        fields: dict[str, Any] = {"index": result.index, "relevance_score": result.relevance_score}
        fields |= {"document": document.text, "file": result.document.file, "line": document.number}
        results.append(fields if document.id is None else fields | {"id": document.id})
    usage = response.usage
    return {
        "id": response.id,
        "model": response.model,
        "results": results,
        "usage": {"total_tokens": usage.total_tokens, "requests": usage.requests, "cost": usage.cost},
        "request_ids": list(response.request_ids),
    }
