"""The placement of the FFN variant: its layers, and how it is combined with the base FFN, both by configuration."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from pkm_lightning.errors import ConfigError, check_choice, check_integer
from pkm_lightning.ffn import FFNContext, FFNOutput
from pkm_lightning.model.plugin_checks import checked_output


class Placement:
    """The layers that run the variant; the others keep the base FFN.

    Args:
        layers: `"all"`, `"centred"`, `"spread"`, or a list of layer numbers from 0.
        count: number of layers for `centred` and `spread`; a model with fewer layers uses all of them. None takes 3 for
            `centred` and one layer in five for `spread`.
        stride: distance between layers for `centred` and `spread`; None takes n_layers // count.
        mode: `replace` the base FFN, or add the variant `parallel` to it (ResM of Kim & Jung 2020, arXiv 2010.03881).
        write_after: add the variant's output this many layers later (UltraMem, arXiv 2411.12364, section 3); needs
            `mode=parallel`. None needs `spread` and takes stride - 1: just before the next variant reads.

    Raises:
        ConfigError: an unknown choice, a negative number, or `write_after` together with `replace`.
    """

    def __init__(
        self,
        *,
        layers: str | Sequence[int],
        count: int | None,
        stride: int | None,
        mode: str,
        write_after: int | None,
    ) -> None:
        check_choice("placement.mode", mode, ("replace", "parallel"))
        if write_after is not None:
            check_integer("placement.write_after", write_after, low=0)
        elif layers != "spread":
            raise ConfigError("placement.write_after=null needs placement.layers=spread; set a number of layers.")
        if isinstance(layers, str):
            check_choice("placement.layers", layers, ("all", "centred", "spread"))
        elif not isinstance(layers, Sequence):
            raise ConfigError(
                f"placement.layers={layers!r} is not known; allowed: all, centred, spread, or a list of layer numbers."
            )
        else:
            for layer in layers:
                check_integer("placement.layers", layer)  # type: ignore[arg-type]
        # A deferred output replaces nothing here: the layer would add only attention to the residual stream.
        shown = "null" if write_after is None else write_after
        if write_after != 0 and mode == "replace":
            raise ConfigError(
                f"placement.write_after={shown} leaves the reading layer without any FFN under "
                "placement.mode=replace; use placement.mode=parallel."
            )
        self.layers, self.count, self.stride = layers, count, stride
        self.mode, self.write_after = mode, write_after

    def resolve(self, n_layers: int) -> list[int]:
        """Returns the numbers of the layers that run the variant, ascending.

        `centred` puts `count` layers around layer n_layers // 2: 4, 12, 20 of 24 for count 3 and stride 8
        (Berges et al. 2024, section 4 and table 3). `spread` ends so that the last output is written after the last
        layer: reads at 2, 7, ..., 27 of 32 layers and writes at 6, 11, ..., 31 (Huang et al. 2024, arXiv 2411.12364).

        Raises:
            ConfigError: a repeated layer, or a layer outside 0 to n_layers - 1, or one whose output would be added
                beyond that.
        """
        layers = self._numbers(n_layers)
        if len(set(layers)) != len(layers):
            raise ConfigError(f"placement.layers={layers} repeats a layer; list each layer once.")
        delay = self.delay(n_layers)
        last = n_layers - 1 - delay
        for layer in layers:
            if not 0 <= layer <= last:
                reason = f" less placement.write_after={delay}" if delay else ""
                raise ConfigError(
                    f"placement puts a layer at {layer}; allowed: 0 to {last} (model.n_layers={n_layers}{reason}). "
                    "Set placement.layers, or placement.count and placement.stride."
                )
        return sorted(layers)

    def delay(self, n_layers: int) -> int:
        """Returns the number of layers between a read and the layer after which its output is added."""
        return self._count_and_stride(n_layers)[1] - 1 if self.write_after is None else self.write_after

    def _numbers(self, n_layers: int) -> list[int]:
        if self.layers == "all":
            return list(range(n_layers))
        if not isinstance(self.layers, str):
            return [int(layer) for layer in self.layers]
        count, stride = self._count_and_stride(n_layers)
        # `spread` counts back from the last layer, after which the last output must still be added.
        if self.layers == "spread":
            first = n_layers - 1 - self.delay(n_layers) - stride * (count - 1)
        else:
            first = n_layers // 2 - stride * (count // 2)
        return [first + stride * i for i in range(count)]

    def _count_and_stride(self, n_layers: int) -> tuple[int, int]:
        default = max(1, n_layers // 5) if self.layers == "spread" else 3
        count = default if self.count is None else self.count
        check_integer("placement.count", count, low=0)
        count = min(count, n_layers)
        if self.stride is not None:
            check_integer("placement.stride", self.stride, low=1)
        return count, self.stride or max(1, n_layers // max(1, count))

    def combine(self, base: nn.Module, variant: nn.Module, *, defer: bool) -> nn.Module:
        """Returns the module that a placed layer runs; `defer` passes the variant's output to a later layer."""
        return variant if self.mode == "replace" else ParallelFFN(base, variant, defer=defer)


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
        """Runs both plugins and merges their outputs.

        Statistics and traces are named `base.NAME` and `variant.NAME`; losses of one name are added, metrics of one
        name averaged.
        """
        base = checked_output(self.base, x_BTD, self.base(x_BTD, context))
        variant = checked_output(self.variant, x_BTD, self.variant(x_BTD, context))
        names = {**base.aux_losses, **variant.aux_losses}
        return FFNOutput(
            y_BTD=base.y_BTD if self.defer else base.y_BTD + variant.y_BTD,
            aux_losses={n: base.aux_losses.get(n, 0) + variant.aux_losses.get(n, 0) for n in names},  # type: ignore[misc]
            trace=_prefixed(base.trace, variant.trace),
            step_stats=_prefixed(base.step_stats, variant.step_stats),
            deferred_BTD=variant.y_BTD if self.defer else None,
            metrics={
                n: torch.stack([part.metrics[n] for part in (base, variant) if n in part.metrics]).mean()
                for n in {**base.metrics, **variant.metrics}
            },
        )


def _prefixed(base: dict[str, Tensor], variant: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        **{f"base.{name}": value for name, value in base.items()},
        **{f"variant.{name}": value for name, value in variant.items()},
    }


def named_plugins(ffn: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields the plugins of a block's FFN with their names within the block: one, or the base and the variant."""
    if isinstance(ffn, ParallelFFN):
        yield "ffn.base", ffn.base
        yield "ffn.variant", ffn.variant
    else:
        yield "ffn", ffn


def plugin_entries(plugin: str, entries: dict[str, Tensor]) -> dict[str, Tensor]:
    """Selects the statistics or the trace of one plugin of a layer, without the prefix that `ParallelFFN` adds.

    Args:
        plugin: the name from `named_plugins`.
        entries: `step_stats` or `trace` of the layer.
    """
    prefix = "" if plugin == "ffn" else f"{plugin.removeprefix('ffn.')}."
    return {name.removeprefix(prefix): value for name, value in entries.items() if name.startswith(prefix)}
