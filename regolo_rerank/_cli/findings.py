"""Which prompt format is right at a server, by what it scores.

Two findings, each by its own numbers: whether the server puts query and document into a template, and how well each
format separates pairs that fit from pairs that do not.
"""

from collections.abc import Callable, Iterator
from statistics import mean
from typing import Final, NamedTuple

from regolo_rerank.errors import BadRequestError, RegoloError
from regolo_rerank.prompts import DEFAULT_INSTRUCTION, PRESETS, PromptFormat

__all__ = ["PAIRS", "Ask", "Separation", "Template", "Verdict", "judge", "probe_template", "separate"]

Ask = Callable[[PromptFormat, str, list[str], str], list[float]]
"""From a prompt format, a query, N documents and an instruction to N scores, in the documents' order."""

PAIRS: Final = {
    "How do plants turn sunlight into food?": (
        [
            "Plants turn sunlight into food by photosynthesis: the chlorophyll in their leaves catches the light.",
            "In photosynthesis a plant turns light, water and carbon dioxide into sugar, which is its food.",
            "Leaves are where plants make their food; the energy for it comes from sunlight.",
            "Sunlight drives a reaction in green plants that turns water and carbon dioxide into sugar, their food.",
        ],
        [
            "Sunlight on the skin helps the body to make vitamin D.",
            "Potted plants need a larger pot every second year.",
            "Solar panels on the roof turn light into electricity for the house.",
            "The restaurant by the harbour serves its food until midnight.",
        ],
    ),
    "What is the capital of Australia?": (
        [
            "Canberra is the capital of Australia.",
            "The capital city of Australia is Canberra, which lies between Sydney and Melbourne.",
            "The parliament of Australia meets in Canberra, the capital.",
            "Canberra was founded in 1913 to be the capital of Australia.",
        ],
        [
            "Sydney is a larger city than any other one in that country.",
            "Wellington lies at the southern end of New Zealand's North Island.",
            "Wool, wheat and coal are sent abroad from many harbours.",
            "Whoever opens an office needs capital for the first months.",
        ],
    ),
    "Come si cancella un file in Python?": (
        [
            "In Python un file si cancella con os.remove(), che ne vuole il percorso.",
            "Per cancellare un file in Python si chiama il metodo unlink() di pathlib.Path.",
            "Un file si cancella in Python con os.unlink() o con os.remove().",
            "In Python si cancella un file con os.remove() e una cartella intera con shutil.rmtree().",
        ],
        [
            "Il pitone è un serpente che non ha veleno.",
            "Con open() si legge un testo riga per riga.",
            "Le fatture si conservano per dieci anni in un armadio.",
            "In Java le stringhe si confrontano con equals().",
        ],
    ),
}
"""By query: documents that answer it, and as many that only share its words or its field."""

FITTING: Final = sum(len(fitting) for fitting, _ in PAIRS.values())

_OTHER_TASK: Final = "Given the name of a dish, retrieve recipes"
_TOLERANCE: Final = 1e-5
"""A server's scores of one pair differ by less, from one request to the next (1.2e-7 were seen)."""
_TIED: Final = 0.99
"""Formats that come this close to the best difference are as good as it."""

_WITH_INSTRUCTION: Final = frozenset({"server_template"})
_WITHOUT: Final = frozenset(PRESETS) - _WITH_INSTRUCTION


class Template(NamedTuple):
    """What a server does with the strings that it gets, by the scores of one text that is cut in two ways.

    Attributes:
        late: The score of ("What is", " Rome?").
        early: The score of ("What", " is Rome?").
        again: The score of the former in another request.
        tasks: Its scores with two different tasks in the field `instruction`; None where the server refuses the field.
    """

    late: float
    early: float
    again: float
    tasks: tuple[float, float] | None

    @property
    def _tolerance(self) -> float:
        return max(_TOLERANCE, 2 * abs(self.late - self.again))

    @property
    def concatenates(self) -> bool | None:
        """Whether query and document are put together as they are; None where the scores cannot tell."""
        if abs(self.late - self.early) > self._tolerance:
            return False
        # At the ends of the scale all texts look alike.
        return None if self.late in {0.0, 1.0} else True

    @property
    def takes_instruction(self) -> bool:
        """Whether the field `instruction` changes a score."""
        return self.tasks is not None and abs(self.tasks[0] - self.tasks[1]) > self._tolerance

    @property
    def fitting_formats(self) -> frozenset[str]:
        """The formats that go with what the server does."""
        return _WITH_INSTRUCTION if self.takes_instruction else _WITHOUT

    def describe(self) -> Iterator[str]:
        """Say what the server does, with the numbers that show it."""
        together = {
            True: "exactly the same, so they are put together as they are: the server applies no template",
            False: "differently, so the server keeps them apart, by a template or a separator",
            None: "the same, but at the end of the scale, which tells nothing",
        }[self.concatenates]
        yield f'("What is", " Rome?") and ("What", " is Rome?") score {self.late:.6f} and {self.early:.6f}: {together}'
        if self.tasks is None:
            yield "the field instruction is refused"
            return
        effect = "changes the score: a template uses it" if self.takes_instruction else "changes nothing"
        yield f"two tasks in the field instruction score {self.tasks[0]:.6f} and {self.tasks[1]:.6f}: it {effect}"


class Separation(NamedTuple):
    """How well a format separates pairs that fit from pairs that do not.

    Attributes:
        above: How many of the pairs that fit score above every other.
        difference: The mean score of the pairs that fit, less that of the others.
    """

    above: int
    difference: float

    @property
    def separates(self) -> bool:
        """Whether this is no accident: half of the pairs that fit above all others come 7 in 1,000 times by chance."""
        return self.difference > 0 and 2 * self.above >= FITTING

    def __str__(self) -> str:
        return f"{self.above} of {FITTING}, {self.difference:+.4f}"


class Verdict(NamedTuple):
    """What follows from both findings.

    Attributes:
        prompt_format: The name of the preset to take; None where no format separates.
        words: Why.
        agree: Whether the findings agree.
    """

    prompt_format: str | None
    words: str
    agree: bool


def probe_template(ask: Ask) -> Template:
    """Find out whether a server applies a template, by five requests of one document."""
    raw, with_field = PromptFormat(escape=False), PromptFormat(escape=False, instruction_field="instruction")
    (late,) = ask(raw, "What is", [" Rome?"], DEFAULT_INSTRUCTION)
    (early,) = ask(raw, "What", [" is Rome?"], DEFAULT_INSTRUCTION)
    (again,) = ask(raw, "What is", [" Rome?"], DEFAULT_INSTRUCTION)
    try:
        (first,) = ask(with_field, "What is", [" Rome?"], DEFAULT_INSTRUCTION)
        (second,) = ask(with_field, "What is", [" Rome?"], _OTHER_TASK)
    except BadRequestError:
        return Template(late, early, again, None)
    return Template(late, early, again, (first, second))


def separate(ask: Ask, instruction: str) -> dict[str, Separation | RegoloError]:
    """Find out how well each preset separates the built-in pairs, or what the server says to it."""
    found: dict[str, Separation | RegoloError] = {}
    for name, prompt_format in PRESETS.items():
        fitting: list[float] = []
        others: list[float] = []
        try:
            for query, (fits, does_not) in PAIRS.items():
                scores = ask(prompt_format, query, [*fits, *does_not], instruction)
                fitting += scores[: len(fits)]
                others += scores[len(fits) :]
        except RegoloError as error:
            found[name] = error
        else:
            found[name] = Separation(sum(score > max(others) for score in fitting), mean(fitting) - mean(others))
    return found


def judge(template: Template, separations: dict[str, Separation | RegoloError], preferred: str) -> Verdict:
    """Return which format to take.

    Args:
        template: What the server does.
        separations: How well each format separates.
        preferred: The format to take where others are as good.
    """
    measured = {name: found for name, found in separations.items() if isinstance(found, Separation)}
    usable = {name: found for name, found in measured.items() if found.separates}
    if not usable:
        return Verdict(
            None,
            "no format separates the pairs that fit from the others, so none can be named: is this model a reranker?",
            agree=False,
        )
    best = max(found.difference for found in usable.values())
    tied = [name for name, found in usable.items() if found.difference >= _TIED * best]
    fitting = template.fitting_formats
    chosen = min(tied, key=lambda name: (name not in fitting, -usable[name].above, name != preferred))
    doubts = []
    if template.concatenates and template.takes_instruction:
        doubts.append("query and document are put together as they are, yet the field instruction has an effect")
    if chosen not in fitting:
        expected = [f"{name} ({measured[name]})" if name in measured else name for name in PRESETS if name in fitting]
        doubts.append(f"by what the server does with its strings it should be {' or '.join(expected)}")
    above = max(found.above for found in usable.values())
    if above > usable[chosen].above:
        others = [f"{name} ({found})" for name, found in usable.items() if found.above == above]
        doubts.append(f"more pairs that fit stand above every other with {' and '.join(others)}")
    if doubts:
        words = f"the findings disagree: {chosen} separates best ({usable[chosen]}), but {'; and '.join(doubts)}"
    else:
        words = f"the findings agree: {chosen} goes with the server, and separates best"
    return Verdict(chosen, words, agree=not doubts)
