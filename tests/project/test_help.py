"""What somebody who asks for it is shown of the options, before the first object is made: each in a fresh process."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import own_process
from tests.support.public import PUBLIC, descriptions_of

ROOT = Path(__file__).parents[2]
DOORS = {"client": "RegoloClient", "langchain": "RegoloRerank", "llama_index": "RegoloRerank"}
"""The classes that people make objects of, by their module."""

ASKED = """
import inspect, json, sys
from importlib import import_module
cls = getattr(import_module("regolo_rerank." + sys.argv[1]), sys.argv[2])

def shown():
    parameters = inspect.signature(cls).parameters.values()
    return [[p.name, p.kind.name, inspect.formatannotation(p.annotation), repr(p.default)] for p in parameters]

told, before = inspect.getdoc(cls), shown()
assert not cls.__pydantic_complete__  # asking has not even built what checks the options
made = cls()
assert [told, before] == [inspect.getdoc(cls), shown()] == [inspect.getdoc(made), before]
print(json.dumps([told, before, list(cls.model_fields)]))
"""

COMPLETED = """
import json, sys
from IPython.core.completer import provisionalcompleter
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
shell.run_cell(f"from regolo_rerank.{sys.argv[1]} import {sys.argv[2]}", silent=True)
found = []
for shell.Completer.use_jedi in (True, False):
    with provisionalcompleter():
        code = sys.argv[2] + "("
        found.append([completion.text for completion in shell.Completer.completions(code, len(code))])
print(json.dumps(found))
"""


def asked(code: str, module: str) -> Any:
    """Run code in a process of its own on one of the classes, and return what it prints as JSON."""
    process = own_process(code, module, DOORS[module], stdout=subprocess.PIPE)
    printed, _ = process.communicate(timeout=50)
    assert process.returncode == 0
    return json.loads(printed)


@pytest.fixture(params=DOORS)
def module(request: pytest.FixtureRequest) -> str:
    """The client's module, and those of both adapters."""
    return str(request.param)


def test_a_signature_and_a_docstring_tell_of_all_options(module: str) -> None:
    """Each option has its type and default in the one and its meaning in the other, the same at any time."""
    told, shown, fields = asked(ASKED, module)
    signature = {name: parameter for name, *parameter in shown}
    assert sorted(signature) == sorted(fields)
    assert next(iter(signature)) == "api_key"
    assert [name for name, (kind, *_) in signature.items() if kind == "POSITIONAL_OR_KEYWORD"] == ["api_key"]
    default = "None" if module == "client" else "5"
    assert signature["top_n"] == ["KEYWORD_ONLY", "Optional[int]", default]
    assert signature["timeout"] == ["KEYWORD_ONLY", "float", "60.0"]
    assert signature["http_client"] == ["KEYWORD_ONLY", "httpx.Client | None", "None"]
    assert not [name for name, (_, annotation, _) in signature.items() if "Annotated" in annotation]
    one_line = " ".join(told.split())
    (cls,) = (cls for cls in PUBLIC if cls.__module__ == f"regolo_rerank.{module}" and cls.__name__ == DOORS[module])
    described = descriptions_of(cls)
    assert set(fields) - set(described) <= {"callback_manager"}  # LlamaIndex's own
    for name in set(fields) - {"api_key", "callback_manager"}:
        assert f" {name}: {' '.join(described[name].split())} " in one_line, name
    assert " api_key: The key" in one_line
    assert "**options" not in one_line


def test_a_shell_completes_options(module: str) -> None:
    """IPython offers each option, whether it asks Jedi or not."""
    pytest.importorskip("IPython", reason="part of the extra [dev]")
    _, _, fields = asked(ASKED, module)
    for completions in asked(COMPLETED, module):
        assert {f"{name}=" for name in fields} <= set(completions)


@pytest.mark.timeout(200)
def test_pyright_knows_each_option(tmp_path: Path) -> None:
    """What editors complete by accepts every option by its name, and refuses any other, and a second position."""
    pytest.importorskip("basedpyright", reason="part of the extra [dev]")
    lines = ["from typing import Any", "def f(x: Any) -> None:"]
    for module, name in DOORS.items():
        _, _, fields = asked(ASKED, module)
        lines += [
            f"    from regolo_rerank.{module} import {name}",
            f"    {name}({', '.join(f'{f}=x' for f in fields)})",
        ]
        lines += [f"    {name}(x, nonsense=x)", f"    {name}(x, x)"]
    program = tmp_path / "program.py"
    program.write_text("\n".join(lines))
    command = [sys.executable, "-m", "basedpyright", "--pythonpath", sys.executable, "--outputjson", str(program)]
    checked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)  # noqa: S603 - our own
    said = [
        (entry["range"]["start"]["line"], entry["message"])
        for entry in json.loads(checked.stdout)["generalDiagnostics"]
        if entry["severity"] == "error"
    ]
    wrong = [number for number, line in enumerate(lines) if "nonsense" in line or "(x, x)" in line]
    assert [line for line, _ in said] == wrong
    assert ["nonsense" in message for _, message in said] == [True, False] * len(DOORS)
