import ast
import re
from pathlib import Path
from typing import Final

import pytest

import regolo_rerank

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


def imports_of(path: Path) -> set[str]:
    """Return what of the package a module imports when it is loaded, or where types are checked."""
    tree, imported = ast.parse(path.read_text("utf-8")), set[str]()
    functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    later = {id(node) for function in functions for node in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and id(node) not in later:
            assert node.level == 0, "imports name the whole way"
            imported |= {f"{node.module}.{name.name}" for name in node.names} | {str(node.module)}
        elif isinstance(node, ast.Import) and id(node) not in later:
            imported |= {name.name for name in node.names}
    # What the package itself gives away has a home in one of its modules.
    homes = {getattr(getattr(regolo_rerank, name.partition(".")[2], None), "__module__", name) for name in imported}
    return {name.removeprefix("regolo_rerank.") for name in imported | homes} & {*map(name_of, MODULES)}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_room_knows_only_those_above_it(path: Path) -> None:
    """What a module imports is drawn before it, or is beside it in a wing of which no rooms are drawn."""
    module = name_of(path)
    wing = module.partition(".")[0]
    for known in imports_of(path) - {"_version"}:
        beside = known.partition(".")[0] == wing and known not in PLACES
        assert beside or place_of(known) < place_of(module), known


def test_every_room_is_drawn() -> None:
    """The drawing has each module in front and each wing, all rooms of a wing or none, and no others."""
    there = {*map(name_of, MODULES)} - {"_version"}
    assert {name for name in PLACES if "." not in name} == {name.partition(".")[0] for name in there}
    open_wings = {name.partition(".")[0] for name in PLACES if "." in name}
    assert {name for name in PLACES if "." in name} == {
        name for name in there if "." in name and name.partition(".")[0] in open_wings
    }
