"""Next-token loss, computed where a target is.

Letters: B sequences, T tokens, D model dimension, M positions with a target, W words of the vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import functional

from pkm_lightning.data.base import NO_TARGET

if TYPE_CHECKING:
    from pkm_lightning.model.transformer import Transformer


def token_nll(model: Transformer, hidden_BTD: Tensor, labels_BT: Tensor) -> Tensor:
    """Negative log-likelihoods in nats, fp32, one for each position with a target, in row-major order, (M,).

    Only those positions are unembedded: where the loss is on the answer alone, that is most of the saving.
    """
    target_BT = labels_BT != NO_TARGET
    logits_MW = model.unembed(hidden_BTD[target_BT]).float()
    return functional.cross_entropy(logits_MW, labels_BT[target_BT], reduction="none")
