"""Recall items of the facts: trained facts in less and less familiar forms, and controls that were never trained."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from itertools import islice

import numpy as np

from pkm_lightning.data.base import RecallItem
from pkm_lightning.data.facts.selection import Fact
from pkm_lightning.data.facts.templates import (
    FORMS,
    QUESTIONS,
    STATEMENTS,
    UNSEEN_QUESTIONS,
    UNSEEN_STATEMENTS,
    prompt,
)

N_OPTIONS = 4
DEFAULT_FORMS = ("seen", "paraphrase", "unseen_template", "question", "control")


class Marginals:
    """Frequencies of the answers within each relation, over all facts."""

    def __init__(self, facts: Sequence[Fact]) -> None:
        counters: defaultdict[str, Counter[str]] = defaultdict(Counter)
        for fact in facts:
            counters[fact.relation][fact.answer] += 1
        self._answers = {relation: sorted(counter) for relation, counter in counters.items()}
        self._numbers = {
            relation: {answer: number for number, answer in enumerate(answers)}
            for relation, answers in self._answers.items()
        }
        self._counts = {
            relation: np.asarray([counters[relation][answer] for answer in answers], dtype=np.float64)
            for relation, answers in self._answers.items()
        }

    def prior_bits(self, fact: Fact) -> float:
        """Returns -log2 of the share of this answer in its relation."""
        counts = self._counts[fact.relation]
        return -math.log2(counts[self._numbers[fact.relation][fact.answer]] / counts.sum())

    def is_majority(self, fact: Fact) -> bool:
        """Returns whether no answer of the relation is more frequent (the first in the alphabet on a tie)."""
        return self._answers[fact.relation][int(self._counts[fact.relation].argmax())] == fact.answer

    def options(self, fact: Fact, rng: np.random.Generator) -> tuple[str, ...]:
        """Returns the answer and three others, drawn by frequency; empty if the relation has fewer than four."""
        answers = self._answers[fact.relation]
        if len(answers) < N_OPTIONS:
            return ()
        # Drawn by frequency: a rare option among common ones would be recognised as the answer without any knowledge.
        weights = self._counts[fact.relation].copy()
        weights[self._numbers[fact.relation][fact.answer]] = 0
        others = rng.choice(len(answers), size=N_OPTIONS - 1, replace=False, p=weights / weights.sum())
        options = [fact.answer, *(answers[i] for i in others)]
        return tuple(options[i] for i in rng.permutation(N_OPTIONS))


def recall_items(
    facts: Sequence[Fact], codes: np.ndarray, sample: np.ndarray, *, per_form: int, seed: int, forms: Sequence[str]
) -> list[RecallItem]:
    """Returns up to `per_form` items per form, a pure function of the arguments.

    Args:
        facts: all facts, controls included.
        codes: fact * 16 + form of every sentence that training shows.
        sample: fact numbers in the order in which to take them.
        per_form: items per form, fewer where there are not so many facts.
        seed: decides the form, where a fact has several, and the options.
        forms: see `RecallItem`. Both forms of question are about subjects that training never asks about: `question`
            uses the questions of training, `unseen_question` others.
    """
    shown: defaultdict[int, list[int]] = defaultdict(list)
    for code in codes.tolist():
        if code % FORMS in STATEMENTS:
            shown[code // FORMS].append(code % FORMS)
    # The templates with which a form can ask about fact i; a form without any skips that fact.
    candidates: dict[str, Callable[[int], Sequence[int]]] = {
        "seen": lambda i: shown.get(i, ()),
        "paraphrase": lambda i: () if facts[i].control else (facts[i].held_out,),
        "unseen_template": lambda i: () if facts[i].control else UNSEEN_STATEMENTS,
        "question": lambda i: () if facts[i].control or facts[i].questioned else QUESTIONS,
        "unseen_question": lambda i: () if facts[i].control or facts[i].questioned else UNSEEN_QUESTIONS,
        "control": lambda i: STATEMENTS if facts[i].control else (),
    }
    marginals = Marginals(facts)
    items: list[RecallItem] = []
    for form in forms:
        number = list(candidates).index(form)
        for i in islice(filter(candidates[form], sample.tolist()), per_form):
            # One generator per item, so that an item does not depend on the others that are asked for.
            rng = np.random.default_rng([seed, number, i])
            template = int(rng.choice(candidates[form](i)))
            items.append(_item(facts[i], form, template, marginals, rng))
    return items


def _item(fact: Fact, form: str, template: int, marginals: Marginals, rng: np.random.Generator) -> RecallItem:
    return RecallItem(
        prompt=prompt(fact.relation, template, fact.subject),
        answer=fact.answer,
        options=marginals.options(fact, rng),
        relation=fact.relation,
        form=form,
        exposures=fact.exposures,
        decile=fact.decile,
        prior_bits=marginals.prior_bits(fact),
        majority=marginals.is_majority(fact),
    )
