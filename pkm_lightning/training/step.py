"""One optimizer step: normalisation of its loss, statistics of the plugins, watchers and judges.

The loss of a step is the sum of its token losses over the number of its targets: over all ranks and all micro-batches,
so that world sizes and accumulations agree. That number is known only after the last micro-batch: each loss is scaled
by the number expected from the first one, and the gradients are corrected once before clipping.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pkm_lightning.model import Traces
from pkm_lightning.ops import sum_over_ranks
from pkm_lightning.training.engine import engine_of

if TYPE_CHECKING:
    import lightning as L
    from lightning.pytorch.core.optimizer import LightningOptimizer
    from torch.optim import Optimizer

    from pkm_lightning.model import ModelOutput


class StepNormaliser:
    """The number of targets in the current optimizer step; one object per LightningModule."""

    def __init__(self) -> None:
        self._expected: Tensor | None = None
        self._seen: Tensor | None = None
        self._exact = False

    def scale(self, targets: Tensor, *, world_size: int, accumulate: int) -> Tensor:
        """Returns the factor for this micro-batch's summed loss.

        Args:
            targets: target tokens of this micro-batch over all ranks, a scalar tensor.
            world_size: number of ranks; the strategy will divide gradients by it.
            accumulate: micro-batches per step; Lightning will divide the loss by it.
        """
        if self._expected is None or self._seen is None:
            self._expected = (targets * accumulate).clamp(min=1).float()
            self._seen = torch.zeros_like(self._expected)
        self._seen = self._seen + targets
        # With several micro-batches the sum may differ from the expectation; an epoch may also end within a step.
        self._exact = accumulate == 1
        return world_size * accumulate / self._expected

    def correction(self) -> Tensor | None:
        """Returns the factor for the accumulated gradients, or None where the expectation was exact."""
        if self._exact or self._expected is None or self._seen is None:
            return None
        return self._expected / self._seen.clamp(min=1)

    def total(self) -> Tensor:
        """Returns the target tokens of the step so far, over all ranks."""
        assert self._seen is not None
        return self._seen

    def reset(self) -> None:
        """Starts the next step."""
        self._expected, self._seen, self._exact = None, None, False


class StepReports:
    """Statistics by layer (sums), auxiliary losses and metrics (means over real tokens) of the current step.

    They are added up on the device, so that nothing is copied to the host before a log is due.
    """

    def __init__(self) -> None:
        self._statistics: dict[int, dict[str, Tensor]] = {}
        self._weighted: dict[str, Tensor] = {}
        self._tokens: Tensor | None = None

    def add(self, output: ModelOutput, local_tokens: Tensor) -> None:
        """Adds a micro-batch with `local_tokens` real tokens on this rank."""
        for layer, stats in output.step_stats.items():
            sums = self._statistics.setdefault(layer, {})
            for name, value in stats.items():
                sums[name] = sums[name] + value.detach() if name in sums else value.detach()
        reported = {f"aux_{name}": loss.detach() for name, loss in output.aux_losses.items()} | output.metrics
        for name, value in reported.items():
            weighted = value.detach().float() * local_tokens
            self._weighted[name] = self._weighted[name] + weighted if name in self._weighted else weighted
        if reported:
            self._tokens = local_tokens if self._tokens is None else self._tokens + local_tokens

    def statistics(self, layer: int) -> dict[str, Tensor]:
        """Returns the sums over this rank's micro-batches of what the plugins of `layer` report to `after_step`."""
        return self._statistics.get(layer, {})

    def means(self) -> dict[str, Tensor]:
        """Returns auxiliary losses and metrics as means over all real tokens of the step. Collective."""
        if self._tokens is None:
            return {}
        *totals, tokens = sum_over_ranks(torch.stack([*self._weighted.values(), self._tokens.float()])).unbind()
        return {name: total / tokens.clamp(min=1) for name, total in zip(self._weighted, totals, strict=True)}

    def reset(self) -> None:
        """Starts the next step."""
        self._statistics, self._weighted, self._tokens = {}, {}, None


class StepRefused(Exception):
    """A judge does not allow the step; raised before the update, and never leaves the module."""


class StepWatch:
    """The watchers and judges of a `LanguageModule`'s steps: how callbacks look at training.

    Watchers see every micro-batch once, also where activation checkpointing repeats a forward. Judges are
    vetoes: called once per step, after its last backward and before anything is updated, they must return the same on
    all ranks.

    Attributes:
        watchers: called after each forward in training with the traces by layer (`FFNOutput.trace`) and the batch;
            where there are any, plugins fill their traces.
        judges: called before each update with the step's figures; a single False refuses the update.
        figures: of the current step: `loss` (mean over the targets of all ranks), `grad_norm_dense` and
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
        """Whether plugins are to fill their traces."""
        return bool(self.watchers)

    def notify(self, traces: Traces, batch: dict[str, Tensor]) -> None:
        """Calls the watchers with a micro-batch."""
        for watcher in self.watchers:
            watcher(traces, batch)

    def judge(self) -> None:
        """Calls every judge.

        Raises:
            StepRefused: a judge returned False.
        """
        verdicts = [judge(self.figures) for judge in self.judges]
        self.refused = not all(verdicts)
        if self.refused:
            raise StepRefused


def drop_gradients(trainer: L.Trainer, optimizer: Optimizer | LightningOptimizer) -> None:
    """Drops the gradients of a refused step, staged reads among them, wherever they are held."""
    engine = engine_of(trainer)
    if engine is not None:
        engine.drop_gradients()
        return
    optimizer.zero_grad()
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is not None:  # GradScaler has unscaled the gradients, and refuses to do so again before an update
        scaler.update()
