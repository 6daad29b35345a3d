"""Reads that count as zero, or for a part: what a model knows without some rows, or without any.

A masked row acts as a row of zeros would, bit for bit in sums, inner products and single lines: the weight of its read
is multiplied by 0 instead of its values. Rows that are not finite are the exception in weighted sums, unless every read
of the table is masked. Nothing is copied or written.

Letters: T tokens, or reads where a plugin reads several times per token, K lines per read, X any further dimensions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from jaxtyping import Int

#: From the ids (T, K) of the lines that are read to factors (T, K): False counts as zero; numbers are multiplied.
ReadMask = Callable[[Tensor], Tensor]


def no_read(ids_TK: Int[Tensor, "T K"]) -> Tensor:
    """Returns False for every read: the mask of `zero_reads`."""
    return torch.zeros_like(ids_TK, dtype=torch.bool)


class MaskableReads(nn.Module):
    """The base of modules whose reads can be masked: value tables, and experts, whose choices are their reads.

    Attributes:
        masks: those in force, of which each applies.
    """

    def __init__(self) -> None:
        super().__init__()
        self.masks: tuple[ReadMask, ...] = ()

    @property
    def reads_zeros(self) -> bool:
        """Whether every read returns zeros."""
        return no_read in self.masks

    def masked(self, value_TKX: Tensor, ids_TK: Int[Tensor, "T K"]) -> Tensor:
        """Returns weights, inner products or lines of the reads `ids` as the masks leave them."""
        for mask in self.masks:
            factor_TK = mask(ids_TK)
            factor_TKX = factor_TK.reshape(*factor_TK.shape, *(1,) * (value_TKX.ndim - factor_TK.ndim))
            if factor_TK.dtype is torch.bool:
                value_TKX = torch.where(factor_TKX, value_TKX, 0)
            else:
                value_TKX = value_TKX * factor_TKX.to(value_TKX.dtype)
        return value_TKX


@contextlib.contextmanager
def masked_reads(modules: Iterable[MaskableReads], mask: ReadMask) -> Iterator[None]:
    """Masks reads of `modules` within the block, whatever ends it; blocks may be nested, and every mask applies.

    A read is made as always, with its exchanges between ranks, so that ranks may enter and leave at different times.

    Args:
        modules: value tables or experts.
        mask: called with the ids of each read, of lines where a table has slices (`row * slices + slice`).

    Example:
        >>> import torch
        >>> from pkm_lightning import ValueTable
        >>> table = ValueTable(rows=100, dim=8)
        >>> with masked_reads([table], lambda ids: ids != 7):
        ...     float(table(torch.tensor([[7]]), torch.ones(1, 1)).norm())
        0.0
    """
    modules = list(dict.fromkeys(modules))
    for module in modules:
        module.masks = (*module.masks, mask)
    try:
        # Compiled blocks would be compiled once more for the sake of a few forwards.
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module in modules:
            # One of them: an inner block may have added the same mask.
            masks = list(module.masks)
            masks.remove(mask)
            module.masks = tuple(masks)


def zero_reads(modules: Iterable[MaskableReads]) -> contextlib.AbstractContextManager[None]:
    """Makes every read of `modules` return zeros within the block; else as `masked_reads`."""
    return masked_reads(modules, no_read)
