"""Lines of a table with deltas on top, which can be taken away again bit for bit.

A line is `base + sum of its deltas`, added in the order of the names that the deltas are known by, in float32 (float64
for a table in float64), and rounded to the table's dtype once. So it depends on which deltas are there, and not on the
order in which they came and went; a line without any is the base itself.

Letters: U lines, V values per line.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float, Int64

    from pkm_lightning.memory.value_table import ValueTable

#: Numbers of lines, ascending, and their deltas, (U,) and (U, V), by name.
NamedDeltas: TypeAlias = "Mapping[str, tuple[Tensor, Tensor]]"


def with_deltas(base_UV: Float[Tensor, "U V"], lines_U: Int64[Tensor, " U"], deltas: NamedDeltas) -> Tensor:
    """Returns lines with all deltas that they have, in the dtype of `base_UV`.

    Args:
        base_UV: the lines without deltas.
        lines_U: their numbers.
        deltas: on the CPU, as the base.
    """
    sum_UV = base_UV.to(torch.promote_types(base_UV.dtype, torch.float32))
    has_any_U = torch.zeros(len(lines_U), dtype=torch.bool)
    for name in sorted(deltas):
        changed_X, deltas_XV = deltas[name]
        has_U = torch.isin(lines_U, changed_X)
        sum_UV[has_U] = sum_UV[has_U] + deltas_XV[torch.searchsorted(changed_X, lines_U[has_U])].to(sum_UV.dtype)
        has_any_U |= has_U
    # A line without deltas does not pass through float32, which need not keep the payload of a NaN.
    return sum_UV.to(base_UV.dtype).where(has_any_U.unsqueeze(1), base_UV)


class EditedLines:
    """The lines of one table that deltas have touched.

    Args:
        table: whose weight is in memory and whole.
    """

    def __init__(self, table: ValueTable) -> None:
        self._table = table
        self._deltas: dict[str, tuple[Tensor, Tensor]] = {}
        #: Each line as it was before its first delta, by its number.
        self._base: dict[int, Tensor] = {}

    def apply(self, name: str, lines_U: Int64[Tensor, " U"], deltas_UV: Float[Tensor, "U V"]) -> None:
        """Adds deltas to lines, under a name that none has yet."""
        assert name not in self._deltas, name
        present_UV = self._table.weight.detach()[lines_U.to(self._table.weight.device)].cpu()
        for number, line_V in zip(lines_U.tolist(), present_UV, strict=True):
            self._base.setdefault(number, line_V.clone())
        self._deltas[name] = (lines_U.cpu(), deltas_UV.detach().cpu())
        self._write(lines_U.cpu())

    def remove(self, name: str) -> None:
        """Takes the deltas of a name away."""
        lines_U, _ = self._deltas.pop(name)
        self._write(lines_U)
        remaining = {number for others_U, _ in self._deltas.values() for number in others_U.tolist()}
        self._base = {number: line_V for number, line_V in self._base.items() if number in remaining}

    def shared(self, lines_U: Int64[Tensor, " U"]) -> dict[str, int]:
        """Returns how many of these lines each of the present deltas touches, without those that touch none."""
        counts = {
            name: int(torch.isin(lines_U.cpu(), present_U).sum()) for name, (present_U, _) in self._deltas.items()
        }
        return {name: count for name, count in counts.items() if count}

    @torch.no_grad()
    def _write(self, lines_U: Tensor) -> None:
        """Computes lines anew from their base."""
        if len(lines_U) == 0:
            return
        weight = self._table.weight
        base_UV = torch.stack([self._base[number] for number in lines_U.tolist()])
        weight[lines_U.to(weight.device)] = with_deltas(base_UV, lines_U, self._deltas).to(weight.device)
