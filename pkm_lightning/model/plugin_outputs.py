"""Several plugins of one layer: how their outputs become one `FFNOutput`, and whose entries are whose.

A layer's plugins are named `ffn`, or `ffn.base` and `ffn.variant` where both run, and `before` and `after` where one
stands in front of the block or behind it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from pkm_lightning.ffn import FFNContext, FFNOutput, replaced
from pkm_lightning.model.plugin_checks import checked_output
from pkm_lightning.model.trunk import ModelOutput

#: What the names of statistics and traces begin with, by the name of their plugin.
_PREFIXES = {"ffn": "", "ffn.base": "base.", "ffn.variant": "variant.", "before": "before.", "after": "after."}


class ParallelFFN(nn.Module):
    """The base FFN and the variant in parallel: `y = base(x) + variant(x)`, or the variant's output deferred.

    Args:
        base, variant: the two plugins.
        defer: return the variant's output as `FFNOutput.deferred_BTD` instead of adding it.
    """

    def __init__(self, base: nn.Module, variant: nn.Module, *, defer: bool) -> None:
        super().__init__()
        self.base, self.variant, self.defer = base, variant, defer

    def forward(self, x_BTD: Tensor, context: FFNContext) -> FFNOutput:
        """Runs both plugins and merges their outputs."""
        base = checked_output(self.base, x_BTD, self.base(x_BTD, _of_part("base", context)))
        variant = checked_output(self.variant, x_BTD, self.variant(x_BTD, _of_part("variant", context)))
        y_BTD = base.y_BTD if self.defer else base.y_BTD + variant.y_BTD
        merged = merged_outputs(y_BTD, {"ffn.base": base, "ffn.variant": variant})
        return replaced(merged, deferred_BTD=variant.y_BTD if self.defer else None)


def _of_part(name: str, context: FFNContext) -> FFNContext:
    """Returns the context with that part of the layer's past which the plugin `name` has entered."""
    return context if context.past is None else replaced(context, past=context.past.part(name))


def merged_outputs(y_BTD: Tensor, outputs: Mapping[str, FFNOutput]) -> FFNOutput:
    """Returns one output with `y_BTD` and all that the outputs of several plugins report.

    Statistics and traces get the prefix of their plugin; losses of one name are added, metrics of one name averaged.

    Args:
        y_BTD: what the layer adds or returns.
        outputs: by the plugin's name.
    """
    losses: dict[str, Tensor] = {}
    metrics: dict[str, list[Tensor]] = {}
    for output in outputs.values():
        for name, loss in output.aux_losses.items():
            losses[name] = losses[name] + loss if name in losses else loss
        for name, value in output.metrics.items():
            metrics.setdefault(name, []).append(value)
    return FFNOutput(
        y_BTD,
        losses,
        _prefixed({plugin: output.trace for plugin, output in outputs.items()}),
        _prefixed({plugin: output.step_stats for plugin, output in outputs.items()}),
        next((output.deferred_BTD for output in outputs.values() if output.deferred_BTD is not None), None),
        {name: torch.stack(values).mean() for name, values in metrics.items()},
    )


def _prefixed(entries: Mapping[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    return {_PREFIXES[plugin] + name: value for plugin, of_one in entries.items() for name, value in of_one.items()}


class ModelReports:
    """What the layers of one forward report, entered into the model's output layer by layer."""

    def __init__(self, output: ModelOutput) -> None:
        self._output = output
        self._metrics: dict[str, list[Tensor]] = {}

    def add(self, layer: int, result: FFNOutput) -> None:
        """Adds the losses, statistics, trace and metrics of one layer."""
        output = self._output
        for name, loss in result.aux_losses.items():
            output.aux_losses[name] = output.aux_losses[name] + loss if name in output.aux_losses else loss
        if result.step_stats:
            output.step_stats[layer] = result.step_stats
        if result.trace:
            output.traces[layer] = result.trace
        for name, value in result.metrics.items():
            self._metrics.setdefault(name, []).append(value)

    def finish(self) -> None:
        """Sets the metrics to their means over layers."""
        self._output.metrics = {name: torch.stack(values).mean() for name, values in self._metrics.items()}


def plugin_entries(plugin: str, entries: dict[str, Tensor]) -> dict[str, Tensor]:
    """Selects the statistics or the trace of one plugin of a layer, without the prefix of `merged_outputs`.

    Args:
        plugin: the name from `pkm_lightning.model.block.named_plugins`.
        entries: `step_stats` or `trace` of the layer.
    """
    prefix = _PREFIXES[plugin]
    others = () if prefix else tuple(filter(None, _PREFIXES.values()))
    return {
        name.removeprefix(prefix): value
        for name, value in entries.items()
        if name.startswith(prefix) and not name.startswith(others)
    }
