"""Training jobs that every rank of a group runs: a whole model by the real Trainer, on its share of given batches."""

from __future__ import annotations

import copy
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from toys import config
from training.fits import loader, rows

from pkm_lightning.cli.assembly import make_trainer
from pkm_lightning.training import LanguageModule

#: Rows of an optimizer step, over all ranks.
GLOBAL_BATCH = 8


class Losses(L.Callback):
    """The loss and norms of every step."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if not trainer.fit_loop._should_accumulate():
            self.seen.append({k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("train/")})


def settings(*overrides: str, steps: int = 30) -> dict[str, Any]:
    """A small model with the package's own optimizers, clipped so that norms count."""
    return config(
        "model.dim=32", "model.ffn_dim=48", "model.n_heads=2", "model.n_kv_heads=2", "model.memory.n_keys=16",
        "model.memory.key_dim=16", "model.memory.knn=4", "model.memory.heads=2", f"trainer.max_steps={steps}",
        "trainer.accelerator=cpu", "trainer.log_every_n_steps=1", "optim.clip_norm=0.5", "optim.table_clip_norm=0.05",
        "trainer.val_check_interval=null", "+trainer.limit_val_batches=0", "logger=none", "callbacks=none", *overrides,
    )  # fmt: skip


def batches(steps: int) -> list[dict[str, torch.Tensor]]:
    """The same global batches for every number of ranks."""
    torch.manual_seed(7)
    return [rows(GLOBAL_BATCH, length=6) for _ in range(steps)]


def share(batch: dict[str, torch.Tensor], parts: int, part: int) -> dict[str, torch.Tensor]:
    """The rows of one rank and micro-batch."""
    return {name: value.chunk(parts)[part] for name, value in batch.items()}


def fit(given: dict[str, Any], steps: int, **options: Any) -> tuple[LanguageModule, L.Trainer, list[dict[str, float]]]:
    """Trains for `steps` optimizer steps on this rank's share; in one process on everything."""
    given = copy.deepcopy(given)
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    given["trainer"]["devices"] = world
    accumulate = given["trainer"]["accumulate_grad_batches"]
    mine = [
        share(batch, world * accumulate, micro * world + rank)
        for batch in batches(steps)
        for micro in range(accumulate)
    ]
    losses = Losses()
    trainer = make_trainer(given, callbacks=[losses], loggers=[])
    module = LanguageModule(given)
    trainer.fit(module, loader(mine), **options)
    return module, trainer, losses.seen


def train(overrides: list[str], steps: int = 30) -> list[dict[str, float]]:
    return fit(settings(*overrides, steps=steps), steps)[2]


def train_and_save(overrides: list[str], steps: int, path: str) -> list[dict[str, float]]:
    _, trainer, losses = fit(settings(*overrides), steps)
    trainer.save_checkpoint(path)
    return losses


def resume_and_save(overrides: list[str], steps: int, path: str, saved_again: str) -> list[dict[str, float]]:
    """Takes up `path`, trains to `steps` optimizer steps since the start, and saves."""
    given = settings(*overrides)
    given["trainer"]["max_steps"] = steps
    _, trainer, losses = fit(given, steps, ckpt_path=path)
    trainer.save_checkpoint(saved_again)
    return losses
