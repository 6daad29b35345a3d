"""Recall items: the subjects and templates of each form."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import pytest

from pkm_lightning.data import FactsDataModule, RecallItem
from pkm_lightning.data.facts import Fact
from pkm_lightning.data.facts.templates import QUESTIONS, STATEMENTS, UNSEEN_QUESTIONS, UNSEEN_STATEMENTS, prompt
from pkm_lightning.errors import ConfigError

FORM_TEMPLATES = {
    "seen": STATEMENTS,
    "paraphrase": STATEMENTS,
    "unseen_template": UNSEEN_STATEMENTS,
    "question": QUESTIONS,
    "unseen_question": UNSEEN_QUESTIONS,
    "control": STATEMENTS,
}


@pytest.fixture(scope="module")
def items(prepared: FactsDataModule) -> list[RecallItem]:
    return prepared.recall_items(forms=tuple(FORM_TEMPLATES))


@pytest.fixture(scope="module")
def fact_and_form(prepared: FactsDataModule) -> dict[tuple[str, str], tuple[Fact, int]]:
    """Returns fact and form of every possible prompt and answer."""
    return {
        (prompt(fact.relation, form, fact.subject), fact.answer): (fact, form)
        for fact in prepared.facts()
        for form in range(16)
    }


def test_each_form_uses_its_subjects_and_templates(
    items: list[RecallItem], fact_and_form: dict[tuple[str, str], tuple[Fact, int]]
) -> None:
    n_controls = sum(fact.control for fact, form in fact_and_form.values() if form == 0)
    left = n_controls - n_controls // 4  # validations have the others
    assert Counter(item.form for item in items) == {**dict.fromkeys(FORM_TEMPLATES, 40), "control": min(40, left)}
    for item in items:
        fact, template = fact_and_form[item.prompt, item.answer]
        assert template in FORM_TEMPLATES[item.form]
        assert fact.control == (item.form == "control")
        assert (item.relation, item.exposures, item.decile) == (fact.relation, fact.exposures, fact.decile)
        assert (template == fact.held_out) == (item.form == "paraphrase") or fact.control
        assert not (item.form.endswith("question") and fact.questioned)


def test_options_are_distinct_answers_of_the_relation(items: list[RecallItem], prepared: FactsDataModule) -> None:
    answers = {(fact.relation, fact.answer) for fact in prepared.facts()}
    for item in items:
        assert len(set(item.options)) == 4
        assert item.answer in item.options
        assert all((item.relation, option) in answers for option in item.options)
    places = Counter(item.options.index(item.answer) for item in items)
    assert min(places.values()) > len(items) / 8


def test_prior_bits_are_those_of_the_marginal(items: list[RecallItem], prepared: FactsDataModule) -> None:
    years = Counter(fact.answer for fact in prepared.facts() if fact.relation == "debut_year")
    for item in items:
        if item.relation == "debut_year":
            assert item.prior_bits == pytest.approx(-math.log2(years[item.answer] / years.total()))
            assert not item.majority or years[item.answer] == max(years.values())


def test_the_sample_is_fixed_and_a_limit_only_shortens_it(prepared: FactsDataModule, items: list[RecallItem]) -> None:
    few = prepared.recall_items(limit=5)
    assert len(few) == 25
    assert few[:5] == items[:5]
    assert all(item in items for item in few)


def test_deciles_rank_the_subjects(prepared: FactsDataModule) -> None:
    people = [f.decile for f in prepared.facts() if f.relation == "debut_year" and not f.control]
    assert people == sorted(people)
    assert set(people) == set(range(10))


def test_wrong_arguments_are_refused(prepared: FactsDataModule, facts: Callable[..., FactsDataModule]) -> None:
    with pytest.raises(ConfigError, match=r"forms='sen' is not known; .*Did you mean 'seen'"):
        prepared.recall_items(forms=["sen"])
    with pytest.raises(ConfigError, match="limit=-1 is out of range"):
        prepared.recall_items(limit=-1)
