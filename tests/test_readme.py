import re
from pathlib import Path
from typing import Any

import pytest
from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from llama_index.core import MockEmbedding, VectorStoreIndex
from llama_index.core import Settings as LlamaIndexSettings
from llama_index.core.llms import MockLLM
from llama_index.core.schema import TextNode

from regolo_rerank.adapter import AdapterOptions
from regolo_rerank.client import RegoloClient

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
TEXTS = ["csv: read a CSV file", "json: read a JSON file", "os: the operating system"]


class Everything(BaseRetriever):
    """Retrieves all documents."""

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:
        del query, run_manager
        return [Document(text) for text in reversed(TEXTS)]


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.DOTALL))
def test_every_example_runs(code: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Each Python block runs as it stands, and ranks what it says."""
    monkeypatch.setenv("REGOLO_BASE_URL", "local://")
    monkeypatch.setattr(LlamaIndexSettings, "_llm", MockLLM())
    index = VectorStoreIndex([TextNode(text=text) for text in TEXTS], embed_model=MockEmbedding(embed_dim=4))
    names: dict[str, Any] = {"my_retriever": Everything(), "index": index}
    exec(compile(code, "README.md", "exec"), names)  # noqa: S102 - our own text
    if "documents" in names:
        assert names["documents"][0].page_content == TEXTS[0]
        assert 0 < names["documents"][0].metadata["relevance_score"] <= 1
    elif "answer" in names:
        assert names["answer"].source_nodes[0].text == TEXTS[0]
    elif "response" in names:
        assert capsys.readouterr().out == "1 1.0 Beijing is the capital of China.\n"
    else:
        assert names.get("client") is not None or not capsys.readouterr().out


def test_the_table_lists_every_option_with_its_default() -> None:
    """The options table names each option once, with the default that the code has."""
    rows = dict(re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| (.*?) \|", README, re.MULTILINE))
    listed = {name.strip("`"): default for names, default in rows.items() for name in names.split(", ")}
    fields = AdapterOptions.model_fields
    assert listed.keys() == fields.keys()
    assert listed.pop("top_n") == "adapters `5`, client `None`"
    assert (fields["top_n"].default, RegoloClient.model_fields["top_n"].default) == (5, None)
    assert listed.pop("instruction") == "a web search task"
    for name, default in listed.items():
        assert eval(default.strip("`")) == fields[name].default, name  # noqa: S307 - our own text


def test_it_is_short_and_opens_with_the_two_commands() -> None:
    """At most 150 lines; the two commands are the only bash blocks, of one line each."""
    assert len(README.splitlines()) <= 150
    commands = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    assert [command.count("\n") for command in commands] == [1, 1]
    assert "regolo-rerank demo" in commands[0]
    assert "pytest" in commands[1]
