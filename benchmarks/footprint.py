"""Cost in addition to calls: the time of the imports, and the memory of a large call."""

import resource
import subprocess
import sys
from collections.abc import Iterator
from functools import partial

from pydantic_core import to_json

from benchmarks.measured import Measured, in_rounds
from benchmarks.server import ROOT, Behaviour, Server
from benchmarks.subjects import Job
from benchmarks.texts import documents

__all__ = ["imports", "memory"]

_EMPTY = "an empty interpreter"
_FIRST_REQUEST = """\
from regolo_rerank.langchain import RegoloRerank
RegoloRerank(api_key="made-up", base_url="{url}").rerank(["Beijing"], "capital of China")
"""
_FIRST_RUN = """\
from langchain_core.documents import Document
from regolo_rerank.langchain import RegoloRerank
RegoloRerank(api_key="made-up", base_url="{url}").compress_documents([Document("Beijing")], "capital of China")
"""
_OURS = {
    _EMPTY: "",
    "regolo_rerank": "import regolo_rerank",
    "langchain_core compressor": "import langchain_core.documents.compressor",
    "LangChain RegoloRerank and its first request": _FIRST_REQUEST,
    "the same, as a run that LangChain could trace": _FIRST_RUN,
}
_PEERS = {
    "LangChain CohereRerank": "from langchain_cohere import CohereRerank",
    "LangChain NVIDIARerank": "from langchain_nvidia_ai_endpoints import NVIDIARerank",
    "LangChain VoyageAIRerank": "from langchain_voyageai import VoyageAIRerank",
}


def imports(server: Server, *, rounds: int = 11, peers: bool = True) -> Iterator[Measured]:
    """CPU of a fresh interpreter that imports something, over one that imports nothing."""
    server.behave(Behaviour())
    programs = {name: text.format(url=server.url) for name, text in (_OURS | (_PEERS if peers else {})).items()}
    missing = {name: problem for name, text in programs.items() if (problem := _problem(text))}
    turns = in_rounds({name: partial(_cpu, text) for name, text in programs.items() if name not in missing}, rounds)
    empty = turns.pop(_EMPTY)
    over = {name: [value - least for value, least in zip(values, empty, strict=True)] for name, values in turns.items()}
    ours = {"regolo_rerank": over.pop("regolo_rerank")}
    yield Measured("import", f"CPU of an import, over {_EMPTY}", "ms", None, ours)
    yield Measured(
        "import-langchain",
        f"CPU of an import, over {_EMPTY}, for LangChain",
        "ms",
        "langchain_core compressor",
        over,
        missing,
    )


def _problem(program: str) -> str:
    """Run a program once, which also compiles its modules, and return the last line of its error."""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False, capture_output=True, text=True)
    return done.stderr.strip().rpartition("\n")[2] if done.returncode else ""


def _cpu(program: str) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) * 1_000


def memory(server: Server, *, rounds: int = 3, peers: bool = True, count: int = 100_000) -> Iterator[Measured]:  # noqa: ARG001 - no peer sends as many
    """100,000 documents in one call, against what it may hold: three times the requests in flight, and the results."""
    server.behave(Behaviour())
    in_flight = 4 * len(to_json(Job(server.url, documents(), 5).body))
    for top_n, bytes_a_document in ((5, 200), (count, 400)):
        allowed = (3 * in_flight + bytes_a_document * count) / 2**20
        modes = {"RegoloClient": "sync", "RegoloClient, async": "async"}
        turns = in_rounds(
            {name: partial(_peak, server.url, mode, count, top_n) for name, mode in modes.items()}, rounds
        )
        title = f"memory of {count:,} documents in one call, over their own; {top_n:,} results wanted"
        name = "memory-top5" if top_n == 5 else "memory-all"
        yield Measured(name, title, "MiB", "the allowance", {"the allowance": [allowed] * rounds, **turns})


def _peak(url: str, mode: str, count: int, top_n: int) -> float:
    command = [sys.executable, "-m", "benchmarks.memory", url, mode, str(count), str(top_n)]
    return int(subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout) / 2**20
