"""The blocks of code of docs/how-to/ray.md, without those that make example data."""

import re
from pathlib import Path
from typing import Final

_PAGE: Final = (Path(__file__).parents[3] / "docs" / "how-to" / "ray.md").read_text("utf-8")

_, RECIPE, AGAIN, _, GROUPED = re.findall(r"^```python\n(.*?)^```$", _PAGE, re.DOTALL | re.MULTILINE)
