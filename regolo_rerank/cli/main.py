"""The entry point of the command line, and the arguments of the commands."""

import errno
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from regolo_rerank._version import __version__, install_hint
from regolo_rerank.cli.options import Parser, UsageError, add_client, add_server, shell_words, suggest
from regolo_rerank.errors import InvalidInputError, MissingAPIKeyError, RegoloError, RerankWarning

__all__ = ["main"]

_MAIN: Final = """\
The API key is read from the environment variable REGOLO_API_KEY.
`regolo-rerank COMMAND --help` lists the options of a command.

exit status:
  0 success, 1 the service failed (bulk, evaluate: at least one query failed),
  2 usage error, 130 interrupted
"""
_RANK: Final = """\
A FILE has one document per line, or it is JSON: an array, or one object per
line with the field "text". The fields "title" and "id" are optional.

examples:
  regolo-rerank rank "capital of China" cities.txt --top-n 3
  grep -h price *.md | regolo-rerank rank "how much is it?" --threshold 0.5
  regolo-rerank rank --local "capital of China" corpus.jsonl.gz --json
"""
_BULK: Final = """\
Each line of IN is a query, and becomes one line of OUT, a ranking or an error:

  {"id": "q1", "query": "...", "documents": ["...", {"id": "d2", "text": ""}]}
  {"id": "q1", "results": [{"index": 1, "relevance_score": 0.97, "id": "d2"}]}
  {"id": "q2", "error": {"type": "...", "message": "..."}, "input": {...}}

If a run stops for any reason, repeat the same command to resume it.

examples:
  regolo-rerank bulk queries.jsonl rankings.jsonl --top-n 10
  regolo-rerank bulk queries.jsonl rankings.jsonl --top-n 10 --retry-errors
"""
_EVALUATE: Final = """\
Each line of FILE has a query, its candidates in the retriever's order, and
either one grade per document or the relevant documents by index or id:

  {"query": "...", "documents": ["...", "..."], "labels": [0, 1]}
  {"query": "...", "documents": ["...", "..."], "relevant": [1]}
  {"query": "...", "documents": [{"id": "d", "text": ""}], "relevant": {"d": 3}}

examples:
  regolo-rerank evaluate judged.jsonl --cache scores.db --picture gain.png
  regolo-rerank evaluate judged.jsonl --model NAME --model ANOTHER
  regolo-rerank evaluate --beir scifact --measure "nDCG@10 AP"
"""
_CHECK: Final = """\
Sends about 25 small requests, and recommends the line of code to use. The
output never contains the API key, so you can paste it into a bug report.
"""
_DEMO: Final = """\
BM25 finds modules of Python's standard library for questions about Python, and
the reranker sorts them, through LangChain and through LlamaIndex. Without
REGOLO_API_KEY it uses the offline scorer.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: The arguments. None uses those of the process.

    Returns:
        The exit status: 0 success, 1 the service failed, 2 usage error, 130 interrupted.
    """
    # Without a handler, Python would print the log's warnings about retries above the final message.
    logging.getLogger("regolo_rerank").addHandler(logging.NullHandler())
    for stream in (sys.stdout, sys.stderr):
        if reconfigure := getattr(stream, "reconfigure", None):
            reconfigure(errors="backslashreplace")
    try:
        if find_spec("rich") is None:
            print(f"regolo-rerank needs rich: {install_hint('cli')}", file=sys.stderr)
            return 2
        with warnings.catch_warnings(record=True, action="default", category=RerankWarning) as caught:
            try:
                return _run(sys.argv[1:] if argv is None else list(argv))
            finally:
                print(end="", flush=True)
                for warning in {str(each.message): None for each in caught if issubclass(each.category, RerankWarning)}:
                    _say(f"warning: {shell_words(warning)}")
    except RegoloError as error:
        problem = shell_words(str(error))
        if isinstance(error, MissingAPIKeyError):
            problem = "no API key: set the environment variable REGOLO_API_KEY, or add --local to try without one"
        return _say(problem, 2 if isinstance(error, InvalidInputError | MissingAPIKeyError) else 1)
    except OSError as error:
        # A reader such as `head` may close the pipe early. Windows reports that as EINVAL.
        if error.errno != errno.EPIPE and not (os.name == "nt" and error.errno == errno.EINVAL):
            return _say(str(error), 1)
        # Discard the rest of the buffer, because Python would try to write it again when it exits.
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130


def _say(message: str, status: int = 0) -> int:
    from regolo_rerank.cli.terminal import say

    say(message)
    return status


def _run(argv: list[str]) -> int:
    parser, commands = _build_parsers()
    if not argv:
        parser.print_help()
        return 0
    name, *rest = argv
    if name not in commands:
        if not name.startswith("-"):
            parser.error(f"unknown command {name}{suggest(name, list(commands))}")
        parser.parse_args(argv)
    arguments = commands[name].parse(rest)
    try:
        status: int = import_module(f"regolo_rerank.cli.{name}").run(**arguments)
    except UsageError as error:
        commands[name].error(str(error))
    return status


def _build_parsers() -> tuple[Parser, dict[str, Parser]]:
    """Return the main parser and the parsers of the commands."""
    description = "Rank texts by their relevance to a query, with Regolo.ai's Rerank API."
    parser = Parser(prog="regolo-rerank", description=description, epilog=_MAIN)
    parser.add_argument("-V", "--version", action="version", version=f"%(prog)s {__version__}")
    group = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    commands: dict[str, Parser] = {}

    def add(name: str, summary: str, epilog: str) -> Parser:
        description = f"{summary[0].upper()}{summary[1:]}."
        commands[name] = group.add_parser(name, help=summary, description=description, epilog=epilog)
        return commands[name]

    json: Any = {"action": "store_true", "default": False, "dest": "as_json", "help": "print JSON"}
    rank = add("rank", "rank the documents of files or of standard input", _RANK)
    rank.add_argument("query", metavar="QUERY", help="the query")
    rank.add_argument("files", metavar="FILE", nargs="*", default=["-"], help="documents (default: standard input)")
    rank.add_argument("--json", **json)

    bulk = add("bulk", "rank the documents of many queries, from a file into a file", _BULK)
    bulk.add_argument("source", metavar="IN", help="queries as JSON Lines (- is standard input)")
    bulk.add_argument("out", metavar="OUT", help="rankings as JSON Lines, one per query")
    bulk.add_argument("--retry-errors", action="store_true", default=False, help="rank only the failed queries again")
    bulk.add_argument("--cache", metavar="DB", help="keep scores in this file, so repeated pairs send no requests")

    evaluate = add("evaluate", "measure reranking on queries with known relevant documents", _EVALUATE)
    evaluate.add_argument("file", metavar="FILE", nargs="?", help="queries as JSON Lines (- is standard input)")
    for flag, metavar, words in (
        ("--beir", "DIR", "folder with corpus.jsonl, queries.jsonl and qrels/*.tsv"),
        ("--split", "NAME", "qrels file of --beir (default: test)"),
        ("--qrels", "FILE", "TREC qrels (needs --queries and --corpus)"),
        ("--run", "FILE", "TREC run with the candidates (default: BM25's top 100)"),
        ("--queries", "FILE", "texts of the queries of --qrels"),
        ("--corpus", "FILE", "texts of the documents of --qrels"),
        ("--measure", "NAMES", 'measures of ir-measures, such as "nDCG@20 AP P@5"'),
        ("--save-run", "FILE", "write a TREC run per variant"),
        ("--per-query", "FILE", "write one JSON line per query"),
        ("--picture", "FILE", "draw a chart, such as gain.png"),
        ("--cache", "DB", "keep scores in this file, so an interrupted run resumes"),
    ):
        evaluate.add_argument(flag, metavar=metavar, help=words)
    evaluate.add_argument("--json", **json)

    check = add("check", "check the API key, server, model and prompt format", _CHECK)
    check.add_argument("--json", **json)
    add_server(add("demo", "show the effect of reranking on Python's own documentation", _DEMO))
    add_client(rank, fields=True, results=True)
    add_client(bulk, fields=True, results=True)
    add_client(evaluate, fields=True, several=True)
    add_client(check)
    return parser, commands
