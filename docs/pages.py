"""What the site needs besides settings: a hook of MkDocs, and one of Griffe."""

from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
AS_A_PAGE = {
    ".ipynb)": ".md)",
    "](../docs/": "](../",
    "![png]": "![What the code above draws]",
}
"""What a notebook links to, on the site, and what its pictures are."""


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Make a page of each notebook, with its stored outputs."""
    exporter: Any = MarkdownExporter  # which has no types
    for notebook in sorted(NOTEBOOKS.glob("*.ipynb")):
        text, resources = exporter().from_filename(
            str(notebook), {"unique_key": notebook.stem}
        )
        for stored, shown in AS_A_PAGE.items():
            text = text.replace(stored, shown)
        files.append(
            File.generated(
                config, f"notebooks/{notebook.stem}.md", content=text
            )
        )
        for name, content in resources["outputs"].items():
            files.append(
                File.generated(config, f"notebooks/{name}", content=content)
            )


class OptionsAsUsed(griffe.Extension):
    """Shows type and default of an option, and not what only pydantic reads."""

    def on_attribute_instance(
        self, *, attr: griffe.Attribute, **_: Any
    ) -> None:
        """Take the default out of `Field`, the type out of `SkipJsonSchema`."""
        match attr.value:
            case griffe.ExprCall(
                function=griffe.ExprName(name="Field"), arguments=arguments
            ):
                named = [
                    each
                    for each in arguments
                    if isinstance(each, griffe.ExprKeyword)
                ]
                attr.value = next(
                    each.value for each in named if each.name == "default"
                )
        match attr.annotation:
            case griffe.ExprSubscript(
                left=griffe.ExprName(name="SkipJsonSchema"), slice=used
            ):
                attr.annotation = used
