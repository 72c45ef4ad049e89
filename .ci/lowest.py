"""Prints pip constraints that hold every direct dependency at the lowest release that pyproject.toml allows."""

import re
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8"))["project"]
for requirements in (project["dependencies"], *project["optional-dependencies"].values()):
    for requirement in requirements:
        if bound := re.match(r"([\w.-]+)(?:\[.*?\])?[>=]=([^,;]+)", requirement):
            print(f"{bound[1]}=={bound[2]}")
