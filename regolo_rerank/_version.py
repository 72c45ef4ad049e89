"""The version and the installation command. This module imports nothing, so that everything else can import it."""

__version__ = "0.1.0"

INSTALL_EXTRA = 'pip install ".[{extra}]" in a clone of the repository'
"""Change this to 'pip install "regolo_rerank[{extra}]"' with the first release on the package index."""


def install_hint(extra: str) -> str:
    """Return the command that installs an extra, for messages about a missing package."""
    return INSTALL_EXTRA.format(extra=extra)
