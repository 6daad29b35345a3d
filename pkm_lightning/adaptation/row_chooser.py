"""Chooses at each optimizer step, or once for a task, the rows that learn, from the reads of all its micro-batches.

Letters: N rows of a set of tables, U rows that were chosen, M = N + 1 counters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pkm_lightning.adaptation.background import ReadBackground
from pkm_lightning.adaptation.row_reads import RowIds, RowReads, count_into
from pkm_lightning.adaptation.row_scores import WITH_BACKGROUND, Score, choose_rows, draw_seed
from pkm_lightning.errors import CheckpointError, ConfigError
from pkm_lightning.memory import restrict_rows
from pkm_lightning.ops import sum_over_ranks


class Changed(NamedTuple):
    """What a finetuning has changed of one set of tables."""

    rows: int
    of_rows: int
    #: Of all values of these rows, in all tables of the set.
    n_bytes: int


class RowChooser:
    """The rows of a model's tables that learn.

    Methods that say so are collective: call them on all ranks.

    Args:
        reads: the readers of the tables that learn by rows.
        rows: rows that learn per set of tables and choice, t; None: all that are read.
        score: by which they are chosen; see `row_scores`.
        background: for scores that compare with one.
        seed: of `score=random`.
        device: of the ids.

    Raises:
        ConfigError: no table learns by rows, or the score needs a background of these tables.
    """

    def __init__(
        self,
        reads: RowReads,
        *,
        rows: int | None,
        score: Score,
        background: ReadBackground | None,
        seed: int,
        device: torch.device,
    ) -> None:
        if not reads.sets:
            raise ConfigError("no table of this model learns by rows, so that no row can be chosen.")
        if score in WITH_BACKGROUND and rows is not None:
            if background is None:
                raise ConfigError(f"score={score} compares the reads of a step with those of a background; pass one.")
            background.check(reads.rows, "the background")
        self.reads, self.rows, self.score, self.background, self.seed = reads, rows, score, background, seed
        self._background = {name: background.of(name, device) for name in reads.rows} if background else {}
        self._counts = {name: torch.zeros(n + 1, dtype=torch.int64, device=device) for name, n in reads.rows.items()}
        #: Rows that a step has updated so far, by set.
        self.changed = {name: torch.zeros(n, dtype=torch.bool, device=device) for name, n in reads.rows.items()}
        self._chosen: dict[str, Tensor] = {}
        self._learning: dict[str, Tensor] = {}
        self._lowest: dict[str, Tensor] = {}
        self._is_fixed = False

    def add(self, ids: RowIds) -> None:
        """Counts the reads of a micro-batch, or of a layer of it; never waits for the device."""
        for name, of_readers in ids.items():
            for ids_SX in of_readers:
                count_into(self._counts[name], ids_SX)

    def choose(self, step: int) -> None:
        """Restricts the tables to the rows that the reads since the last step choose. Collective.

        Call it after the last backward of the step and before the norm of its gradients is taken. A choice that was
        fixed stays.
        """
        for name, tables in self.reads.sets.items():
            counts_N = sum_over_ranks(self._counts[name])[:-1]
            if self.rows is not None and not self._is_fixed:
                self._choose(name, counts_N, step)
            elif self.rows is None:
                self._chosen[name] = counts_N.nonzero().squeeze(-1)
            chosen_U = self._chosen[name]
            if self.rows is not None:
                for table in tables.tables:
                    if table.stage is not None:
                        restrict_rows(table, chosen_U)
            self._learning[name] = chosen_U[counts_N[chosen_U] > 0]

    def fix(self) -> None:
        """Chooses from all reads counted since the start, for all later steps. Collective."""
        self._is_fixed = False
        self.choose(0)
        self._is_fixed = self.rows is not None
        self._clear()

    def _choose(self, name: str, counts_N: Tensor, step: int) -> None:
        choice = choose_rows(
            counts_N,
            self.score,
            self.rows,
            background=self._background.get(name),
            seed=draw_seed(self.seed, step, name),
        )
        self._chosen[name] = choice.rows_U
        if len(choice.scores_U):
            self._lowest[name] = choice.scores_U[-1]

    def end_step(self, *, updated: bool) -> None:
        """Ends a step.

        Args:
            updated: whether the optimizer has made it.
        """
        for name, rows_U in self._learning.items():
            if updated:
                self.changed[name][rows_U] = True
        self._clear()

    def _clear(self) -> None:
        self._learning = {}
        for counts_M in self._counts.values():
            counts_M.zero_()

    def figures(self) -> dict[str, float]:
        """Returns figures of the step whose rows were chosen: `NAME/chosen_share`, `/rows_changed`, `/threshold`.

        These are the share of a set's rows that learn in it, the rows that have changed before it, and the lowest score
        of a chosen row.
        """
        figures: dict[str, float] = {}
        for name, rows_U in self._learning.items():
            figures[f"{name}/chosen_share"] = len(rows_U) / self.reads.rows[name]
            figures[f"{name}/rows_changed"] = float(self.changed[name].sum())
            if name in self._lowest:
                figures[f"{name}/threshold"] = float(self._lowest[name])
        return figures

    def report(self) -> dict[str, Changed]:
        """Returns by set what has changed so far."""
        report = {}
        for name, tables in self.reads.sets.items():
            learning = [table for table in tables.tables if table.stage is not None]
            rows, row_bytes = int(self.changed[name].sum()), sum(table.bytes_of(table.dim) for table in learning)
            report[name] = Changed(rows, self.reads.rows[name], rows * row_bytes)
        return report

    def lift(self) -> None:
        """Removes the restriction: all rows learn again."""
        for tables in self.reads.sets.values():
            for table in tables.tables:
                if table.stage is not None:
                    restrict_rows(table, None)

    def state_dict(self) -> dict[str, Any]:
        """Returns rows changed so far, and those that were fixed, on the CPU."""
        return {
            # Copies: the flags change while a checkpoint is written in the background.
            "changed": {name: flags.to("cpu", copy=True) for name, flags in self.changed.items()},
            "fixed": {name: rows_U.to("cpu", copy=True) for name, rows_U in self._chosen.items()}
            if self._is_fixed
            else {},
            "lowest": {name: float(score) if self._is_fixed else math.nan for name, score in self._lowest.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a `state_dict`.

        Raises:
            CheckpointError: it is of other tables.
        """
        saved = {name: len(flags) for name, flags in state["changed"].items()}
        if saved != self.reads.rows:
            raise CheckpointError(
                f"the checkpoint restricts tables of {saved} rows, this model has {self.reads.rows}; use the "
                "configuration that the run was started with."
            )
        for name, flags in state["changed"].items():
            self.changed[name].copy_(flags)
        device = next(iter(self.changed.values())).device
        self._chosen = {name: rows_U.to(device) for name, rows_U in state["fixed"].items()}
        self._is_fixed = bool(self._chosen)
        self._lowest = {name: torch.tensor(score) for name, score in state["lowest"].items() if not math.isnan(score)}
