"""The parts of the site that need code: a hook of MkDocs, and an extension of Griffe."""

import re
import tomllib
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parents[1]
NOTEBOOK_TO_PAGE = {
    ".ipynb)": ".md)",
    "](../docs/": "](../",
    "![png]": "![Chart drawn by the code above]",
}
"""Replacements that turn the links and pictures of a notebook into those of a page."""


@event_priority(100)  # before plugins read the addresses
def on_config(config: MkDocsConfig) -> None:
    """Derive all addresses from that of the repository in pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    hooks = project["tool"]["hatch"]["metadata"]["hooks"]
    if repository := hooks.get("custom", {}).get("repository"):
        config.repo_url, config.edit_uri = repository, "edit/main/docs/"
        config.repo_name = "Repository"
        if pages := re.fullmatch(r"https://github\.com/([^/]+)/([^/]+)", repository):
            config.site_url = "https://{}.github.io/{}/".format(*pages.groups())


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Make a page of each notebook, with its stored outputs."""
    exporter: Any = MarkdownExporter  # which has no types
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        text, resources = exporter().from_filename(str(notebook), {"unique_key": notebook.stem})
        for stored, shown in NOTEBOOK_TO_PAGE.items():
            text = text.replace(stored, shown)
        files.append(File.generated(config, f"notebooks/{notebook.stem}.md", content=text))
        for name, content in resources["outputs"].items():
            files.append(File.generated(config, f"notebooks/{name}", content=content))


class OptionsAsUsed(griffe.Extension):
    """Shows type and default of an option, without the parts for pydantic."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        """Take the default out of `Field`, the type out of `SkipJsonSchema`."""
        match attr.value:
            case griffe.ExprCall(function=griffe.ExprName(name="Field"), arguments=arguments):
                for each in arguments:
                    if isinstance(each, griffe.ExprKeyword) and (each.name == "default"):
                        attr.value = each.value
        match attr.annotation:
            case griffe.ExprSubscript(left=griffe.ExprName(name="SkipJsonSchema"), slice=used):
                attr.annotation = used
