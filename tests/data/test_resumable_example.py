"""The data module of docs/extending.md that keeps its position: a run that is continued sees the same batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from pages import blocks
from tree import ROOT

from pkm_lightning.data.base import missing_parts
from pkm_lightning.data.batch_check import check_batch


class Recorder(pl.LightningModule):
    """A module that learns nothing and records what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.batches: list[list[int]] = []

    def training_step(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        check_batch(batch, 50)
        self.batches.append(batch["input_ids"].flatten().tolist())
        return self.weight * 1.0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([self.weight], lr=0.1)


def example() -> Any:
    (source,) = (block for block in blocks(ROOT / "docs" / "extending.md", "python") if "class MyData" in block)
    names: dict[str, Any] = {}
    exec(compile(source, "extending.md", "exec"), names)
    return names["MyData"]()


def train(folder: Path, steps: int, accumulate: int, checkpoint: Path | None = None) -> list[list[int]]:
    module = Recorder()
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=steps, accumulate_grad_batches=accumulate, logger=False,
        enable_progress_bar=False, enable_model_summary=False,
        callbacks=[ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)],
    )  # fmt: skip
    trainer.fit(module, example(), ckpt_path=None if checkpoint is None else str(checkpoint))
    return module.batches


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_continued_run_sees_the_batches_of_one_that_was_not_interrupted(tmp_path: Path, accumulate: int) -> None:
    whole = train(tmp_path / "whole", 6, accumulate)
    assert len(set(map(tuple, whole))) == len(whole) == 6 * accumulate
    resumed = train(tmp_path / "resumed", 6, accumulate, tmp_path / "whole" / "step=3.ckpt")
    assert resumed == whole[3 * accumulate :]


def test_it_is_complete_in_its_position() -> None:
    assert "state_dict" not in str(missing_parts(example()))
