"""Adds the project's addresses to the metadata, and makes the README's links work on the package index."""

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

RELATIVE_LINK = re.compile(r"(!?)\[([^\]]+)\]\((?!https://)([^)]+)\)")


class ProjectMetadata(MetadataHookInterface):
    """Derives all addresses from `repository` in pyproject.toml. While that is empty, relative links become text."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Set the dynamic fields `readme` and `urls`."""
        repository = self.config["repository"]

        def absolute(link: re.Match[str]) -> str:
            image, text, path = link.groups()
            view = "raw" if image else "blob"
            return f"{image}[{text}]({repository}/{view}/main/{path})" if repository else text

        readme = Path(self.root, "README.md").read_text("utf-8")
        metadata["readme"] = {"content-type": "text/markdown", "text": RELATIVE_LINK.sub(absolute, readme)}
        metadata["urls"] = dict(self.config["urls"])
        if repository:
            metadata["urls"] |= {
                "Repository": repository,
                "Documentation": f"{repository}/blob/main/docs/index.md",
                "Issues": f"{repository}/issues",
                "Changelog": f"{repository}/blob/main/CHANGELOG.md",
            }
