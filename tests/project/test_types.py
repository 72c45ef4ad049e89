import asyncio
import re
import subprocess
import sys
from pathlib import Path

import pytest
from llama_index.core import Settings as LlamaIndexSettings
from llama_index.core.llms import MockLLM

from tests.support import typed_user_code
from tests.support.corpus import QUERY, TEXTS, Everything, index

ROOT = Path(__file__).parents[2]
PAIRS = [(QUERY, TEXTS), (QUERY, TEXTS[::-1])]

IMPORTS = """\
from regolo_rerank import RegoloClient
from regolo_rerank.langchain import RegoloRerank as DocumentReranker
from regolo_rerank.llama_index import RegoloRerank as NodeReranker
client = RegoloClient()
"""
MISTAKES = {
    "RegoloClient(topn=5)": "topn",
    "RegoloClient(top_n='5')": "top_n",
    "RegoloClient(prompt_format='taged')": "taged",
    "RegoloClient(None, 'local://')": "positional",
    "client.timeout = '60'": "str",
    "client.retries = 5": "retries",
    "client.rerank(['a text'], 'the query')": "rerank",
    "client.rerank('the query', ['a text'], 5)": "positional",
    "client.rerank('the query', ['a text'], batch_size=5)": "batch_size",
    "client.arerank('the query', ['a text']).results": "Coroutine",
    "client.rerank('the query', ['a text']).results[0]['index']": "RerankResult",
    "DocumentReranker(on_error='ignore')": "ignore",
    "DocumentReranker(metadata_mode=None)": "metadata_mode",
    "DocumentReranker(metadata_fields='title')": "metadata_fields",
    "DocumentReranker().compress_documents(['a text'], 'the query')": "Document",
    "DocumentReranker().rerank([1], 'the query')": "Document",
    "DocumentReranker().as_runnable().invoke('the query')": "Candidates",
    "DocumentReranker().as_runnable().batch([['a text']])": "Candidates",
    "NodeReranker(keep_retrieval_score='yes')": "keep_retrieval_score",
    "NodeReranker().postprocess_nodes(['a text'], query_str='the query')": "NodeWithScore",
}
"""What a user may get wrong, and a word of what a type checker says about it."""


def test_the_file_of_user_code_runs(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code whose types are checked does what it says, in both modes: it finds the text that answers the query."""
    monkeypatch.setenv("REGOLO_BASE_URL", "local://")
    monkeypatch.setattr(LlamaIndexSettings, "_llm", MockLLM())
    if mode == "sync":
        responses = [typed_user_code.with_the_client(TEXTS), *typed_user_code.with_many_queries(PAIRS)]
        documents = typed_user_code.with_langchain(Everything())
        nodes = typed_user_code.with_llama_index(index())
    else:
        responses = asyncio.run(typed_user_code.with_many_async_queries(PAIRS))
        responses.append(asyncio.run(typed_user_code.with_the_async_client(TEXTS)))
        documents = asyncio.run(typed_user_code.with_async_langchain(Everything()))
        nodes = asyncio.run(typed_user_code.with_async_llama_index(index()))
    assert [response.results[0].document for response in responses] == [TEXTS[0]] * (len(PAIRS) + 1)
    assert {document.page_content for document in documents} == {TEXTS[0]}
    assert {node.text for node in nodes} == {TEXTS[0]}


def test_its_options_and_errors_are_real() -> None:
    """The options that the user code assigns count for the next call, and its mistake is told by its name."""
    client = typed_user_code.with_options()
    assert [result.index for result in client.rerank("longest", ["b", "ccc", "aa"]).results] == [1, 2, 0]
    assert typed_user_code.with_errors(client).startswith("query:")


@pytest.mark.timeout(300)  # without mypy's cache
def test_a_type_checker_accepts_user_code_and_refuses_mistakes(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    """Under mypy's strict rules, typical code is right to the letter, and each mistake of a wrong program is named."""
    pytest.importorskip("mypy", reason="part of the extra [dev]")
    program = tmp_path / "program.py"
    program.write_text(IMPORTS + "\n".join(MISTAKES))
    files = [str(typed_user_code.__file__), str(program)]
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(pytestconfig.cache.mkdir("mypy")), *files]
    checked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)  # noqa: S603 - our own
    said: dict[int, str] = {}
    for file, line, words in re.findall(r"^(.*):(\d+): error: (.*)$", checked.stdout, re.MULTILINE):
        assert file.endswith(program.name), checked.stdout
        said[int(line)] = f"{said.get(int(line), '')} {words}"
    assert list(said) == [IMPORTS.count("\n") + number for number in range(1, len(MISTAKES) + 1)], checked
    assert [
        mistake for (mistake, word), words in zip(MISTAKES.items(), said.values(), strict=True) if word not in words
    ] == []
