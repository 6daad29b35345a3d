"""Factual recall: the model answers the data module's questions at each validation and in the test.

Metrics: `val/recall_FORM` and `test/recall_FORM` (exact match), `.../choice_FORM` (best of four options),
`.../bits_FORM` (bits of knowledge per fact, prior less model). Data modules without `recall_items` are skipped; those
with `validation_items` are asked these at validations, so that no question of the test decides about a setting. Every
answer of the test is written to recall.csv, so that reports can resample facts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any

import lightning as L
import torch.distributed as dist

from pkm_lightning.data.base import RecallItem, recall_items_of, validation_items_of
from pkm_lightning.errors import check_integer
from pkm_lightning.inference.recall import ItemScore, score_items, summarise
from pkm_lightning.inference.synchronized_forwards import synchronized_forwards
from pkm_lightning.storage import csv_line, write_beside
from pkm_lightning.training import LanguageModule

__all__ = ["Recall"]


class Recall(L.Callback):
    """Scorer of questions, which the ranks share among them.

    Args:
        val_items: questions per form at each validation; 0 for none.
        test_items: questions per form in the test; None for all.
        path: file of the test's answers, one row per answer with the fields of `ItemScore`; None for no file.

    Attributes:
        scores: the score of each question of the last test.
        report: their means by form, relation and decile (`pkm_lightning.inference.recall.summarise`).

    Raises:
        ConfigError: a number of questions below 0.
    """

    def __init__(self, *, val_items: int, test_items: int | None, path: str | None = None) -> None:
        check_integer("callbacks.recall.val_items", val_items, 0)
        if test_items is not None:
            check_integer("callbacks.recall.test_items", test_items, 0)
        self.val_items, self.test_items = val_items, test_items
        self.path = None if path is None else Path(path)
        self.scores: list[ItemScore] = []
        self.report: dict[str, Any] = {}

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Scores and logs a small sample."""
        if self.val_items:
            items = validation_items_of(trainer.datamodule, self.val_items)  # type: ignore[attr-defined]
            self._log("val", self._score(trainer, pl_module, items), pl_module)

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Scores and logs the full sample, and keeps it for the report."""
        self.scores = self.score(trainer, pl_module, self.test_items)
        self.report = self._log("test", self.scores, pl_module)
        if self.path is not None and self.scores and trainer.is_global_zero:
            write_scores(self.path, self.scores)

    def score(self, trainer: L.Trainer, pl_module: L.LightningModule, limit: int | None) -> list[ItemScore]:
        """Returns the scores of at most `limit` questions of the test per form. Collective: call on all ranks."""
        return self._score(trainer, pl_module, recall_items_of(trainer.datamodule, limit))  # type: ignore[attr-defined]

    def _score(self, trainer: L.Trainer, pl_module: L.LightningModule, items: list[RecallItem]) -> list[ItemScore]:
        if not items:
            return []
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(pl_module, LanguageModule)
        # Every n-th question, so that all ranks get a share of every form.
        share = items[trainer.global_rank :: trainer.world_size]
        with synchronized_forwards(pl_module.model, pl_module.device), trainer.precision_plugin.forward_context():
            scores = score_items(pl_module.model, data.tokenizer, share, device=pl_module.device) if share else []
        if trainer.world_size == 1:
            return scores
        # All ranks need all scores: they log the same means.
        gathered: list[list[ItemScore]] = [[] for _ in range(trainer.world_size)]
        dist.all_gather_object(gathered, scores)
        return [score for rank_scores in gathered for score in rank_scores]

    def _log(self, prefix: str, scores: list[ItemScore], pl_module: L.LightningModule) -> dict[str, Any]:
        report = summarise(scores)
        for form, means in report.items():
            for metric in ("recall", "choice", "bits"):
                if metric in means:
                    on_bar = prefix == "val" and metric == "recall" and form == "paraphrase"
                    # All ranks hold all scores, so their mean changes nothing, and Lightning does not warn.
                    pl_module.log(f"{prefix}/{metric}_{form}", means[metric], prog_bar=on_bar, sync_dist=True)
        return report


def write_scores(path: Path, scores: Sequence[ItemScore]) -> None:
    """Writes `scores` as CSV, with truth values as 0 or 1."""
    lines = [csv_line(field.name for field in fields(ItemScore))]
    for score in scores:
        lines.append(csv_line(int(value) if isinstance(value, bool) else value for value in astuple(score)))
    write_beside(path, "".join(lines))
