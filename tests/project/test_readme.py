import re
import sys
from pathlib import Path

from regolo_rerank import RegoloClient
from regolo_rerank.evaluation import evaluate, example_queries
from tests.support.public import OPTIONS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


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


def test_the_gain_that_it_names_is_the_measured_one() -> None:
    """The figures in its first ten lines are what the 100 questions come to, where the docstrings are Python 3.11's."""
    opening = "\n".join(README.splitlines()[:10])
    assert "WordLlama" in opening
    said = re.search(
        r"nDCG@10 of (\S+)\. .* it is \*\*(\S+)\*\* \((\S+), 95 % interval (\S+) to (\S+)\), "
        r"and (\d+) documents instead of (\d+)",
        opening,
    )
    assert said is not None
    if sys.version_info[:2] == (3, 11):
        variant = evaluate(example_queries(), RegoloClient(base_url="local://")).variants[0]
        gain = variant.measures["nDCG@10"]
        numbers = [f"{each:.3f}" for each in (gain.before, gain.after)]
        numbers += [f"{each:+.3f}" for each in (gain.difference, gain.low, gain.high)]
        assert list(said.groups()) == [*numbers, str(variant.top_n.after), str(variant.top_n.before)]


def test_its_picture_is_there() -> None:
    """The picture of one reranking is in the repository, and says in words what it shows."""
    ((words, path),) = re.findall(r"!\[(.*?)\]\((.*?)\)", README)
    assert len(words) > 40
    assert (ROOT / path).read_bytes().startswith(b"\x89PNG")
