"""Sparse memory finetuning in a training loop of your own, of any module that has memory layers.

In the package's own training `finetune=sparse` does this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pkm_lightning.adaptation.background import ReadBackground, call_model, in_evaluation
from pkm_lightning.adaptation.row_chooser import Changed, RowChooser
from pkm_lightning.adaptation.row_reads import RowReads
from pkm_lightning.adaptation.row_scores import SCORES
from pkm_lightning.errors import check_choice, check_integer
from pkm_lightning.memory import TableOptimizer
from pkm_lightning.usage.layer_reads import LayerReads

__all__ = ["SparseUpdates"]


class SparseUpdates:
    """A restriction of each optimizer step to the rows that it reads unusually often, until `close`.

    Forward hooks on the memory layers count the reads of forwards with gradients. `optimizer.step()` then updates the
    chosen rows only: all others keep their values and optimizer states, bit by bit. Everything else that the optimizer
    steps learns as before, so freeze what must not change. With several ranks, all must make the same steps.

    Args:
        model: a module with memory layers anywhere in it, on its device.
        optimizer: steps its tables, which learn by rows; plain gradient descent forgets least (arXiv 2510.15103).
        rows: rows that learn per step and set of tables; None: all that are read.
        score: `tfidf`, `kl`, `tf` or `random`; see `pkm_lightning.adaptation.row_scores`.
        background: reads of ordinary text, as `measure_background` counts them, for `tfidf` and `kl`.
        seed: of `score=random`.

    Raises:
        ConfigError: a value out of range, a model without tables that learn by rows, or no background of its tables.

    Example:
        >>> import torch
        >>> from pkm_lightning import MemoryPlus, SparseUpdates, TableOptimizer, ValueTable, measure_background
        >>> from pkm_lightning import row_learning_tables
        >>> layer = MemoryPlus(dim=8, n_keys=16, table=ValueTable(rows=16**2, dim=8, learning="rows"))
        >>> layer.requires_grad_(False)  # doctest: +ELLIPSIS
        MemoryPlus(...
        >>> ordinary, new = torch.randn(20, 2, 6, 8), torch.randn(2, 6, 8)
        >>> background = measure_background(layer, ordinary, forward=layer)
        >>> optimizer = TableOptimizer(None, row_learning_tables(layer), rows="sgd", lr=2.0)
        >>> updates = SparseUpdates(layer, optimizer, rows=5, background=background)
        >>> before = layer.values.table.weight.detach().clone()
        >>> layer(new).y_BTD.square().sum().backward()
        >>> optimizer.step()
        >>> optimizer.zero_grad()
        >>> int((layer.values.table.weight != before).any(-1).sum()), updates.report()["table0"].rows
        (5, 5)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: TableOptimizer,
        *,
        rows: int | None = 500,
        score: Literal["tfidf", "kl", "tf", "random"] = "tfidf",
        background: ReadBackground | None = None,
        seed: int = 0,
    ) -> None:
        if rows is not None:
            check_integer("rows", rows, low=1)
        check_choice("score", score, SCORES)
        self._model, self._step, self._counts_all, self._is_chosen = model, 0, False, False
        layers = LayerReads(model, self._count, observes=lambda _: torch.is_grad_enabled() or self._counts_all)
        try:
            device = next((p.device for p in model.parameters()), torch.device("cpu"))
            self._chooser = RowChooser(
                RowReads(layers, learning=True),
                rows=rows,
                score=score,
                background=background,
                seed=seed,
                device=device,
            )
        except Exception:
            layers.close()
            raise
        self._hooks: list[Any] = [
            optimizer.register_step_pre_hook(lambda *_: self.choose()),
            optimizer.register_step_post_hook(lambda *_: self._end_step()),
        ]
        self._layers = layers

    def _count(self, layer: int, trace: dict[str, Tensor], batch: dict[str, Tensor], sequences: int) -> None:
        self._chooser.add(self._chooser.reads.of_layer(layer, trace, batch, sequences))

    def choose(self) -> None:
        """Chooses the rows of the step under way; collective.

        `optimizer.step()` does it, unless the loop has done so before: one that clips calls it before `clip_tables`, so
        that the norm is that of the chosen rows.
        """
        if not self._is_chosen:
            self._chooser.choose(self._step + 1)
            self._is_chosen = True

    def _end_step(self) -> None:
        self._chooser.end_step(updated=True)
        self._step, self._is_chosen = self._step + 1, False

    def choose_for_task(self, batches: Iterable[Any], *, forward: Callable[[Any], object] | None = None) -> None:
        """Chooses the rows of all later steps once, from the reads of a pass over the data of a task; collective.

        Args:
            batches: as in `measure_background`.
            forward: likewise.
        """
        self._chooser.end_step(updated=False)
        self._counts_all = True
        try:
            with in_evaluation(self._model), torch.no_grad():
                for batch in batches:
                    call_model(self._model, batch) if forward is None else forward(batch)
        finally:
            self._counts_all = False
        self._chooser.fix()

    def figures(self) -> dict[str, float]:
        """Returns figures of the step under way, between `choose` and `optimizer.step()`; see `RowChooser.figures`."""
        return self._chooser.figures()

    def report(self) -> dict[str, Changed]:
        """Returns by set of tables how many rows have changed so far, of how many, and their bytes."""
        return self._chooser.report()

    def state_dict(self) -> dict[str, Any]:
        """Returns what was chosen and changed so far, for `torch.save`."""
        return {**self._chooser.state_dict(), "step": self._step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores a `state_dict`.

        Raises:
            CheckpointError: it is of other tables.
        """
        self._chooser.load_state_dict(state)
        self._step = state["step"]

    def close(self) -> None:
        """Removes the hooks and lets all rows learn again."""
        self._layers.close()
        while self._hooks:
            self._hooks.pop().remove()
        self._chooser.lift()
