"""Collectives with gradients, by which a sharded table's reads travel between the ranks of a group.

Each is the transpose of another: what one sends in forward, the other sends in backward. Ranks may hold different
numbers of rows, which every rank knows beforehand (`lengths`). Every rank of the group must make the same calls.

| forward | backward | bytes a rank receives, n values of size b a row, T rows a rank, P ranks |
|---|---|---|
| `all_gather` | `reduce_scatter` | (P - 1) T n b |
| `reduce_scatter` | `all_gather` | (P - 1) T n b |
| `columns_to_rows` | `rows_to_columns` | (P - 1) / P T n b, of the n values of a whole row |

Letters: T own rows, A rows of all ranks, P ranks, C own columns, D columns of all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pkm_lightning.ops.ranks import gather_into, reduce_scatter_into

# With equal lengths one contiguous tensor goes in and one comes out; else each rank's part is padded to the longest.


def all_gather(x_T: Tensor, lengths: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """All ranks' rows in the order of ranks, (A, ...); the gradient is the sum of all ranks' gradients of the rows."""
    if x_T.requires_grad and torch.is_grad_enabled():
        gathered: Tensor = _AllGather.apply(x_T, tuple(lengths), group)
        return gathered
    return _all_gather(x_T, lengths, group)


def reduce_scatter(x_A: Tensor, lengths: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """The own rows of the sum over ranks, (T, ...)."""
    own: Tensor = _ReduceScatter.apply(x_A, tuple(lengths), group)
    return own


def columns_to_rows(x_AC: Tensor, lengths: Sequence[int], group: dist.ProcessGroup) -> Callable[[], Tensor]:
    """From own columns of all ranks' rows, (A, ..., C), to all columns of the own rows, (T, ..., D).

    The exchange starts here and ends when the result is called for, once; what is computed in between, the exchange
    does not wait for. In backward it is the same between the gradients of the result and of `x_AC`.
    """
    flight = _Flight(tuple(lengths), group)
    received: Tensor = _Send.apply(x_AC, flight)

    def result() -> Tensor:
        rows: Tensor = _Receive.apply(received, flight)
        return rows

    return result


def rows_to_columns(x_TD: Tensor, lengths: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """From all columns of the own rows, (T, ..., D), to own columns of all ranks' rows, (A, ..., C)."""
    columns: Tensor = _RowsToColumns.apply(x_TD, tuple(lengths), group)
    return columns


def _all_gather(x_T: Tensor, lengths: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    longest = max(lengths)
    padded = x_T.contiguous()
    if len(padded) < longest:
        padded = torch.cat([padded, padded.new_zeros(longest - len(padded), *padded.shape[1:])])
    gathered = padded.new_empty(len(lengths) * longest, *padded.shape[1:])
    gather_into(gathered, padded, group)
    if min(lengths) == longest:
        return gathered
    return torch.cat([part[:length] for part, length in zip(gathered.split(longest), lengths, strict=True)])


def _reduce_scatter(x_A: Tensor, lengths: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    longest, own = max(lengths), lengths[dist.get_rank(group)]
    padded = x_A.contiguous()
    if min(lengths) < longest:
        padded = x_A.new_zeros(len(lengths), longest, *x_A.shape[1:])
        for rank, part in enumerate(x_A.split(list(lengths))):
            padded[rank, : len(part)] = part
        padded = padded.flatten(0, 1)
    reduced = padded.new_empty(longest, *padded.shape[1:])
    reduce_scatter_into(reduced, padded, group)
    return reduced[:own]


def _rows_to_columns(x_TD: Tensor, lengths: Sequence[int], group: dist.ProcessGroup) -> tuple[Tensor, dist.Work]:
    ranks, own = len(lengths), len(x_TD)
    columns = x_TD.shape[-1] // ranks
    parts = x_TD.unflatten(-1, (ranks, columns)).movedim(-2, 0).flatten(0, 1).contiguous()
    received = x_TD.new_empty(sum(lengths), *x_TD.shape[1:-1], columns)
    work = dist.all_to_all_single(received, parts, list(lengths), [own] * ranks, group=group, async_op=True)
    return received, work


class _Flight:
    """One exchange under way, there or back."""

    def __init__(self, lengths: tuple[int, ...], group: dist.ProcessGroup) -> None:
        self.lengths, self.group = lengths, group
        self.own = lengths[dist.get_rank(group)]
        self.work: dist.Work | None = None
        self.back: Tensor | None = None

    def send(self, x_AC: Tensor) -> Tensor:
        """Starts from columns to rows; what is returned is filled when `work` has ended."""
        ranks = len(self.lengths)
        received = x_AC.new_empty(ranks * self.own, *x_AC.shape[1:])
        splits = [self.own] * ranks, list(self.lengths)
        self.work = dist.all_to_all_single(received, x_AC.contiguous(), *splits, group=self.group, async_op=True)
        return received

    def rows(self, received: Tensor) -> Tensor:
        """All columns side by side."""
        return received.view(len(self.lengths), self.own, *received.shape[1:]).movedim(0, -2).flatten(-2)

    def wait(self) -> None:
        """Until the exchange that was started last has ended; of a device's stream, not of the host."""
        assert self.work is not None
        self.work.wait()
        self.work = None


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, flight: _Flight) -> Tensor:
        ctx.flight = flight
        return flight.send(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None]:
        ctx.flight.wait()
        back, ctx.flight.back = ctx.flight.back, None
        return back, None


class _Receive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, received: Tensor, flight: _Flight) -> Tensor:
        ctx.flight, ctx.shape = flight, received.shape
        flight.wait()
        return flight.rows(received)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        flight = ctx.flight
        flight.back, flight.work = _rows_to_columns(grad, flight.lengths, flight.group)
        # The gradient proper arrives in _Send's backward; its shape is another where lengths differ.
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
        flight = _Flight(*ctx.where)
        received = flight.send(grad)
        flight.wait()
        return flight.rows(received), None, None
