"""The documents of all measures, in a file that imports nothing, so that a process that is measured can have it."""

__all__ = ["documents"]


def documents(count: int = 100) -> list[str]:
    """Return distinct documents of 500 characters."""
    return [f"{number}: {'the words of a document, ' * 20}"[:500] for number in range(count)]
