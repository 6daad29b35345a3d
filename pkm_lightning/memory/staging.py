"""Staged reads: in backward, each read of a table leaves its ids, weights and output gradients for the optimizer.

The backward of a read (`stage_operators.py`) copies the factors of the table's gradient into buffers, which grow to the
size of a step and are reused. The optimizer merges the reads of all layers and micro-batches of a step into one
gradient per row. The first read of a step is sorted in backward, which computes the gradients of its weights row by
row; where it stays the only one, norm and update continue with what backward has computed.

Letters: T tokens, or reads where a plugin reads several times per token, K lines per read, L = T * K, X source rows,
G groups per read, U lines that learn, M = N + 1 flags of the N lines of this rank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pkm_lightning.errors import ConfigError
from pkm_lightning.memory.replicas import StagedReads, mean_gradient, norm_over_members
from pkm_lightning.memory.stage_operators import register_stage, stage_dot, stage_rows, stage_sum
from pkm_lightning.ops.backends import best_backend
from pkm_lightning.ops.gathered_rows import default_backend
from pkm_lightning.ops.ranks import is_distributed
from pkm_lightning.ops.row_update import RowGradient, row_gradient_norm
from pkm_lightning.ops.segments import check_indices

if TYPE_CHECKING:
    from pkm_lightning.memory.mesh import TableMesh

# Backward passes whose reads nobody takes before the next one raises. Without an optimizer of the table nobody ever
# will; with one, it is the number of micro-batches of a step, of which no sane loop has as many.
_PASSES_WITHOUT_OPTIMIZER, _PASSES_WITH_OPTIMIZER = 10, 10_000


class RowStage:
    """The staged reads of one table in one optimizer step.

    Args:
        n_rows: rows that this rank holds; the id `n_rows` stands for a row that another rank holds.
        mesh: the ranks that the table is sharded or replicated over; None: each rank holds a copy.

    Attributes:
        was_read: whether the table has ever been read with gradients enabled.
        has_optimizer: whether a `TableOptimizer` steps the table.
        scale: factor on the gradient: a number, or a scalar tensor, which stays on its device.
    """

    def __init__(self, n_rows: int, mesh: TableMesh | None = None) -> None:
        self.n_rows, self.mesh, self.was_read, self.has_optimizer = n_rows, mesh, False, False
        self._passes, self._last_pass, self._reads = 0, -1, 0
        # A flag per line and one more, always False, for lines of other ranks; None: all lines learn.
        self._learns_M: Tensor | None = None
        self._learning_U: Tensor | None = None
        self.handle = register_stage(self)
        # An input that requires a gradient, so that a read with constant weights has a backward too. Its gradient, a
        # zero, is the output of the staging operator, so that a compiler cannot remove that operator as unused.
        self.anchor = torch.zeros((), dtype=torch.float32, device="cpu", requires_grad=True)
        self._ids, self._coefficients, self._sources, self._rows = (_Buffer() for _ in range(4))
        self._units: tuple[Tensor, Tensor] | None = None
        self._gradient: RowGradient | None = None
        self.scale: Tensor | float = 1.0

    def __deepcopy__(self, memo: dict[int, Any]) -> RowStage:
        """Returns an empty stage: staged reads belong to the model that was run."""
        return RowStage(self.n_rows, self.mesh)

    def __reduce__(self) -> tuple[type[RowStage], tuple[int]]:
        # Process groups cannot be pickled: the copy stands for a whole table.
        return RowStage, (self.n_rows,)

    def record_read(self, device: torch.device) -> None:
        """Records a read with gradients enabled.

        Raises:
            ConfigError: under autocast to float16, whose loss a GradScaler scales.
        """
        self.was_read = True
        if torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type) is torch.float16:
            raise ConfigError(
                "a value table with learning='rows' was read under autocast to float16, and a GradScaler does not "
                "unscale its reads: use torch.autocast(..., torch.bfloat16), or make the table with learning='dense'."
            )

    def sum(
        self,
        table_NV: Tensor,
        ids_TK: Tensor,
        staged_TK: Tensor | None,
        weights_TK: Tensor,
        groups_TK: Tensor | None,
        n_groups: int,
    ) -> Tensor:
        """Returns the weighted sums of the rows `ids`, (T, G, V), and stages their gradient under the ids `staged`.

        `staged_TK` is None where these are the same ids.
        """
        anchors = self.anchor, self.handle, best_backend(table_NV)
        y: Tensor = stage_sum(table_NV, ids_TK, staged_TK, weights_TK, groups_TK, n_groups, *anchors)
        return y

    def dot(self, dots_TK: Tensor, ids_TK: Tensor, x_TV: Tensor) -> Tensor:
        """Returns `dots_TK`, computed as <row ids[t, k], x[t]>, and stages its gradient."""
        dots: Tensor = stage_dot(dots_TK, ids_TK, x_TV, self.anchor, self.handle)
        return dots

    def gather(self, table_NV: Tensor, ids_TK: Tensor, staged_TK: Tensor) -> Tensor:
        """Returns the rows `ids` of the table, (T, K, V), and stages their gradient under the ids `staged`."""
        backend = default_backend(table_NV)
        rows: Tensor = stage_rows(table_NV, ids_TK, staged_TK, self.anchor, self.handle, backend)
        return rows

    def add(
        self,
        ids_L: Tensor,
        coefficients_L: Tensor | None,
        sources_L: Tensor | None,
        source_rows_XV: Tensor,
    ) -> None:
        """Appends the factors of the gradient of one read to the buffers.

        Without coefficients and sources, each read has a source row of its own and the coefficient 1.

        Raises:
            ConfigError: the reads of earlier backward passes were never taken.
        """
        self._count_pass()
        self._gradient = None
        self._reads += len(ids_L)
        if self.mesh is not None and self.mesh.shard == "row" and ids_L.device.type == "cpu":
            # On an accelerator the host would have to wait for the number of remaining reads.
            is_local_L = ids_L < self.n_rows
            ids_L = ids_L[is_local_L]
            if coefficients_L is None or sources_L is None:
                source_rows_XV = source_rows_XV[is_local_L]
            else:
                coefficients_L, sources_L = coefficients_L[is_local_L], sources_L[is_local_L]
        if coefficients_L is not None and sources_L is not None:
            self._add_factors(coefficients_L, sources_L, source_rows_XV)
        elif self._coefficients.length:
            self._add_factors(*_unit_factors(ids_L, _sum_dtype(source_rows_XV)), source_rows_XV)
        self._ids.append(ids_L, torch.int32)
        # To the table: lines that were fetched ahead have their gradient where the model is.
        self._rows.append(source_rows_XV.to(ids_L.device), source_rows_XV.dtype)

    def _add_factors(self, coefficients_L: Tensor, sources_L: Tensor, source_rows_XV: Tensor) -> None:
        """Appends coefficients and sources, after those that the reads before them imply."""
        dtype = _sum_dtype(source_rows_XV)
        if self._ids.length and not self._coefficients.length:
            ones_L, numbers_L = _unit_factors(self._ids.filled(sources_L), dtype)
            self._coefficients.append(ones_L, dtype)
            self._sources.append(numbers_L, torch.int32)
        self._coefficients.append(coefficients_L, dtype)
        self._sources.append(sources_L, torch.int32).add_(self._rows.length)

    def gradient(self, table_NV: Tensor) -> RowGradient | None:
        """Returns the gradient of the staged reads, a mean over ranks; None if no rank has any.

        Collective: call on all ranks.

        Args:
            table_NV: the table, for width, dtype and device where this rank has read nothing.
        """
        self._passes = 0
        return self._merged(table_NV)

    def _merged(self, table_NV: Tensor) -> RowGradient | None:
        if self._gradient is None:
            ids_L, rows_XV = self._ids.filled(table_NV[:0, 0].int()), self._rows.filled(table_NV[:0])
            staged = StagedReads(ids_L, *self._factors(ids_L, _sum_dtype(table_NV)), rows_XV)
            if self._learns_M is not None:
                staged = _only(staged, self._learns_M)
            self._gradient = mean_gradient(self.n_rows, staged, self.mesh, reads=self._reads)
        return self._gradient

    def sole_gradient(self, ids_L: Tensor, table_NV: Tensor) -> RowGradient | None:
        """Returns the gradient of the reads `ids`, if nothing else is staged and all lines and one rank learn.

        Until something else is staged, `gradient` returns the same object, with all that was computed from it.
        """
        if len(ids_L) != self._ids.length or self.mesh is not None or self._learns_M is not None or is_distributed():
            return None
        return self._merged(table_NV)

    def restrict(self, lines_U: Tensor | None) -> None:
        """Cuts the gradient to some lines, in this and all later steps: others keep values and optimizer states.

        Norm and update are then those of a step that has read these lines only.

        Args:
            lines_U: numbers of lines within this rank's part, on the device of the table; `n_rows` stands for a line
                of another rank. None: all lines learn.
        """
        self._gradient = None
        if lines_U is None:
            self._learns_M = self._learning_U = None
            return
        check_indices("RowStage.restrict", "lines", lines_U, self.n_rows + 1)
        if self._learns_M is None or self._learns_M.device != lines_U.device:
            self._learns_M = torch.zeros(self.n_rows + 1, dtype=torch.bool, device=lines_U.device)
        elif self._learning_U is not None:
            self._learns_M[self._learning_U] = False  # few flags instead of all: a table may have 1e8 lines
        self._learns_M[lines_U] = True
        self._learns_M[-1] = False
        self._learning_U = lines_U

    def _factors(self, ids_L: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Returns coefficients and sources of all reads; those that are implied are kept from step to step."""
        if self._coefficients.length:
            return self._coefficients.filled(ids_L), self._sources.filled(ids_L)
        units = self._units
        if units is None or len(units[0]) < len(ids_L) or units[0].device != ids_L.device or units[0].dtype != dtype:
            units = self._units = _unit_factors(ids_L, dtype)
        return units[0][: len(ids_L)], units[1][: len(ids_L)]

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
        self._passes = self._reads = 0

    def _count_pass(self) -> None:
        """Counts backward passes since the reads were last taken: they would fill the memory, and teach nothing."""
        # torch numbers the passes and has no public name for the number; layers that share a table stage in one pass.
        current = torch._C._current_graph_task_id()
        if current == self._last_pass:
            return
        self._last_pass = current
        self._passes += 1
        if self._passes > (_PASSES_WITH_OPTIMIZER if self.has_optimizer else _PASSES_WITHOUT_OPTIMIZER):
            raise ConfigError(
                f"a value table with learning='rows' was read in {self._passes - 1} backward passes, and no optimizer "
                "has taken these reads, so nothing is learned: step a TableOptimizer(dense, "
                "row_learning_tables(model), lr=...), make the table with learning='dense', or, for gradients of "
                "inputs alone, set table.stage = None."
            )


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


def _unit_factors(ids_L: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns coefficients and sources of reads that have a source row each: ones, and 0, 1, 2, ..."""
    numbers_L = torch.arange(len(ids_L), dtype=torch.int32, device=ids_L.device)
    return torch.ones(len(ids_L), dtype=dtype, device=ids_L.device), numbers_L


def _only(staged: StagedReads, learns_M: Tensor) -> StagedReads:
    """Returns the staged reads of the lines whose flag is True."""
    keep_L = learns_M[staged.ids_L]
    if keep_L.device.type == "cpu":
        ids_L, coefficients_L, sources_L, source_rows_XV = staged
        return StagedReads(ids_L[keep_L], coefficients_L[keep_L], sources_L[keep_L], source_rows_XV)
    # On an accelerator the host would wait for their number: the others count as lines of another rank.
    return staged._replace(ids_L=torch.where(keep_L, staged.ids_L, len(learns_M) - 1))
