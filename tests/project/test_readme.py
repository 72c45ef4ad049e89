import re
from pathlib import Path

from regolo_rerank import RegoloClient
from tests.support.public import OPTIONS

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")


def test_the_table_lists_every_option_with_its_default() -> None:
    """The options table names each option once, with the default that the code has."""
    rows = dict(re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| (.*?) \|", README, re.MULTILINE))
    listed = {name.strip("`"): default for names, default in rows.items() for name in names.split(", ")}
    assert listed.keys() == OPTIONS.keys()
    assert listed.pop("top_n") == "adapters `5`, client `None`"
    assert (OPTIONS["top_n"].default, RegoloClient.model_fields["top_n"].default) == (5, None)
    assert listed.pop("instruction") == "a web search task"
    for name, default in listed.items():
        assert eval(default.strip("`")) == OPTIONS[name].default, name  # noqa: S307 - our own text


def test_it_is_short_and_opens_with_the_two_commands() -> None:
    """At most 150 lines; the two commands are the only bash blocks, of one line each."""
    assert len(README.splitlines()) <= 150
    commands = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    assert [command.count("\n") for command in commands] == [1, 1]
    assert "regolo-rerank demo" in commands[0]
    assert "pytest" in commands[1]
