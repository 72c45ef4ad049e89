"""Measure what reranking brings on a file of judged queries: `regolo-rerank evaluate FILE`."""

import io
import json
from contextlib import ExitStack
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regolo_rerank._cli.common import find_encoding, open_client, sees_a_bar
from regolo_rerank._cli.rank import read_text, shown_json
from regolo_rerank._cli.scores import kept_scores
from regolo_rerank._evaluation.tables import text
from regolo_rerank.errors import InvalidInputError

if TYPE_CHECKING:
    from regolo_rerank import RegoloClient
    from regolo_rerank.evaluation import Evaluation

__all__ = ["run_evaluation"]


def run_evaluation(
    file: str,
    *,
    as_json: bool,
    cache: str | None,
    picture: str | None,
    variants: dict[str, list[str]],
    **options: Any,
) -> int:
    """Run the command and return its exit status.

    Args:
        file: Where queries are read; "-" is standard input.
        as_json: Whether the evaluation is printed as one JSON object.
        cache: The file that keeps scores.
        picture: The file that the picture is written to, if any.
        variants: Values of options to set side by side, by the option's name.
        **options: Those of the client that all variants share.
    """
    try:
        from regolo_rerank.evaluation import evaluate
    except ImportError as error:
        raise InvalidInputError(str(error)) from None
    queries = _queries(file)
    with ExitStack() as opened:
        if cache is not None:
            options["cache"] = opened.enter_context(kept_scores(Path(cache)))
        clients = {name: opened.enter_context(client) for name, client in _clients(variants, options).items()}
        evaluation = evaluate(queries, clients, show_progress=sees_a_bar())
    print(shown_json(asdict(evaluation)) if as_json else text(evaluation, find_encoding()))
    if picture is not None:
        _draw(evaluation, Path(picture))
    return 1 if any(variant.failed for variant in evaluation.variants) else 0


def _clients(variants: dict[str, list[str]], options: dict[str, Any]) -> dict[str, "RegoloClient"]:
    """Return a client for each combination of values, called by those that differ."""
    clients = {}
    for values in product(*variants.values()):
        settings = dict(zip(variants, values, strict=True))
        names = [value for name, value in settings.items() if len(variants[name]) > 1]
        clients[", ".join(names) or "reranked"] = open_client({**options, **settings})
    return clients


def _queries(file: str) -> list[Any]:
    from regolo_rerank._evaluation.queries import read_query

    queries = []
    for number, line in enumerate(io.StringIO(read_text(file, "queries, one a line"), newline=None), 1):
        if not line.strip():
            continue
        try:
            queries.append(json.loads(line))
            read_query(queries[-1])
        except (ValueError, RecursionError) as error:
            problem = str(error) if isinstance(error, InvalidInputError) else "not JSON"
            raise InvalidInputError(f"{file}, line {number}: {problem}") from None
    return queries


def _draw(evaluation: "Evaluation", path: Path) -> None:
    try:
        from regolo_rerank.plot import evaluation_summary
    except ImportError as error:
        raise InvalidInputError(str(error)) from None
    evaluation_summary(evaluation).savefig(path, dpi=200)
