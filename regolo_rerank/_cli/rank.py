"""Rank the lines of files: `regolo-rerank rank QUERY FILE...`."""

import io
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from regolo_rerank._cli.common import find_encoding, open_client, standard_input, tell
from regolo_rerank._display.tables import encodable, lines
from regolo_rerank.errors import InvalidInputError

if TYPE_CHECKING:
    from regolo_rerank.results import RerankResponse

__all__ = ["rank", "read_text", "shown_json"]


class _Document(NamedTuple):
    """A text, and where it comes from: its file, the line's number from 1, and the id that an object may have."""

    text: str
    file: str
    line: int
    id: Any = None


def rank(query: str, files: list[str], *, as_json: bool, **options: Any) -> int:
    """Run the command and return its exit status.

    Args:
        query: What is searched.
        files: Where documents are read, one a line; "-" is standard input.
        as_json: Whether the ranking is printed as one JSON object.
        **options: Those of the client.
    """
    documents = [document for file in files for document in _documents(file)]
    with open_client(options) as client:
        response = client.rerank(query, [document.text for document in documents])
    if as_json:
        print(_json(response, documents))
    elif response.results:
        print(*lines(response.results, shutil.get_terminal_size().columns, encoding=find_encoding()), sep="\n")
    else:
        tell(f"nothing found: {f'none of {len(documents)} reaches the threshold' if documents else 'no documents'}")
    return 0


def read_text(file: str, awaited: str) -> str:
    """Return the text of a file, or of standard input where it is called "-".

    Raises:
        InvalidInputError: It cannot be read, or is not UTF-8.
    """
    name = "standard input" if file == "-" else file
    try:
        content = standard_input(awaited).read() if file == "-" else Path(file).read_bytes()
        return content.decode("utf-8-sig")
    except OSError as error:
        raise InvalidInputError(f"{name}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InvalidInputError(f"{name}: not UTF-8 at byte {error.start}") from None


def shown_json(fields: dict[str, Any]) -> str:
    """Return JSON that standard output can take."""
    text = json.dumps(fields, ensure_ascii=False)
    # ASCII is UTF-8 too: the way out for another encoding, and for half a surrogate pair.
    return text if find_encoding() == "utf-8" and encodable(text, "utf-8") == text else json.dumps(fields)


def _documents(file: str) -> Iterator[_Document]:
    """Read the documents of a file."""
    for number, line in enumerate(io.StringIO(read_text(file, "documents, one a line"), newline=None), 1):
        if line.strip():
            yield (
                _read_object(line, file, number)
                if file.lower().endswith(".jsonl")
                else _Document(line.rstrip("\n"), file, number)
            )


def _read_object(line: str, file: str, number: int) -> _Document:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        raise InvalidInputError(f"{file}, line {number}: not JSON") from None
    text = fields.get("text") if isinstance(fields, dict) else None
    if not isinstance(text, str):
        raise InvalidInputError(f'{file}, line {number}: not an object with a string in its field "text"')
    return _Document(text, file, number, fields.get("id"))


def _json(response: "RerankResponse", documents: list[_Document]) -> str:
    fields = asdict(response)
    del fields["meta"]
    for result in fields["results"]:
        document = documents[result["index"]]
        result.update(file=document.file, line=document.line)
        if document.id is not None:
            result["id"] = document.id
    return shown_json(fields)
