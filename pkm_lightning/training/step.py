"""One optimizer step: the normalisation of its loss, what plugins report over its micro-batches, and who judges it.

The loss of an optimizer step is the sum of token losses over the number of targets of the whole step: over all ranks
and all micro-batches, so that world sizes and accumulations agree. The number is only known after the last micro-batch:
each is scaled by the expectation that the first one gives, and the gradients are corrected once before clipping.

Watchers see every micro-batch once, also where activation checkpointing runs a forward again. Judges are asked once per
step, after its last backward and before anything is updated; they must answer alike on all ranks.
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
    """Keeps the targets of the current optimizer step; one object a LightningModule."""

    def __init__(self) -> None:
        self._expected: Tensor | None = None
        self._seen: Tensor | None = None
        self._exact = False

    def scale(self, targets: Tensor, *, world_size: int, accumulate: int) -> Tensor:
        """The factor for this micro-batch's summed loss.

        Args:
            targets: target tokens of this micro-batch over all ranks, a scalar tensor.
            world_size: ranks; the strategy will divide gradients by it.
            accumulate: micro-batches a step; Lightning will divide the loss by it.
        """
        if self._expected is None or self._seen is None:
            self._expected = (targets * accumulate).clamp(min=1).float()
            self._seen = torch.zeros_like(self._expected)
        self._seen = self._seen + targets
        # An epoch may end within a step: then even one micro-batch is not all that was expected.
        self._exact = accumulate == 1
        return world_size * accumulate / self._expected

    def correction(self) -> Tensor | None:
        """What the accumulated gradients must be multiplied by, or None where the expectation was exact."""
        if self._exact or self._expected is None or self._seen is None:
            return None
        return self._expected / self._seen.clamp(min=1)

    def total(self) -> Tensor:
        """Target tokens of the step so far, over all ranks."""
        assert self._seen is not None
        return self._seen

    def reset(self) -> None:
        """Forgets the step that has ended."""
        self.__init__()  # type: ignore[misc]


class StepReports:
    """Statistics by layer (sums), auxiliary losses and metrics (means over real tokens) of the step under way."""

    def __init__(self) -> None:
        self._statistics: dict[int, dict[str, Tensor]] = {}
        self._weighted: dict[str, Tensor] = {}
        self._tokens: Tensor | None = None

    def add(self, output: ModelOutput, own_tokens: Tensor) -> None:
        """Takes in a micro-batch with `own_tokens` real tokens on this rank."""
        for layer, stats in output.step_stats.items():
            kept = self._statistics.setdefault(layer, {})
            for name, value in stats.items():
                kept[name] = kept[name] + value.detach() if name in kept else value.detach()
        reported = {f"aux_{name}": loss.detach() for name, loss in output.aux_losses.items()} | output.metrics
        for name, value in reported.items():
            weighted = value.detach().float() * own_tokens
            self._weighted[name] = self._weighted[name] + weighted if name in self._weighted else weighted
        if reported:
            self._tokens = own_tokens if self._tokens is None else self._tokens + own_tokens

    def statistics(self, layer: int) -> dict[str, Tensor]:
        """Sums over this rank's micro-batches of what a layer's plugins have for their `after_step`."""
        return self._statistics.get(layer, {})

    def means(self) -> dict[str, Tensor]:
        """Auxiliary losses and metrics, means over the step's real tokens of all ranks; every rank must ask."""
        if self._tokens is None:
            return {}
        *totals, tokens = sum_over_ranks(torch.stack([*self._weighted.values(), self._tokens.float()])).unbind()
        return {name: total / tokens.clamp(min=1) for name, total in zip(self._weighted, totals, strict=True)}

    def reset(self) -> None:
        """Forgets the step that has ended."""
        self._statistics, self._weighted, self._tokens = {}, {}, None


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
    engine = engine_of(trainer)
    if engine is not None:
        engine.drop_gradients()
        return
    optimizer.zero_grad()
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is not None:  # it has unscaled the gradients and waits for the step
        scaler.update()
