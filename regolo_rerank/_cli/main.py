"""The command line: `regolo-rerank rank` for texts, `bulk` for many queries, `check` to see what works, and `demo`.

Frameworks and the client are imported by the command that needs them, so that `--help` comes at once.
"""

import argparse
import codecs
import gzip
import io
import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, NoReturn, TypeVar

from regolo_rerank import __version__
from regolo_rerank._display.tables import encodable, harmless, lines
from regolo_rerank.errors import InvalidInputError, MissingAPIKeyError, RegoloError

if TYPE_CHECKING:
    from regolo_rerank import RegoloClient
    from regolo_rerank.results import RerankResponse

__all__ = ["main"]

Client = TypeVar("Client", bound="RegoloClient")

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
  regolo-rerank check --base-url http://localhost:8000/v1
  regolo-rerank demo

The API key is read from the environment variable REGOLO_API_KEY, and never from
an argument, which others could see in the list of processes.

exit status: 0 done, 1 the service said no or failed (bulk: for a query at
least), 2 wrong use, 130 interrupted
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
        return _failed("no API key: set the environment variable REGOLO_API_KEY, or try without one by --local", 2)
    except InvalidInputError as error:
        return _failed(str(error), 2)
    except RegoloError as error:
        return _failed(str(error), 1)
    except OSError as error:
        # What is still buffered would fail again when Python ends.
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        return 0 if isinstance(error, BrokenPipeError) else _failed(str(error), 1)
    except KeyboardInterrupt:
        return 130


def _run(argv: list[str]) -> int:
    parser, rank = _parsers()
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


def _failed(problem: str, status: int) -> int:
    _tell(problem)
    return status


class _Parser(argparse.ArgumentParser):
    """Refuses wrong arguments in one line, like all other errors, and a key wherever it stands."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **settings)
        self.add_argument("--api-key", action=_RefuseKey, nargs="?", default=argparse.SUPPRESS, help=argparse.SUPPRESS)

    def error(self, message: str) -> NoReturn:
        raise InvalidInputError(f"{message} (see {self.prog} --help)")


class _RefuseKey(argparse.Action):
    """Tells whoever passes a key where it belongs, and does not repeat it."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        parser.error("the key is read from the environment variable REGOLO_API_KEY only")


def _parsers() -> tuple[_Parser, _Parser]:
    """Return the parser of all commands, and the one of `rank` in it."""
    parser = _Parser(
        prog="regolo-rerank",
        description="Rank texts by their relevance to a query, with Regolo.ai's Rerank API.",
        epilog=_EPILOG,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
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
    bulk.add_argument("--max-concurrency", type=int, metavar="N", help="requests in flight at once")
    bulk.add_argument(
        "--allow-changed-options",
        action="store_true",
        help="go on with an OUT that was made with other options, and mix them",
    )

    check = commands.add_parser(
        "check",
        help="see whether key, address, model and prompt format work",
        description=_CHECK,
        argument_default=argparse.SUPPRESS,
    )
    check.set_defaults(run=_check)
    check.add_argument("--json", action="store_true", default=False, dest="as_json", help="print one JSON object")
    _add_server(check)

    demo = commands.add_parser(
        "demo",
        help="see what reranking changes, on the documentation of Python's standard library",
        description="Rerank what a keyword search finds in Python's documentation,\nby LangChain and by LlamaIndex.",
    )
    demo.set_defaults(run=_demo)
    return parser, rank


def _add_options(parser: _Parser) -> None:
    """Add the options of the client."""
    parser.add_argument("--top-n", type=int, metavar="N", help="results kept, the best first")
    parser.add_argument("--threshold", type=float, metavar="X", dest="score_threshold", help="drop what scores lower")
    _add_server(parser)


def _add_server(parser: _Parser) -> None:
    """Add the options of the client that say who ranks, and to which task."""
    parser.add_argument("--model", metavar="NAME", help="the reranking model")
    parser.add_argument("--instruction", metavar="TEXT", help="the task in a sentence, for models that take one")
    server = parser.add_mutually_exclusive_group()
    server.add_argument("--base-url", metavar="URL", help="the server; else the environment's REGOLO_BASE_URL")
    server.add_argument(
        "--local",
        action="store_const",
        const="local://",
        dest="base_url",
        help="score by shared words on this machine, without key, network or model",
    )


def _client(options: dict[str, Any]) -> "RegoloClient":
    from regolo_rerank import RegoloClient

    return _make(RegoloClient, options)


def _make(kind: "type[Client]", options: dict[str, Any]) -> "Client":
    from pydantic import ValidationError

    try:
        return kind(**options)
    except ValidationError as error:
        raise InvalidInputError("; ".join(f"{line['loc'][0]}: {line['msg']}" for line in error.errors())) from None


def _rank(query: str, files: list[str], *, as_json: bool, **options: Any) -> int:
    documents = [document for file in files for document in _documents(file)]
    with _client(options) as client:
        response = client.rerank(query, documents)
    if as_json:
        print(_json(response))
    elif response.results:
        print(*lines(response.results, shutil.get_terminal_size().columns, encoding=_encoding()), sep="\n")
    else:
        print(f"Nothing found: {f'none of {len(documents)} reaches the threshold' if documents else 'no documents'}.")
    return 0


def _bulk(source: str, out: str, *, allow_changed_options: bool = False, **options: Any) -> int:
    from regolo_rerank._cli.bulk import resume, tell_each_minute
    from regolo_rerank._display.progress import progress

    if out == "-":
        raise InvalidInputError("OUT must be a file, so that a run that was stopped can go on")
    seen = sys.stderr is not None and sys.stderr.isatty()
    shown = seen and find_spec("tqdm") is not None
    with (
        _client(options) as client,
        _queries(source) as lines,
        resume(client, lines, source, Path(out), allow_changed_options=allow_changed_options) as run,
    ):
        if seen and not shown:
            _tell('for a progress bar: pip install "regolo_rerank[progress]"')
        try:
            with progress(run.size, unit="B", initial=run.at, shown=shown) as advance:
                run.rank(client, advance if shown else tell_each_minute(run, _tell))
        except KeyboardInterrupt:
            _tell("interrupted; run the same command again, it goes on where it was")
            raise
        finally:
            for line in run.summarize():
                _tell(line)
    return 0 if run.is_complete else 1


def _tell(line: str) -> None:
    print(f"regolo-rerank: {harmless(line, _encoding())}", file=sys.stderr, flush=True)


def _check(*, as_json: bool, **options: Any) -> int:
    from regolo_rerank._cli.check import CheckedClient, check, describe

    with _make(CheckedClient, options) as client:
        report = check(client)
    if as_json:
        print(json.dumps(report))
    else:
        print(*(encodable(line, _encoding()) for line in describe(report)), sep="\n")
    return 1 if report["problems"] else 0


def _queries(file: str) -> "BinaryIO | gzip.GzipFile | nullcontext[BinaryIO]":
    if file == "-":
        return nullcontext(_standard_input("queries, one a line"))
    if file.lower().endswith(".zst"):
        raise InvalidInputError(f"{file}: cannot be read; unpack it: zstd -dc FILE | regolo-rerank bulk - OUT")
    try:
        return gzip.open(file) if file.lower().endswith(".gz") else Path(file).open("rb")
    except OSError as error:
        raise InvalidInputError(f"{file}: {error.strerror}") from None


def _demo() -> int:
    try:
        from regolo_rerank._cli.demo import report
    except ModuleNotFoundError:
        raise InvalidInputError('the demo needs both frameworks: pip install "regolo_rerank[demo]"') from None
    for line in report():
        print(encodable(line, _encoding()))
    return 0


def _documents(file: str) -> Iterator[str]:
    """Read the documents of a file, or of standard input where it is called "-"."""
    for number, line in enumerate(io.StringIO(_text(file), newline=None), 1):
        if line.strip():
            yield _field(line, f"{file}, line {number}") if file.lower().endswith(".jsonl") else line.rstrip("\n")


def _text(file: str) -> str:
    name = "standard input" if file == "-" else file
    try:
        content = _standard_input("documents, one a line").read() if file == "-" else Path(file).read_bytes()
        return content.decode("utf-8-sig")
    except OSError as error:
        raise InvalidInputError(f"{name}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InvalidInputError(f"{name}: not UTF-8 at byte {error.start}") from None


def _standard_input(awaited: str) -> BinaryIO:
    if sys.stdin is None:
        raise InvalidInputError("standard input: closed")
    if sys.stdin.isatty():
        print(f"reading {awaited}, until the end of input", file=sys.stderr)
    return sys.stdin.buffer


def _field(line: str, place: str) -> str:
    try:
        text = json.loads(line)["text"]
    except (ValueError, RecursionError):
        raise InvalidInputError(f"{place}: not JSON") from None
    except (LookupError, TypeError):
        text = None
    if not isinstance(text, str):
        raise InvalidInputError(f'{place}: not an object with a string in its field "text"')
    return text


def _json(response: "RerankResponse") -> str:
    fields = asdict(response)
    del fields["meta"]
    text = json.dumps(fields, ensure_ascii=False)
    # ASCII is UTF-8 too: the way out for another encoding, and for half a surrogate pair.
    return text if _encoding() == "utf-8" and encodable(text, "utf-8") == text else json.dumps(fields)


def _encoding() -> str:
    # A replaced or closed standard output may have no encoding.
    return codecs.lookup(getattr(sys.stdout, "encoding", None) or "utf-8").name
