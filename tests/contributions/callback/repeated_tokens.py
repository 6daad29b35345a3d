"""Repetition in the training data: the share of tokens that occurred shortly before in the same sequence.

Metric, at each log step: `train/repeated_tokens`, over all ranks and all micro-batches since training began.

Letters: B sequences, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor

from pkm_lightning.errors import ConfigError, check_integer
from pkm_lightning.ops import sum_over_ranks
from pkm_lightning.training import LanguageModule

__all__ = ["RepeatedTokens"]

_KEY = "callbacks.repeated_tokens"


class RepeatedTokens(L.Callback):
    """Counter of repeated tokens. Its state is the two counts, summed over the ranks.

    Args:
        distance: a token counts as repeated if it occurred at most that many tokens before, 1 or more.

    Raises:
        ConfigError: `distance` is out of range.
    """

    def __init__(self, *, distance: int) -> None:
        check_integer(f"{_KEY}.distance", distance, low=1)
        self.distance = distance
        self._counts = torch.zeros(2, dtype=torch.int64)  # repeated tokens, all tokens

    def check(self, config: Mapping[str, Any]) -> None:
        """Refuses a distance that no sequence reaches, with a ConfigError."""
        length = config["data"].get("seq_len")
        if length is not None and self.distance >= length:
            raise ConfigError(
                f"{_KEY}.distance={self.distance} reaches beyond data.seq_len={length}; set a smaller distance."
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts to count."""
        assert isinstance(pl_module, LanguageModule)
        self._counts = self._counts.to(pl_module.device)
        # The counts of a checkpoint are sums, so one rank continues from them.
        if not trainer.is_global_zero:
            self._counts.zero_()
        pl_module.watch.watchers.append(self._watch)

    def _watch(self, traces: Any, batch: dict[str, Tensor]) -> None:
        ids_BT = batch["input_ids"]
        repeated_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
        for back in range(1, self.distance + 1):
            repeated_BT[:, back:] |= ids_BT[:, back:] == ids_BT[:, :-back]
        valid_BT = batch.get("valid", torch.ones_like(repeated_BT))
        self._counts += torch.stack([(repeated_BT & valid_BT).sum(), valid_BT.sum()])

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        """Logs the share when a log is due."""
        assert isinstance(pl_module, LanguageModule)
        if pl_module.log_is_due():
            repeated, tokens = sum_over_ranks(self._counts)
            pl_module.log("train/repeated_tokens", repeated / tokens)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stops to count."""
        assert isinstance(pl_module, LanguageModule)
        pl_module.watch.watchers.remove(self._watch)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Stops to count, if training had begun."""
        assert isinstance(pl_module, LanguageModule)
        if self._watch in pl_module.watch.watchers:
            pl_module.watch.watchers.remove(self._watch)

    def state_dict(self) -> dict[str, Any]:
        """Returns the counts over all ranks. Collective: call on all ranks."""
        return {"counts": sum_over_ranks(self._counts).cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the counts."""
        self._counts = state["counts"].clone()
