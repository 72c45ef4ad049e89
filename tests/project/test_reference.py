"""The reference: its tables have every option with its default, and the report that it shows is true."""

import inspect
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from regolo_rerank import RegoloClient
from regolo_rerank.langchain import RegoloRerank as LangChainRerank
from regolo_rerank.llama_index import RegoloRerank as LlamaIndexRerank
from regolo_rerank.options import Options

DOCS = Path(__file__).parents[2] / "docs"
ADAPTERS: dict[str, type[Options]] = {"LangChain": LangChainRerank, "LlamaIndex": LlamaIndexRerank}
PAGE = (DOCS / "reference/options.md").read_text("utf-8")
TABLE = {name: cells for name, *cells in re.findall(r"^\| `(\w+)` \| (.*) \| (.*) \|$", PAGE, re.MULTILINE)}


def defaults_of(cls: type[Options]) -> dict[str, Any]:
    """Return the default of each option."""
    return {name: field.get_default(call_default_factory=True) for name, field in cls.model_fields.items()}


def test_the_table_has_each_option_of_the_client_with_its_default() -> None:
    """The page, the signature of the client and the fields of `Options` agree."""
    signature = inspect.signature(RegoloClient).parameters
    shared = {name: default for name, (default, meaning) in TABLE.items() if "only.*" not in meaning}
    assert shared.keys() == signature.keys() == Options.model_fields.keys()
    for name, default in defaults_of(Options).items():
        assert signature[name].default == default
        shown = repr(default) if shared[name] == "web search" else shared[name].partition(";")[0].strip("`")
        assert eval(shown) == default, name  # noqa: S307 - a literal on our own page


@pytest.mark.parametrize("framework", ADAPTERS)
def test_the_table_has_each_option_of_an_adapter_with_its_default(framework: str) -> None:
    """The options of an adapter are those of the client, and those that the page attributes to it."""
    defaults = defaults_of(ADAPTERS[framework])
    own = {name for name, (_, meaning) in TABLE.items() if re.match(rf"\*(Adapters|{framework}) only", meaning)}
    assert defaults.keys() == Options.model_fields.keys() | own
    changed = {name for name, default in defaults_of(Options).items() if defaults[name] != default}
    assert changed == {"top_n"}
    assert TABLE["top_n"][0].endswith(f"adapters `{defaults['top_n']}`")
    for name in own - {"callback_manager"}:
        shown = TABLE[name][0].strip("`").strip('"')
        assert shown == str(defaults[name]), name


def test_the_page_of_the_command_line_has_each_option(capsys: pytest.CaptureFixture[str]) -> None:
    """The tables have the options that the help of the commands lists, and no others."""
    main = pytest.importorskip("regolo_rerank.cli.main").main
    for command in ("rank", "bulk", "evaluate", "check", "demo"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
    listed = set(re.findall(r"^  (--[a-z-]+)", capsys.readouterr().out, re.MULTILINE))
    page = (DOCS / "reference/cli.md").read_text("utf-8")
    assert set(re.findall(r"^\| `(--[a-z-]+)", page, re.MULTILINE)) == listed


def test_the_report_on_the_evaluate_page_is_true() -> None:
    """It is the report of the 100 questions, except for the seconds and the line breaks."""
    if sys.version_info[:2] != (3, 11):
        pytest.skip("other versions of Python have other docstrings to search")
    evaluation = pytest.importorskip("regolo_rerank.evaluation")
    report = str(evaluation.evaluate(evaluation.example_queries(), RegoloClient(base_url="local://")))
    page = (DOCS / "evaluate.md").read_text("utf-8")
    (shown,) = re.findall(r"^```text\n(Queries: 100.*?)^```$", page, re.DOTALL | re.MULTILINE)
    first, second = (re.sub(r"[\d.]+ seconds", "", text).split() for text in (report, shown))
    assert first == second
