"""The placement of the FFN variant: its layers, and how it is combined with the base FFN, both by configuration."""

from __future__ import annotations

from collections.abc import Sequence

from pkm_lightning.errors import ConfigError, check_choice, check_flag, check_integer

#: How a variant is combined with the base FFN of its layer.
MODES = ("replace", "parallel", "before", "after")


class Placement:
    """The layers that run the variant; the others keep the base FFN.

    Args:
        layers: `"all"`, `"centred"`, `"spread"`, or a list of layer numbers from 0.
        count: number of layers for `centred` and `spread`; a model with fewer layers uses all of them. None takes 3 for
            `centred` and one layer in five for `spread`.
        stride: distance between layers for `centred` and `spread`; None takes n_layers // count.
        mode: `replace` the base FFN; add the variant `parallel` to it (ResM of Kim & Jung 2020, arXiv 2010.03881); or
            keep it, and add the variant's output to the residual stream `before` the layer (Engram, arXiv 2601.07372)
            or `after` it (per-layer embeddings of Gemma 3n).
        write_after: add the variant's output this many layers later (UltraMem, arXiv 2411.12364, section 3); needs
            `mode=parallel`. None needs `spread` and takes stride - 1: just before the next variant reads.
        zero_start: the variant's output starts at zero; None: where it stands beside a pretrained FFN.

    Raises:
        ConfigError: an unknown choice, a negative number, `write_after` with another mode than `parallel`, or
            `zero_start` where the variant is the only FFN of its layers.

    Example:
        >>> Placement(layers="centred", count=3, stride=8, mode="replace", write_after=0).resolve(24)
        [4, 12, 20]
    """

    def __init__(
        self,
        *,
        layers: str | Sequence[int],
        count: int | None,
        stride: int | None,
        mode: str,
        write_after: int | None,
        zero_start: bool | None = None,
    ) -> None:
        check_choice("placement.mode", mode, MODES)
        if zero_start is not None:
            check_flag("placement.zero_start", zero_start)
        if zero_start and mode == "replace":
            raise ConfigError(
                "placement.zero_start=true under placement.mode=replace leaves the layers without an FFN at first; "
                "set placement.mode=parallel, which keeps theirs, or placement.zero_start=false."
            )
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
        if write_after != 0 and mode != "parallel":
            # A deferred output replaces nothing here: the layer would add only attention to the residual stream.
            problem = "leaves the reading layer without any FFN" if mode == "replace" else "is not offered"
            raise ConfigError(
                f"placement.write_after={'null' if write_after is None else write_after} {problem} under "
                f"placement.mode={mode}; use placement.mode=parallel."
            )
        self.layers, self.count, self.stride = layers, count, stride
        self.mode, self.write_after, self.zero_start = mode, write_after, zero_start

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
