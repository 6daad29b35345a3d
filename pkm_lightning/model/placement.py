"""Which layers carry the FFN variant, and how: a decision in the configuration, not in code.

Letters: B sequences, T tokens, D model dimension.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from pkm_lightning.errors import ConfigError, check_choice, check_integer
from pkm_lightning.ffn import FFNContext, FFNOutput


class Placement:
    """The layers that get the variant; the others keep the base FFN.

    Args:
        layers: `"all"`, `"centred"`, `"spread"`, or a list of layer numbers from 0.
        count: layers, for `centred` and `spread`; all of a model that has fewer. None takes 3 for `centred`, one
            layer in five for `spread`.
        stride: distance between them, for `centred` and `spread`; None takes n_layers // count.
        mode: `replace` the base FFN, or add the variant `parallel` to it (ResM of Kim & Jung 2020, arXiv 2010.03881).
        write_after: add the variant's output this many layers later (UltraMem, arXiv 2411.12364, section 3); needs
            `mode=parallel`. None takes, for `spread`, stride - 1: just before the next one reads.

    Raises:
        ConfigError: an unknown word, a negative number, or `write_after` together with `replace`.
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
        shown = "null" if write_after is None else write_after
        if write_after != 0 and mode == "replace":
            raise ConfigError(
                f"placement.write_after={shown} leaves the reading layer without any FFN under "
                "placement.mode=replace; use placement.mode=parallel."
            )
        self.layers, self.count, self.stride = layers, count, stride
        self.mode, self.write_after = mode, write_after

    def resolve(self, n_layers: int) -> list[int]:
        """Layer numbers, ascending.

        `centred` puts `count` layers around layer n_layers // 2: 4, 12, 20 of 24 for count 3 and stride 8
        (Berges et al. 2024, section 4 and table 3). `spread` ends so that the last output is written after the last
        layer: reads at 2, 7, ..., 27 of 32 layers and writes at 6, 11, ..., 31 (Huang et al. 2024, arXiv 2411.12364).

        Raises:
            ConfigError: a layer, or the layer that its output is written after, outside 0 to n_layers - 1, or twice.
        """
        layers = self._numbers(n_layers)
        if len(set(layers)) != len(layers):
            raise ConfigError(f"placement.layers={layers} names a layer twice.")
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
        """Layers between a read and the layer after which its output is added."""
        return self._count_and_stride(n_layers)[1] - 1 if self.write_after is None else self.write_after

    def _numbers(self, n_layers: int) -> list[int]:
        if self.layers == "all":
            return list(range(n_layers))
        if not isinstance(self.layers, str):
            return [int(layer) for layer in self.layers]
        count, stride = self._count_and_stride(n_layers)
        if self.layers == "spread":
            first = n_layers - 1 - self.delay(n_layers) - stride * (count - 1)
        else:
            first = n_layers // 2 - stride * (count // 2)
        return [first + stride * i for i in range(count)]

    def _count_and_stride(self, n_layers: int) -> tuple[int, int]:
        usual = max(1, n_layers // 5) if self.layers == "spread" else 3
        check_integer("placement.count", usual if self.count is None else self.count, low=0)
        count = min(usual if self.count is None else self.count, n_layers)
        if self.stride is not None:
            check_integer("placement.stride", self.stride, low=1)
        return count, self.stride or max(1, n_layers // max(1, count))

    def combine(self, base: nn.Module, variant: nn.Module, *, defer: bool) -> nn.Module:
        """The module that a placed layer runs; `defer` hands the variant's part on for a later layer."""
        return variant if self.mode == "replace" else ParallelFFN(base, variant, defer=defer)


class ParallelFFN(nn.Module):
    """A variant beside the base FFN: `y = base(x) + variant(x)`, or the variant's part handed on for a later layer."""

    def __init__(self, base: nn.Module, variant: nn.Module, *, defer: bool) -> None:
        super().__init__()
        self.base, self.variant, self.defer = base, variant, defer

    def forward(self, x_BTD: Tensor, context: FFNContext) -> FFNOutput:
        """What both report: statistics and traces as `base.NAME` and `variant.NAME`, equal losses added, equal metrics
        averaged."""
        base: FFNOutput = self.base(x_BTD, context)
        variant: FFNOutput = self.variant(x_BTD, context)
        names = {**base.aux_losses, **variant.aux_losses}
        return FFNOutput(
            y_BTD=base.y_BTD if self.defer else base.y_BTD + variant.y_BTD,
            aux_losses={n: base.aux_losses.get(n, 0) + variant.aux_losses.get(n, 0) for n in names},  # type: ignore[misc]
            trace=_told_apart(base.trace, variant.trace),
            step_stats=_told_apart(base.step_stats, variant.step_stats),
            deferred_BTD=variant.y_BTD if self.defer else None,
            metrics={
                n: torch.stack([part.metrics[n] for part in (base, variant) if n in part.metrics]).mean()
                for n in {**base.metrics, **variant.metrics}
            },
        )


def _told_apart(base: dict[str, Tensor], variant: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        **{f"base.{name}": value for name, value in base.items()},
        **{f"variant.{name}": value for name, value in variant.items()},
    }


def plugins(ffn: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The plugins that a block's FFN holds, with their names below the block: one, or the base and the variant."""
    if isinstance(ffn, ParallelFFN):
        yield "ffn.base", ffn.base
        yield "ffn.variant", ffn.variant
    else:
        yield "ffn", ffn


def of_plugin(plugin: str, reported: dict[str, Tensor]) -> dict[str, Tensor]:
    """Selects what one of `plugins` has reported: of two in parallel, `ParallelFFN` prefixed `base.` or `variant.`."""
    prefix = "" if plugin == "ffn" else f"{plugin.removeprefix('ffn.')}."
    return {name.removeprefix(prefix): value for name, value in reported.items() if name.startswith(prefix)}
