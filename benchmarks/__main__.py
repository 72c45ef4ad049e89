"""Run the benchmarks: `python -m benchmarks`, or `python -m benchmarks --short` for the rows that decide what lands.

The exit status is 1 where a bound is missed or could not be measured.
"""

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from benchmarks.bounds import BOUNDS, MARGIN, Result, judged
from benchmarks.calls import all_results, top5
from benchmarks.footprint import imports, memory
from benchmarks.measured import Measured
from benchmarks.server import Server
from benchmarks.service import service
from benchmarks.waiting import batches, burst, idle, sustained

MEASURES: dict[str, Callable[..., Iterator[Measured]]] = {
    "top5": top5,
    "all": all_results,
    "burst": burst,
    "sustained": sustained,
    "service": service,
    "batches": batches,
    "imports": imports,
    "idle": idle,
    "memory": memory,
}
SHORT = {"top5": 31, "imports": 5}
"""The measures of the short form, with their rounds."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print the table, write the JSON and return the exit status."""
    arguments = _parser().parse_args(argv)
    environment = _environment()
    print("Python {python}, {system}, {cores} cores, load {load[0]:.1f}".format_map(environment))
    results = list(_run(arguments.measures, arguments.rounds, short=arguments.short))
    failed = [result for result in results if result.verdict not in {"", "ok"}]
    print(f"\n{sum(result.verdict == 'ok' for result in results)} bounds reached, {len(failed)} not")
    report = {"environment": environment, "short": arguments.short, "results": [asdict(result) for result in results]}
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(report, indent=2) + "\n")
    return 1 if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    choose = parser.add_argument
    choose("measures", nargs="*", metavar="MEASURE", type=_measure, help=f"of {', '.join(MEASURES)}; none is all")
    choose(
        "--short", action="store_true", help=f"{' and '.join(SHORT)} without peers, with a margin of {MARGIN - 1:.0%}%"
    )
    choose("--rounds", type=int, metavar="N", help="rounds of each measure, instead of its default")
    choose("--json", type=Path, metavar="FILE", default=Path("build/benchmarks.json"), help="default: %(default)s")
    return parser


def _measure(name: str) -> str:
    if name not in MEASURES:
        raise argparse.ArgumentTypeError(f"no such measure: {name}")
    return name


def _run(measures: Sequence[str], rounds: int | None, *, short: bool) -> Iterator[Result]:
    """Measure, print each table when it is complete, and yield its lines."""
    bounds = [bound for bound in BOUNDS if bound.short or not short]
    margin = MARGIN if short else 1.0
    with Server() as server:
        for name in measures or (SHORT if short else MEASURES):
            number = rounds or (SHORT.get(name) if short else None)
            for measured in MEASURES[name](server, peers=not short, **({"rounds": number} if number else {})):
                results = list(judged(measured, bounds, margin))
                print(*_table(measured, results), sep="\n", flush=True)
                yield from results


def _environment() -> dict[str, Any]:
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "load": os.getloadavg(),
        "packages": dict(sorted((found.name, found.version) for found in distributions())),
    }


def _table(measured: Measured, results: list[Result]) -> Iterator[str]:
    yield f"\n{measured.title}"
    yield f"  {'subject':<42} {'over':<26} {'ratio':>7}  {'quartiles':<15} {'bound':<9} {'':<6} {measured.unit:>9}"
    for result in results:
        head = f"  {result.subject:<42} {result.against or '-':<26}"
        if result.ratio is None or result.quartiles is None:
            yield f"{head} {'-':>7}  {result.note[:120]} {result.verdict}".rstrip()
            continue
        spread = "{:.2f} - {:.2f}".format(*result.quartiles)
        bound = "" if result.limit is None else f"{'>=' if result.at_least else '<='} {result.limit:.2f}"
        yield f"{head} {result.ratio:>7.2f}  {spread:<15} {bound:<9} {result.verdict:<6} {result.value:>9.3f}"


def _drop_settings() -> None:
    """Forget the environment's proxies and tracers, which do not belong to a call."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name.startswith(("LANGCHAIN_", "LANGSMITH_", "REGOLO_")):
            del os.environ[name]


if __name__ == "__main__":
    _drop_settings()
    sys.exit(main())
