"""What the value tables hold: the test once more, with every read of a table set to zero.

Metrics: `test/recall_FORM_without_table`, `test/choice_FORM_without_table` and `test/bits_FORM_without_table`, on the
questions of `Recall`; where that asks none, `test/loss_without_table` and `test/perplexity_without_table`. A model
without value tables has none of them. The difference to the figure without the suffix is what the tables contribute;
what the rest of the model could learn in a training without tables is another question, which `compare` answers.

The cost is that of scoring the questions, or of the test's forwards, once more.
"""

from __future__ import annotations

from typing import Any

import lightning as L
from torch import Tensor

from pkm_lightning.callbacks.base import find_callback
from pkm_lightning.callbacks.recall import Recall
from pkm_lightning.data.base import data_of, recall_items_of
from pkm_lightning.inference.recall import summarise
from pkm_lightning.memory import zero_reads
from pkm_lightning.model.loss import token_nll
from pkm_lightning.training import LanguageModule
from pkm_lightning.training.heldout import HeldoutSum

__all__ = ["WithoutTable"]


class WithoutTable(L.Callback):
    """Scorer of the test with zeros for the reads of all value tables; it keeps nothing between tests."""

    def __init__(self) -> None:
        self._recall: Recall | None = None
        self._sums: tuple[HeldoutSum, HeldoutSum] | None = None

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Decides between questions and loss, and neither for a model without tables."""
        assert isinstance(pl_module, LanguageModule)
        self._recall, self._sums = None, None
        if not pl_module.model.value_tables:
            return
        recall = find_callback(trainer, Recall)
        data = data_of(trainer)
        if recall is not None and recall_items_of(data, recall.test_items):
            self._recall = recall
        else:
            self._sums = HeldoutSum().to(pl_module.device), HeldoutSum().to(pl_module.device)

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: dict[str, Tensor],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Adds the batch to the mean over all target tokens."""
        if self._sums is None:
            return
        assert isinstance(pl_module, LanguageModule)
        with zero_reads(pl_module.model.value_tables), trainer.precision_plugin.forward_context():
            nll_M = token_nll(pl_module.model, pl_module.forward(batch).hidden_BTD, batch["labels"])
        if nll_M.numel():
            nll, targets = self._sums
            nll.update(nll_M.sum())
            targets.update(float(nll_M.numel()))

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Logs the metrics."""
        assert isinstance(pl_module, LanguageModule)
        figures: dict[str, float | Tensor] = {}
        if self._recall is not None:
            with zero_reads(pl_module.model.value_tables):
                scores = self._recall.score(trainer, pl_module, self._recall.test_items)
            for form, means in summarise(scores).items():
                figures |= {f"{name}_{form}": means[name] for name in ("recall", "choice", "bits") if name in means}
        elif self._sums is not None:
            nll, targets = self._sums
            loss = nll.compute() / targets.compute()
            figures = {"loss": loss, "perplexity": loss.exp()}
        # All ranks hold the same figures; without `sync_dist` Lightning would warn that they may not.
        for name, value in figures.items():
            pl_module.log(f"test/{name}_without_table", value, sync_dist=True)
