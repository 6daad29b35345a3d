"""A stranger's data module: what it lacks is said once, part by part, and every accessor copes with its absence."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from toys import VOCAB, Letters
from training.fits import settings, trainer

from pkm_lightning.data import FactsDataModule, base
from pkm_lightning.training import LanguageModule


def rows() -> DataLoader[dict[str, Tensor]]:
    ids_NT = torch.randint(VOCAB, (4, 9))
    return DataLoader([{"input_ids": row[:-1], "labels": row[1:]} for row in ids_NT], batch_size=2)  # type: ignore[arg-type]


class Stranger(L.LightningDataModule):
    """What is required and no more."""

    vocab_size = VOCAB

    def train_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        return rows()


#: What a class body adds, and the clause of the sentence that then goes.
PARTS: dict[str, tuple[dict[str, Any], str]] = {
    "tokenizer": ({"tokenizer": Letters()}, "no tokenizer (no sample answers, recall, predict, generate or chat)"),
    "validation": (
        {"val_dataloader": Stranger.train_dataloader},
        "no val_dataloader (no held-out loss while training)",
    ),
    "test": ({"test_dataloader": Stranger.train_dataloader}, "no test_dataloader (no test after training)"),
    "state": (
        {"state_dict": lambda self: {}, "load_state_dict": lambda self, state: None},
        "no state_dict and load_state_dict (a run that is continued takes its first batch again)",
    ),
    "fingerprint": ({"fingerprint": "abc"}, "no fingerprint (reports do not notice runs on other data)"),
}


def stranger(*parts: str) -> Stranger:
    members = {name: value for part in parts for name, value in PARTS[part][0].items()}
    made: Stranger = type("MyData", (Stranger,), members)()
    return made


@pytest.mark.parametrize("part", PARTS)
def test_each_part_that_is_there_is_not_said_to_be_missing(part: str) -> None:
    said = base.missing_parts(stranger(part))
    clauses = [clause for name, (_, clause) in PARTS.items() if name != part]
    assert said == f"MyData has {', '.join(clauses)}: pkm_lightning/data/base.py lists what each part is."


def test_nothing_is_said_of_what_has_everything(prepared: FactsDataModule) -> None:
    assert base.missing_parts(stranger(*PARTS)) is None
    assert base.missing_parts(None) is None  # loaders alone, which nobody calls a data source
    assert base.missing_parts(prepared) is None


def test_a_loader_may_keep_the_position() -> None:
    loader = SimpleNamespace(state_dict=dict, load_state_dict=print)
    parts = [part for part in PARTS if part != "state"]
    assert base.missing_parts(stranger(*parts), loader) is None
    assert "state_dict" in (base.missing_parts(stranger(*parts), SimpleNamespace(state_dict=dict)) or "")


def test_a_fit_says_it_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="pkm_lightning"):
        trainer(max_epochs=2).fit(LanguageModule(settings("ffn=dense")), stranger())
    (said,) = [record.getMessage() for record in caplog.records if "lists what each part is" in record.getMessage()]
    assert all(clause in said for _, clause in PARTS.values())


def test_accessors_of_nothing() -> None:
    bare = stranger()
    assert base.data_of(None) is None
    assert base.vocab_size_of(bare) == VOCAB
    for accessor in (base.tokenizer_of, base.tokenizer_digest, base.n_facts_of, base.fingerprint_of):
        assert accessor(bare) is None
        assert accessor(None) is None
    assert base.recall_items_of(bare, None) == []
    assert not base.is_endless(bare)
    assert not base.yields_whole_steps(bare)
    assert [base.defines(bare, f"{name}_dataloader") for name in ("train", "val", "test", "predict")] == [True] + [
        False
    ] * 3
    tokenizer = Letters()
    assert base.prompt_ids(tokenizer, "a") == [2]
    assert base.prompt_ids(tokenizer, "") == [0]
    assert base.begin_ids(tokenizer) == {"begin_id": None, "prefix_id": None}
    assert base.chat_template_of(tokenizer) is None
