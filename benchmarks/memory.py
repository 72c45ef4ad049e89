"""Peak memory of one call, minus the documents' own memory: run by `footprint`, in a separate process.

The resident memory counts, as the system sees it: it includes what Python's allocator does not know, such as buffers
of extensions, and memory that it releases late.
"""

import asyncio
import gc
import re
import sys
from pathlib import Path

from benchmarks.texts import documents
from regolo_rerank import RegoloClient

__all__ = ["peak"]


def peak(url: str, mode: str, count: int, top_n: int) -> int:
    """Return the bytes that a call adds at most.

    Args:
        url: The server.
        mode: "sync" or "async".
        count: Documents.
        top_n: Results wanted.
    """
    texts, client = documents(count), RegoloClient("made-up", base_url=url)

    def call(texts: list[str]) -> None:
        if mode == "sync":
            client.rerank("capital of China", texts, top_n=top_n)
        else:
            asyncio.run(acall(texts))

    async def acall(texts: list[str]) -> None:
        # Returns nothing: asyncio.run writes out a result in full, to look up a signal handler that holds it.
        await client.arerank("capital of China", texts, top_n=top_n)

    call(texts[:1_000])  # loads and opens what any call needs
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is reset
    before = _resident("VmRSS")
    call(texts)
    return _resident("VmHWM") - before


def _resident(name: str) -> int:
    found = re.search(rf"{name}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1_024 if found else 0


if __name__ == "__main__":
    print(peak(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
