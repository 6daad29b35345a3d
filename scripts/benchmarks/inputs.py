"""Inputs of the benchmarks: tables, ids and weights, and a sample of the results in float64.

Letters: R sampled rows or tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from pkm_lightning.memory import ValueTable
from pkm_lightning.ops.huge_pages import use_huge_pages


class Lookup(NamedTuple):
    """Sizes of a read: T tokens read K rows each, of N rows with V values; ids `uniform` or `zipf` with exponent 1."""

    tokens: int
    reads: int
    rows: int
    dim: int
    ids: str

    def __str__(self) -> str:
        return f"T={self.tokens} K={self.reads} V={self.dim} N={self.rows} {self.ids} ids"


def table(rows: int, dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Draws a table from N(0, 1/V) whose rows repeat after 4093."""
    # Drawing every row would take longer than the benchmark. The period is a prime, so that it meets no power of two.
    block_RV = torch.randn(min(rows, 4093), dim, device=device).mul_(dim**-0.5).to(dtype)
    # As a `ValueTable` has its rows, for all contenders alike.
    table_NV = use_huge_pages(torch.empty(rows, dim, dtype=dtype, device=device))
    for part_RV in table_NV.split(len(block_RV)):
        part_RV.copy_(block_RV[: len(part_RV)])
    return table_NV


def draw_ids(sizes: Lookup, device: torch.device) -> Tensor:
    """Draws int32 ids (T, K)."""
    shape = (sizes.tokens, sizes.reads)
    if sizes.ids == "uniform":
        return torch.randint(sizes.rows, shape, dtype=torch.int32, device=device)
    # A rank drawn as exp(uniform) has a probability of about 1 / rank; an odd factor spreads the ranks over the rows.
    rank_TK = ((sizes.rows + 1) ** torch.rand(shape, dtype=torch.float64, device=device)).long() - 1
    return (rank_TK.clamp(max=sizes.rows - 1) * 2654435761 % sizes.rows).int()


def value_table(weight_NV: Tensor, learning: str, device: str = "auto") -> ValueTable:
    """Wraps existing rows into a table of the package, without copying them."""
    with torch.device("meta"):
        wrapper = ValueTable(rows=weight_NV.shape[0], dim=weight_NV.shape[1], learning=learning, device=device)
    wrapper.weight = nn.Parameter(weight_NV, requires_grad=wrapper.weight.requires_grad)
    return wrapper


class Reads(NamedTuple):
    """Inputs of a read, and a sample of its results in float64."""

    table_NV: Tensor
    ids_TK: Tensor
    weights_TK: Tensor
    #: Gradient of the sums, or the x of inner products.
    upstream_TV: Tensor
    tokens_R: Tensor
    rows_R: Tensor

    @classmethod
    def draw(cls, sizes: Lookup, dtype: torch.dtype, device: torch.device) -> Reads:
        """Draws inputs from torch's global generator, which the caller seeds."""
        ids_TK = draw_ids(sizes, device)
        weights_TK = torch.rand(sizes.tokens, sizes.reads, device=device).to(dtype)
        upstream_TV = torch.randn(sizes.tokens, sizes.dim, device=device).to(dtype)
        tokens_R = torch.arange(0, sizes.tokens, max(1, sizes.tokens // 61), device=device)
        # Sampled from the reads, so that the frequent rows of Zipf ids are among them.
        rows_R = torch.unique(ids_TK.flatten()[:: max(1, ids_TK.numel() // 61)]).long()
        return cls(table(sizes.rows, sizes.dim, dtype, device), ids_TK, weights_TK, upstream_TV, tokens_R, rows_R)

    def sums(self) -> Tensor:
        """Returns the weighted sums of the sampled tokens (R, V)."""
        return torch.stack([self.weights_TK[t].double() @ self._rows_of(t) for t in self.tokens_R.tolist()])

    def dots(self) -> Tensor:
        """Returns inner products of `upstream` with the rows of the sampled tokens (R, K): gradients of weights."""
        return torch.stack([self._rows_of(t) @ self.upstream_TV[t].double() for t in self.tokens_R.tolist()])

    def row_gradients(self) -> Tensor:
        """Returns the gradient of the sampled rows (R, V)."""
        weights_TK = self.weights_TK.double()
        share_RT = torch.stack([(weights_TK * (self.ids_TK == row)).sum(1) for row in self.rows_R.tolist()])
        return share_RT @ self.upstream_TV.double()

    def _rows_of(self, token: int) -> Tensor:
        return self.table_NV[self.ids_TK[token].long()].double()
