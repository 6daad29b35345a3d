"""A data module that breaks the contract later on is refused in that batch, in training, validation and prediction."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from training.fits import Batch, loader, rows, settings, trainer

from pkm_lightning.data.base import NO_TARGET
from pkm_lightning.errors import DataError
from pkm_lightning.training import LanguageModule

LATER: dict[str, tuple[Callable[[Batch], Any], str]] = {
    "id": (lambda batch: {**batch, "input_ids": batch["input_ids"] + 50}, "token ids run from"),
    "label": (lambda batch: {**batch, "labels": batch["labels"].clamp(min=0) + 50}, "token ids run from"),
    "no labels": (lambda batch: {"input_ids": batch["input_ids"]}, r"got \['input_ids'\]"),
    "nothing": (lambda batch: None, "got NoneType"),
    "int32": (lambda batch: {**batch, "labels": batch["labels"].int()}, "is torch.int32"),
    "float ids": (lambda batch: {**batch, "input_ids": batch["input_ids"].float()}, "is torch.float32"),
    "float valid": (lambda batch: {**batch, "valid": torch.ones(2, 8)}, "it must be a tensor of bool"),
}


def batches(spoil: Callable[[Batch], Any], at: int) -> list[Any]:
    return [spoil(rows(2)) if i == at else rows(2) for i in range(at + 1)]


@pytest.mark.parametrize("name", LATER)
def test_a_later_batch_is_refused(name: str) -> None:
    spoil, message = LATER[name]
    given, where = settings("ffn=dense"), r"^batch 2 of {}_dataloader.*{}"
    with pytest.raises(DataError, match=where.format("train", message)):
        trainer().fit(LanguageModule(given), loader(batches(spoil, 2)))
    if name == "id":  # whatever is wrong, the other loops look in the same way
        with pytest.raises(DataError, match=where.format("val", message)):
            trainer().validate(LanguageModule(given), loader(batches(spoil, 2)), verbose=False)
        with pytest.raises(DataError, match=where.format("test", message)):
            trainer().test(LanguageModule(given), loader(batches(spoil, 2)), verbose=False)


def without_targets(batch: Batch) -> Batch:
    return {**batch, "labels": torch.full_like(batch["labels"], NO_TARGET)}


def test_data_without_any_target_are_refused() -> None:
    given, empty = settings("ffn=dense"), [without_targets(rows(2)) for _ in range(4)]
    with pytest.raises(
        DataError, match="train_dataloader: the first optimizer step has no target, all labels are -100"
    ):
        trainer(accumulate_grad_batches=2).fit(LanguageModule(given), loader(empty))
    with pytest.raises(DataError, match="val_dataloader: the val data has no target"):
        trainer().validate(LanguageModule(given), loader(empty), verbose=False)
    with pytest.raises(DataError, match="test_dataloader: the test data has no target"):
        trainer().test(LanguageModule(given), loader(empty), verbose=False)
    trainer().validate(LanguageModule(given), loader([*empty, rows(2)]), verbose=False)


def test_a_batch_for_predict_without_prompts_is_refused() -> None:
    with pytest.raises(DataError, match="batch 0 of predict_dataloader must be a dict with prompt"):
        trainer().predict(LanguageModule(settings("ffn=dense")), loader([rows(2)]))
