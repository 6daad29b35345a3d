"""What the plugins report over the micro-batches of an optimizer step, added up on the device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pkm_lightning.ops import sum_over_ranks

if TYPE_CHECKING:
    from torch import Tensor

    from pkm_lightning.model import ModelOutput


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
