"""A checkpoint as it would be with its value tables quantised: what `export quantize=` writes.

In the place of `tables.I.weight` the file holds `tables.I.codes` (uint8) and `tables.I.scales` (bfloat16); see
`pkm_lightning.ops.quantized_rows`. In its configuration `table` names `pkm_lightning.memory.QuantizedTable` and `bits`,
by which the model is built again.
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import Tensor

from pkm_lightning.checkpoints.reader import SavedCheckpoint
from pkm_lightning.errors import CheckpointError, check_choice
from pkm_lightning.ops import quantize_rows
from pkm_lightning.ops.quantized_rows import WIDTHS, stored_shapes

_TABLE = re.compile(r"(state_dict\.model\.tables\.\d+\.)weight")
_PART = re.compile(r"(state_dict\.model\.tables\.\d+\.)(codes|scales)")
_PLAIN, _QUANTIZED = "pkm_lightning.memory.ValueTable", "pkm_lightning.memory.QuantizedTable"
#: Keys of `table` that a table without training has too.
_KEPT = ("shared", "device", "shard", "group")


def _without_training(extra: dict[str, Any]) -> dict[str, Any]:
    return {**extra, "table": {key: value for key, value in (extra.get("table") or {}).items() if key in _KEPT}}


class QuantizedCheckpoint:
    """The weights of a checkpoint, of which tables are quantised block by block when they are read.

    Args:
        saved: of any kind.
        width: `int8`, `int4` or `int2`.

    Attributes:
        saved: the checkpoint.
        skeleton, shapes: those of the checkpoint with codes and scales in the place of each table's weight.
        table_bytes: of all tables, before and after.

    Raises:
        ConfigError: an unknown width.
        CheckpointError: there is no table, or none of floats.
    """

    def __init__(self, saved: SavedCheckpoint, width: str) -> None:
        check_choice("quantize", width, WIDTHS)
        self.saved, self._bits = saved, WIDTHS[width]
        config = saved.config
        target = config["table"].get("_target_")
        if target == _QUANTIZED:
            raise CheckpointError(
                f"quantize={width}: the value tables of {saved.path} have {config['table'].get('bits')} bits per value "
                "already; give the run's own checkpoint."
            )
        tables = {name for name in saved.shapes if _TABLE.fullmatch(name)}
        if not tables:
            raise CheckpointError(
                f"quantize={width}: ckpt={saved.path} has no value table ({config['ffn'].get('_target_')} reads none), "
                "so that nothing can be quantised; leave it out."
            )
        if target != _PLAIN:
            raise CheckpointError(f"quantize={width}: table._target_={target} cannot be quantised, only {_PLAIN}.")
        table = {key: config["table"][key] for key in _KEPT if key in config["table"]}
        config["table"] = {"_target_": _QUANTIZED, "bits": self._bits, **table}
        if config.get("extra_ffns"):
            config["extra_ffns"] = {name: _without_training(extra) for name, extra in config["extra_ffns"].items()}
        if (config.get("optim") or {}).get("freeze"):
            # Nothing of the file is trained, and patterns of a table's weight would match no parameter.
            config["optim"] = {**config["optim"], "freeze": []}
        self.skeleton: Any = {**saved.skeleton, "hyper_parameters": {"config": config}}
        self.shapes: dict[str, tuple[torch.Size, torch.dtype]] = {}
        before = after = 0
        for name, (shape, dtype) in saved.shapes.items():
            if name not in tables:
                self.shapes[name] = (torch.Size(shape), dtype)
                continue
            codes, scales = stored_shapes(shape[0], shape[1], self._bits)
            prefix = name.removesuffix("weight")
            self.shapes[f"{prefix}codes"] = (torch.Size(codes), torch.uint8)
            self.shapes[f"{prefix}scales"] = (torch.Size(scales), torch.bfloat16)
            before += math.prod(shape) * dtype.itemsize
            after += math.prod(codes) + 2 * math.prod(scales)
        self.table_bytes = before, after

    def origin(self, name: str) -> tuple[str, str | None]:
        """Returns the name in the checkpoint that `name` is made from; for a table also `codes` or `scales`."""
        part = _PART.fullmatch(name)
        return (name, None) if part is None else (f"{part[1]}weight", part[2])

    def part(self, block: Tensor, name: str) -> Tensor:
        """Returns codes or scales, as `name` asks for, of a block of a table's rows.

        Raises:
            CheckpointError: a value is not finite.
        """
        try:
            rows = quantize_rows(block, self._bits)
        except ValueError:
            raise CheckpointError(
                f"{self.origin(name)[0].removeprefix('state_dict.model.')} of ckpt={self.saved.path} has a value that "
                "is not finite and cannot be quantised; use a checkpoint of before the run diverged."
            ) from None
        return rows.codes_NC if name.endswith("codes") else rows.scales_NQ

    def forget(self) -> None:
        """Releases the memory of all pages read so far."""
        self.saved.forget()
