"""The parts of the site that need code: a hook of MkDocs, and an extension of Griffe."""

import copy
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


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Turn links to notebooks of the repository into links to their pages, which are one folder nearer."""
    return re.sub(r"\]\(\.\./((?:\.\./)*notebooks/\w+)\.ipynb\)", r"](\1.md)", markdown)


class OptionsAsUsed(griffe.Extension):
    """Documents options as callers use them, without names of the library's inside."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        """Take the default out of `Field`."""
        match attr.value:
            case griffe.ExprCall(function=griffe.ExprName(name="Field"), arguments=arguments):
                for each in arguments:
                    if isinstance(each, griffe.ExprKeyword) and (each.name == "default"):
                        attr.value = each.value

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """List all options among the parameters of both adapters, in the words of the client."""
        client = pkg["client.RegoloClient"]
        compressor, evaluate = pkg["langchain.RegoloRerank"], pkg["evaluation.runs.evaluate"]
        for function in (*client.functions.values(), *compressor.functions.values(), evaluate):
            for parameter in function.parameters:
                parameter.default = _DEFAULTS.get(str(parameter.default), parameter.default)
                parameter.annotation = _TYPES.get(str(parameter.annotation), parameter.annotation)
        options = {item.name: item for item in _parameters_of(client).value}
        for adapter in (compressor, pkg["llama_index.RegoloRerank"]):
            section = _parameters_of(adapter)
            named = {item.name: item for item in section.value if item.name != "**options"}
            for name, field in adapter.attributes.items():
                if name in options and name not in named:
                    named[name] = copy.copy(options[name])
                elif field.docstring and name not in {"user_agent", *named}:
                    text = " ".join(field.docstring.value.split())
                    named[name] = griffe.DocstringParameter(name, annotation=field.annotation, description=text)
                    named[name].value = field.value
            named["top_n"].value = "5"
            section.value = list(named.values())


_DEFAULTS = {
    "_Default(60.0)": "60.0",
    "DEFAULT_INSTRUCTION": "'Given a web search query, ...'",
    "DEFAULT_MEASURES": "'nDCG@10 MRR Recall@1 Recall@5 Recall@10'",
}
_TYPES = {
    "Unpack[RankOptions]": None,  # the docstring lists the options
    "Iterable[Mapping[str, Any] | Row]": "Iterable[Mapping[str, Any]]",
}
"""Internal types, each with the type that the reference shows instead."""


def _parameters_of(cls: griffe.Class) -> griffe.DocstringSectionParameters:
    """Return the parameters in the docstring of a class, to be changed there."""
    assert cls.docstring is not None  # noqa: S101 - our own classes have one
    sections = cls.docstring.parse("google", warn_missing_types=False, warn_unknown_params=False)
    cls.docstring.__dict__["parsed"] = sections  # the value of a cached property
    return next(section for section in sections if isinstance(section, griffe.DocstringSectionParameters))
