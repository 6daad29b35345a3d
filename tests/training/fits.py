"""Small fits of the real LightningModule through the real Trainer, on batches that the test gives.

Letters: B sequences, T tokens.
"""

from __future__ import annotations

import copy
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from toys import VOCAB, config

from pkm_lightning.data.base import NO_TARGET
from pkm_lightning.training import LanguageModule

Batch = dict[str, Tensor]


def settings(*overrides: str, lr: float = 0.5) -> dict[str, Any]:
    """Plain gradient descent at a constant rate, unclipped: weights then show what the gradients were."""
    made = config("model.dim=16", "model.ffn_dim=12", "trainer.max_steps=100", *overrides)
    made["model"]["memory"] = None
    made["optim"].update(
        optimizer={"_target_": "torch.optim.SGD"}, lr=lr, weight_decay=0.0, table_lr_factor=1.0,
        clip_norm=None, table_clip_norm=None, schedule="linear", warmup_share=0, final_factor=1.0,
    )  # fmt: skip
    made["table"]["optimizer"] = {"_target_": "pkm_lightning.memory.RowOptimizer", "rule": "sgd"}
    return made


def rows(count: int, length: int = 8) -> Batch:
    """Rows of which each has another number of targets, one of them none."""
    ids_BT = torch.randint(VOCAB, (count, length))
    labels_BT = torch.randint(VOCAB, (count, length))
    for b in range(count):
        labels_BT[b, : (3 * b) % (length + 1)] = NO_TARGET
    return {"input_ids": ids_BT, "labels": labels_BT}


def split(batch: Batch, sizes: list[int]) -> list[Batch]:
    """The rows of `batch` as micro-batches of these sizes."""
    parts = {name: value.split(sizes) for name, value in batch.items()}
    return [{name: parts[name][i] for name in parts} for i in range(len(sizes))]


def trainer(**changes: Any) -> L.Trainer:
    quiet: dict[str, Any] = {
        "accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False, "max_epochs": 1,
        "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0, "log_every_n_steps": 1,
    }  # fmt: skip
    return L.Trainer(**{**quiet, **changes})


def loader(batches: list[Any]) -> DataLoader[Any]:
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


def fit(given: dict[str, Any], batches: list[Batch], **changes: Any) -> LanguageModule:
    """The module after one epoch over `batches`, in float64 unless told otherwise."""
    module = LanguageModule(copy.deepcopy(given))
    trainer(**{"precision": "64-true", **changes}).fit(module, loader(batches))
    return module
