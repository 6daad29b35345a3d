"""Staged reads: in backward, each read of a table leaves its ids, weights and output gradients for the optimizer.

Staging is the identity in forward. Its backward copies the factors of the table's gradient into buffers, which grow to
the size of a step and are reused. The optimizer merges the reads of all layers and micro-batches of a step into one
gradient per row. Forward and backward are custom operators, so that compiled blocks can call them.

Letters: T tokens, or reads where a plugin reads several times per token, K lines per read, L = T * K, X source rows.
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

# Arguments of an operator are numbers and tensors, so the stage of a table is passed as an integer handle and looked up
# here. The table owns its stage: this dictionary must not keep it alive.
_stages: weakref.WeakValueDictionary[int, RowStage] = weakref.WeakValueDictionary()
_handles = itertools.count()


class RowStage:
    """The staged reads of one table in one optimizer step.

    Args:
        n_rows: rows that this rank holds; the id `n_rows` stands for a row that another rank holds.
        mesh: the ranks that the table is sharded or replicated over; None: each rank holds a copy.

    Attributes:
        was_read: whether the table has ever been read with gradients enabled.
        scale: factor on the gradient: a number, or a scalar tensor, which stays on its device.
    """

    def __init__(self, n_rows: int, mesh: TableMesh | None = None) -> None:
        self.n_rows, self.mesh, self.was_read = n_rows, mesh, False
        handle = next(_handles)
        _stages[handle] = self
        # A tensor, because torch.compile specialises on numbers and would compile a block once per table.
        self.handle = torch.tensor(handle, dtype=torch.int64, device="cpu")
        # An input that requires a gradient, so that a read with constant weights has a backward too. Its gradient, a
        # zero, is the output of the staging operator, so that a compiler cannot remove that operator as unused.
        self.anchor = torch.zeros((), dtype=torch.float32, device="cpu", requires_grad=True)
        self._ids, self._coefficients, self._sources, self._rows = (_Buffer() for _ in range(4))
        self._gradient: RowGradient | None = None
        self.scale: Tensor | float = 1.0

    def __deepcopy__(self, memo: dict[int, Any]) -> RowStage:
        """Returns an empty stage: staged reads belong to the model that was run."""
        return RowStage(self.n_rows, self.mesh)

    def __reduce__(self) -> tuple[type[RowStage], tuple[int]]:
        # Process groups cannot be pickled: the copy stands for a whole table.
        return RowStage, (self.n_rows,)

    def stage_sum(self, y_XV: Tensor, ids_TK: Tensor, weights_TK: Tensor, sources_TK: Tensor | None = None) -> Tensor:
        """Returns `y_XV` and stages its gradient: row `sources[t, k]` of y (default t) has the term
        weights[t, k] * row ids[t, k]."""
        y: Tensor = _stage_sum(y_XV, ids_TK, weights_TK, sources_TK, self.anchor, self.handle)
        return y

    def stage_dot(self, dots_TK: Tensor, ids_TK: Tensor, x_TV: Tensor) -> Tensor:
        """Returns `dots_TK`, computed as <row ids[t, k], x[t]>, and stages its gradient."""
        dots: Tensor = _stage_dot(dots_TK, ids_TK, x_TV, self.anchor, self.handle)
        return dots

    def add(self, ids_L: Tensor, coefficients_L: Tensor, sources_L: Tensor, source_rows_XV: Tensor) -> None:
        """Appends the factors of the gradient of one read to the buffers."""
        self._gradient = None
        before = self._rows.length
        if self.mesh is not None and self.mesh.shard == "row" and ids_L.device.type == "cpu":
            # On an accelerator the host would have to wait for the number of remaining reads.
            is_local_L = ids_L < self.n_rows
            ids_L, coefficients_L, sources_L = ids_L[is_local_L], coefficients_L[is_local_L], sources_L[is_local_L]
        self._ids.append(ids_L, torch.int32)
        self._coefficients.append(coefficients_L, _sum_dtype(source_rows_XV))
        self._sources.append(sources_L, torch.int32).add_(before)
        # To the table: lines that were fetched ahead have their gradient where the model is.
        self._rows.append(source_rows_XV.to(ids_L.device), source_rows_XV.dtype)

    def gradient(self, table_NV: Tensor) -> RowGradient | None:
        """Returns the gradient of the staged reads, a mean over ranks; None if no rank has any.

        Collective: call on all ranks.

        Args:
            table_NV: the table, for width, dtype and device where this rank has read nothing.
        """
        if self._gradient is None:
            staged = StagedReads(
                self._ids.filled(table_NV[:0, 0].int()),
                self._coefficients.filled(table_NV[:0, 0].to(_sum_dtype(table_NV))),
                self._sources.filled(table_NV[:0, 0].int()),
                self._rows.filled(table_NV[:0]),
            )
            self._gradient = mean_gradient(self.n_rows, staged, self.mesh)
        return self._gradient

    def norm(self, table_NV: Tensor) -> Tensor:
        """Returns the L2 norm of the gradient over all rows and ranks, a scalar tensor.

        Collective: call on all ranks.
        """
        gradient = self.gradient(table_NV)
        norm = table_NV.new_zeros((), dtype=_sum_dtype(table_NV)) if gradient is None else row_gradient_norm(gradient)
        return norm_over_members(norm, self.mesh) * self.scale

    def clear(self) -> None:
        """Discards the staged reads and keeps the buffers."""
        for buffer in (self._ids, self._coefficients, self._sources, self._rows):
            buffer.length = 0
        self._gradient, self.scale = None, 1.0


class _Buffer:
    """A tensor to which rows are appended, and which grows by doubling."""

    def __init__(self) -> None:
        self.length = 0
        self._storage: Tensor | None = None

    def append(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """Appends `values` as `dtype` and returns a view of the copy."""
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
        """Returns a view of the appended rows, or `empty` if there never were any."""
        return empty if self._storage is None else self._storage[: self.length]


def _sum_dtype(rows: Tensor) -> torch.dtype:
    """Returns the dtype of coefficients and norms: fp32, or fp64 for an fp64 table."""
    return torch.promote_types(rows.dtype, torch.float32)


def _stage(handle: Tensor) -> RowStage:
    stage = _stages.get(int(handle))
    if stage is None:
        raise RuntimeError("the table of this read no longer exists: keep the model until its backward pass has ended.")
    return stage


@library.custom_op("pkm_lightning::stage_sum", mutates_args=())
def _stage_sum(
    y: Tensor, ids: Tensor, weights: Tensor, sources: Tensor | None, anchor: Tensor, handle: Tensor
) -> Tensor:
    _stage(handle).was_read = True
    # An operator's output must not alias its input.
    return y.clone()


@library.custom_op("pkm_lightning::stage_dot", mutates_args=())
def _stage_dot(dots: Tensor, ids: Tensor, x: Tensor, anchor: Tensor, handle: Tensor) -> Tensor:
    _stage(handle).was_read = True
    # As in `_stage_sum`: no alias of the input.
    return dots.clone()


@library.custom_op("pkm_lightning::stage_reads", mutates_args=())
def _stage_reads(ids: Tensor, coefficients: Tensor, sources: Tensor | None, rows: Tensor, handle: Tensor) -> Tensor:
    sources = read_sources(ids) if sources is None else sources
    _stage(handle).add(ids.flatten(), coefficients.flatten(), sources.flatten(), rows)
    return torch.zeros((), dtype=torch.float32, device="cpu")


@_stage_sum.register_fake
def _(y: Tensor, ids: Tensor, weights: Tensor, sources: Tensor | None, anchor: Tensor, handle: Tensor) -> Tensor:
    return torch.empty_like(y)


@_stage_dot.register_fake
def _(dots: Tensor, ids: Tensor, x: Tensor, anchor: Tensor, handle: Tensor) -> Tensor:
    return torch.empty_like(dots)


@_stage_reads.register_fake
def _(ids: Tensor, coefficients: Tensor, sources: Tensor | None, rows: Tensor, handle: Tensor) -> Tensor:
    return torch.empty((), dtype=torch.float32, device="cpu")


def _save_sum(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ids_TK, weights_TK, sources_TK, _, handle = inputs
    ctx.save_for_backward(ids_TK, weights_TK, sources_TK, handle)


def _backward_sum(ctx: Any, grad_XV: Tensor) -> tuple[Tensor, None, None, None, Tensor, None]:
    ids_TK, weights_TK, sources_TK, handle = ctx.saved_tensors
    zero = _stage_reads(ids_TK, weights_TK, sources_TK, grad_XV, handle)
    return grad_XV, None, None, None, zero, None


def _save_dot(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ids_TK, x_TV, _, handle = inputs
    ctx.save_for_backward(ids_TK, x_TV, handle)


def _backward_dot(ctx: Any, grad_TK: Tensor) -> tuple[Tensor, None, None, Tensor, None]:
    ids_TK, x_TV, handle = ctx.saved_tensors
    zero = _stage_reads(ids_TK, grad_TK, None, x_TV, handle)
    return grad_TK, None, None, zero, None


# Two reads of a table by the same ids and weights stage twice: a compiler must not merge them as common subexpressions.
if hasattr(_stage_reads, "register_effect"):  # torch 2.13 has it, older versions do not
    from torch._library.effects import EffectType

    _stage_reads.register_effect(EffectType.ORDERED)
_stage_sum.register_autograd(_backward_sum, setup_context=_save_sum)
_stage_dot.register_autograd(_backward_dot, setup_context=_save_dot)
