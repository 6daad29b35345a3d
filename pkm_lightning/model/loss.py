"""Next-token loss, computed only at positions with a target.

Letters: M positions with a target, W vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from pkm_lightning.data.base import NO_TARGET
from pkm_lightning.memory.precision import score_dtype
from pkm_lightning.ops.operators import differentiable_once, is_transformed

if TYPE_CHECKING:
    from pkm_lightning.model.transformer import Transformer

#: Probabilities that the backward computes and scales while they are in the cache: 512 KiB of float32.
_CACHED = 2**17


def token_nll(model: Transformer, hidden_BTD: Tensor, labels_BT: Tensor) -> Tensor:
    """Returns the negative log-likelihoods of the targets in nats, in row-major order, (M,); fp32, or fp64 in fp64."""
    # Positions without a target are not unembedded: with the loss on answers alone they are most of the logits.
    target_BT = labels_BT != NO_TARGET
    logits_MW = model.unembed(hidden_BTD[target_BT])
    logits_MW = logits_MW.to(score_dtype(logits_MW))
    targets_M = labels_BT[target_BT]
    if type(logits_MW) is Tensor and logits_MW.is_cpu and not is_transformed():
        nll_M: Tensor = _NegativeLogLikelihood.apply(logits_MW, targets_M, logits_MW[:0].clone())
        return nll_M
    return functional.cross_entropy(logits_MW, targets_M, reduction="none")


class _NegativeLogLikelihood(torch.autograd.Function):
    """Cross-entropy whose gradient is written once.

    torch's own takes two matrices of the size of the logits: that of the likelihoods, which has one number per row, and
    from it that of the logits. Here it is p * g, and at the target p * g - g, whose last bit may differ from torch's.
    """

    @staticmethod
    def forward(ctx: Any, logits_MW: Tensor, targets_M: Tensor, logits_0W: Tensor) -> Tensor:
        log_p_MW = torch.log_softmax(logits_MW, -1)
        # A copy of no logits: it shows what the gradient depends on, and keeps no memory.
        ctx.save_for_backward(log_p_MW, targets_M, logits_0W)
        return functional.nll_loss(log_p_MW, targets_M, reduction="none")

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad_M: Tensor) -> tuple[Tensor, None, None]:
        log_p_MW, targets_M, _ = ctx.saved_tensors
        grad_MW = torch.empty_like(log_p_MW)
        grad_M1 = grad_M.unsqueeze(1)
        rows = max(1, _CACHED // log_p_MW.shape[1])
        for part in (slice(start, start + rows) for start in range(0, len(log_p_MW), rows)):
            torch.exp(log_p_MW[part], out=grad_MW[part]).mul_(grad_M1[part])
        return grad_MW.scatter_add_(1, targets_M.unsqueeze(1), -grad_M1), None, None
