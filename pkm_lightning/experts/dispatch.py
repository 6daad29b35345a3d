"""Dropless dispatch: sort the choices by expert, run the experts, undo the sort, sum over choices.

Every step is a permutation or a sum of fixed order, so results do not depend on threads or atomics.

Letters: K choices per token, M = T * K choices.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from pkm_lightning.experts.swiglu import SwiGLUExperts

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor


def run_experts(
    experts: SwiGLUExperts,
    x_TD: Float[Tensor, "T D"],
    ids_TK: Int[Tensor, "T K"],
    weights_TK: Float[Tensor, "T K"],
) -> Float[Tensor, "T D"]:
    """Returns `y[t] = sum_k weights[t, k] * E_ids[t, k](x[t])` in the dtype of the experts' output.

    Differentiable in the tokens, the weights and the experts. All choices are computed, whatever the load per expert.
    A masked expert has weight 0, and the others keep theirs.
    """
    weights_TK = experts.masked(weights_TK, ids_TK)
    n_experts, choices = len(experts.gate), ids_TK.shape[1]
    # Stable, so that the tokens of an expert stay in order and its rows are the same on every device.
    sorted_M, order_M = torch.sort(ids_TK.flatten(), stable=True)
    inverse_M = torch.empty_like(order_M)
    inverse_M[order_M] = torch.arange(len(order_M), device=order_M.device)
    # The ends of the groups in the sorted ids, found without atomics and in a shape that the data does not change.
    ends_E = torch.searchsorted(sorted_M, torch.arange(n_experts, device=sorted_M.device), right=True)
    x_MD = x_TD.unsqueeze(1).expand(-1, choices, -1).flatten(0, 1)
    y_MD = experts(_permuted(x_MD, order_M, inverse_M), ends_E.diff(prepend=ends_E.new_zeros(1)))
    y_TKD = _permuted(y_MD, inverse_M, order_M).unflatten(0, ids_TK.shape)
    # In the precision of the weights: bf16 would round the products, and with them the router's gradient.
    return (y_TKD * weights_TK.unsqueeze(-1)).sum(dim=1).to(y_TKD.dtype)


def _permuted(x_MD: Tensor, order_M: Tensor, inverse_M: Tensor) -> Tensor:
    result: Tensor = _Permute.apply(x_MD, order_M, inverse_M)
    return result


class _Permute(torch.autograd.Function):
    """The permutation `x[order]`. Its gradient is gathered through the inverse; autograd would scatter with atomics."""

    @staticmethod
    def forward(ctx: Any, x_MD: Tensor, order_M: Tensor, inverse_M: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_M)
        return x_MD[order_M]

    @staticmethod
    def backward(ctx: Any, grad_MD: Tensor) -> tuple[Tensor, None, None]:
        (inverse_M,) = ctx.saved_tensors
        return grad_MD[inverse_M], None, None
