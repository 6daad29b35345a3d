"""The cost of a plugin that addresses slots by product keys and reads weighted sums of their values."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pkm_lightning.ffn.base import FFNCost

if TYPE_CHECKING:
    from torch import nn

    from pkm_lightning.memory import Addressing, Values


def read_cost(plugin: nn.Module, addressing: Addressing, values: Values, matrices: int = 0) -> FFNCost:
    """The cost of a memory that adds `matrices` parameters of dense matrices to its addressing and its values."""
    params = sum(p.numel() for p in plugin.parameters())
    table = values.table.weight
    rows_read = addressing.reads * table.shape[1]

    def flops(reads: int) -> int:
        return addressing.flops() + values.flops(reads) + 2 * matrices

    return FFNCost(
        params=params,
        table_params=table.numel(),
        active_params=params + rows_read,
        flops=flops(addressing.reads),
        train_flops=flops(addressing.training_reads),
        lookup_bytes=rows_read * table.element_size(),
    )
