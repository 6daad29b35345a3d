"""metrics.csv: a row at every log step and every validation, kept exactly over kills and resumes.

Lightning's own CSVLogger deletes the file when it opens it and writes a step's row after that step's checkpoint.

Columns: `step`, `tokens` (real input tokens so far, all ranks), `seconds` (training time so far, without validation),
`flops` (tokens times the model's training FLOPs a token), then every logged metric. A row has what callbacks before
this one have logged in the step; `fit` puts it behind all others but those that write checkpoints.
"""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_only

from pkm_lightning.callbacks.stopwatch import Stopwatch, TimedCallback, in_training, step_logs
from pkm_lightning.training import LanguageModule

_FIRST_COLUMNS = ("step", "tokens", "seconds", "flops")


class MetricsCSV(TimedCallback):
    """Writes the rows on rank 0. Its state is the number of rows and the columns at the time of a checkpoint.

    Args:
        path: the file.
    """

    order = 1  # behind the callbacks whose figures it writes

    def __init__(self, *, path: str) -> None:
        super().__init__()
        self.path = Path(path)
        self._columns: list[str] = list(_FIRST_COLUMNS)
        self._n_rows = 0

    def state_dict(self) -> dict[str, Any]:
        """Rows and columns so far, and seconds trained."""
        return {"columns": self._columns, "rows": self._n_rows, "seconds": self.stopwatch.seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up the count; the file itself is cut when training starts."""
        self._columns, self._n_rows = list(state["columns"]), state["rows"]
        self.stopwatch = Stopwatch(state["seconds"])

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Cuts the file back to the rows of the checkpoint; a fresh run starts an empty one."""
        self._truncate()
        super().on_train_start(trainer, pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """A row after the last micro-batch of a step that logs, before that step's checkpoint is written."""
        if step_logs(trainer):
            metrics = trainer.callback_metrics
            self._append(trainer, pl_module, {k: v for k, v in metrics.items() if k.startswith("train/")})

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A row of the validation's metrics, if it is part of training."""
        if in_training(trainer):
            metrics = trainer.callback_metrics
            self._append(trainer, pl_module, {k: v for k, v in metrics.items() if k.startswith("val/")})
        super().on_validation_end(trainer, pl_module)

    @rank_zero_only
    def _append(self, trainer: L.Trainer, pl_module: L.LightningModule, metrics: dict[str, Any]) -> None:
        assert isinstance(pl_module, LanguageModule)
        tokens = int(pl_module.tokens_seen)
        row = {
            "step": trainer.global_step,
            "tokens": tokens,
            "seconds": round(self.stopwatch.seconds, 3),
            "flops": tokens * pl_module.cost.train_flops,
            **{name: float(value) for name, value in sorted(metrics.items())},
        }
        new = [name for name in row if name not in self._columns]
        if new:
            rows = self._read()
            self._columns = [*self._columns, *new]
            self._replace(rows)
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self._columns).writerow(row)
        self._n_rows += 1

    @rank_zero_only
    def _truncate(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._replace(self._read()[: self._n_rows] if self._n_rows else [])

    def _read(self) -> list[dict[str, str]]:
        if not self.path.exists():
            return []
        with self.path.open(newline="") as file:
            return list(csv.DictReader(file))

    def _replace(self, rows: list[dict[str, str]]) -> None:
        """Writes the whole file beside and renames it."""
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self._columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
        beside = self.path.with_suffix(".csv.tmp")
        beside.write_text(text.getvalue(), newline="")
        os.replace(beside, self.path)
