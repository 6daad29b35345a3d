"""Invented facts about persons, cities and companies that do not exist, for measuring what a model learns anew.

Persons were born in the cities and work for the companies, so that two facts together answer further questions. Real
facts may be known to a pretrained model, or follow from what it knows; these cannot be.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from math import ceil

import numpy as np

from pkm_lightning.data.facts.invented_names import DRAWS, InventedNames
from pkm_lightning.data.facts.invented_templates import CHAINS, WORDINGS, Wording, stated
from pkm_lightning.errors import check_integer

#: Statements of each relation that training may show of a fact; one at least is held out.
MOST_SHOWN = min(len(wording.statements) for wording in WORDINGS.values()) - 1
_PERSONS_PER_CITY, _PERSONS_PER_COMPANY, _CITIES_PER_COUNTRY = 3, 4, 2
#: Three of a person; two of a city and one of a company, shared by those who live and work there.
_FACTS_PER_PERSON = 3 + Fraction(2, _PERSONS_PER_CITY) + Fraction(1, _PERSONS_PER_COMPANY)
_YEARS = range(1100, 2000)


@dataclass(frozen=True)
class InventedChoice:
    """What determines the facts; see configs/prepare/data/invented.yaml.

    Raises:
        ConfigError: for a value out of range.
    """

    n_facts: int
    shown: int
    controls: int
    seed: int
    draw: int

    def __post_init__(self) -> None:
        check_integer("data.n_facts", self.n_facts, 1, 50_000)
        check_integer("data.shown", self.shown, 1, MOST_SHOWN)
        check_integer("data.controls", self.controls, 0, 10_000)
        check_integer("data.seed", self.seed, 0)
        check_integer("data.draw", self.draw, 0, DRAWS - 1)


@dataclass(frozen=True)
class InventedFact:
    """One answer about one subject.

    Attributes:
        subject, relation, answer: the fact.
        prompts: statements that training shows, each a text that the answer continues.
        test_prompts: statements that training never shows of this fact, but of others.
        question: in a form that training never shows.
    """

    subject: str
    relation: str
    answer: str
    prompts: tuple[str, ...]
    test_prompts: tuple[str, ...]
    question: str

    @property
    def sentence(self) -> str:
        """The first statement with its answer, as a context for questions."""
        return f"{self.prompts[0]} {self.answer}."


@dataclass(frozen=True)
class TwoFactQuestion:
    """A question that two facts answer together; neither alone does.

    Attributes:
        question, answer: as of a fact.
        facts: both, in the order in which they are needed.
    """

    question: str
    answer: str
    facts: tuple[InventedFact, InventedFact]


@dataclass(frozen=True)
class InventedFacts:
    """The facts of a choice, what follows from two of them, and controls: facts that nothing shows.

    Attributes:
        facts: in random order.
        chains: questions whose two facts are among `facts`.
        controls: about other persons; their answers occur in `facts`.
    """

    facts: tuple[InventedFact, ...]
    chains: tuple[TwoFactQuestion, ...]
    controls: tuple[InventedFact, ...]


def invent(choice: InventedChoice) -> InventedFacts:
    """Returns the facts, a function of `choice` alone."""
    rng = np.random.default_rng([choice.seed, choice.draw])
    names = InventedNames(choice.draw, rng)
    n_persons = ceil(choice.n_facts / _FACTS_PER_PERSON)
    cities = [names.word() for _ in range(ceil(n_persons / _PERSONS_PER_CITY))]
    companies = [names.word() for _ in range(ceil(n_persons / _PERSONS_PER_COMPANY))]
    countries = [names.word() for _ in range(ceil(len(cities) / _CITIES_PER_COUNTRY))]
    answers: dict[str, dict[str, str]] = {relation: {} for relation in WORDINGS}
    _invent_persons(answers, [names.person() for _ in range(n_persons)], cities, companies, rng)
    answers["country"] = dict(zip(cities, _spread(countries, len(cities), rng), strict=True))
    answers["river"] = {city: names.word() for city in cities}
    answers["product"] = {company: names.word() for company in companies}
    # Where there are a few too many, years of birth are left out, on which no chain depends.
    order = ("birth_city", "country", "employer", "product", "river", "birth_year")
    triples = [(subject, name, answer) for name in order for subject, answer in answers[name].items()][: choice.n_facts]
    facts = [_worded(triples[i], rng.permutation(6), choice.shown, rng) for i in rng.permutation(len(triples))]
    strangers: dict[str, dict[str, str]] = {relation: {} for relation in WORDINGS}
    _invent_persons(strangers, [names.person() for _ in range(choice.controls)], cities, companies, rng)
    controls = [
        _worded((subject, "birth_city", answer), rng.permutation(6), choice.shown, rng)
        for subject, answer in strangers["birth_city"].items()
    ]
    return InventedFacts(tuple(facts), tuple(_chains(facts, rng)), tuple(controls))


def _invent_persons(
    answers: dict[str, dict[str, str]],
    persons: list[str],
    cities: list[str],
    companies: list[str],
    rng: np.random.Generator,
) -> None:
    """Adds the facts of `persons` to `answers`, by relation and subject."""
    answers["birth_city"] |= dict(zip(persons, _spread(cities, len(persons), rng), strict=True))
    answers["employer"] |= dict(zip(persons, _spread(companies, len(persons), rng), strict=True))
    years = rng.integers(_YEARS.start, _YEARS.stop, len(persons)).tolist()
    answers["birth_year"] |= dict(zip(persons, map(str, years), strict=True))


def _spread(values: list[str], n: int, rng: np.random.Generator) -> list[str]:
    """Returns `n` of the values in random order, each about as often."""
    return [values[i % len(values)] for i in rng.permutation(n)]


def _worded(triple: tuple[str, str, str], order: np.ndarray, shown: int, rng: np.random.Generator) -> InventedFact:
    subject, relation, answer = triple
    wording: Wording = WORDINGS[relation]
    statements = [stated(wording.statements[i], subject) for i in order]
    question = stated(wording.questions[rng.integers(len(wording.questions))], subject)
    return InventedFact(subject, relation, answer, tuple(statements[:shown]), tuple(statements[shown:]), question)


def _chains(facts: list[InventedFact], rng: np.random.Generator) -> Iterator[TwoFactQuestion]:
    by_subject = {(fact.relation, fact.subject): fact for fact in facts}
    for first in facts:
        for chain in CHAINS:
            second = by_subject.get((chain.second, first.answer))
            if first.relation == chain.first and second is not None:
                question = stated(chain.questions[rng.integers(len(chain.questions))], first.subject)
                yield TwoFactQuestion(question, second.answer, (first, second))
