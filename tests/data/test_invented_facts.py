"""Invented facts: as many as asked for, forms that training never shows, questions of two facts, disjoint draws."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small import Run

from pkm_lightning.data.facts.invented import InventedChoice, InventedFacts, invent
from pkm_lightning.data.facts.invented_files import write_invented
from pkm_lightning.data.facts.invented_names import DRAWS
from pkm_lightning.data.facts.invented_templates import CHAINS, WORDINGS
from pkm_lightning.errors import RunDirectoryError


def choice(n_facts: int = 100, **changes: int) -> InventedChoice:
    return InventedChoice(**{"n_facts": n_facts, "shown": 4, "controls": 20, "seed": 0, "draw": 0, **changes})


def names(invented: InventedFacts) -> set[str]:
    """Returns the words that distinguish the subjects and answers."""
    words = {text.split()[-1] for fact in invented.facts for text in (fact.subject, fact.answer)}
    return {word for word in words if not word.isdigit()}


def test_templates_name_the_subject_and_end_where_the_answer_begins() -> None:
    for wording in WORDINGS.values():
        assert len(set(wording.statements)) == 6
        assert all(t.count("{s}") == 1 and t == t.strip() for t in (*wording.statements, *wording.questions))
        assert all(t.startswith("Question: ") and t.endswith("? Answer:") for t in wording.questions)
    assert all(t.count("{s}") == 1 and t.endswith("? Answer:") for chain in CHAINS for t in chain.questions)


@pytest.mark.parametrize("n_facts", [1, 2, 7, 46, 100, 2000])
def test_there_are_as_many_facts_as_asked_for_each_about_one_thing(n_facts: int) -> None:
    invented = invent(choice(n_facts))
    assert len(invented.facts) == n_facts
    assert len({(fact.subject, fact.relation) for fact in invented.facts}) == n_facts


def test_what_tests_ask_is_shown_of_other_facts_and_never_of_this_one() -> None:
    facts = invent(choice()).facts
    of_subject = {
        (fact.relation, fact.subject): {t.replace(fact.subject, "{s}") for t in fact.prompts} for fact in facts
    }
    for fact in facts:
        assert len(fact.prompts) == 4
        assert len(fact.test_prompts) == 2
        assert not set(fact.prompts) & set(fact.test_prompts)
        assert fact.question.startswith("Question: ")
        held_out = {t.replace(fact.subject, "{s}") for t in fact.test_prompts}
        others = [shown for key, shown in of_subject.items() if key != (fact.relation, fact.subject)]
        assert held_out <= set().union(*others)


def test_two_facts_answer_a_question_that_neither_answers_alone() -> None:
    invented = invent(choice())
    assert len(invented.chains) > 60
    for one in invented.chains:
        first, second = one.facts
        assert first in invented.facts
        assert second in invented.facts
        assert first.answer == second.subject
        assert one.answer == second.answer != first.answer
        assert first.subject in one.question
        assert second.subject not in one.question


def test_controls_are_about_nobody_that_is_taught_with_answers_that_are() -> None:
    invented = invent(choice())
    assert len(invented.controls) == 20
    assert not {fact.subject for fact in invented.controls} & {fact.subject for fact in invented.facts}
    assert {fact.answer for fact in invented.controls} <= {
        f.answer for f in invented.facts if f.relation == "birth_city"
    }


def test_draws_share_no_name_whatever_their_sizes_and_seeds() -> None:
    many, few, last = (names(invent(c)) for c in (choice(2000), choice(draw=1, seed=7), choice(300, draw=DRAWS - 1)))
    assert len(many) > 1000
    assert not many & few
    assert not many & last
    assert invent(choice(seed=1)) != invent(choice()) == invent(choice())
    # Else a fact could be told from others by the draw that it is of.
    assert len({word[-2:] for word in many}) > 10


def test_the_files_are_written_once_and_others_are_not_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "new" / "invented"
    assert write_invented(choice(), out) == {
        "facts.jsonl": 100, "train.jsonl": 400, "composition.jsonl": 78, "controls.jsonl": 20,
    }  # fmt: skip
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    assert write_invented(choice(), out) == {}
    with pytest.raises(RunDirectoryError, match=r"invented holds other invented facts; choose another folder, or"):
        write_invented(choice(seed=1), out)
    assert before == {file.name: file.read_bytes() for file in out.iterdir()}
    assert write_invented(choice(seed=1), out, overwrite=True)["facts.jsonl"] == 100
    (out / "notes.txt").write_text("of somebody")
    with pytest.raises(RunDirectoryError, match=r"holds notes\.txt, which is not of invented facts"):
        write_invented(choice(), out, overwrite=True)
    with pytest.raises(RunDirectoryError, match="is no folder"):
        write_invented(choice(), out / "notes.txt", overwrite=True)


def test_the_command_writes_what_fit_reads(cli: Run, tmp_path: Path) -> None:
    shown = cli("prepare", "data=invented", "data.n_facts=10", "out=facts")
    assert shown.code == 0, shown.err
    assert "facts.jsonl             10 lines" in shown.out
    facts = [json.loads(line) for line in (tmp_path / "facts" / "facts.jsonl").read_text().splitlines()]
    rows = [json.loads(line) for line in (tmp_path / "facts" / "train.jsonl").read_text().splitlines()]
    expected = [(prompt, fact["answer"]) for fact in facts for prompt in [fact["prompt"], *fact["paraphrases"]]]
    assert [(row["prompt"], row["answer"]) for row in rows] == expected
    prepared = cli("prepare", "data=jsonl", "data.path=facts/train.jsonl", "data.tokenizer=bytes", "out=tokens")
    assert prepared.code == 0, prepared.err
    assert "40 documents" in prepared.out
    assert "up to date" in cli("prepare", "data=invented", "data.n_facts=10", "out=facts").out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data.n_facts=0", "out=x"], "data.n_facts=0 is out of range"),
        (["data.n_facts=2.5", "out=x"], "data.n_facts=2.5 is not a whole number"),
        (["data.shown=6", "out=x"], "data.shown=6 is out of range"),
        (["data.draw=61", "out=x"], "data.draw=61 is out of range"),
        (["data.controls=-1", "out=x"], "data.controls=-1 is out of range"),
        ([], "out is not set; set it to the folder"),
        (["data.n_fact=3", "out=x"], "Did you mean 'n_facts'?"),
        (["sets=[piqa]", "out=x"], "sets is for data=benchmarks, not for data=invented"),
        (["overwrite=maybe", "out=x"], "overwrite='maybe' is neither true nor false"),
    ],
)
def test_what_cannot_be_written_is_refused(cli: Run, tmp_path: Path, arguments: list[Any], message: str) -> None:
    refused = cli("prepare", "data=invented", *arguments)
    assert refused.code == 2
    assert message in refused.err
    assert not (tmp_path / "x").exists()
