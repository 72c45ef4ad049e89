"""The command line: `rank` for texts, `bulk` for many queries, `evaluate`, `check` and `demo` to see what is what.

Frameworks and the client are imported by the command that needs them, so that `--help` comes at once.
"""

import argparse
import errno
import gzip
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, BinaryIO, Final

from regolo_rerank import __version__
from regolo_rerank._cli.common import (
    Parser,
    add_server,
    find_encoding,
    open_client,
    sees_a_bar,
    standard_input,
    tell,
)
from regolo_rerank._display.tables import encodable
from regolo_rerank.errors import InvalidInputError, MissingAPIKeyError, RegoloError

__all__ = ["main"]

_SILENT: Final = logging.NullHandler()

_BULK: Final = """\
Rank the documents of many queries. A line of IN is a query:

  {"id": "q1", "query": "...", "documents": ["...", {"id": "d2", "text": "..."}]}

and one of OUT its ranking, the best document first:

  {"id": "q1", "results": [{"index": 1, "relevance_score": 0.97, "id": "d2"}]}

Without an id, the number of the line serves. A query that fails is a line of
OUT.errors, with its error; that file can be run as IN again.

A run that was stopped, by whatever it was, goes on where it was when the same
command is run again. OUT.state beside OUT says what is finished and by which
options: with another IN or other options the run is refused. To start anew,
remove OUT.
"""

_EVALUATE: Final = """\
Measure what reranking brings on queries whose relevant documents are known. A
line of FILE is a query, its candidates in the retriever's order, and what of
them is relevant: indices, or ids where documents have them, with grades or not:

  {"query": "...", "documents": ["...", "..."], "relevant": [1]}
  {"query": "...", "documents": [{"id": "d2", "text": "..."}], "relevant": ["d2"]}
  {"query": "...", "documents": [{"id": "d2", "text": "..."}], "relevant": {"d2": 3}}

Out come nDCG@10, MRR and recall before and after with 95 % intervals and a
verdict, how far top_n can go down, the best threshold, what it took, and the
queries that gained and lost the most. Several prompt formats, instructions and
models are set side by side.
"""

_CHECK: Final = """\
See whether key, address, model and prompt format work, by about twenty small
requests, and which line of code to use. What it prints holds nothing of the
key, so that it can go into a bug report.
"""

_EPILOG: Final = """\
examples:
  regolo-rerank rank "capital of China" cities.txt --top-n 3
  grep -h price *.md | regolo-rerank rank "what does it cost?" --threshold 0.5
  regolo-rerank rank --local "capital of China" cities.txt
  regolo-rerank bulk queries.jsonl rankings.jsonl --top-n 10
  regolo-rerank evaluate judged.jsonl --cache scores.db --picture gain.png
  regolo-rerank check --base-url http://localhost:8000/v1
  regolo-rerank demo

The API key is read from the environment variable REGOLO_API_KEY, and never from
an argument, which others could see in the list of processes.

exit status: 0 done, 1 the service said no or failed (bulk and evaluate: for a
query at least), 2 wrong use, 130 interrupted
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: The arguments; None takes the process's own.

    Returns:
        The exit status: 0 done, 1 the service said no or failed, 2 wrong use, 130 interrupted.
    """
    # An error is told in one line, so the retries before it are not told as well.
    logging.getLogger("regolo_rerank").addHandler(_SILENT)
    try:
        try:
            return _run(sys.argv[1:] if argv is None else list(argv))
        finally:
            print(end="", flush=True)
    except MissingAPIKeyError:
        return _fail("no API key: set the environment variable REGOLO_API_KEY, or try without one by --local", 2)
    except InvalidInputError as error:
        return _fail(str(error), 2)
    except RegoloError as error:
        return _fail(str(error), 1)
    except OSError as error:
        # What is still buffered would fail again when Python ends.
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        # On Windows a closed pipe is EINVAL.
        return 0 if error.errno in {errno.EPIPE, errno.EINVAL} else _fail(str(error), 1)
    except KeyboardInterrupt:
        return 130


def _run(argv: list[str]) -> int:
    parser, rank = _parsers()
    if "_ARGCOMPLETE" in os.environ:  # a shell asks what could come next
        import argcomplete

        argcomplete.autocomplete(parser)
    # Options between QUERY and FILE take intermixed parsing, which knows neither commands nor "--".
    if argv[:1] == ["rank"] and "--" not in argv:
        parsed, unknown = rank.parse_known_intermixed_args(argv[1:])
    else:
        parsed, unknown = parser.parse_known_args(argv)
    if unknown:
        # Without its value, which might be a key.
        parser.error(f"unknown argument {unknown[0].partition('=')[0]}")
    arguments = vars(parsed)
    status: int = arguments.pop("run")(**arguments)
    return status


def _fail(problem: str, status: int) -> int:
    tell(problem)
    return status


def _parsers() -> tuple[Parser, Parser]:
    """Return the parser of all commands, and the one of `rank` in it."""
    parser = Parser(
        prog="regolo-rerank",
        description="Rank texts by their relevance to a query, with Regolo.ai's Rerank API.",
        epilog=_EPILOG,
    )
    parser.add_argument("-V", "--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    rank = commands.add_parser(
        "rank",
        help="rank the lines of files or of standard input",
        description="Rank documents by their relevance to a query, the best first.",
        epilog=_EPILOG,
        # What is not given is not passed on, so that every default stays the client's.
        argument_default=argparse.SUPPRESS,
    )
    rank.set_defaults(run=_rank)
    rank.add_argument("query", metavar="QUERY", help="what is searched")
    rank.add_argument(
        "files",
        metavar="FILE",
        nargs="*",
        default=["-"],
        help="documents, one a line; in *.jsonl, one object with a field text a line; - or no file: standard input",
    )
    rank.add_argument("--json", action="store_true", default=False, dest="as_json", help="print one JSON object")
    _add_options(rank)

    bulk = commands.add_parser(
        "bulk",
        help="rank the documents of many queries, from a file into a file",
        description=_BULK,
        argument_default=argparse.SUPPRESS,
    )
    bulk.set_defaults(run=_bulk)
    bulk.add_argument(
        "source", metavar="IN", help="queries, one JSON object a line; - is standard input; .gz is read too"
    )
    bulk.add_argument("out", metavar="OUT", help="rankings, one JSON object a line, in the order of IN")
    _add_options(bulk)
    bulk.add_argument(
        "--allow-changed-options",
        action="store_true",
        help="go on with an OUT that was made with other options, and mix them",
    )

    evaluate = commands.add_parser(
        "evaluate",
        help="measure what reranking brings on your own queries",
        description=_EVALUATE,
        argument_default=argparse.SUPPRESS,
    )
    evaluate.set_defaults(run=_evaluate)
    evaluate.add_argument("file", metavar="FILE", help="queries, one JSON object a line; - is standard input")
    evaluate.add_argument("--json", action="store_true", default=False, dest="as_json", help="print one JSON object")
    evaluate.add_argument("--picture", metavar="PNG", default=None, help="draw it into a file")
    evaluate.add_argument("--cache", metavar="DB", default=None, help="keep scores there, and go on after a stop")
    evaluate.add_argument("--model", action="append", metavar="NAME", help="the reranking model; may be given twice")
    evaluate.add_argument("--instruction", action="append", metavar="TEXT", help="the task; may be given twice")
    evaluate.add_argument("--prompt-format", action="append", metavar="NAME,...", help="such as tagged,chat")
    evaluate.add_argument("--max-concurrency", type=int, metavar="N", help="requests in flight at once")
    evaluate.add_argument("--max-document-chars", type=int, metavar="N", help="longer documents are cut")
    add_server(evaluate)

    check = commands.add_parser(
        "check",
        help="see whether key, address, model and prompt format work",
        description=_CHECK,
        argument_default=argparse.SUPPRESS,
    )
    check.set_defaults(run=_check)
    check.add_argument("--json", action="store_true", default=False, dest="as_json", help="print one JSON object")
    _add_ranker(check)

    demo = commands.add_parser(
        "demo",
        help="see what reranking changes, on the documentation of Python's standard library",
        description="Rerank what a keyword search finds in Python's documentation,\n"
        "by LangChain and by LlamaIndex, and measure it on 100 questions.",
        argument_default=argparse.SUPPRESS,
    )
    demo.set_defaults(run=_demo)
    add_server(demo)
    return parser, rank


def _add_options(parser: Parser) -> None:
    """Add the options of the client."""
    parser.add_argument("--top-n", type=int, metavar="N", help="results kept, the best first")
    parser.add_argument("--threshold", type=float, metavar="X", dest="score_threshold", help="drop what scores lower")
    parser.add_argument("--max-document-chars", type=int, metavar="N", help="longer documents are cut for scoring")
    parser.add_argument("--prompt-format", metavar="NAME", help="how texts are put into words for the model")
    parser.add_argument("--timeout", type=float, metavar="X", help="seconds for one attempt")
    parser.add_argument("--max-concurrency", type=int, metavar="N", help="requests in flight at once")
    parser.add_argument(
        "--header",
        type=_read_header,
        action="append",
        metavar="NAME:VALUE",
        dest="headers",
        help="a further HTTP header",
    )
    _add_ranker(parser)


def _read_header(text: str) -> tuple[str, str]:
    name, colon, value = text.partition(":")
    if not colon:
        raise argparse.ArgumentTypeError("must be NAME:VALUE")  # which argparse tells without the text
    return name.strip(), value.strip()


def _add_ranker(parser: Parser) -> None:
    """Add the options that say who ranks, and to which task."""
    parser.add_argument("--model", metavar="NAME", help="the reranking model")
    parser.add_argument("--instruction", metavar="TEXT", help="the task in a sentence, for models that take one")
    add_server(parser)


def _rank(query: str, files: list[str], **arguments: Any) -> int:
    from regolo_rerank._cli.rank import rank

    return rank(query, files, **arguments)


def _bulk(source: str, out: str, *, allow_changed_options: bool = False, **options: Any) -> int:
    from regolo_rerank._cli.bulk import resume, tell_each_minute
    from regolo_rerank._display.progress import progress

    if out == "-":
        raise InvalidInputError("OUT must be a file, so that a run that was stopped can go on")
    with (
        open_client(options) as client,
        _queries(source) as lines,
        resume(client, lines, source, Path(out), allow_changed_options=allow_changed_options) as run,
    ):
        shown = sees_a_bar()
        try:
            with progress(run.size, unit="B", initial=run.at, shown=shown) as advance:
                run.rank(client, advance if shown else tell_each_minute(run, tell))
        except KeyboardInterrupt:
            tell("interrupted; run the same command again, it goes on where it was")
            raise
        finally:
            for line in run.summarize():
                tell(line)
    return 0 if run.is_complete else 1


def _queries(file: str) -> "BinaryIO | gzip.GzipFile | nullcontext[BinaryIO]":
    if file == "-":
        return nullcontext(standard_input("queries, one a line"))
    if file.lower().endswith(".zst"):
        raise InvalidInputError(f"{file}: cannot be read; unpack it: zstd -dc FILE | regolo-rerank bulk - OUT")
    try:
        return gzip.open(file) if file.lower().endswith(".gz") else Path(file).open("rb")
    except OSError as error:
        raise InvalidInputError(f"{file}: {error.strerror}") from None


def _evaluate(file: str, **arguments: Any) -> int:
    from regolo_rerank._cli.evaluate import run_evaluation

    several = "model", "instruction", "prompt_format"
    variants: dict[str, list[str]] = {name: arguments.pop(name) for name in several if name in arguments}
    if "prompt_format" in variants:
        variants["prompt_format"] = [name.strip() for names in variants["prompt_format"] for name in names.split(",")]
    return run_evaluation(file, variants=variants, **arguments)


def _check(**arguments: Any) -> int:
    from regolo_rerank._cli.check import run_check

    return run_check(**arguments)


def _demo(base_url: str | None = None) -> int:
    try:
        from regolo_rerank._cli.demo import report
    except ImportError:
        raise InvalidInputError('the demo needs more packages: pip install "regolo_rerank[demo]"') from None
    for line in report(base_url):
        print(encodable(line, find_encoding()))
    return 0
