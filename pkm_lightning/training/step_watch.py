"""Who watches the steps of a training run: what plugins have read, and whether an update may be made.

Watchers see every micro-batch once, also where activation checkpointing runs a forward again. Judges are asked once a
step, after its last backward and before anything is updated; they must answer alike on all ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import lightning as L
    from lightning.pytorch.core.optimizer import LightningOptimizer
    from torch import Tensor
    from torch.optim import Optimizer

Traces = dict[int, "dict[str, Tensor]"]


class StepRefused(Exception):
    """Raised within a step that a judge does not allow, before the update; it never leaves the module."""


class StepWatch:
    """What a `LanguageModule` offers to callbacks.

    Attributes:
        watchers: called after each forward in training with the traces by layer (`FFNOutput.trace`) and the batch;
            where there are any, plugins fill their traces.
        judges: called before each update with the step's figures; one False refuses the update.
        figures: of the step under way: `loss` (mean over the targets of all ranks), `grad_norm_dense` and
            `grad_norm_table` before clipping; scalar tensors, the same on all ranks. Filled each step where there are
            judges, else where a log is due.
        refused: the last step was refused.
    """

    def __init__(self) -> None:
        self.watchers: list[Callable[[Traces, dict[str, Tensor]], None]] = []
        self.judges: list[Callable[[dict[str, Tensor]], bool]] = []
        self.figures: dict[str, Tensor] = {}
        self.refused = False

    @property
    def observes(self) -> bool:
        """Somebody wants to see what the plugins read."""
        return bool(self.watchers)

    def saw(self, traces: Traces, batch: dict[str, Tensor]) -> None:
        """Tells the watchers of a micro-batch."""
        for watcher in self.watchers:
            watcher(traces, batch)

    def judge(self) -> None:
        """Asks every judge.

        Raises:
            StepRefused: one said no.
        """
        verdicts = [judge(self.figures) for judge in self.judges]
        self.refused = not all(verdicts)
        if self.refused:
            raise StepRefused


def drop_gradients(trainer: L.Trainer, optimizer: Optimizer | LightningOptimizer) -> None:
    """Forgets the gradients of a refused step, staged reads among them, wherever they are held."""
    drop = getattr(trainer.strategy, "drop_gradients", None)
    if drop is not None:
        drop()
        return
    optimizer.zero_grad()
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is not None:  # it has unscaled the gradients and waits for the step
        scaler.update()
