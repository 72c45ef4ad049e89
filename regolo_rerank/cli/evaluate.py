"""Measure reranking on judged queries: `regolo-rerank evaluate FILE`."""

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict
from itertools import islice, product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rich.text import Text

from regolo_rerank._files import read_documents, read_rows
from regolo_rerank._version import install_hint
from regolo_rerank.cli.options import UsageError, open_client
from regolo_rerank.cli.terminal import announce_input, err, out, print_json, say
from regolo_rerank.errors import InvalidInputError

if TYPE_CHECKING:
    from regolo_rerank.evaluation import Evaluation

__all__ = ["run"]

_VARIED: Final = "model", "instruction", "prompt_format"
_INPUTS: Final = "file", "beir", "split", "qrels", "run", "queries", "corpus"
_OUTPUTS: Final = "save_run", "per_query", "picture"


def run(*, as_json: bool, text_field: str, title_field: str, measure: str | None = None, **options: Any) -> int:
    """Run the command and return its exit status."""
    try:
        from regolo_rerank import evaluation
    except ImportError:
        raise InvalidInputError(f"evaluate needs more packages: {install_hint('evaluate')}") from None
    # The files are checked before the first request, because requests cost money.
    outputs: dict[str, Path] = {name: Path(options.pop(name)) for name in _OUTPUTS if name in options}
    for name, path in outputs.items():
        _check_output(f"--{name.replace('_', '-')}", path)
    fields: dict[str, Any] = {"text_field": text_field, "title_field": title_field or None}
    queries, has_titles = _read_queries({name: options.pop(name, None) for name in _INPUTS}, fields)
    with ExitStack() as opened:
        clients = {name: opened.enter_context(open_client(each)) for name, each in _variants(options)}
        measures = {"measures": measure} if measure else {}
        result = evaluation.evaluate(queries, clients, show_progress=err().is_terminal, **measures, **fields)
    if as_json:
        print_json(asdict(result))
    else:
        text = Text(str(result))
        text.highlight_words(["better"], "green")
        text.highlight_words(["worse"], "red")
        out().print(text, soft_wrap=True)
    if has_titles:
        say("titles were scored in front of the texts")
    for path in _write_results(result, outputs):
        say(f"wrote {path}")
    return 1 if result.skipped or any(variant.failed for variant in result.variants) else 0


def _read_queries(paths: dict[str, Any], fields: dict[str, Any]) -> tuple[list[Any], bool]:
    """Return the judged queries, and whether a document has a title."""
    from regolo_rerank import evaluation

    file, folder, qrels, corpus = (paths[name] for name in ("file", "beir", "qrels", "corpus"))
    if sum(source is not None for source in (file, folder, qrels)) != 1:
        raise UsageError("pass one of FILE, --beir and --qrels")
    if file:
        announce_input(file, "queries, one per line")
        rows = list(read_rows(file))
        lists = (row.value.get("documents") for row in rows if isinstance(row.value, dict))
        documents = (each for documents in lists if isinstance(documents, list) for each in documents)
        return rows, any(isinstance(each, dict) and each.get(fields["title_field"]) for each in documents)
    if folder:
        queries = evaluation.read_beir(folder, paths["split"] or "test", paths["run"], **fields)
        corpus = next(Path(folder).glob("corpus.jsonl*"))
    elif corpus and paths["queries"]:
        queries = evaluation.read_trec(qrels, paths["run"], paths["queries"], corpus, **fields)
    else:
        raise UsageError("--qrels needs --queries and --corpus")
    return queries, any(document.title for document in islice(read_documents(corpus, **fields), 100))


def _write_results(result: "Evaluation", outputs: dict[str, Path]) -> Iterator[Path]:
    """Write the files, and yield their paths."""
    if "save_run" in outputs:
        yield from result.save_run(outputs["save_run"])
    if "per_query" in outputs:
        result.save_per_query(outputs["per_query"])
        yield outputs["per_query"]
    if "picture" in outputs:
        from regolo_rerank.plot import evaluation_summary

        evaluation_summary(result).savefig(outputs["picture"])
        yield outputs["picture"]


def _variants(options: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the options of each variant, and a name made of the values that distinguish it."""
    varied: Mapping[str, list[str]] = {name: options[name] for name in _VARIED if name in options}
    for values in product(*varied.values()):
        settings = dict(zip(varied, values, strict=True))
        names = [value for name, value in settings.items() if len(varied[name]) > 1]
        yield ", ".join(names) or "reranked", options | settings


def _check_output(option: str, path: Path) -> None:
    """Raise a UsageError if a file cannot be written."""
    if not path.parent.is_dir():
        raise UsageError(f"{option}: the folder {path.parent} does not exist")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UsageError(f"{option}: cannot write {path}")
    if option == "--picture":
        from matplotlib.backend_bases import FigureCanvasBase

        suffixes = sorted(FigureCanvasBase.get_supported_filetypes())
        if path.suffix.lower().removeprefix(".") not in suffixes:
            raise UsageError(f"--picture must end in one of {', '.join(suffixes)}, got {path.name!r}")
