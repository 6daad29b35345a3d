"""Next-token loss, computed only at positions with a target.

Letters: M positions with a target, W vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import functional

from pkm_lightning.data.base import NO_TARGET
from pkm_lightning.memory.precision import score_dtype

if TYPE_CHECKING:
    from pkm_lightning.model.transformer import Transformer


def token_nll(model: Transformer, hidden_BTD: Tensor, labels_BT: Tensor) -> Tensor:
    """Returns the negative log-likelihoods of the targets in nats, in row-major order, (M,); fp32, or fp64 in fp64."""
    # Positions without a target are not unembedded: with the loss on answers alone they are most of the logits.
    target_BT = labels_BT != NO_TARGET
    logits_MW = model.unembed(hidden_BTD[target_BT])
    logits_MW = logits_MW.to(score_dtype(logits_MW))
    return functional.cross_entropy(logits_MW, labels_BT[target_BT], reduction="none")
