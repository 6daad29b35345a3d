"""metrics.csv: a row at every log step and every validation, kept exactly over kills and resumes.

Lightning's own CSVLogger deletes the file when it opens it, and writes a step's row after that step's checkpoint. Here
the rows are on disk before the checkpoint that counts them, so that a loss of power leaves no gap between the two.

Columns: `step`, `tokens` (real input tokens so far, all ranks), `seconds` (training time so far, without validation),
`flops` (tokens times the model's training FLOPs per token), then every logged metric. A row has what the callbacks
before this one have logged in the step; the Trainer calls it after all others but those that write checkpoints.
"""

from __future__ import annotations

import csv
import io
import logging
from itertools import takewhile
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_only

from pkm_lightning.callbacks.base import find_callback, in_training
from pkm_lightning.callbacks.evaluate import Evaluate
from pkm_lightning.callbacks.stopwatch import Stopwatch, TimedCallback
from pkm_lightning.storage import flush, write_beside
from pkm_lightning.training import LanguageModule

__all__ = ["MetricsCSV"]

_log = logging.getLogger(__name__)
_FIRST_COLUMNS = ("step", "tokens", "seconds", "flops")


class MetricsCSV(TimedCallback):
    """Writer of the rows, on rank 0. Its state is the number of rows and the columns at the time of a checkpoint.

    Args:
        path: the file.
    """

    #: Behind the callbacks whose metrics it writes.
    hook_order = 1

    def __init__(self, *, path: str) -> None:
        super().__init__()
        self.path = Path(path)
        self._columns: list[str] = list(_FIRST_COLUMNS)
        self._n_rows = 0

    def state_dict(self) -> dict[str, Any]:
        """Returns the number of rows and the columns so far, and the seconds trained."""
        return {"columns": self._columns, "rows": self._n_rows, "seconds": self.stopwatch.seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores them; the file itself is truncated when training starts."""
        self._columns, self._n_rows = list(state["columns"]), state["rows"]
        self.stopwatch = Stopwatch(state["seconds"])

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Waits until all rows are on disk; the checkpoint is written afterwards."""
        if trainer.is_global_zero and self.path.exists():
            flush(self.path)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Cuts the file to the rows of the checkpoint; a fresh run starts an empty file."""
        # A killed run may have written rows after its last checkpoint.
        self._truncate()
        super().on_train_start(trainer, pl_module)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Appends a row after the last micro-batch of a step that logs, before that step's checkpoint is written."""
        assert isinstance(pl_module, LanguageModule)
        if pl_module.log_is_due():
            self._append(trainer, pl_module, metrics_of(trainer, "train/"))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Appends a row of the validation's metrics, if it is part of training."""
        assert isinstance(pl_module, LanguageModule)
        if in_training(trainer):
            self._append(trainer, pl_module, metrics_of(trainer, "val/"))
        super().on_validation_end(trainer, pl_module)

    @rank_zero_only
    def _append(self, trainer: L.Trainer, pl_module: LanguageModule, metrics: dict[str, Any]) -> None:
        tokens = int(pl_module.tokens_seen)
        row = {
            "step": trainer.global_step,
            "tokens": tokens,
            "seconds": round(self.stopwatch.seconds, 3),
            "flops": tokens * pl_module.cost.train_flops,
            # Reads the device; a log is due, so it may.
            **{name: float(value) for name, value in sorted(metrics.items())},
        }
        new = [name for name in row if name not in self._columns]
        if new:
            # The header grows, so the whole file is written again.
            rows = self._read()
            self._columns = [*self._columns, *new]
            self._replace(rows)
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self._columns).writerow(row)
        self._n_rows += 1

    @rank_zero_only
    def _truncate(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rows = self._read()[: self._n_rows] if self._n_rows else []
        if len(rows) < self._n_rows:
            last = rows[-1]["step"] if rows else 0
            _log.warning(
                "%s has %d of the %d rows that the checkpoint counts; those after step %s are lost",
                *(self.path, len(rows), self._n_rows, last),
            )
            # Else the next resume would take rows that come after its checkpoint for the lost ones.
            self._n_rows = len(rows)
        self._replace(rows)

    def _read(self) -> list[dict[str, str]]:
        if not self.path.exists():
            return []
        with self.path.open(newline="", errors="replace") as file:
            # After a loss of power the last row may be cut short or consist of zeros.
            lines = (line for line in file if line.endswith("\n") and "\0" not in line)
            return list(takewhile(_is_whole, csv.DictReader(lines)))

    def _replace(self, rows: list[dict[str, str]]) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self._columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
        write_beside(self.path, text.getvalue())


def _is_whole(row: dict[str, Any]) -> bool:
    """Returns whether a row has a step and as many fields as there are columns."""
    return str(row.get("step")).isdigit() and None not in row.values() and None not in row


def metrics_of(trainer: L.Trainer, prefix: str) -> dict[str, Any]:
    """Returns what was logged under `prefix`, and the benchmarks of this step."""
    evaluate = find_callback(trainer, Evaluate)
    benchmarks = evaluate.metrics if evaluate is not None and evaluate.step == trainer.global_step else {}
    return {**{k: v for k, v in trainer.callback_metrics.items() if k.startswith(prefix)}, **benchmarks}
