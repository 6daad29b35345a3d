"""Selection of facts: trained subjects, controls, subjects with questions, and the held-out form of each fact."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from pkm_lightning.data.facts.exposures import exposure_counts
from pkm_lightning.data.facts.subjects import LOADERS, Subject
from pkm_lightning.data.facts.templates import CITY_RELATION, COUNTRY_RELATIONS, PEOPLE_RELATIONS, STATEMENTS
from pkm_lightning.errors import ConfigError, check_choice, check_range

# Controls come from the first of these that has subjects: names of people occur in no answer, those of places may.
CONTROL_DOMAINS = ("people", "cities", "countries")


@dataclass(frozen=True)
class FactsChoice:
    """The keys of `data=facts` that determine the facts; see configs/data/facts.yaml.

    Raises:
        ConfigError: for a value out of range, an unknown relation, or nothing to learn.
    """

    people: int
    people_relations: Sequence[str]
    countries: int
    country_relations: Sequence[str]
    cities: int
    control_subjects: int
    exposures: float
    exposure_distribution: str
    zipf_exponent: float
    max_exposures: int
    question_subjects: float
    question_share: float
    seed: int
    eval_facts: int

    def __post_init__(self) -> None:
        for key in ("people", "countries", "cities", "control_subjects", "seed"):
            check_range(f"data.{key}", getattr(self, key), low=0)
        for key in ("question_subjects", "question_share"):
            check_range(f"data.{key}", getattr(self, key), low=0, high=1)
        check_range("data.eval_facts", self.eval_facts, low=1)
        check_range("data.max_exposures", self.max_exposures, low=1)
        check_range("data.exposures", self.exposures, low=1, high=self.max_exposures)
        if self.exposure_distribution == "uniform" and self.exposures % 1:
            raise ConfigError(
                f"data.exposures={self.exposures} cannot be uniform, where each fact is shown equally often; give a "
                "whole number, or set data.exposure_distribution=zipf."
            )
        check_range("data.zipf_exponent", self.zipf_exponent, low=0, high=3)
        check_choice("data.exposure_distribution", self.exposure_distribution, ["uniform", "zipf"])
        self._check_relations("people", self.people, "people_relations", PEOPLE_RELATIONS)
        self._check_relations("countries", self.countries, "country_relations", COUNTRY_RELATIONS)
        if self.people + self.countries + self.cities == 0:
            raise ConfigError("data.people, data.countries and data.cities are all 0; at least one must be above 0.")

    def _check_relations(self, domain: str, count: int, key: str, allowed: Iterable[str]) -> None:
        relations = getattr(self, key)
        for relation in relations:
            check_choice(f"data.{key}", relation, allowed)
        if count and not relations:
            raise ConfigError(
                f"data.{key}=[] leaves data.{domain}={count} without facts; set one or more of: {', '.join(allowed)}."
            )

    def domains(self) -> dict[str, tuple[int, Sequence[str]]]:
        """Returns number of subjects and relations of each domain that has any."""
        sizes = {
            "people": (self.people, self.people_relations),
            "countries": (self.countries, self.country_relations),
            "cities": (self.cities, (CITY_RELATION,)),
        }
        return {domain: size for domain, size in sizes.items() if size[0]}


@dataclass(frozen=True)
class Fact:
    """One answer about one subject.

    Attributes:
        subject, relation, answer: the fact.
        exposures: times per epoch that it is shown; 0 for a control, which training never shows.
        decile: of the subject's prominence within its domain, 0 the most prominent tenth; 9 for controls.
        questioned: whether training shows facts of this subject as questions.
        held_out: the statement form (0-9) that training never shows for this fact.
        control: whether the subject is a control.
    """

    subject: str
    relation: str
    answer: str
    exposures: int
    decile: int
    questioned: bool
    held_out: int
    control: bool


def choose_facts(choice: FactsChoice) -> list[Fact]:
    """Returns the facts of a run, a function of `choice` and the installed packages alone.

    Raises:
        ConfigError: if there are fewer subjects than `choice` asks for, with their number.
        DataError: if a package is missing.
    """
    facts: list[Fact] = []
    # A name that an earlier domain has is ambiguous in later ones, whether it was chosen there or not.
    used_names: set[str] = set()
    for domain, (count, relations) in choice.domains().items():
        first_control = next(name for name in CONTROL_DOMAINS if name in choice.domains())
        controls = choice.control_subjects if domain == first_control else 0
        eligible = [
            subject
            for subject in LOADERS[domain]()
            if subject.name not in used_names and any(relation in subject.answers for relation in relations)
        ]
        _require_enough(domain, count, controls, relations, len(eligible))
        used_names.update(subject.name for subject in eligible)
        facts += _domain_facts(choice, domain, eligible, count, controls)
    return _with_held_out_forms(facts, np.random.default_rng([choice.seed, len(LOADERS)]))


def _require_enough(domain: str, count: int, controls: int, relations: Sequence[str], available: int) -> None:
    if count + controls > available:
        control_text = f" plus data.control_subjects={controls}" if controls else ""
        raise ConfigError(
            f"data.{domain}={count}{control_text} exceeds the {available} {domain} with a unique name and one of "
            f"{', '.join(relations)}; set data.{domain}={max(available - controls, 0)} or less."
        )


def _domain_facts(choice: FactsChoice, domain: str, eligible: list[Subject], count: int, controls: int) -> list[Fact]:
    """Returns the facts of `count` trained subjects, by prominence, followed by those of the controls."""
    # One generator per domain, so that the size of one domain does not change the subjects of another.
    rng = np.random.default_rng([choice.seed, list(LOADERS).index(domain)])
    selection = rng.permutation(len(eligible))[: count + controls]
    # `eligible` is sorted by prominence, which exposures and deciles follow.
    trained = [eligible[i] for i in np.sort(selection[:count])]
    questioned = rng.permutation(count) < round(count * choice.question_subjects)
    counts = exposure_counts(
        count,
        mean=choice.exposures,
        distribution=choice.exposure_distribution,
        exponent=choice.zipf_exponent,
        maximum=choice.max_exposures,
    )
    relations = choice.domains()[domain][1]
    facts: list[Fact] = []
    for rank, subject in enumerate(trained):
        template = Fact("", "", "", int(counts[rank]), 10 * rank // count, bool(questioned[rank]), 0, False)
        facts += _subject_facts(subject, relations, template)
    for i in np.sort(selection[count:]):
        facts += _subject_facts(eligible[i], relations, Fact("", "", "", 0, 9, False, 0, True))
    return facts


def _subject_facts(subject: Subject, relations: Sequence[str], template: Fact) -> list[Fact]:
    return [
        replace(template, subject=subject.name, relation=relation, answer=subject.answers[relation])
        for relation in dict.fromkeys(relations)
        if relation in subject.answers
    ]


def _with_held_out_forms(facts: list[Fact], rng: np.random.Generator) -> list[Fact]:
    """Assigns the held-out forms evenly within each relation, so that nine facts in ten show any given form."""
    by_relation: defaultdict[str, list[int]] = defaultdict(list)
    for i, fact in enumerate(facts):
        by_relation[fact.relation].append(i)
    held_out = np.zeros(len(facts), dtype=np.int64)
    for indices in by_relation.values():
        held_out[rng.permutation(indices)] = np.arange(len(indices)) % len(STATEMENTS)
    return [replace(fact, held_out=int(form)) for fact, form in zip(facts, held_out, strict=True)]
