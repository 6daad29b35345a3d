"""Reads that wait for the optimizer: in backward each read of a table leaves its ids, weights and output gradients.

A staged read is an identity in forward. Its backward copies what the table's gradient is made of into buffers that
grow to what a step needs and are used again, so that all layers and micro-batches of a step are one gradient per
touched row later on. Both are custom operators: compiled blocks call them like any other.

Letters: T reads, K rows a read, L = T * K, X source rows, V values per row.
"""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, library

from pkm_lightning.memory.replicas import StagedReads, mean_gradient, norm_over_members
from pkm_lightning.ops.row_update import RowGradient, row_gradient_norm
from pkm_lightning.ops.segments import read_sources

if TYPE_CHECKING:
    from pkm_lightning.memory.mesh import TableMesh

# An operator takes numbers and tensors only: by this number it finds the stage of the table that was read. The stage
# belongs to its table; nothing here keeps it alive.
_stages: weakref.WeakValueDictionary[int, RowStage] = weakref.WeakValueDictionary()
_numbers = itertools.count()


class RowStage:
    """What the reads of one optimizer step leave for one table.

    Args:
        n_rows: rows that this rank holds; a read of row `n_rows` is one of a row that another rank holds.
        mesh: the ranks that the table is split or copied over; None: each rank holds a copy.

    Attributes:
        seen: whether the table has ever been read with a gradient in view.
        scale: factor on the gradient: a number, or a scalar tensor that no host need read.
    """

    def __init__(self, n_rows: int, mesh: TableMesh | None = None) -> None:
        self.n_rows, self.mesh, self.seen = n_rows, mesh, False
        number = next(_numbers)
        _stages[number] = self
        # A tensor, since a compiled block is compiled anew for another number, and each table has one.
        self.number = torch.tensor(number, dtype=torch.int64, device="cpu")
        # Requires a gradient, so that a read with constant weights has a backward too. The gradient, a zero, is what
        # staging returns: nobody who compiles the backward can take it for an operation without effect.
        self.anchor = torch.zeros((), dtype=torch.float32, device="cpu", requires_grad=True)
        self._ids, self._coefficients, self._sources, self._rows = (_Buffer() for _ in range(4))
        self._gradient: RowGradient | None = None
        self.scale: Tensor | float = 1.0

    def __deepcopy__(self, memo: dict[int, Any]) -> RowStage:
        """An empty stage of its own: what is staged belongs to the model that was run."""
        return RowStage(self.n_rows, self.mesh)

    def __reduce__(self) -> tuple[type[RowStage], tuple[int]]:
        return RowStage, (self.n_rows,)

    def watch_sum(self, y_XV: Tensor, ids_TK: Tensor, weights_TK: Tensor, sources_TK: Tensor | None = None) -> Tensor:
        """`y_XV`, in whose row `sources[t, k]` (default t) the row ids[t, k] stands with the weight weights[t, k]."""
        y: Tensor = _watch_sum(y_XV, ids_TK, weights_TK, sources_TK, self.anchor, self.number)
        return y

    def watch_dot(self, dots_TK: Tensor, ids_TK: Tensor, x_TV: Tensor) -> Tensor:
        """`dots_TK`, which was computed as <row ids[t, k], x[t]>."""
        dots: Tensor = _watch_dot(dots_TK, ids_TK, x_TV, self.anchor, self.number)
        return dots

    def add(self, ids_L: Tensor, coefficients_L: Tensor, sources_L: Tensor, source_rows_XV: Tensor) -> None:
        """Copies one read's part of the gradient behind what is there."""
        self._gradient = None
        before = self._rows.length
        if self.mesh is not None and self.mesh.shard == "row" and ids_L.device.type == "cpu":
            own_L = ids_L < self.n_rows  # elsewhere the host would wait to learn how many there are
            ids_L, coefficients_L, sources_L = ids_L[own_L], coefficients_L[own_L], sources_L[own_L]
        self._ids.append(ids_L, torch.int32)
        wide = torch.promote_types(source_rows_XV.dtype, torch.float32)
        self._coefficients.append(coefficients_L, wide)
        self._sources.append(sources_L, torch.int32).add_(before)
        self._rows.append(source_rows_XV, source_rows_XV.dtype)

    def gradient(self, table_NV: Tensor) -> RowGradient | None:
        """The gradient of what is staged, a mean over ranks; None if no rank has anything. Every rank must ask.

        Args:
            table_NV: the table, for width, dtype and device where this rank has read nothing.
        """
        if self._gradient is None:
            wide = torch.promote_types(table_NV.dtype, torch.float32)
            staged = StagedReads(
                self._ids.filled(table_NV[:0, 0].int()),
                self._coefficients.filled(table_NV[:0, 0].to(wide)),
                self._sources.filled(table_NV[:0, 0].int()),
                self._rows.filled(table_NV[:0]),
            )
            self._gradient = mean_gradient(self.n_rows, staged, self.mesh)
        return self._gradient

    def norm(self, table_NV: Tensor) -> Tensor:
        """L2 norm of the gradient over all rows and ranks, a scalar tensor; every rank must ask."""
        gradient = self.gradient(table_NV)
        norm = torch.zeros((), device=table_NV.device) if gradient is None else row_gradient_norm(gradient)
        return norm_over_members(norm, self.mesh) * self.scale

    def clear(self) -> None:
        """Forgets what is staged; the buffers stay."""
        for buffer in (self._ids, self._coefficients, self._sources, self._rows):
            buffer.length = 0
        self._gradient, self.scale = None, 1.0


class _Buffer:
    """A tensor that is filled from the front and grows by doubling."""

    def __init__(self) -> None:
        self.length = 0
        self._storage: Tensor | None = None

    def append(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """Copies `values` behind what is there, as `dtype`; returns the copy, a view."""
        end = self.length + len(values)
        storage = self._storage
        if storage is None or len(storage) < end or storage.device != values.device or storage.dtype is not dtype:
            room = end if storage is None else max(end, 2 * len(storage))
            storage = torch.empty(room, *values.shape[1:], dtype=dtype, device=values.device)
            if self._storage is not None and self.length:
                storage[: self.length] = self._storage[: self.length]
            self._storage = storage
        copied = storage[self.length : end]
        copied.copy_(values)
        self.length = end
        return copied

    def filled(self, empty: Tensor) -> Tensor:
        """What is there, or `empty`."""
        return empty if self._storage is None else self._storage[: self.length]


def _stage(number: Tensor) -> RowStage:
    stage = _stages.get(int(number))
    if stage is None:
        raise RuntimeError("the table of this read is gone: keep the model for as long as you compute its gradients.")
    return stage


@library.custom_op("pkm_lightning::watch_sum", mutates_args=())
def _watch_sum(
    y: Tensor, ids: Tensor, weights: Tensor, sources: Tensor | None, anchor: Tensor, number: Tensor
) -> Tensor:
    _stage(number).seen = True
    return y.clone()


@library.custom_op("pkm_lightning::watch_dot", mutates_args=())
def _watch_dot(dots: Tensor, ids: Tensor, x: Tensor, anchor: Tensor, number: Tensor) -> Tensor:
    _stage(number).seen = True
    return dots.clone()


@library.custom_op("pkm_lightning::stage_reads", mutates_args=())
def _stage_reads(ids: Tensor, coefficients: Tensor, sources: Tensor | None, rows: Tensor, number: Tensor) -> Tensor:
    sources = read_sources(ids) if sources is None else sources
    _stage(number).add(ids.flatten(), coefficients.flatten(), sources.flatten(), rows)
    return torch.zeros((), dtype=torch.float32, device="cpu")


@_watch_sum.register_fake
def _(y: Tensor, ids: Tensor, weights: Tensor, sources: Tensor | None, anchor: Tensor, number: Tensor) -> Tensor:
    return torch.empty_like(y)


@_watch_dot.register_fake
def _(dots: Tensor, ids: Tensor, x: Tensor, anchor: Tensor, number: Tensor) -> Tensor:
    return torch.empty_like(dots)


@_stage_reads.register_fake
def _(ids: Tensor, coefficients: Tensor, sources: Tensor | None, rows: Tensor, number: Tensor) -> Tensor:
    return torch.empty((), dtype=torch.float32, device="cpu")


def _keep_sum(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ids_TK, weights_TK, sources_TK, _, number = inputs
    ctx.save_for_backward(ids_TK, weights_TK, sources_TK, number)


def _stage_sum(ctx: Any, grad_XV: Tensor) -> tuple[Tensor, None, None, None, Tensor, None]:
    ids_TK, weights_TK, sources_TK, number = ctx.saved_tensors
    zero = _stage_reads(ids_TK, weights_TK, sources_TK, grad_XV, number)
    return grad_XV, None, None, None, zero, None


def _keep_dot(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ids_TK, x_TV, _, number = inputs
    ctx.save_for_backward(ids_TK, x_TV, number)


def _stage_dot(ctx: Any, grad_TK: Tensor) -> tuple[Tensor, None, None, Tensor, None]:
    ids_TK, x_TV, number = ctx.saved_tensors
    zero = _stage_reads(ids_TK, grad_TK, None, x_TV, number)
    return grad_TK, None, None, zero, None


# Two reads of one table by the same ids and weights stage twice: a compiler must not make one of them.
if hasattr(_stage_reads, "register_effect"):  # older versions of torch have none
    from torch._library.effects import EffectType

    _stage_reads.register_effect(EffectType.ORDERED)
_watch_sum.register_autograd(_stage_sum, setup_context=_keep_sum)
_watch_dot.register_autograd(_stage_dot, setup_context=_keep_dot)
