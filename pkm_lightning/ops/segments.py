"""Reads of table rows, sorted by row into segments, so that the gradient of a row is one sum over one segment.

The sort is stable: the reads of a row are added in the same order on every run. Sums over segments are therefore
deterministic, which atomic additions are not.

Letters: L reads (T * K), U segments, Z = U + 1 limits of segments, G groups per token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from pkm_lightning.ops.backends import HAS_NUMBA

if TYPE_CHECKING:
    from jaxtyping import Int, Int32
    from torch import Tensor

#: From here on torch sorts integers by radix too, and with several threads.
_MANY_READS = 2**16

#: Integer dtypes in which ops accept row ids, group ids and sources.
INDEX_DTYPES = (torch.int32, torch.int64)


class Segments(NamedTuple):
    """For each row that is read, the positions of its reads."""

    #: Positions of the reads, sorted by row; those of one row in their original order; (L,) int64.
    order_L: Tensor
    #: Rows that are read, ascending; (U,) int32. On an accelerator U is min(L, N), an upper bound that the host knows
    #: without waiting for the device; the entries after the last row hold -1.
    rows_U: Tensor
    #: Segment u is order[starts[u]:starts[u + 1]]; (U + 1,) int64. Empty where `rows_U` is -1.
    starts_Z: Tensor


def read_segments(ids_L: Int[Tensor, " L"], n_rows: int) -> Segments:
    """Sorts reads of the rows `ids_L` into segments.

    Args:
        ids_L: the row of each read, 0 to `n_rows` - 1 (not checked). On an accelerator, `n_rows` itself marks a read
            that belongs to no segment.
        n_rows: rows of the table.
    """
    if ids_L.device.type == "cpu" and HAS_NUMBA and ids_L.numel() < _MANY_READS:
        # Imported where it is needed, as all kernels are: numba takes a second.
        from pkm_lightning.ops.numba_segments import sorted_segments

        return Segments(*sorted_segments(ids_L.int()))
    # int32 halves the sort's traffic.
    sorted_L, order_L = torch.sort(ids_L.int(), stable=True)
    if ids_L.device.type == "cpu":
        rows_U, counts_U = torch.unique_consecutive(sorted_L, return_counts=True)
        return Segments(order_L, rows_U, torch.nn.functional.pad(counts_U.cumsum(0), (1, 0)))
    return _padded_segments(sorted_L, order_L, n_rows)


def _padded_segments(sorted_L: Tensor, order_L: Tensor, n_rows: int) -> Segments:
    """Returns segments whose number depends on shapes only: `unique` would make the host wait for the device."""
    reads, n_segments = sorted_L.numel(), min(sorted_L.numel(), n_rows)
    # The last reads of all rows but the last, and then the last read of all: a padding segment starts after it.
    changes_U1 = torch.nonzero_static(sorted_L[1:] != sorted_L[:-1], size=n_segments, fill_value=reads - 1)
    # Reads marked with `n_rows`, of rows that another rank holds, are sorted to the end and cut off there.
    end = (sorted_L < n_rows).sum()
    starts_Z = torch.minimum(torch.nn.functional.pad(changes_U1.squeeze(-1), (1, 0), value=-1) + 1, end)
    starts_U = starts_Z[:-1]
    rows_U = sorted_L[starts_U.clamp(max=reads - 1)].masked_fill_(starts_U >= end, -1)
    return Segments(order_L, rows_U, starts_Z)


def read_sources(
    ids_TK: Int[Tensor, "T K"], groups_TK: Int[Tensor, "T K"] | None = None, n_groups: int = 1
) -> Int32[Tensor, "T K"]:
    """Returns for each read the row of the upstream values (T * G, V) that its weight multiplies.

    It is the row of the read's token, or of the read's group in that token.
    """
    token_T1 = torch.arange(len(ids_TK), dtype=torch.int32, device=ids_TK.device).unsqueeze(-1)
    if groups_TK is None:
        return token_T1.expand(-1, ids_TK.shape[1]).contiguous()
    return token_T1 * n_groups + groups_TK.int()


def check_indices(op: str, name: str, indices_TK: Tensor, limit: int) -> None:
    """Checks that indices on the CPU lie between 0 and `limit` - 1; indices on other devices are not checked.

    On the CPU the check costs about 1 % of an op, and kernels would access memory outside the table. On an accelerator
    it would make the host wait.

    Raises:
        ValueError: an index is out of range; the message names the index and the limit.
    """
    if indices_TK.device.type != "cpu" or indices_TK.numel() == 0:
        return
    low, high = (int(extreme) for extreme in torch.aminmax(indices_TK))
    if low < 0 or high >= limit:
        raise ValueError(f"{op}: {name} has {low if low < 0 else high}; allowed: 0 to {limit - 1}.")
