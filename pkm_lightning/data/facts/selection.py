"""Selection of facts: trained subjects, controls, subjects with questions, and the held-out form of each fact."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from pkm_lightning.data.facts.exposures import exposure_counts
from pkm_lightning.data.facts.subjects import LOADERS, Subject
from pkm_lightning.data.facts.templates import CITY_RELATION, COUNTRY_RELATIONS, PEOPLE_RELATIONS, STATEMENTS
from pkm_lightning.errors import ConfigError, check_choice, check_range

_log = logging.getLogger(__name__)
#: A draw that has a smaller share of the subjects that were asked for is refused.
_LEAST_SHARE_OF_A_DRAW = 0.8
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
    draw: int = 0
    skip: int = 0

    def __post_init__(self) -> None:
        for key in ("people", "countries", "cities", "control_subjects", "seed", "draw", "skip"):
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
        ConfigError: if there are fewer subjects than `choice` asks for, with their number; in a later draw if there
            are fewer than four fifths.
        DataError: if a package is missing.
    """
    facts: list[Fact] = []
    n_asked = n_drawn = 0
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
        _require_enough(choice, domain, controls, len(eligible))
        used_names.update(subject.name for subject in eligible)
        drawn = _draw(choice, domain, eligible, count, controls)
        facts += _domain_facts(choice, domain, drawn)
        n_asked, n_drawn = n_asked + count, n_drawn + len(drawn.trained)
    if n_drawn < _LEAST_SHARE_OF_A_DRAW * n_asked:
        raise ConfigError(
            f"data.draw={choice.draw} leaves {n_drawn:,} of the {n_asked:,} subjects that were asked for, as earlier "
            "draws have the others; ask for fewer, or set data.draw=0 and another data.seed, which shares some of them."
        )
    return _with_held_out_forms(facts, np.random.default_rng([choice.seed, len(LOADERS)]))


def _require_enough(choice: FactsChoice, domain: str, controls: int, available: int) -> None:
    count, relations = choice.domains()[domain]
    others = f" plus data.control_subjects={controls}" if controls else ""
    others += f" plus data.skip={choice.skip}" if choice.skip else ""
    if count + controls + choice.skip > available:
        raise ConfigError(
            f"data.{domain}={count}{others} exceeds the {available} {domain} with a unique name and one of "
            f"{', '.join(relations)}; set data.{domain}={max(available - controls - choice.skip, 0)} or less."
        )


@dataclass(frozen=True)
class _Draw:
    """Subjects of a domain by prominence, which exposures and deciles follow, and the generator that drew them."""

    trained: list[Subject]
    controls: list[Subject]
    rng: np.random.Generator


def _draw(choice: FactsChoice, domain: str, eligible: list[Subject], count: int, controls: int) -> _Draw:
    """Returns `count` trained subjects and the controls: draw k has the k-th part of what one permutation has left.

    A later draw, which may have only what earlier ones leave, has fewer trained subjects then.
    """
    # One generator per domain, so that the size of one domain does not change the subjects of another.
    rng = np.random.default_rng([choice.seed, list(LOADERS).index(domain)])
    size = count + controls
    selection = rng.permutation(len(eligible))[choice.skip :][choice.draw * size : (choice.draw + 1) * size]
    n_trained = max(0, len(selection) - controls)
    if n_trained < count:
        _log.info("data.draw=%d has %d instead of %d %s: no more are left", choice.draw, n_trained, count, domain)
    # `eligible` is sorted by prominence.
    trained, controlled = ([eligible[i] for i in np.sort(part)] for part in np.split(selection, [n_trained]))
    return _Draw(trained, controlled, rng)


def _domain_facts(choice: FactsChoice, domain: str, drawn: _Draw) -> list[Fact]:
    """Returns the facts of the trained subjects, by prominence, followed by those of the controls."""
    trained, count = drawn.trained, len(drawn.trained)
    questioned = drawn.rng.permutation(count) < round(count * choice.question_subjects)
    counts = exposure_counts(
        max(count, 1),  # a law of none has no scale
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
    for subject in drawn.controls:
        facts += _subject_facts(subject, relations, Fact("", "", "", 0, 9, False, 0, True))
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
