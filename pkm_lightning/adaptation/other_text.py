"""Text that an edit should leave as it is: how far the model's predictions on it drift, as a KL divergence.

Letters: B sequences, T positions, M positions with a target, D model dimension, W vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from pkm_lightning.data.base import NO_TARGET, Batch
from pkm_lightning.memory.precision import score_dtype

if TYPE_CHECKING:
    from jaxtyping import Float

    from pkm_lightning.model.trunk import Trunk


class OtherText:
    """Batches of text with the predictions of the model as it is now, to which later ones are compared.

    The last hidden states are kept, not the logits, which would take W / D times the memory.

    Args:
        model: in evaluation mode.
        batches: dicts of `input_ids`, `labels` and optional `doc_ids`, as a data module gives them; positions without
            a target count nowhere.
        device: of the model.
    """

    def __init__(self, model: Trunk, batches: Sequence[Batch], *, device: torch.device) -> None:
        self._model = model
        self.batches = [{name: value.to(device) for name, value in batch.items()} for batch in batches]
        with torch.no_grad():
            self._reference = [self._hidden(batch) for batch in self.batches]

    def __len__(self) -> int:
        return len(self.batches)

    @property
    def n_tokens(self) -> int:
        """Positions with a target."""
        return sum(len(hidden_MD) for hidden_MD in self._reference)

    def divergence(self, number: int, most: int | None = None) -> Float[Tensor, " M"]:
        """Returns KL(before || now) in nats at the positions of a batch with a target, differentiable.

        Args:
            number: of the batch.
            most: positions that are compared, drawn at random where there are more; None: all.
        """
        reference_MD, hidden_MD = self._reference[number], self._hidden(self.batches[number])
        if most is not None and len(hidden_MD) > most:
            chosen = torch.randperm(len(hidden_MD))[:most].to(hidden_MD.device)
            reference_MD, hidden_MD = reference_MD[chosen], hidden_MD[chosen]
        with torch.no_grad():
            before_MW = self._log_probabilities(reference_MD)
        now_MW = self._log_probabilities(hidden_MD)
        return functional.kl_div(now_MW, before_MW, reduction="none", log_target=True).sum(1)

    @torch.no_grad()
    def mean_divergence(self) -> float:
        """Returns the mean of KL(before || now) over all positions with a target, in nats per token."""
        total = sum(float(self.divergence(number).double().sum()) for number in range(len(self)))
        return total / max(1, self.n_tokens)

    def _hidden(self, batch: Batch) -> Tensor:
        output = self._model(batch["input_ids"], doc_ids_BT=batch.get("doc_ids"))  # type: ignore[operator]
        hidden_MD: Tensor = output.hidden_BTD[batch["labels"] != NO_TARGET]
        return hidden_MD

    def _log_probabilities(self, hidden_MD: Tensor) -> Tensor:
        logits_MW = self._model.unembed(hidden_MD)
        return logits_MW.to(score_dtype(logits_MW)).log_softmax(1)
