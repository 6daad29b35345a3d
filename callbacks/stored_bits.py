"""How many bits of the training data a model stores, of data whose entropy is known (`data=biographies`).

Metrics of validations and the test, nothing for other data:

| metric | content |
|---|---|
| `bits_name`, `bits_value` | bits stored per name and per value: the prior's less the model's |
| `bits_person`, `bits_person_clipped` | per person, of the name and all values; clipped: no name or value below zero |
| `stored_bits`, `stored_bits_clipped` | the same of all people |
| `stored_share` | share of the bits that there are; near 1 the data are too few to measure a capacity |
| `bits_per_parameter`, `bits_per_active_parameter` | `stored_bits` over parameters |
| `bits_per_byte` | `stored_bits` over `weight_bytes` |
| `weight_bytes` | of all weights |

Those of the test that end in a width, such as `bits_per_byte_int8`, are the same with the value tables rounded to
it; with `int8_all` all matrices are, embedding included. They need one process that holds the whole model.

The cost is a further forward over the held-out sequences, in the test one more per width and kind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
from torch import Tensor

from pkm_lightning.data.base import Batch, FactSpace, data_of, fact_space_of
from pkm_lightning.errors import check_choice
from pkm_lightning.inference.rounded_weights import rounded_weights, weight_bytes
from pkm_lightning.inference.stored_bits import FactLosses, fact_nats
from pkm_lightning.model.loss import token_nll
from pkm_lightning.ops import sum_over_ranks
from pkm_lightning.ops.quantized_rows import WIDTHS
from pkm_lightning.training import LanguageModule

__all__ = ["StoredBits"]

_ROUNDED = ("bits_person", "stored_bits", "stored_share", "bits_per_parameter", "bits_per_byte", "weight_bytes")


class StoredBits(L.Callback):
    """Scorer of held-out sequences whose targets are names and values; it keeps nothing between evaluations.

    Args:
        widths: of `int8`, `int4`, `int2`: at which the test measures once more.

    Raises:
        ConfigError: an unknown width.
    """

    def __init__(self, *, widths: Sequence[str]) -> None:
        for width in widths:
            check_choice("callbacks.stored_bits.widths", width, WIDTHS)
        self.widths = tuple(widths)
        self._losses: FactLosses | None = None
        self._batches: list[Batch] = []

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts anew; does nothing for data of unknown entropy."""
        space = fact_space_of(data_of(trainer))
        self._losses = None if space is None else FactLosses.none(space, pl_module.device)
        self._batches = []

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts anew, as for a validation."""
        self.on_validation_start(trainer, pl_module)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Tensor | Mapping[str, Any] | None,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Adds the facts of the batch."""
        if self._losses is not None:
            _add(self._losses, trainer, pl_module, batch)

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Tensor | Mapping[str, Any] | None,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Adds the facts of the batch, and keeps it for the rounded weights."""
        self.on_validation_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._losses is not None and self.widths and trainer.world_size == 1:
            self._batches.append(batch)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Logs the figures."""
        self._log("val", pl_module)

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Logs the figures, and those of rounded weights."""
        assert isinstance(pl_module, LanguageModule)
        self._log("test", pl_module)
        if self._losses is not None and self._batches:
            for width in self.widths:
                for suffix, tables_only in ((width, True), (f"{width}_all", False)):
                    self._log_rounded(trainer, pl_module, self._losses.space, width, suffix, tables_only)
        self._batches = []

    def _log(self, prefix: str, pl_module: L.LightningModule) -> None:
        if self._losses is None:
            return
        assert isinstance(pl_module, LanguageModule)
        self._losses.sums = sum_over_ranks(self._losses.sums)
        for name, value in _figures(self._losses, pl_module, weight_bytes(pl_module.model)).items():
            # All ranks hold the same figures; without `sync_dist` Lightning would warn that they may not.
            pl_module.log(f"{prefix}/{name}", value, sync_dist=True, prog_bar=(prefix, name) == ("val", "stored_share"))

    def _log_rounded(
        self,
        trainer: L.Trainer,
        pl_module: LanguageModule,
        space: FactSpace,
        width: str,
        suffix: str,
        tables_only: bool,
    ) -> None:
        losses = FactLosses.none(space, pl_module.device)
        with rounded_weights(pl_module.model, width, tables_only=tables_only) as n_bytes:
            if n_bytes is None:
                return
            for batch in self._batches:
                _add(losses, trainer, pl_module, batch)
        figures = _figures(losses, pl_module, n_bytes)
        for name in _ROUNDED:
            pl_module.log(f"test/{name}_{suffix}", figures[name], sync_dist=True)


def _add(losses: FactLosses, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch) -> None:
    assert isinstance(pl_module, LanguageModule)
    with trainer.precision_plugin.forward_context():
        nll_M = token_nll(pl_module.model, pl_module.forward(batch).hidden_BTD, batch["labels"])
    if nll_M.numel():
        losses.add(*fact_nats(nll_M, batch["labels"], batch.get("doc_ids")))


def _figures(losses: FactLosses, pl_module: LanguageModule, n_bytes: int) -> dict[str, float]:
    figures = losses.figures()
    stored, cost = figures["stored_bits"], pl_module.cost
    ratios = {
        "bits_per_parameter": stored / cost.params_total,
        "bits_per_active_parameter": stored / cost.params_active,
        "bits_per_byte": stored / n_bytes,
    }
    return {**figures, **ratios, "weight_bytes": float(n_bytes)}
