"""Inputs of the benchmarks: tables, ids, weights, and what a few of the results are in float64.

Letters: T tokens, K rows a token, N rows, D values a row, R sampled rows or tokens, U rows that are read.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from pkm_lightning.memory import ValueTable


class Lookup(NamedTuple):
    """Sizes of a read: T tokens, K rows each of N rows of D values; ids `uniform` or `zipf`, exponent 1."""

    tokens: int
    reads: int
    rows: int
    dim: int
    ids: str

    def __str__(self) -> str:
        return f"T={self.tokens} K={self.reads} D={self.dim} N={self.rows} {self.ids} ids"


def table(rows: int, dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A table of N(0, 1/D) whose rows repeat after 4093, a prime: drawing them all would take longer than reading."""
    block_RD = torch.randn(min(rows, 4093), dim, device=device).mul_(dim**-0.5).to(dtype)
    table_ND = torch.empty(rows, dim, dtype=dtype, device=device)
    for part_RD in table_ND.split(len(block_RD)):
        part_RD.copy_(block_RD[: len(part_RD)])
    return table_ND


def draw_ids(sizes: Lookup, device: torch.device) -> Tensor:
    """int32 ids (T, K)."""
    shape = (sizes.tokens, sizes.reads)
    if sizes.ids == "uniform":
        return torch.randint(sizes.rows, shape, dtype=torch.int32, device=device)
    # A rank drawn as exp(uniform) has a probability of about 1 / rank; an odd factor spreads the ranks over the rows.
    rank_TK = ((sizes.rows + 1) ** torch.rand(shape, dtype=torch.float64, device=device)).long() - 1
    return (rank_TK.clamp(max=sizes.rows - 1) * 2654435761 % sizes.rows).int()


def value_table(weight_ND: Tensor, learning: str, device: str = "auto") -> ValueTable:
    """A table of the package around rows that are there."""
    with torch.device("meta"):
        made = ValueTable(rows=weight_ND.shape[0], dim=weight_ND.shape[1], learning=learning, device=device)
    made.weight = nn.Parameter(weight_ND, requires_grad=made.weight.requires_grad)
    return made


class Reads(NamedTuple):
    """Inputs of a read, and what a few of its results are in float64."""

    table_ND: Tensor
    ids_TK: Tensor
    weights_TK: Tensor
    #: Gradient of the sums, or the x of inner products.
    upstream_TD: Tensor
    tokens_R: Tensor
    rows_R: Tensor

    @classmethod
    def draw(cls, sizes: Lookup, dtype: torch.dtype, device: torch.device) -> Reads:
        """Everything random but seeded."""
        ids_TK = draw_ids(sizes, device)
        weights_TK = torch.rand(sizes.tokens, sizes.reads, device=device).to(dtype)
        upstream_TD = torch.randn(sizes.tokens, sizes.dim, device=device).to(dtype)
        tokens_R = torch.arange(0, sizes.tokens, max(1, sizes.tokens // 61), device=device)
        # By reads, so that the hot rows of Zipf ids are among them.
        rows_R = torch.unique(ids_TK.flatten()[:: max(1, ids_TK.numel() // 61)]).long()
        return cls(table(sizes.rows, sizes.dim, dtype, device), ids_TK, weights_TK, upstream_TD, tokens_R, rows_R)

    def sums(self) -> Tensor:
        """The weighted sums of the sampled tokens, (R, D)."""
        return torch.stack([self.weights_TK[t].double() @ self._rows_of(t) for t in self.tokens_R.tolist()])

    def dots(self) -> Tensor:
        """The inner products with `upstream` of the sampled tokens, (R, K): the gradient of their weights."""
        return torch.stack([self._rows_of(t) @ self.upstream_TD[t].double() for t in self.tokens_R.tolist()])

    def row_gradients(self) -> Tensor:
        """The gradient of the sampled rows, (R, D)."""
        weights_TK = self.weights_TK.double()
        share_RT = torch.stack([(weights_TK * (self.ids_TK == row)).sum(1) for row in self.rows_R.tolist()])
        return share_RT @ self.upstream_TD.double()

    def _rows_of(self, token: int) -> Tensor:
        return self.table_ND[self.ids_TK[token].long()].double()
