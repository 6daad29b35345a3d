"""Callbacks that watch a run, one idea a file. They ship as `pkm_lightning.callbacks`."""

if __name__ != "pkm_lightning.callbacks":
    raise ImportError(
        f"'{__name__}' is pkm_lightning.callbacks; import it by that name: import pkm_lightning.callbacks"
    )

from pkm_lightning.callbacks.diagnostics import Diagnostics
from pkm_lightning.callbacks.instability import Instability
from pkm_lightning.callbacks.metrics_csv import MetricsCSV
from pkm_lightning.callbacks.progress_bar import StepProgressBar
from pkm_lightning.callbacks.recall import Recall
from pkm_lightning.callbacks.run_record import RunRecord
from pkm_lightning.callbacks.samples import Samples
from pkm_lightning.callbacks.slot_revival import SlotRevival
from pkm_lightning.callbacks.slot_usage import SlotUsage
from pkm_lightning.callbacks.step_checkpoint import RunInterrupted, StepCheckpoint
from pkm_lightning.callbacks.throughput import Throughput

#: The name of `Diagnostics` in the saved configurations of versions before 0.2.
Vitals = Diagnostics

__all__ = [
    "Instability",
    "MetricsCSV",
    "Recall",
    "RunInterrupted",
    "RunRecord",
    "Samples",
    "SlotRevival",
    "SlotUsage",
    "StepCheckpoint",
    "StepProgressBar",
    "Throughput",
    "Diagnostics",
]
