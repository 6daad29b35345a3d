"""The cache folder of facts: the facts, a tokenizer trained on what training shows, and each shown sentence once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np

from pkm_lightning.data.facts.evaluated import divide_sample
from pkm_lightning.data.facts.exposures import exposure_list
from pkm_lightning.data.facts.selection import Fact, FactsChoice, choose_facts
from pkm_lightning.data.facts.templates import FORMS, prompt
from pkm_lightning.data.statements import write_statements
from pkm_lightning.data.tokenizer import Tokenizer
from pkm_lightning.data.tokenizer_choice import TokenizerChoice

#: What facts are asked for, in the order of their statements in the store.
PARTS = ("test", "validation")


def build_facts(folder: Path, choice: FactsChoice, tokenizer_choice: TokenizerChoice) -> None:
    """Writes the data of `choice` into `folder`.

    Files: `facts.json`; `tokenizer.json`; the statements (see `StatementStore`) with `codes.npy`, fact * 16 + form of
    each; `exposures.npy`, the statement of every exposure of an epoch; `test.npy` and `validation.npy`, statements in
    their fact's held-out form, the latter empty where there are too few facts; `test_sample.npy` and
    `validation_sample.npy`, facts in the order in which evaluations take them.
    """
    facts = choose_facts(choice)
    rng = np.random.default_rng([choice.seed, FORMS])
    shown = exposure_list(
        np.asarray([fact.exposures for fact in facts]),
        np.asarray([fact.held_out for fact in facts]),
        np.asarray([fact.questioned for fact in facts]),
        choice.question_share,
        rng,
    )
    samples = divide_sample(facts, rng.permutation(len(facts)), choice.eval_facts)
    # A sentence that an epoch shows several times is stored once.
    trained_codes, exposures = np.unique(shown, return_inverse=True)
    # Statements of the test, then of validations, follow those of training in the store; no exposure refers to them.
    test_codes, validation_codes = (_held_out_codes(facts, sample, choice.eval_facts) for sample in samples)
    codes = np.concatenate([trained_codes, test_codes, validation_codes])

    tokenizer = tokenizer_choice.make(lambda: _texts(facts, trained_codes))
    _write_tokens(folder, facts, codes, tokenizer)
    tokenizer.save(folder / "tokenizer.json")
    np.save(folder / "codes.npy", codes)
    np.save(folder / "exposures.npy", exposures.astype(np.int32))
    of_test, of_validation = np.split(np.arange(len(trained_codes), len(codes), dtype=np.int32), [len(test_codes)])
    for name, statements, sample in zip(PARTS, (of_test, of_validation), samples, strict=True):
        np.save(folder / f"{name}.npy", statements)
        np.save(folder / f"{name}_sample.npy", sample)
    (folder / "facts.json").write_text(json.dumps([asdict(fact) for fact in facts], indent=0), encoding="utf-8")


def read_facts(folder: Path) -> list[Fact]:
    """Returns the facts of a cache folder."""
    return [Fact(**entry) for entry in json.loads((folder / "facts.json").read_text(encoding="utf-8"))]


def _held_out_codes(facts: list[Fact], sample: np.ndarray, limit: int) -> np.ndarray:
    """Returns the first `limit` trained facts of `sample`, each in the form that training never shows of it."""
    trained = [i for i in sample.tolist() if not facts[i].control][:limit]
    return np.asarray([i * FORMS + facts[i].held_out for i in trained], dtype=np.int64)


def _texts(facts: list[Fact], codes: np.ndarray) -> Iterator[str]:
    for code in codes.tolist():
        fact = facts[code // FORMS]
        yield f"{prompt(fact.relation, code % FORMS, fact.subject)} {fact.answer}"


def _write_tokens(folder: Path, facts: list[Fact], codes: np.ndarray, tokenizer: Tokenizer) -> None:
    """Writes the statements; prompt and answer are tokenised separately, so an answer is the same in every form."""
    answers = tokenizer.encode_batch([f" {fact.answer}" for fact in facts], follows=True)
    prompts = tokenizer.encode_batch(
        [prompt(facts[code // FORMS].relation, code % FORMS, facts[code // FORMS].subject) for code in codes.tolist()]
    )
    end = [tokenizer.eos_id]
    token_lists = (ids + answers[code // FORMS] + end for ids, code in zip(prompts, codes.tolist(), strict=True))
    write_statements(folder, token_lists, (len(ids) for ids in prompts), tokenizer.vocab_size)
