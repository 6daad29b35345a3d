"""The rows that a memory reads: N x V parameters of which one token touches a few.

Letters: N rows, V values per row, T reads, K rows a read, G groups a read.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from pkm_lightning.errors import ConfigError, check_choice, check_integer
from pkm_lightning.memory.sharded_reads import sharded_dot, sharded_sum
from pkm_lightning.memory.staging import RowStage
from pkm_lightning.ops import gathered_dot, weighted_gather
from pkm_lightning.ops.segments import read_sources

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from pkm_lightning.memory.mesh import TableMesh


class ValueTable(nn.Module):
    """A table of `rows` x `dim` values, read by ids and weights.

    The model owns a table once; layers that share it hold a reference that is not registered (`TableReference`), so
    that no class attribute and no global is needed and two models in one process never meet.

    Layers read it by calling it or by `dot`; `weight` itself is for checkpoints. With `learning=rows`
    `weight` requires no gradient: a read leaves its part of the gradient in `stage`, and a `TableOptimizer` updates the
    rows that were read. Whatever runs backward through a read stages it, `torch.autograd.grad` in evaluation too: what
    should not be learned from is cleared by `TableOptimizer.zero_grad`, or read under `torch.no_grad`.

    Args:
        rows: slots N.
        dim: values per row V.
        std: standard deviation of the initial rows; None takes dim**-0.5.
        trainable: False keeps the rows as they were drawn (SimVQ: a trained map after the read moves all of them).
        slices: equal parts of a row that are read each for itself; ids then count slices, `row * slices + slice`, and a
            slice is what a row optimizer takes for a row.
        learning: `dense` (autograd's N x V gradient, any torch optimizer) or `rows` (one update of the touched rows
            per optimizer step).
        device: `auto` goes where the model goes; `cpu` stays in host memory, ids and outputs travel; `mmap` is for
            reading only: `weight` is on meta, without memory, until `load_state_dict` makes it the very tensor of the
            state dict, and stays that, where it is and in its dtype.
        mesh: the ranks that the table is split or copied over; None: this process holds it alone.

    Attributes:
        weight: this rank's part of the lines that ids count, (rows * slices, dim / slices) where it holds all.

    Raises:
        ConfigError: an unknown word, `slices` that do not divide `dim`, or a row that the mesh cannot split.
    """

    #: The optimizer gives tables a learning rate, a decay and a clipping norm of their own.
    parameter_roles: ClassVar[dict[str, str]] = {"weight": "table"}

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
    ) -> None:
        super().__init__()
        check_choice("table.learning", learning, ("dense", "rows"))
        check_choice("table.device", device, ("auto", "cpu", "mmap"))
        check_integer("slices", slices, low=1)
        if dim % slices:
            raise ConfigError(f"slices={slices} do not divide the {dim} values of a row.")
        self.rows, self.dim, self.slices, self.mesh = rows, dim, slices, mesh
        self.std = dim**-0.5 if std is None else std
        self.learning, self.stays_on_cpu, self.is_mapped = learning, device == "cpu", device == "mmap"
        if self.is_mapped:
            trainable = False
        by_rows = trainable and learning != "dense"
        lines, width = rows * slices, dim // slices
        if mesh is not None:
            lines, width = mesh.local_shape(lines, width)
        self.stage = RowStage(lines, mesh) if by_rows else None
        # A parameter that requires a gradient gets one of its own size as soon as an optimizer's state is loaded.
        # A Trainer builds models within the context of its device; models of which only shapes are wanted, on meta.
        here = torch.empty(0).device
        home = torch.device("cpu") if self.stays_on_cpu and here.type != "meta" else here
        home = torch.device("meta") if self.is_mapped else home
        self.weight = nn.Parameter(torch.empty(lines, width, device=home), requires_grad=trainable and not by_rows)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Rows from N(0, std**2): the same table for every way of splitting it, of which a part is kept.

        The whole table is drawn a block of rows at a time, so that no rank ever holds more of it than its part.
        """
        if self.weight.is_meta:  # nothing to draw, in very many blocks
            return
        width = self.dim // self.slices
        low, high = (0, self.n_lines) if self.mesh is None else self.mesh.row_range(self.n_lines)
        columns = slice(0, width) if self.mesh is None else self.mesh.columns(width)
        with torch.no_grad():
            for start, some in _blocks(self.n_lines, width):
                if not self.is_split:
                    nn.init.normal_(self.weight[start : start + some], std=self.std)
                    continue
                drawn = torch.empty(some, width, dtype=self.weight.dtype, device=self.weight.device)
                nn.init.normal_(drawn, std=self.std)
                first, last = max(start, low), min(start + some, high)
                if first < last:
                    self.weight[first - low : last - low] = drawn[first - start : last - start, columns]

    @property
    def is_registered(self) -> bool:
        """`weight` is among `parameters()`."""
        return "weight" in self._parameters

    def unregister(self) -> None:
        """Takes `weight` out of `parameters()`, for engines that would own it; `state_dict` and `.to()` keep it."""
        weight = self._parameters.pop("weight", None)
        if weight is not None:
            self.__dict__["weight"] = weight

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self.is_registered:
            destination[f"{prefix}weight"] = self.weight if keep_vars else self.weight.detach()

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *arguments: Any
    ) -> None:
        apart = not self.is_registered
        if apart:
            self._parameters["weight"] = self.__dict__.pop("weight")
        if self.is_mapped:
            local_metadata = {**local_metadata, "assign_to_params_buffers": True}
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *arguments)
        if apart:
            self.unregister()

    def forward(
        self,
        ids_TK: Int[Tensor, "T K"],
        weights_TK: Float[Tensor, "T K"],
        groups_TK: Int[Tensor, "T K"] | None = None,
        n_groups: int | None = None,
    ) -> Float[Tensor, "T V"] | Float[Tensor, "T G V"]:
        """`sum_k weights[t, k] * lines[ids[t, k]]` in the table's dtype; with groups, one sum a group."""
        return self.start(ids_TK, weights_TK, groups_TK, n_groups)()

    def start(
        self,
        ids_TK: Int[Tensor, "T K"],
        weights_TK: Float[Tensor, "T K"],
        groups_TK: Int[Tensor, "T K"] | None = None,
        n_groups: int | None = None,
    ) -> Callable[[], Tensor]:
        """As a call, but the result is what a call of the result gives, once: work in between need not wait for ranks.

        With a table split by `dim` the sums travel meanwhile, in backward their gradients too.
        """
        if not self.is_split:
            read_TV = self._sum(ids_TK, weights_TK, ids_TK, groups_TK, n_groups)
            return lambda: read_TV
        read = functools.partial(self._sum, n_groups=n_groups)
        assert self.mesh is not None
        return sharded_sum(self.mesh, self.n_lines, read, ids_TK, weights_TK.to(self.weight.dtype), groups_TK)

    def dot(self, x_TV: Float[Tensor, "T V"], ids_TK: Int[Tensor, "T K"]) -> Float[Tensor, "T K"]:
        """`<lines[ids[t, k]], x[t]>` in the table's dtype."""
        if not self.is_split:
            return self._dot(x_TV, ids_TK, ids_TK)
        assert self.mesh is not None
        return sharded_dot(self.mesh, self.n_lines, self._dot, x_TV.to(self.weight.dtype), ids_TK)

    @property
    def size(self) -> int:
        """Values of the whole table, wherever they lie."""
        return self.rows * self.dim

    @property
    def n_lines(self) -> int:
        """Rows, or slices of rows, of the whole table: what ids count."""
        return self.rows * self.slices

    @property
    def is_split(self) -> bool:
        """Other ranks hold parts of the table, and every rank must make the same reads in the same order."""
        return self.mesh is not None and self.mesh.shard != "none"

    def _sum(
        self,
        ids_TK: Tensor,
        weights_TK: Tensor,
        staged_TK: Tensor,
        groups_TK: Tensor | None = None,
        n_groups: int | None = None,
    ) -> Tensor:
        """The sums over the lines that are here; `staged_TK` are the ids that the gradient is staged by."""
        home = weights_TK.device
        ids_TK, staged_TK = self._both_here(ids_TK, staged_TK)
        weights_TK = self._here(weights_TK)
        groups_TK = None if groups_TK is None else self._here(groups_TK)
        y = weighted_gather(self.weight, ids_TK, weights_TK, groups_TK=groups_TK, n_groups=n_groups)
        if self.stage is not None and torch.is_grad_enabled():
            if groups_TK is None or n_groups is None:
                y = self.stage.watch_sum(y, staged_TK, weights_TK)
            else:
                sources_TK = read_sources(ids_TK, groups_TK, n_groups)
                y = self.stage.watch_sum(y.flatten(0, 1), staged_TK, weights_TK, sources_TK).view_as(y)
        return y.to(home)

    def _dot(self, x_TV: Tensor, ids_TK: Tensor, staged_TK: Tensor) -> Tensor:
        """The inner products with the lines that are here."""
        home = x_TV.device
        ids_TK, staged_TK = self._both_here(ids_TK, staged_TK)
        x_TV = self._here(x_TV).to(self.weight.dtype)
        dots_TK = gathered_dot(self.weight, x_TV, ids_TK)
        if self.stage is not None and torch.is_grad_enabled():
            dots_TK = self.stage.watch_dot(dots_TK, staged_TK, x_TV)
        return dots_TK.to(home)

    def _both_here(self, ids_TK: Tensor, staged_TK: Tensor) -> tuple[Tensor, Tensor]:
        """Ids to read and to stage, which are mostly one tensor: then it travels once."""
        here_TK = self._here(ids_TK)
        return here_TK, here_TK if staged_TK is ids_TK else self._here(staged_TK)

    def _here(self, value: Tensor) -> Tensor:
        return value.to(self.weight.device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ValueTable:
        """Moves and casts with the model; a table that stays on the CPU only casts, a mapped one does neither.

        Raises:
            ConfigError: a mapped table is to be cast, which would copy it into memory.
        """
        if self.is_mapped:
            dtype = fn(torch.empty(0, dtype=self.weight.dtype)).dtype
            if dtype != self.weight.dtype and not self.weight.is_meta:
                raise ConfigError(
                    f"table.device=mmap reads the table as it was saved ({self.weight.dtype}), not as {dtype}; leave "
                    "trainer.precision as it was in training, or set table.device=cpu."
                )
            return self
        if self.stays_on_cpu and not self.weight.is_meta:
            move = fn

            def fn(value: Tensor) -> Tensor:
                return value.to(move(value[:0]).dtype)

        if not self.is_registered:
            self.weight.data = fn(self.weight.data)
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        """Rows, values a row and way of learning, for `print(model)`."""
        return f"rows={self.rows}, dim={self.dim}, learning={self.learning}"


def _blocks(lines: int, width: int) -> Iterator[tuple[int, int]]:
    """Start and length of blocks of about 2**22 values, drawn one after another with the values of one long draw.

    torch fills by 16 values on the CPU, and the last 16 of a tensor apart: blocks are multiples of 16 lines, and the
    last one takes the rest.
    """
    block = max(16, 2**22 // width // 16 * 16)
    for start in range(0, lines, block):
        if lines - start < 2 * block:
            yield start, lines - start
            return
        yield start, block


class TableReference:
    """Holds a table without registering it as a sub-module of the holder; deep copies keep pointing at one copy."""

    def __init__(self, table: ValueTable) -> None:
        self.table = table


def check_table(table: ValueTable, rows: int, dim: int, *, named: str) -> None:
    """Refuse a table of another shape than (rows, dim); `named` says which keys of the plugin ask for that shape.

    Raises:
        ConfigError: with both shapes.
    """
    if (table.rows, table.dim) != (rows, dim):
        raise ConfigError(
            f"table has shape {(table.rows, table.dim)}, but {named} need {(rows, dim)}: layers that share a table "
            "need the same sizes."
        )
