"""What plugins in a model of transformers report beside their outputs, for loops of users."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from pkm_lightning.ffn import FFNOutput, HasAfterStep
from pkm_lightning.model.plugged_layer import PluggedLayer, plugged_layers


@dataclass
class FFNReports:
    """What plugins in a model of transformers report beside their outputs; `ffn_reports` collects it.

    Attributes:
        outputs: each plugin with its output, one entry per forward.

    Example: that of `ffn_reports`.
    """

    outputs: list[tuple[nn.Module, FFNOutput]] = field(default_factory=list)

    def collect(self, layer: PluggedLayer, outputs: dict[str, FFNOutput]) -> None:
        """Takes the outputs of one forward of a layer, by the names of its plugins."""
        plugins = dict(layer.named_plugins())
        self.outputs += [(plugins[name], output) for name, output in outputs.items()]

    def aux_loss(self) -> Tensor | float:
        """Returns the sum of the losses of all plugins, such as that which balances experts; 0.0 if there are none."""
        losses: list[Tensor] = []
        for plugin, output in self.outputs:
            losses += output.aux_losses.values()
            is_lost = any(not loss.requires_grad for loss in output.aux_losses.values())
            if is_lost and torch.is_grad_enabled() and any(p.requires_grad for p in plugin.parameters()):
                warnings.warn(
                    f"the losses of {type(plugin).__name__} ({', '.join(output.aux_losses)}) have no gradient, since "
                    "its forward ran without one: checkpoint activations with use_reentrant=False.",
                    stacklevel=2,
                )
        return sum(losses[1:], start=losses[0]) if losses else 0.0

    def after_step(self) -> None:
        """Passes the summed statistics of the step to each plugin that keeps some, such as batch-normalised queries."""
        sums: dict[nn.Module, dict[str, Tensor]] = {}
        for plugin, output in self.outputs:
            of_plugin = sums.setdefault(plugin, {})
            for name, value in output.step_stats.items():
                of_plugin[name] = of_plugin[name] + value if name in of_plugin else value
        for plugin, stats in sums.items():
            if isinstance(plugin, HasAfterStep):
                plugin.after_step(stats)


@contextlib.contextmanager
def ffn_reports(model: nn.Module) -> Iterator[FFNReports]:
    """Collects, within the block, the losses and statistics of plugins that `replace_ffn` put into `model`.

    A model of this package returns them itself (`ModelOutput`). With activation checkpointing call `backward` after the
    block, so that the repeated forwards are not collected.

    Example:
        ```python
        with ffn_reports(model) as reports:
            loss = model(input_ids, labels=input_ids).loss + reports.aux_loss()
        loss.backward()
        optimizer.step()
        reports.after_step()
        ```
    """
    reports, layers = FFNReports(), plugged_layers(model)
    for layer in layers:
        layer.collector = reports.collect
    try:
        yield reports
    finally:
        for layer in layers:
            layer.collector = warn_of_reports


def warn_of_reports(layer: PluggedLayer, outputs: dict[str, FFNOutput]) -> None:
    """Warns of losses and statistics in training that nobody collects."""
    plugins = dict(layer.named_plugins())
    for name, output in outputs.items():
        if layer.training and (output.aux_losses or output.step_stats):
            names = ", ".join((*output.aux_losses, *output.step_stats))
            warnings.warn(
                f"{type(plugins[name]).__name__} reports losses or statistics ({names}) that nobody collects: run the "
                "forward within pkm_lightning.ffn_reports(model).",
                stacklevel=3,
            )
