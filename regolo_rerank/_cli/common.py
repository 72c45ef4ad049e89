"""What the commands share: arguments, the client, and where text comes from and goes to."""

import argparse
import codecs
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, BinaryIO, NoReturn

from regolo_rerank._display.tables import harmless
from regolo_rerank.errors import InvalidInputError

if TYPE_CHECKING:
    from regolo_rerank import RegoloClient

__all__ = ["Parser", "add_server", "find_encoding", "open_client", "sees_a_bar", "standard_input", "tell"]


class Parser(argparse.ArgumentParser):
    """Refuses wrong arguments in one line, like all other errors, and a key wherever it stands."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **settings)
        self.add_argument("--api-key", action=_RefuseKey, nargs="?", default=argparse.SUPPRESS, help=argparse.SUPPRESS)

    def error(self, message: str) -> NoReturn:
        """Raise what is said in one line."""
        raise InvalidInputError(f"{message} (see {self.prog} --help)")


class _RefuseKey(argparse.Action):
    """Tells whoever passes a key where it belongs, and does not repeat it."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        parser.error("the key is read from the environment variable REGOLO_API_KEY only")


def add_server(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say where to send requests."""
    server = parser.add_mutually_exclusive_group()
    server.add_argument("--base-url", metavar="URL", help="the server; else the environment's REGOLO_BASE_URL")
    server.add_argument(
        "--local",
        action="store_const",
        const="local://",
        dest="base_url",
        help="score on this machine, by word vectors, without key and network",
    )


def open_client(options: dict[str, Any]) -> "RegoloClient":
    """Return a client with these options.

    Raises:
        InvalidInputError: One of them is wrong.
    """
    from pydantic import ValidationError

    from regolo_rerank import RegoloClient

    if "headers" in options:
        options["default_headers"] = dict(options.pop("headers"))
    try:
        return RegoloClient(**options)
    except ValidationError as error:
        raise InvalidInputError("; ".join(f"{line['loc'][0]}: {line['msg']}" for line in error.errors())) from None


def sees_a_bar() -> bool:
    """Return whether somebody would see a progress bar; on a terminal without tqdm, say how to get one."""
    seen = sys.stderr is not None and sys.stderr.isatty()
    if seen and find_spec("tqdm") is None:
        tell('for a progress bar: pip install "regolo_rerank[progress]"')
        return False
    return seen


def standard_input(awaited: str) -> BinaryIO:
    """Return the bytes of standard input, after saying on a terminal what is awaited.

    Raises:
        InvalidInputError: It is closed.
    """
    if sys.stdin is None:
        raise InvalidInputError("standard input: closed")
    if sys.stdin.isatty():
        print(f"reading {awaited}, until the end of input", file=sys.stderr)
    return sys.stdin.buffer


def tell(line: str) -> None:
    """Say something that is no result, on standard error."""
    print(f"regolo-rerank: {harmless(line, find_encoding())}", file=sys.stderr, flush=True)


def find_encoding() -> str:
    """Return the encoding of standard output; a replaced or closed one may have none."""
    return codecs.lookup(getattr(sys.stdout, "encoding", None) or "utf-8").name
