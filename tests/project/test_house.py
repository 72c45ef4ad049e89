import ast
import re
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[2]
PACKAGE: Final = ROOT / "regolo_rerank"


def drawn() -> dict[str, int]:
    """Return the place of each room in the drawing of CONTRIBUTING.md, by the module or wing that it is."""
    drawing = (ROOT / "CONTRIBUTING.md").read_text("utf-8").partition("## The house")[2].partition("###")[0]
    rooms, wing = list[str](), ""
    for line in drawing.splitlines():
        names = line[:30].split()
        if re.match(r" {4}\w", line):
            wing = names[0]
            rooms += names
        elif re.match(r" {8}\w", line):
            rooms += [f"{wing}{name}" for name in names]
    return {room.strip("/").replace("/", "."): place for place, room in enumerate(rooms)}


PLACES: Final = drawn()
MODULES: Final = [path for path in sorted(PACKAGE.rglob("*.py")) if not path.stem.startswith("__")]


def name_of(path: Path) -> str:
    """Return a module's name below the package."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def place_of(module: str) -> int:
    """Return the place of a module, or of the wing that it is in."""
    return PLACES.get(module, PLACES[module.partition(".")[0]])


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_room_knows_only_those_above_it(path: Path) -> None:
    """What a module imports is drawn before it, or is in a wing of which no rooms are drawn."""
    module = name_of(path)
    for statement in ast.parse(path.read_text("utf-8")).body:
        if isinstance(statement, ast.ImportFrom) and (statement.module or "").startswith("regolo_rerank."):
            _, _, package = (statement.module or "").partition(".")
            for known in {f"{package}.{name.name}" for name in statement.names} & {*map(name_of, MODULES)} or {package}:
                beside = known.partition(".")[0] == module.partition(".")[0] and known not in PLACES
                assert known == "_version" or beside or place_of(known) < place_of(module), known


def test_every_room_is_drawn() -> None:
    """The drawing has each module in front and each wing, and no room that there is not."""
    there = {name_of(path).partition(".")[0] for path in MODULES} - {"_version"}
    assert {name for name in PLACES if "." not in name} == there
    assert {name for name in PLACES if "." in name} <= {*map(name_of, MODULES)}
