"""Sparse finetuning of small models by the real Trainer, in one process or on each rank of a group.

Letters: N rows.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import distributed_jobs as jobs
import torch
import usage_jobs
from torch import Tensor
from usage_jobs import Raw

from pkm_lightning.adaptation import ReadBackground
from pkm_lightning.adaptation.row_chooser import RowChooser
from pkm_lightning.adaptation.row_reads import RowReads
from pkm_lightning.build.finetuning import finetuning_callbacks
from pkm_lightning.build.model import build_meta_model
from pkm_lightning.training import LanguageModule

BASE = ["finetune=sparse", "finetune.rows=5", "optim.lr=0.1", "optim.schedule=linear", "optim.warmup_share=0"]


def background(overrides: list[str], path: Path) -> ReadBackground:
    """Writes a random background of the tables of a model."""
    reads = RowReads(build_meta_model(jobs.settings(*BASE, *overrides)))
    generator = torch.Generator().manual_seed(3)
    counts = {name: torch.randint(10, (n,), generator=generator) for name, n in reads.rows.items()}
    made = ReadBackground(9, {name: n.int() for name, n in counts.items()}, {name: n * 4 for name, n in counts.items()})
    made.save(path)
    return made


class Finetuned:
    """What a finetuning leaves: the whole state of module and optimizer, losses, traces, and the callback."""

    def __init__(self, overrides: list[str], steps: int, path: Path | None = None, **options: Any) -> None:
        given = [*BASE, *overrides, *([f"finetune.background={path}"] if path else [])]
        settings = jobs.settings(*given, steps=steps)
        (self.callback,) = finetuning_callbacks(settings)
        self.raw = Raw()
        module, self.trainer, self.losses = usage_jobs.fit(given, steps, [self.callback, self.raw], **options)
        self.model = module.model
        self.settings = settings

    @property
    def state(self) -> dict[str, Tensor]:
        """Parameters, buffers and optimizer states by name."""
        state = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        optimizer = self.trainer.optimizers[0]
        for number, entry in optimizer.state_dict()["state"].items():
            state |= {f"optimizer.{number}.{name}": torch.as_tensor(value) for name, value in entry.items()}
        return state

    @property
    def chooser(self) -> RowChooser:
        """The rows that were chosen and changed."""
        chooser: RowChooser = self.callback.chooser  # type: ignore[attr-defined]
        return chooser

    def start(self) -> dict[str, Tensor]:
        """Returns the state of the model before the first step."""
        module = LanguageModule(copy.deepcopy(self.settings))
        module.configure_model()
        return module.model.state_dict()


def on_ranks(overrides: list[str], steps: int, path: str) -> tuple[list[float], dict[str, list[int]], list[float]]:
    """Returns the losses, the rows that have changed, and the norms of the tables' gradients."""
    done = Finetuned(overrides, steps, Path(path))
    changed = {name: flags.nonzero().flatten().tolist() for name, flags in done.chooser.changed.items()}
    return (
        [row["train/loss"] for row in done.losses],
        changed,
        [row["train/grad_norm_table"] for row in done.losses],
    )
