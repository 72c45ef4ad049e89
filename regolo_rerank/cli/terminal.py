"""Output: results go to standard output, everything else to standard error."""

import json
import sys
from typing import Any

from rich.console import Console
from rich.highlighter import JSONHighlighter
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.text import Text

from regolo_rerank.errors import InvalidInputError

__all__ = ["announce_input", "clean", "err", "out", "print_json", "progress_bar", "say", "show"]


def out() -> Console:
    """Return a console on standard output, which has colours only on a terminal."""
    return Console(highlight=False)


def err() -> Console:
    """Return a console on standard error."""
    return Console(stderr=True, highlight=False)


def clean(text: str) -> str:
    """Return a text in one line, without characters that could control a terminal."""
    return "".join(character if character.isprintable() else " " for character in " ".join(text.split()))


def show(*renderables: Any) -> None:
    """Print on standard output, without the spaces that fill the last column of a table."""
    console = out()
    with console.capture() as capture:
        console.print(*renderables, sep="\n")
    for line in capture.get().splitlines():
        print(line.rstrip(), flush=True)


def say(message: str) -> None:
    """Print a message on standard error. A long message is not broken into lines, so that logs can be searched."""
    err().print(Text.assemble(("regolo-rerank: ", "bold"), clean(message)), soft_wrap=True)


def print_json(fields: Any) -> None:
    """Print JSON: indented on a terminal, on one line elsewhere."""
    console = out()
    is_utf8 = (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("-", "") == "utf8"
    text = json.dumps(fields, ensure_ascii=not is_utf8, indent=2 if console.is_terminal else None)
    # JSON allows characters that could control a terminal, so they are escaped.
    text = "".join(each if each.isprintable() or each == "\n" else json.dumps(each)[1:-1] for each in text)
    if console.is_terminal:
        console.print(JSONHighlighter()(text), soft_wrap=True)
    else:
        print(text)


def progress_bar() -> Progress:
    """Return a progress bar on standard error. It is shown on a terminal only, and disappears at the end."""
    console = err()
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def announce_input(file: str, what: str) -> None:
    """Tell a person at a terminal that a command is waiting for input.

    Raises:
        InvalidInputError: Standard input is closed.
    """
    if file == "-" and sys.stdin is None:
        raise InvalidInputError("standard input is closed")
    if file == "-" and sys.stdin.isatty():
        say(f"Reading {what} from standard input. Press Ctrl-D to finish.")
