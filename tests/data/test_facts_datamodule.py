"""What training shows, read back from its batches: everything but held-out forms and controls."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest

from pkm_lightning.data import NO_TARGET, FactsDataModule
from pkm_lightning.data.facts import Fact
from pkm_lightning.data.facts.templates import QUESTIONS, STATEMENTS, TEMPLATES, UNSEEN_STATEMENTS, prompt
from pkm_lightning.errors import ConfigError


@pytest.fixture(scope="module")
def facts_of(prepared: FactsDataModule) -> list[Fact]:
    return prepared.facts()


def read_epoch(datamodule: FactsDataModule) -> list[tuple[str, str]]:
    """Returns text and target text of every document of the first epoch, decoded from the training batches."""
    remaining, documents = datamodule.splits.order.size(0), []
    loader = iter(datamodule.train_dataloader())
    while remaining > 0:
        batch = next(loader)
        for b in range(min(remaining, len(batch["input_ids"]))):
            ids, labels, docs = (batch[name][b] for name in ("input_ids", "labels", "doc_ids"))
            for doc in range(int(docs.max()) + 1):
                targets = labels[(docs == doc) & (labels != NO_TARGET)].tolist()
                assert targets[-1] == datamodule.tokenizer.eos_id
                text = datamodule.tokenizer.decode([*ids[docs == doc].tolist()])
                documents.append((text, datamodule.tokenizer.decode(targets)))
        remaining -= len(batch["input_ids"])
    return documents


@pytest.fixture(scope="module")
def epoch(prepared: FactsDataModule) -> list[tuple[str, str]]:
    return read_epoch(prepared)


def test_an_epoch_shows_every_fact_as_often_as_its_exposures(
    epoch: list[tuple[str, str]], facts_of: list[Fact], prepared: FactsDataModule
) -> None:
    trained = {
        f"{prompt(f.relation, form, f.subject)} {f.answer}": f
        for f in facts_of
        for form in (*STATEMENTS, *QUESTIONS)
        if form != f.held_out and not f.control
    }
    shown = Counter(trained[text] for text, _ in epoch)
    assert shown == {fact: fact.exposures for fact in facts_of if not fact.control}
    assert len(shown) == prepared.n_facts
    assert all(target == f" {trained[text].answer}" for text, target in epoch)


def test_each_fact_lacks_its_form_which_others_show(epoch: list[tuple[str, str]], facts_of: list[Fact]) -> None:
    texts = {text for text, _ in epoch}
    shown_by = defaultdict(set)
    for i, fact in enumerate(facts_of):
        for form in STATEMENTS:
            if f"{prompt(fact.relation, form, fact.subject)} {fact.answer}" in texts:
                assert form != fact.held_out
                shown_by[fact.relation, form].add(i)
    assert all(shown_by[relation, form] for relation in ("birth_date", "capital") for form in STATEMENTS)


def test_unseen_templates_never_appear(epoch: list[tuple[str, str]]) -> None:
    heads = [TEMPLATES[relation][form].split("{s}")[0] for relation in TEMPLATES for form in UNSEEN_STATEMENTS]
    assert not any(text.startswith(head) for text, _ in epoch for head in heads if head)


def test_half_of_the_subjects_are_never_questioned(epoch: list[tuple[str, str]], facts_of: list[Fact]) -> None:
    questions = [text for text, _ in epoch if text.startswith("Question:")]
    questioned = {f.subject for f in facts_of if f.questioned}
    unquestioned = {f.subject for f in facts_of if not f.questioned and not f.control}
    assert len(questioned) == len(unquestioned) == 45
    assert len(questions) / sum(f.exposures for f in facts_of if f.questioned) == pytest.approx(0.3, abs=0.05)
    for f in facts_of:
        if not f.questioned:
            assert not {f"{prompt(f.relation, form, f.subject)} {f.answer}" for form in QUESTIONS} & set(questions)


def test_controls_occur_in_no_training_text(epoch: list[tuple[str, str]], facts_of: list[Fact]) -> None:
    everything = "\n".join(text for text, _ in epoch)
    assert not [fact.subject for fact in facts_of if fact.control and fact.subject in everything]


def test_validation_and_test_ask_about_different_facts_in_their_held_out_forms(
    prepared: FactsDataModule, facts_of: list[Fact]
) -> None:
    held_out = {f"{prompt(f.relation, f.held_out, f.subject)} {f.answer}" for f in facts_of if not f.control}
    validation, test = (
        [
            prepared.tokenizer.decode(ids[docs == doc].tolist())
            for batch in loader
            for ids, docs in zip(batch["input_ids"], batch["doc_ids"], strict=True)
            for doc in range(int(docs.max()) + 1)
        ]
        for loader in (prepared.val_dataloader(), prepared.test_dataloader())
    )
    assert (len(test), len(validation)) == (40, 36)  # a quarter of 74 facts with questions, and of 74 without
    assert set(validation) | set(test) <= held_out
    assert not set(validation) & set(test)
    assert prepared.own_test


def test_no_question_of_a_validation_is_about_a_fact_of_the_test(
    prepared: FactsDataModule, facts_of: list[Fact]
) -> None:
    number = {
        (prompt(fact.relation, form, fact.subject), fact.answer): i
        for i, fact in enumerate(facts_of)
        for form in range(16)
    }
    test, validation = (
        {number[item.prompt, item.answer] for item in items}
        for items in (prepared.recall_items(), prepared.validation_items())
    )
    assert {facts_of[i].control for i in validation} == {False, True}
    assert not test & validation


def test_very_few_facts_are_asked_in_both(facts: Callable[..., FactsDataModule]) -> None:
    few = facts(people=1, countries=0, control_subjects=0, tokenizer="bytes", seq_len=128)
    few.prepare_data()
    assert not few.own_test
    assert few.validation_items() == few.recall_items() != []


def test_one_statement_per_sequence_and_loss_on_all(facts: Callable[..., FactsDataModule]) -> None:
    datamodule = facts(packing="none", loss="all")
    datamodule.prepare_data()
    batch = next(iter(datamodule.train_dataloader()))
    assert batch["input_ids"].shape[1] % 8 == 0
    assert batch["doc_ids"].max() == 0
    assert ((batch["labels"] != NO_TARGET) == batch["valid"]).all()
    assert batch["labels"].max() < datamodule.vocab_size == 600


def test_zipf_shows_prominent_subjects_more_often(facts: Callable[..., FactsDataModule]) -> None:
    datamodule = facts(exposure_distribution="zipf", countries=0, max_exposures=50, tokenizer="bytes", seq_len=128)
    counts = [fact.exposures for fact in datamodule.facts() if fact.relation == "debut_year" and not fact.control]
    assert counts[0] == 50
    assert counts == sorted(counts, reverse=True)
    assert datamodule.vocab_size == 258


def test_a_short_sequence_is_refused_when_the_data_are_built(facts: Callable[..., FactsDataModule]) -> None:
    with pytest.raises(
        ConfigError, match=r"data\.seq_len=8 is too short for the longest statement; set data\.seq_len="
    ):
        facts(seq_len=8).prepare_data()


@pytest.mark.parametrize("key", ["packing", "loss"])
def test_unknown_choices_are_refused(facts: Callable[..., FactsDataModule], key: str) -> None:
    with pytest.raises(ConfigError, match=rf"data\.{key}='x' is not known; allowed: "):
        facts(**{key: "x"})


def test_the_fingerprint_distinguishes_data_but_not_orders(facts: Callable[..., FactsDataModule]) -> None:
    one = facts().fingerprint
    assert one == facts(order_seed=9, num_workers=2).fingerprint
    assert len({one, facts(loss="all").fingerprint, facts(seq_len=96).fingerprint, facts(seed=1).fingerprint}) == 4


@pytest.mark.slow
def test_two_processes_build_equal_files(prepared: FactsDataModule, tmp_path: Path) -> None:
    code = (
        "import sys; from conftest import FACTS, LOADER; "
        "from pkm_lightning.data import FactsDataModule; "
        "FactsDataModule(**LOADER, **FACTS, cache_dir=sys.argv[1]).prepare_data()"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env=environment)
    ours = prepared.cache_folder()
    theirs = tmp_path / ours.name
    assert sorted(p.name for p in ours.iterdir()) == sorted(p.name for p in theirs.iterdir())
    assert [p.name for p in ours.iterdir() if p.read_bytes() != (theirs / p.name).read_bytes()] == []
