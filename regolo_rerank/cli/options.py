"""Options of the commands. Each has the name of a client option, in the spelling of a shell."""

import argparse
import json
import os
import re
from collections.abc import Callable
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, Final, NoReturn

from regolo_rerank.errors import InvalidInputError
from regolo_rerank.options import API_KEY_VARIABLE, BASE_URL_VARIABLE, Options
from regolo_rerank.prompts import PRESETS

if TYPE_CHECKING:
    from regolo_rerank import RegoloClient

__all__ = ["Parser", "UsageError", "add_client", "add_server", "open_client", "server_of", "shell_words", "suggest"]

_FLAGS: Final = {"score_threshold": "--threshold", "default_headers": "--header", "api_key": API_KEY_VARIABLE}
"""Client options that have another name in the shell."""
_PHRASES: Final = {
    r"""(?i)(pass |set )?api_key=(''|"")""": "add --no-key",
    r"""(?i)(pass |set )?base_url=['"]local://['"]""": "add --local",
    r"(?i)(pass |set )?allow_http=True": "add --allow-http",
    r"api_key, or the environment": "the environment",
    r"(?i) or pass api_key|[.;] or pass a scorer|, and long_documents='split' to score all of it": "",
}
_NAMES: Final = "|".join(Options.model_fields)
_SPELT: Final = "|".join(["text_field", "title_field", *(name for name in Options.model_fields if "_" in name)])


class UsageError(InvalidInputError):
    """A command or an option is wrong. The message ends with a reference to the help of the command."""


class Parser(argparse.ArgumentParser):
    """Raises errors instead of printing them, and suggests the nearest option."""

    def __init__(self, **settings: Any) -> None:
        # Options that are not given are not passed on, so the client's defaults apply.
        super().__init__(
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **settings,
        )

    def error(self, message: str) -> NoReturn:
        """Raise the message: `argument --top-n: must be ...` becomes `--top-n must be ...`."""
        message = re.sub(r"^argument (\S+): (?=must)", r"\1 ", message).removeprefix("argument ")
        raise UsageError(f"{message} (see {self.prog} --help)")

    def parse(self, argv: list[str]) -> dict[str, Any]:
        """Return the arguments by name.

        Raises:
            UsageError: An argument is unknown or wrong.
        """
        # Options may stand between QUERY and FILE. argparse supports this, but not together with "--".
        parsed, unknown = (self.parse_known_args if "--" in argv else self.parse_known_intermixed_args)(argv)
        if unknown:
            # Leave out the value of an option, because it might be a key.
            name = unknown[0].partition("=")[0]
            if name == "--api-key":
                self.error(f"the key is read from the environment variable {API_KEY_VARIABLE} only")
            self.error(f"unknown argument {name}{suggest(name, re.findall('--[a-z][a-z-]+', self.format_help()))}")
        return vars(parsed)


def suggest(name: str, known: list[str]) -> str:
    """Return a suggestion for a name that is unknown, or nothing."""
    nearest = get_close_matches(name, known, 1, 0.7)
    return f", did you mean {nearest[0]}?" if nearest else ""


def _number(kind: type[int] | type[float], least: float, word: str = "") -> Callable[[str], float | None]:
    def read(text: str) -> float | None:
        if word and text == word:
            return None
        try:
            number = kind(text)
        except ValueError:
            name = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"must be a {name}, got {text!r}") from None
        if not number >= least:
            limit = f"at least {least}" if least > float("-inf") else "a number"
            raise argparse.ArgumentTypeError(f"must be {limit}, got {text}")
        return number

    return read


_COUNT: Final = _number(int, 1)


def _read_format(text: str) -> str:
    names = ["auto", *PRESETS]
    if text not in names:
        problem = f"must be one of {', '.join(names)}, got {text!r}{suggest(text, names)}"
        raise argparse.ArgumentTypeError(problem)
    return text


def _read_header(text: str) -> tuple[str, str]:
    name, colon, value = text.partition(":")
    if not colon:
        raise argparse.ArgumentTypeError("must be NAME:VALUE")  # without the text, which might be a key
    return name.strip(), value.strip()


def _read_object(text: str) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except ValueError:
        fields = None
    if not isinstance(fields, dict):
        raise argparse.ArgumentTypeError("""must be a JSON object such as '{"truncate_prompt_tokens": 4096}'""")
    return fields


def add_server(parser: Parser) -> None:
    """Add the options that choose a server."""
    server = parser.add_mutually_exclusive_group()
    default = f"(default: the environment variable {BASE_URL_VARIABLE}, else https://api.regolo.ai)"
    server.add_argument("--base-url", metavar="URL", help=f"server {default}")
    local: Any = {"action": "store_const", "const": "local://", "dest": "base_url"}
    server.add_argument("--local", help="use the offline scorer: no API key, no network", **local)


def add_client(parser: Parser, *, fields: bool = False, results: bool = False, several: bool = False) -> None:
    """Add the options that `rank`, `bulk`, `evaluate` and `check` share.

    Args:
        parser: The parser of the command.
        fields: Add the options that choose the fields of a document.
        results: Add the options that limit the results.
        several: Accept several models, instructions and prompt formats.
    """

    def add(flag: str, words: str, metavar: str = "N", **settings: Any) -> None:
        option = Options.model_fields.get(flag[2:].replace("-", "_"))
        if option and isinstance(option.default, str | int | float) and "default" not in words:
            words += f" (default: {option.default})"
        parser.add_argument(flag, metavar=metavar, help=words, **settings)

    repeat: Any = {"action": "append"} if several else {}
    more = ". May be repeated" if several else ""
    if results:
        add("--top-n", "number of results (default: all)", type=_COUNT)
        words = "drop results with a lower score (default: keep all)"
        add("--threshold", words, "SCORE", type=_number(float, float("-inf")), dest="score_threshold")
    if fields:
        add("--text-field", "field with the text (default: text)", "NAME", default="text")
        words = 'field scored in front of the text, "" for none (default: title)'
        add("--title-field", words, "NAME", default="title")
    add_server(parser)
    add("--model", f"reranking model{more}", "NAME", **repeat)
    add("--instruction", f"task of the model (default: web search){more}", "TEXT", **repeat)
    add("--prompt-format", f"auto, {', '.join(PRESETS)}{more}", "NAME", type=_read_format, **repeat)
    add("--timeout", "limit per attempt", "SECONDS", type=_number(float, 0.001))
    words = "limit per query with all retries and waits, or none"
    add("--total-timeout", words, "SECONDS", type=_number(float, 0.001, "none"))
    add("--max-retries", "retries per request", type=_number(int, 0))
    add("--max-concurrency", "concurrent requests", type=_COUNT)
    add("--batch-size", "documents per request", type=_COUNT)
    add("--max-document-chars", "cut longer documents for scoring (default: no limit)", type=_COUNT)
    headers: Any = {"type": _read_header, "action": "append", "dest": "default_headers"}
    add("--header", "additional HTTP header, may be repeated", "NAME:VALUE", **headers)
    add("--extra-body", "additional fields of each request, as a JSON object", "JSON", type=_read_object)
    parser.add_argument("--allow-http", action="store_true", help="allow the key over plain http to another machine")
    parser.add_argument("--no-key", action="store_const", const="", dest="api_key", help="send no API key")


def open_client(options: dict[str, Any], **more: Any) -> "RegoloClient":
    """Return a client with these options.

    Raises:
        UsageError: One of them is wrong.
    """
    from regolo_rerank import RegoloClient

    if headers := options.get("default_headers"):
        options = options | {"default_headers": dict(headers)}
    try:
        return RegoloClient(**options, **more)
    except InvalidInputError as error:
        raise UsageError(str(error)) from None


def server_of(options: dict[str, Any]) -> str:
    """Return the address of the server, without a password and a query, which may be secret."""
    url = options.get("base_url") or os.environ.get(BASE_URL_VARIABLE, "").strip() or "https://api.regolo.ai"
    return re.sub(r"(?<=//)[^/@]*@|[?#].*", "", url).rstrip("/" if "local:" not in url else "")


def shell_words(message: str) -> str:
    """Return a message of the library with options in the spelling of a shell."""

    def flag(found: re.Match[str]) -> str:
        return _FLAGS.get(found[1]) or "--" + found[1].replace("_", "-")

    for pattern, words in _PHRASES.items():
        message = re.sub(pattern, words, message)
    # Names such as "model" are also plain words, so they count at the beginning only.
    message = re.sub(rf"^({_NAMES})(?=:)", flag, message)
    return re.sub(rf"(?<![-\w])({_SPELT})\b", flag, message)
