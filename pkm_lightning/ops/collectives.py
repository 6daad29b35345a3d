"""Collectives with gradients that exchange the reads of a sharded table between the ranks of a group.

Each is the transpose of another: what one sends in forward, the other sends in backward. Ranks may hold different
numbers of rows, which every rank knows beforehand (`lengths`). Collective: call on all ranks of the group, in the same
order.

| forward | backward | bytes that each rank receives, for n values of size b per row |
|---|---|---|
| `all_gather` | `reduce_scatter` | (P - 1) R n b |
| `reduce_scatter` | `all_gather` | (P - 1) R n b |
| `columns_to_rows` | `rows_to_columns` | (P - 1) / P R n b, for the n values of a whole row |

Letters: R rows of this rank, A rows of all ranks, P ranks, C columns (values per row) of this rank, V of all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pkm_lightning.ops.ranks import gather_into, reduce_scatter_into

# Torch has contiguous collectives for equal lengths only: otherwise each rank's part is padded to the longest.


def all_gather(x_R: Tensor, lengths: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """Returns the rows of all ranks in the order of ranks, (A, ...); their gradient is the sum over all ranks."""
    if x_R.requires_grad and torch.is_grad_enabled():  # ids are integers and need no autograd node
        gathered: Tensor = _AllGather.apply(x_R, tuple(lengths), group)
        return gathered
    return _all_gather(x_R, lengths, group)


def reduce_scatter(x_A: Tensor, lengths: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """Returns this rank's rows of the sum over ranks, (R, ...)."""
    reduced: Tensor = _ReduceScatter.apply(x_A, tuple(lengths), group)
    return reduced


def columns_to_rows(x_AC: Tensor, lengths: Sequence[int], group: dist.ProcessGroup) -> Callable[[], Tensor]:
    """Starts the exchange of this rank's columns of all rows, (A, ..., C), for all columns of its rows, (R, ..., V).

    Returns:
        A function to call once, which waits for the exchange and returns the rows. Work between the two calls overlaps
        with the exchange; in backward, work between the gradient of the rows and that of `x_AC` does.
    """
    exchange = _Exchange(tuple(lengths), group)
    received: Tensor = _Send.apply(x_AC, exchange)

    def result() -> Tensor:
        rows: Tensor = _Receive.apply(received, exchange)
        return rows

    return result


def rows_to_columns(x_RV: Tensor, lengths: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """Returns this rank's columns of all rows, (A, ..., C), for all columns of its own rows, (R, ..., V)."""
    columns: Tensor = _RowsToColumns.apply(x_RV, tuple(lengths), group)
    return columns


def _all_gather(x_R: Tensor, lengths: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    longest = max(lengths)
    padded = x_R.contiguous()
    if len(padded) < longest:
        padded = torch.cat([padded, padded.new_zeros(longest - len(padded), *padded.shape[1:])])
    gathered = padded.new_empty(len(lengths) * longest, *padded.shape[1:])
    gather_into(gathered, padded, group)
    if min(lengths) == longest:
        return gathered
    return torch.cat([part[:length] for part, length in zip(gathered.split(longest), lengths, strict=True)])


def _reduce_scatter(x_A: Tensor, lengths: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    longest, length = max(lengths), lengths[dist.get_rank(group)]
    padded = x_A.contiguous()
    if min(lengths) < longest:
        padded = x_A.new_zeros(len(lengths), longest, *x_A.shape[1:])
        for rank, part in enumerate(x_A.split(list(lengths))):
            padded[rank, : len(part)] = part
        padded = padded.flatten(0, 1)
    reduced = padded.new_empty(longest, *padded.shape[1:])
    reduce_scatter_into(reduced, padded, group)
    return reduced[:length]


def _rows_to_columns(x_RV: Tensor, lengths: Sequence[int], group: dist.ProcessGroup) -> tuple[Tensor, dist.Work]:
    ranks, rows = len(lengths), len(x_RV)
    columns = x_RV.shape[-1] // ranks
    # Rank-major, since all_to_all sends contiguous blocks of the first dimension.
    parts = x_RV.unflatten(-1, (ranks, columns)).movedim(-2, 0).flatten(0, 1).contiguous()
    received = x_RV.new_empty(sum(lengths), *x_RV.shape[1:-1], columns)
    work = dist.all_to_all_single(received, parts, list(lengths), [rows] * ranks, group=group, async_op=True)
    return received, work


class _Exchange:
    """One exchange between columns and rows, in forward or in backward."""

    def __init__(self, lengths: tuple[int, ...], group: dist.ProcessGroup) -> None:
        self.lengths, self.group = lengths, group
        self.rows = lengths[dist.get_rank(group)]
        self.work: dist.Work | None = None
        self.grad: Tensor | None = None

    def send(self, x_AC: Tensor) -> Tensor:
        """Starts the exchange from columns to rows; the returned buffer is filled when `work` has ended."""
        ranks = len(self.lengths)
        received = x_AC.new_empty(ranks * self.rows, *x_AC.shape[1:])
        splits = [self.rows] * ranks, list(self.lengths)
        self.work = dist.all_to_all_single(received, x_AC.contiguous(), *splits, group=self.group, async_op=True)
        return received

    def join_columns(self, received: Tensor) -> Tensor:
        """Puts the columns of all ranks side by side."""
        return received.view(len(self.lengths), self.rows, *received.shape[1:]).movedim(0, -2).flatten(-2)

    def wait(self) -> None:
        """Waits for the last exchange; under NCCL only the device's stream waits, not the host."""
        assert self.work is not None
        self.work.wait()
        self.work = None


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: _Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.send(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        ctx.exchange.wait()
        grad, ctx.exchange.grad = ctx.exchange.grad, None
        return grad, None


class _Receive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, received: Tensor, exchange: _Exchange) -> Tensor:
        ctx.exchange, ctx.shape = exchange, received.shape
        exchange.wait()
        return exchange.join_columns(received)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # Starts the exchange; autograd may compute other gradients before _Send's backward waits for it.
        exchange = ctx.exchange
        exchange.grad, exchange.work = _rows_to_columns(grad, exchange.lengths, exchange.group)
        # A placeholder of the shape that autograd expects; _Send's backward returns the exchanged gradient.
        return grad.new_zeros(()).expand(ctx.shape), None


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, lengths: tuple[int, ...], group: dist.ProcessGroup) -> Tensor:
        ctx.where = lengths, group
        return _all_gather(x, lengths, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _reduce_scatter(grad, *ctx.where), None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, lengths: tuple[int, ...], group: dist.ProcessGroup) -> Tensor:
        ctx.where = lengths, group
        return _reduce_scatter(x, lengths, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _all_gather(grad, *ctx.where), None, None


class _RowsToColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, lengths: tuple[int, ...], group: dist.ProcessGroup) -> Tensor:
        ctx.where = lengths, group
        columns, work = _rows_to_columns(x, lengths, group)
        work.wait()
        return columns

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        exchange = _Exchange(*ctx.where)
        received = exchange.send(grad)
        exchange.wait()
        return exchange.join_columns(received), None, None
