"""The table of a memory: N x V parameters, of which each token reads a few rows.

A line is the unit that ids address: a row, or a slice of a row where `slices` is above 1.

Letters: T tokens, or reads where a plugin reads several times per token, K lines per read, G groups per read, V values
per line: of a row, or of its slice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from pkm_lightning.errors import ConfigError, check_choice, check_integer
from pkm_lightning.memory.row_prefetch import ReadTable, read_compactly
from pkm_lightning.memory.sharded_reads import sharded_dot, sharded_rows, sharded_sum
from pkm_lightning.memory.staging import RowStage
from pkm_lightning.memory.stored_rows import StoredRows
from pkm_lightning.memory.table_rows import copy_rows, draw_rows
from pkm_lightning.ops import gathered_dot, gathered_rows, weighted_gather
from pkm_lightning.ops.huge_pages import use_huge_pages
from pkm_lightning.ops.segments import check_indices
from pkm_lightning.ops.weighted_gather import check_read

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from pkm_lightning.memory.mesh import TableMesh
    from pkm_lightning.memory.read_recorder import ReadRecorder
    from pkm_lightning.memory.row_deltas import RowDeltas


class ValueTable(ReadTable):
    """A table of `rows` x `dim` values, read by ids and weights.

    The model owns a table once. Layers that share it hold a reference (`TableReference`) instead of a class attribute
    or a global, so that two models in one process never share a table.

    Layers read a table by calling it, by `dot` or by `gather`; `weight` itself is for checkpoints. With
    `learning=rows`, `weight` requires no gradient: a read leaves its part of the gradient in `stage`, and a
    `TableOptimizer` updates the rows that were read. Every backward pass through a read stages it,
    `torch.autograd.grad` in evaluation included. To learn nothing from a read, call `TableOptimizer.zero_grad` after
    it, or read under `torch.no_grad`.

    Args:
        rows: number of rows N.
        dim: values per row V.
        std: standard deviation of the initial rows; None takes dim**-0.5.
        trainable: False keeps the initial rows (SimVQ trains a linear map after the read instead).
        slices: equal parts of a row that are read separately. Ids then count slices, `row * slices + slice`, and row
            optimizers treat a slice as a row.
        learning: `dense` (an N x V gradient from autograd, any torch optimizer) or `rows` (one update per optimizer
            step of the rows that were read).
        device: `auto` moves with the model. `cpu` stays in host memory; ids and outputs are copied. `mmap` can only be
            read: `weight` is on meta, without memory. With `stored` it remains there; without, `load_state_dict`
            assigns the tensor of the state dict to it, whose device and dtype it then keeps.
        stored: a file that holds the rows, which are then not trained and not in `state_dict`. With `device=mmap` they
            are read from it, otherwise copied into `weight`.
        mesh: the ranks that the table is sharded or replicated over; None: this process holds the whole table.

    Attributes:
        weight: this rank's part of the lines, (rows * slices, dim / slices) where it holds the whole table.
        stage: the staged reads of a table that learns by rows, else None.
        deltas: what is added to the lines that are read; or what records the reads; set by `deltas_added`.
        first_rows: finds the file with the initial rows of a table that learns; None where they are drawn.
        prefetcher: has the rows of coming reads, in training and evaluation of some tables; else None.

    Raises:
        ConfigError: an unknown choice, `slices` that do not divide `dim`, or sizes that the mesh cannot divide.

    Example:
        >>> import torch
        >>> table = ValueTable(rows=100, dim=8, learning="rows")
        >>> table(torch.tensor([[3, 7]]), torch.tensor([[0.25, 0.75]])).shape
        torch.Size([1, 8])
    """

    #: Tables have a learning rate, a weight decay and a clipping norm of their own.
    parameter_roles: ClassVar[dict[str, str]] = {"weight": "table"}

    #: Digest of the rows in `stored`, by which a checkpoint without rows knows them.
    rows_digest: Tensor
    first_rows: Callable[[], StoredRows] | None
    deltas: RowDeltas | ReadRecorder | None

    def __init__(
        self,
        *,
        rows: int,
        dim: int,
        std: float | None = None,
        trainable: bool = True,
        slices: int = 1,
        learning: str = "dense",
        device: str = "auto",
        mesh: TableMesh | None = None,
        stored: StoredRows | None = None,
    ) -> None:
        super().__init__()
        check_choice("table.learning", learning, ("dense", "rows"))
        check_choice("table.device", device, ("auto", "cpu", "mmap"))
        check_integer("slices", slices, low=1)
        if dim % slices:
            raise ConfigError(f"slices={slices} does not divide the {dim} values of a row; choose a divisor of {dim}.")
        self.rows, self.dim, self.slices, self.mesh = rows, dim, slices, mesh
        self.deltas = None
        self.stored, self.first_rows, self.prefetcher = stored, None, None
        self.std = dim**-0.5 if std is None else std
        self.learning, self.stays_on_cpu, self.is_mapped = learning, device == "cpu", device == "mmap"
        if self.is_mapped or stored is not None:
            trainable = False
        by_rows = trainable and learning != "dense"
        lines, width = rows * slices, dim // slices
        if mesh is not None:
            lines, width = mesh.local_shape(lines, width)
        self.stage = RowStage(lines, mesh) if by_rows else None
        values = use_huge_pages(torch.empty(lines, width, device=self._initial_device()))
        # torch.distributed.checkpoint allocates a gradient for every parameter that requires one when it loads an
        # optimizer's state: here that would be as large as the table.
        self.weight = nn.Parameter(values, requires_grad=trainable and not by_rows)
        if stored is None:
            self.reset_parameters()
        else:
            self.register_buffer("rows_digest", stored.digest.clone())
            copy_rows(self, stored)

    def _initial_device(self) -> torch.device:
        # That of the enclosing `torch.device` context: the Trainer's, or meta for a model without memory.
        current = torch.empty(0).device
        if self.is_mapped:
            return torch.device("meta")
        return torch.device("cpu") if self.stays_on_cpu and current.type != "meta" else current

    def reset_parameters(self) -> None:
        """Draws the rows from N(0, std**2): the same table for every sharding; each rank keeps its part.

        Every rank draws the whole table block by block, so that it never holds more than its part and one block. Rows
        that are `stored` in a file stay as they are there.
        """
        if self.stored is None:
            draw_rows(self)

    @property
    def is_registered(self) -> bool:
        """Whether `weight` is among `parameters()`."""
        return "weight" in self._parameters

    def unregister(self) -> None:
        """Removes `weight` from `parameters()` but not from `state_dict` and `.to()`.

        Engines such as DeepSpeed take ownership of all parameters, and would gather the whole table.
        """
        weight = self._parameters.pop("weight", None)
        if weight is not None:
            # Past nn.Module.__setattr__, which would register the parameter again.
            self.__dict__["weight"] = weight

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.stored is not None:
            destination.pop(f"{prefix}weight", None)
        elif not self.is_registered:
            destination[f"{prefix}weight"] = self.weight if keep_vars else self.weight.detach()

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *arguments: Any
    ) -> None:
        was_unregistered = not self.is_registered
        if self.stored is not None:  # the state has no rows
            weight = self._parameters.pop("weight", None)
            super()._load_from_state_dict(state_dict, prefix, local_metadata, *arguments)
            if not was_unregistered:
                self._parameters["weight"] = weight
            return
        # nn.Module only loads registered parameters.
        if was_unregistered:
            self._parameters["weight"] = self.__dict__.pop("weight")
        if self.is_mapped:
            local_metadata = {**local_metadata, "assign_to_params_buffers": True}
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *arguments)
        if was_unregistered:
            self.unregister()

    def forward(
        self,
        ids_TK: Int[Tensor, "T K"],
        weights_TK: Float[Tensor, "T K"],
        groups_TK: Int[Tensor, "T K"] | None = None,
        n_groups: int | None = None,
    ) -> Float[Tensor, "T V"] | Float[Tensor, "T G V"]:
        """Returns `sum_k weights[t, k] * lines[ids[t, k]]` in the table's dtype; with groups, one sum per group.

        A line has V values, dim / slices of them where rows are sliced.
        """
        return self.start(ids_TK, weights_TK, groups_TK, n_groups)()

    def start(
        self,
        ids_TK: Int[Tensor, "T K"],
        weights_TK: Float[Tensor, "T K"],
        groups_TK: Int[Tensor, "T K"] | None = None,
        n_groups: int | None = None,
    ) -> Callable[[], Tensor]:
        """Starts a read and returns a function that returns its result; call that function once.

        With a table sharded by `dim`, the sums are exchanged between ranks while other work is done in between, and so
        are their gradients in backward.
        """
        weights_TK = self.masked(weights_TK, ids_TK)
        if self.is_split:
            read = functools.partial(self._sum, n_groups=n_groups)
            assert self.mesh is not None
            finish = sharded_sum(self.mesh, self.n_lines, read, ids_TK, weights_TK.to(self.weight.dtype), groups_TK)
            return (lambda: torch.zeros_like(finish())) if self.reads_zeros else finish
        read_TV = self._sum(ids_TK, weights_TK, ids_TK, groups_TK, n_groups)
        if self.deltas is not None:
            read_TV = self.deltas.add_sum(read_TV, ids_TK, weights_TK, groups_TK, n_groups)
        if self.reads_zeros:
            read_TV = torch.zeros_like(read_TV)
        return lambda: read_TV

    def dot(self, x_TV: Float[Tensor, "T V"], ids_TK: Int[Tensor, "T K"]) -> Float[Tensor, "T K"]:
        """Returns the inner products `<lines[ids[t, k]], x[t]>` in the table's dtype."""
        if self.is_split:
            assert self.mesh is not None
            dots_TK = sharded_dot(self.mesh, self.n_lines, self._dot, x_TV.to(self.weight.dtype), ids_TK)
        else:
            dots_TK = self._dot(x_TV, ids_TK, ids_TK)
        if self.deltas is not None:
            dots_TK = self.deltas.add_dot(dots_TK, x_TV, ids_TK)
        return self.masked(dots_TK, ids_TK)

    def gather(self, ids_TK: Int[Tensor, "T K"]) -> Float[Tensor, "T K V"]:
        """Returns the lines `ids` one by one, in the table's dtype (float32 where the table is quantised)."""
        if self.is_split:
            assert self.mesh is not None
            lines_TKV = sharded_rows(self.mesh, self.n_lines, self._gather, ids_TK)
        else:
            lines_TKV = self._gather(ids_TK, ids_TK)
        if self.deltas is not None:
            lines_TKV = self.deltas.add_lines(lines_TKV, ids_TK)
        return self.masked(lines_TKV, ids_TK)

    @property
    def size(self) -> int:
        """Number of values of the whole table, over all ranks."""
        return self.rows * self.dim

    @property
    def n_lines(self) -> int:
        """Number of lines of the whole table: rows, or slices of rows."""
        return self.rows * self.slices

    @property
    def learns(self) -> bool:
        """Whether training changes the rows."""
        return self.stage is not None or self.weight.requires_grad

    def bytes_of(self, values: int) -> int:
        """Returns the bytes that `values` values of whole rows take."""
        return values * self.weight.element_size()

    @property
    def is_split(self) -> bool:
        """Whether the table is sharded. Reads are collective then: all ranks make the same reads in the same order."""
        return self.mesh is not None and self.mesh.shard != "none"

    def _sum(
        self,
        ids_TK: Tensor,
        weights_TK: Tensor,
        staged_TK: Tensor,
        groups_TK: Tensor | None = None,
        n_groups: int | None = None,
    ) -> Tensor:
        """Returns the sums over the lines of this rank; `staged_TK` are the ids under which the gradient is staged."""
        device = weights_TK.device
        if self.is_streamed:
            rows_UV, ids_TK, _ = self._compact(ids_TK, device)
            return weighted_gather(rows_UV, ids_TK, weights_TK, groups_TK=groups_TK, n_groups=n_groups)
        ids_TK, staged_TK = self._ids_to_table(ids_TK, staged_TK)
        weights_TK = self._to_table(weights_TK)
        groups_TK = None if groups_TK is None else self._to_table(groups_TK)
        if self.stage is None or not torch.is_grad_enabled():
            y = weighted_gather(self.weight, ids_TK, weights_TK, groups_TK=groups_TK, n_groups=n_groups)
            return y.to(device)
        check_read(self.weight, ids_TK, weights_TK, groups_TK, n_groups)
        weights_TK, apart_TK = weights_TK.to(self.weight.dtype), None if staged_TK is ids_TK else staged_TK
        y_TGV = self.stage.sum(self.weight, ids_TK, apart_TK, weights_TK, groups_TK, n_groups or 1)
        return (y_TGV.squeeze(1) if groups_TK is None else y_TGV).to(device)

    def _dot(self, x_TV: Tensor, ids_TK: Tensor, staged_TK: Tensor) -> Tensor:
        """Returns the inner products with the lines of this rank."""
        device = x_TV.device
        if self.is_streamed:
            rows_UV, ids_TK, _ = self._compact(ids_TK, device)
            return gathered_dot(rows_UV, x_TV.to(rows_UV.dtype), ids_TK)
        ids_TK, staged_TK = self._ids_to_table(ids_TK, staged_TK)
        x_TV = self._to_table(x_TV).to(self.weight.dtype)
        dots_TK = gathered_dot(self.weight, x_TV, ids_TK)
        if self.stage is not None and torch.is_grad_enabled():
            dots_TK = self.stage.dot(dots_TK, staged_TK, x_TV)
        return dots_TK.to(device)

    def _gather(self, ids_TK: Tensor, staged_TK: Tensor) -> Tensor:
        """Returns the lines of this rank, (T, K, V)."""
        device, rows_NV = ids_TK.device, self.weight
        if self.is_streamed or self.prefetcher is not None:
            # A table with a stage is not split here, so that the same ids are read and staged.
            rows_NV, ids_TK, staged_TK = self._compact(ids_TK, device)
        else:
            ids_TK, staged_TK = self._ids_to_table(ids_TK, staged_TK)
        if self.stage is not None and torch.is_grad_enabled():
            return self.stage.gather(rows_NV, ids_TK, staged_TK).to(device)
        return gathered_rows(rows_NV, ids_TK).to(device)

    # Shapes that depend on values, and reads of a file, cannot be traced.
    @torch.compiler.disable
    def _compact(self, ids_TK: Tensor, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the lines of `ids`, each once, (U, V), and (T, K) ids as places among them and on the CPU."""
        if ids_TK.is_meta:  # a count of shapes
            return self.weight, ids_TK, ids_TK
        check_indices("ValueTable", "ids", ids_TK, self.n_lines)
        read = None if self.prefetcher is None else self.prefetcher.find(self, ids_TK)
        read = read_compactly(self, ids_TK, device) if read is None else read
        return read.rows_UV, read.local_TK, read.host_TK

    def ids_ahead(self, reader: object, tokens: tuple[Tensor | None, ...]) -> list[Tensor] | None:
        """Returns the ids (T, K) that `reader` gathers here for these tokens, where a prefetch has computed them.

        A gather with one of these very tensors costs no comparison of ids, for which the host would wait for a GPU.

        Args:
            reader: the plugin.
            tokens: token ids, `valid` and `doc_ids`, as the model was given them.
        """
        return None if self.prefetcher is None else self.prefetcher.ids_ahead(self, reader, tokens)

    def _ids_to_table(self, ids_TK: Tensor, staged_TK: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the ids to read and to stage on the table's device; if they are one tensor, it is copied once."""
        local_TK = self._to_table(ids_TK)
        return local_TK, local_TK if staged_TK is ids_TK else self._to_table(staged_TK)

    def _to_table(self, value: Tensor) -> Tensor:
        return value.to(self.weight.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ValueTable:
        """Moves and casts the table with the model; one that stays on the CPU is only cast, a mapped one neither.

        Raises:
            ConfigError: a cast of a mapped table, which would copy it into memory.
        """
        if self.is_mapped:
            dtype = fn(torch.empty(0, dtype=self.weight.dtype)).dtype
            if self.stored is not None:  # lines get this dtype when they have been read
                self.weight.data = self.weight.data.to(dtype)
                self.rows_digest = fn(self.rows_digest)
                return self
            if dtype != self.weight.dtype and not self.weight.is_meta:
                raise ConfigError(
                    f"table.device=mmap reads the table as it was saved ({self.weight.dtype}), not as {dtype}; leave "
                    "trainer.precision as it was in training, or set table.device=cpu."
                )
            return self
        if self.stays_on_cpu and not self.weight.is_meta:
            # Applied to an empty tensor, `fn` reveals the dtype without copying the table to its device.
            move = fn

            def fn(value: Tensor) -> Tensor:
                return value.to(move(value[:0]).dtype)

        memory = self.weight.data_ptr()
        if not self.is_registered:
            self.weight.data = fn(self.weight.data)
        super()._apply(fn, recurse)
        if self.weight.data_ptr() != memory:
            use_huge_pages(self.weight.data, is_written=True)
        return self

    def extra_repr(self) -> str:
        """Returns rows, values per row and `learning`, for `print(model)`."""
        return f"rows={self.rows}, dim={self.dim}, learning={self.learning}"
