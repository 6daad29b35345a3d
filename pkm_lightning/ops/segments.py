"""Reads of table rows, sorted by row: what every sum over the reads of a row walks along.

The sort is stable, so that the reads of a row are added in one order on every run: sums over segments are
deterministic, which atomic additions are not.

Letters: L reads, N rows of the table, U segments, V = U + 1 their limits, T tokens, K reads a token, G groups a token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from jaxtyping import Int, Int32
    from torch import Tensor


class Segments(NamedTuple):
    """For each row that is read, where its reads stand."""

    #: Positions of the reads, sorted by row, those of one row in their old order; (L,) int64.
    order_L: Tensor
    #: The rows that are read, ascending; (U,) int32. On an accelerator U is min(L, N), so that the host need not wait
    #: to learn how many there are; from the last row on it holds -1.
    rows_U: Tensor
    #: Segment u is order[starts[u]:starts[u + 1]]; (U + 1,) int64. Empty where `rows_U` is -1.
    starts_V: Tensor


def read_segments(ids_L: Int[Tensor, " L"], n_rows: int) -> Segments:
    """The segments of reads of rows `ids_L`, each 0 to `n_rows` - 1 (not checked).

    On an accelerator `n_rows` itself stands for a read that belongs to no segment.
    """
    sorted_L, order_L = torch.sort(ids_L.int(), stable=True)
    if ids_L.device.type == "cpu":
        rows_U, counts_U = torch.unique_consecutive(sorted_L, return_counts=True)
        return Segments(order_L, rows_U, torch.nn.functional.pad(counts_U.cumsum(0), (1, 0)))
    return _padded_segments(sorted_L, order_L, n_rows)


def _padded_segments(sorted_L: Tensor, order_L: Tensor, n_rows: int) -> Segments:
    reads = sorted_L.numel()
    first_L = torch.ones_like(sorted_L, dtype=torch.bool)
    first_L[1:] = sorted_L[1:] != sorted_L[:-1]
    n_segments = min(reads, n_rows)
    starts_U = torch.nonzero_static(first_L, size=n_segments, fill_value=reads).squeeze(-1)
    padded_L = torch.nn.functional.pad(sorted_L, (0, 1), value=-1)
    rows_U = padded_L[starts_U]
    # Reads of a row that another rank holds stand last.
    end = (sorted_L < n_rows).sum()
    starts_V = torch.minimum(torch.nn.functional.pad(starts_U, (0, 1), value=reads), end)
    return Segments(order_L, rows_U.masked_fill(rows_U >= n_rows, -1), starts_V)


def read_sources(
    ids_TK: Int[Tensor, "T K"], groups_TK: Int[Tensor, "T K"] | None = None, n_groups: int = 1
) -> Int32[Tensor, "T K"]:
    """Which row of (T * G, D) upstream values a read belongs to: its token's, or that of its group in its token."""
    token_T1 = torch.arange(len(ids_TK), dtype=torch.int32, device=ids_TK.device).unsqueeze(-1)
    if groups_TK is None:
        return token_T1.expand(-1, ids_TK.shape[1]).contiguous()
    return token_T1 * n_groups + groups_TK.int()


def check_indices(op: str, name: str, indices_TK: Tensor, limit: int) -> None:
    """Refuse indices that no row answers to; on the CPU only, where it costs 1 % and kernels would read wild memory.

    Raises:
        ValueError: with the index and the limit.
    """
    if indices_TK.device.type != "cpu" or indices_TK.numel() == 0:
        return
    low, high = (int(extreme) for extreme in torch.aminmax(indices_TK))
    if low < 0 or high >= limit:
        raise ValueError(f"{op}: {name} has {low if low < 0 else high}; allowed: 0 to {limit - 1}.")
