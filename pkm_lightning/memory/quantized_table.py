"""A value table of 8, 4 or 2 bits per value: read from its codes and scales, and never expanded.

`export quantize=` writes such tables (`pkm_lightning.checkpoints.quantized`), and a configuration that names this class
instead of `ValueTable`.

Letters: T tokens, K lines per read, L = T * K, G groups per read, V values per line, C bytes of codes and Q scales per
line.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from pkm_lightning.errors import CheckpointError, ConfigError
from pkm_lightning.memory.value_table import ValueTable
from pkm_lightning.ops import QuantizedRows, quantized_dot, quantized_gather
from pkm_lightning.ops.quantized_rows import WIDTHS, stored_shapes

if TYPE_CHECKING:
    from jaxtyping import Float, Int


class QuantizedTable(ValueTable):
    """A table that can only be read: it has `codes` and `scales` in the place of `weight`, and nothing to train.

    All values are zero until `load_state_dict`. Sums are computed in float32 and returned in the dtype of the weights,
    inner products in that of the input, single lines in float32.

    Args:
        rows: number of rows N.
        dim: values per row.
        bits: per value, 8, 4 or 2.
        slices: as in `ValueTable`; a slice has scales of its own.
        device: as in `ValueTable`.

    Raises:
        ConfigError: an unknown choice, or `slices` that do not divide `dim`.

    Example: `docs/tables.md`, "Smaller tables".
    """

    parameter_roles: ClassVar[dict[str, str]] = {}

    codes: Tensor
    scales: Tensor

    def __init__(self, *, rows: int, dim: int, bits: Literal[8, 4, 2], slices: int = 1, device: str = "auto") -> None:
        if bits not in WIDTHS.values():
            raise ConfigError(f"table.bits={bits}; allowed: 8, 4, 2.")
        with torch.device("meta"):  # the weight that this table does not have takes no memory
            super().__init__(rows=rows, dim=dim, trainable=False, slices=slices, device=device)
        del self.weight
        self.bits = bits
        shapes = stored_shapes(self.n_lines, dim // slices, bits)
        for name, shape, dtype in zip(("codes", "scales"), shapes, (torch.uint8, torch.bfloat16), strict=True):
            self.register_buffer(name, torch.zeros(shape, dtype=dtype, device=self._initial_device()))

    def reset_parameters(self) -> None:
        """Does nothing: rows are read from a file, not drawn."""

    @property
    def is_registered(self) -> bool:
        """True: codes and scales are buffers, which no engine takes for its own."""
        return True

    @property
    def learns(self) -> bool:
        """False: codes have no gradient."""
        return False

    def bytes_of(self, values: int) -> int:
        """Returns the bytes of codes and scales that `values` values of whole rows take."""
        (_, codes), (_, scales) = stored_shapes(1, self.dim // self.slices, self.bits)
        return values * self.slices * (codes + 2 * scales) // self.dim

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *arguments: Any
    ) -> None:
        for name, dtype in (("codes", torch.uint8), ("scales", torch.bfloat16)):
            saved = state_dict.get(prefix + name)
            if saved is not None and saved.dtype != dtype:
                raise CheckpointError(f"{prefix}{name} is {saved.dtype}, but must be {dtype}; export the run again.")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *arguments)

    def _sum(
        self,
        ids_TK: Int[Tensor, "T K"],
        weights_TK: Float[Tensor, "T K"],
        staged_TK: Tensor,
        groups_TK: Int[Tensor, "T K"] | None = None,
        n_groups: int | None = None,
    ) -> Tensor:
        groups_TK = None if groups_TK is None else self._to_table(groups_TK)
        ids_TK, local_TK = self._to_table(ids_TK), self._to_table(weights_TK)
        y = quantized_gather(self._rows(), ids_TK, local_TK, groups_TK=groups_TK, n_groups=n_groups)
        return y.to(weights_TK.device)

    def _dot(self, x_TV: Tensor, ids_TK: Tensor, staged_TK: Tensor) -> Tensor:
        return quantized_dot(self._rows(), self._to_table(x_TV), self._to_table(ids_TK)).to(x_TV.device)

    def _gather(self, ids_TK: Tensor, staged_TK: Tensor) -> Tensor:
        ids_L1 = self._to_table(ids_TK).reshape(-1, 1)
        ones_L1 = torch.ones(ids_L1.shape, dtype=torch.float32, device=ids_L1.device)
        lines_LV = quantized_gather(self._rows(), ids_L1, ones_L1)
        return lines_LV.view(*ids_TK.shape, -1).to(ids_TK.device)

    def _rows(self) -> QuantizedRows:
        return QuantizedRows(self.codes, self.scales, self.bits, self.dim // self.slices)

    def _to_table(self, value: Tensor) -> Tensor:
        return value.to(self.codes.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ValueTable:
        """Moves the table with the model, unless it stays on the CPU or in its file; a cast changes neither part."""
        if self.is_mapped:
            return self

        def move(value: Tensor) -> Tensor:
            if value.is_meta:
                return fn(value).to(value.dtype)
            # Applied to an empty tensor, `fn` reveals the device without casting the scales.
            return value if self.stays_on_cpu else value.to(fn(value[:0]).device)

        nn.Module._apply(self, move, recurse)
        return self

    def extra_repr(self) -> str:
        """Returns rows, values per row and bits per value, for `print(model)`."""
        return f"rows={self.rows}, dim={self.dim}, bits={self.bits}"
