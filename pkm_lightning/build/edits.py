"""Edits of a model: applied when it is loaded, applied or removed in a program, and put into what an export reads."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from pkm_lightning.checkpoints import SavedCheckpoint
from pkm_lightning.checkpoints.edit_file import Edit, state_digest, weights_digest
from pkm_lightning.checkpoints.edit_folder import read_edits
from pkm_lightning.errors import CheckpointError, ConfigError, counted, nearest
from pkm_lightning.memory import QuantizedTable, ValueTable
from pkm_lightning.memory.edited_lines import EditedLines, with_deltas

if TYPE_CHECKING:
    from pkm_lightning.checkpoints.export import WeightSource

_log = logging.getLogger(__name__)


def value_tables_by_name(model: nn.Module) -> dict[str, ValueTable]:
    """Returns the value tables of a model by the names of their weights in its state."""
    return {f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, ValueTable)}


def check_editable(name: str, table: ValueTable) -> None:
    """Refuses a table whose rows cannot be changed where they are.

    Raises:
        ConfigError: naming the way out.
    """
    if isinstance(table, QuantizedTable):
        raise ConfigError(
            f"{name} is quantised, and its rows cannot be edited; edit the run or file that it was exported from, and "
            "export that again: export with quantize= includes applied edits."
        )
    if table.is_mapped or table.weight.is_meta:
        raise ConfigError(
            f"{name} stays in its file (table.device=mmap), and its rows cannot be edited; set table.device=cpu."
        )
    if table.is_split:
        raise ConfigError(f"{name} is sharded over ranks, and its rows cannot be edited; load it in one process.")


class EditedTables:
    """The value tables of a model with edits on top.

    Edits may be applied and removed in any order: the same edits leave the same bits, and none the original ones.

    Args:
        model: without edits; its weights are changed in place.
        weights: digest of its weights, or a function that returns it; None: computed from them at the first `apply`.

    Attributes:
        applied: the edits by name, in the order in which they were applied.
        by_name: the value tables by the names of their weights.

    Example: `docs/editing.md`, "From a program".
    """

    def __init__(self, model: nn.Module, weights: str | Callable[[], str] | None = None) -> None:
        self._model, self._weights = model, weights
        self.by_name = value_tables_by_name(model)
        self._lines: dict[str, EditedLines] = {}
        self.applied: dict[str, Edit] = {}

    @property
    def weights(self) -> str:
        """Digest of the model's weights without edits."""
        if self._weights is None:
            assert not self.applied
            self._weights = state_digest(self._model.state_dict())
        if callable(self._weights):
            self._weights = self._weights()
        return self._weights

    def apply(self, edit: Edit) -> None:
        """Adds an edit.

        Raises:
            ConfigError: one of this name is applied already, or a table cannot be edited.
            CheckpointError: it was made for other weights, or has lines that the tables lack.
        """
        if edit.name in self.applied:
            raise ConfigError(f"edit {edit.name!r} is applied already; remove it first.")
        check_fits(edit, self.weights)
        for name, deltas in edit.tables.items():
            if name not in self.by_name:
                raise CheckpointError(f"edit {edit.name!r} changes {name}, which the model lacks; write it again.")
            check_editable(name, self.by_name[name])
            lines, width = self.by_name[name].weight.shape
            check_shape(edit.name, name, deltas.lines_U, deltas.values_UV, (lines, width))
        for name, deltas in edit.tables.items():
            lines_of_table = self._lines.setdefault(name, EditedLines(self.by_name[name]))
            lines_of_table.apply(edit.name, deltas.lines_U, deltas.values_UV)
        self.applied[edit.name] = edit

    def remove(self, name: str) -> None:
        """Takes an edit away.

        Raises:
            ConfigError: none of this name is applied.
        """
        if name not in self.applied:
            raise ConfigError(
                f"edit {name!r} is not applied; applied: {', '.join(self.applied) or 'none'}."
                f"{nearest(name, self.applied)}"
            )
        for table in self.applied.pop(name).tables:
            self._lines[table].remove(name)

    def collisions(self, edit: Edit) -> dict[str, int]:
        """Returns how many lines `edit` shares with each applied edit, without those that share none."""
        counts: dict[str, int] = {}
        for table, deltas in edit.tables.items():
            for name, count in (self._lines[table].shared(deltas.lines_U) if table in self._lines else {}).items():
                if name != edit.name:
                    counts[name] = counts.get(name, 0) + count
        return counts


def check_fits(edit: Edit, weights: str, remedy: str = "write its facts again") -> None:
    """Refuses an edit that was made for other weights.

    Args:
        edit: to be applied.
        weights: digest of the weights.
        remedy: what to do, for the message.

    Raises:
        CheckpointError: naming it and what to do.
    """
    if edit.weights != weights:
        raise CheckpointError(
            f"edit {edit.name!r} was made for other weights (digest {edit.weights[:12]}, here {weights[:12]}), and "
            f"deltas of rows mean nothing in another model; {remedy}."
        )


def check_shape(edit: str, table: str, lines_U: Tensor, values_UV: Tensor, shape: Sequence[int]) -> None:
    """Refuses deltas that a table of `shape`, (N, V), cannot have.

    Raises:
        CheckpointError: naming both shapes.
    """
    if values_UV.shape[1:] != tuple(shape[1:]) or (len(lines_U) and int(lines_U[-1]) >= shape[0]):
        raise CheckpointError(
            f"edit {edit!r} changes lines up to {int(lines_U[-1]) if len(lines_U) else 0} of "
            f"{tuple(values_UV.shape[1:])} values in {table}, whose shape is {tuple(shape)}; write the facts again."
        )


def applied_line(edits: Sequence[Edit]) -> str:
    """Returns which edits are applied, as one line."""
    return "edits applied: " + ", ".join(f"{edit.name} ({counted(len(edit.facts), 'fact')})" for edit in edits)


def edited(model: nn.Module, checkpoint: SavedCheckpoint, edits: Sequence[str | Path] | None) -> EditedTables:
    """Applies edits to a model with the weights of `checkpoint`, and logs which.

    Raises:
        ConfigError, CheckpointError: as `read_edits` and `EditedTables.apply`.
    """
    tables = EditedTables(model, lambda: weights_digest(checkpoint))
    chosen = read_edits(checkpoint.path, edits)
    if chosen:
        check_fit(chosen, tables.weights, are_named=edits is not None)
        for edit in chosen:
            tables.apply(edit)
        _log.info("%s", applied_line(chosen))
    return tables


def check_fit(edits: Sequence[Edit], weights: str, *, are_named: bool) -> None:
    """Refuses edits that were made for other weights than those that are loaded.

    Args:
        edits: with which the weights are to be used.
        weights: digest of the weights.
        are_named: whether the command names them; they are the applied ones if not.

    Raises:
        CheckpointError: naming the edit and what to do.
    """
    for edit in edits:
        remedy = (
            "leave it out of edits=, or write its facts again"
            if are_named
            else f"set edits=[] where a command reads that, or take it out with `edit remove name={edit.name}`, after "
            "which its facts can be written again"
        )
        check_fits(edit, weights, remedy)


def include_edits(checkpoint: SavedCheckpoint, chosen: Sequence[Edit]) -> None:
    """Puts edits that fit into what an export reads of `checkpoint`.

    Raises:
        CheckpointError: an edit changes a table or lines that the checkpoint lacks.
    """
    rows: dict[str, tuple[Tensor, Tensor]] = {}
    for table in sorted({name for edit in chosen for name in edit.tables}):
        tensor = f"state_dict.model.{table}"
        if tensor not in checkpoint.shapes:
            raise CheckpointError(f"{checkpoint.path} has no {table}, which an edit changes; write the edit again.")
        deltas = {e.name: (e.tables[table].lines_U, e.tables[table].values_UV) for e in chosen if table in e.tables}
        for name, (lines_U, values_UV) in deltas.items():
            check_shape(name, table, lines_U, values_UV, checkpoint.shapes[tensor][0])
        lines_U = torch.unique(torch.cat([of_edit_U for of_edit_U, _ in deltas.values()]))
        rows[tensor] = (lines_U, with_deltas(_rows(checkpoint, tensor, lines_U), lines_U, deltas))
    checkpoint.replace_rows(rows)


def _rows(checkpoint: WeightSource, tensor: str, rows_U: Tensor) -> Tensor:
    """Returns rows of a tensor on disk, (U, V)."""
    shape, dtype = checkpoint.shapes[tensor]
    rows_UV = torch.empty(len(rows_U), *shape[1:], dtype=dtype)
    for offsets, block in checkpoint.chunks(tensor):
        within_U = (rows_U >= offsets[0]) & (rows_U < offsets[0] + len(block))
        part = block[rows_U[within_U] - offsets[0]]
        rows_UV[within_U, offsets[1] : offsets[1] + block.shape[1]] = part
    return rows_UV
