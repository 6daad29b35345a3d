"""From tokens to experts and back without dropping any: sort the choices by expert, run, undo the sort, add up.

Every step is a permutation or a sum of fixed order, so results do not depend on threads or atomics.

Letters: T tokens, K choices a token, M = T * K choices, E experts, D model dimension.
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
    """`y[t] = sum_k weights[t, k] * E_ids[t, k](x[t])`, in the dtype of the experts' output.

    Differentiable in the tokens, the weights and the experts. All choices are computed, however they are spread.
    """
    n_experts, choices = len(experts.gate), ids_TK.shape[1]
    sorted_M, order_M = torch.sort(ids_TK.flatten(), stable=True)
    inverse_M = torch.empty_like(order_M)
    inverse_M[order_M] = torch.arange(len(order_M), device=order_M.device)
    ends_E = torch.searchsorted(sorted_M, torch.arange(n_experts, device=sorted_M.device), right=True)
    x_MD = x_TD.unsqueeze(1).expand(-1, choices, -1).flatten(0, 1)
    y_MD = experts(_permuted(x_MD, order_M, inverse_M), ends_E.diff(prepend=ends_E.new_zeros(1)))
    y_TKD = _permuted(y_MD, inverse_M, order_M).unflatten(0, ids_TK.shape)
    # In the weights' precision: in bf16 the products would be rounded, and so would the router's gradient.
    return (y_TKD * weights_TK.unsqueeze(-1)).sum(dim=1).to(y_TKD.dtype)


def _permuted(x_MD: Tensor, order_M: Tensor, inverse_M: Tensor) -> Tensor:
    result: Tensor = _Permute.apply(x_MD, order_M, inverse_M)
    return result


class _Permute(torch.autograd.Function):
    """`x[order]`; its gradient is read through the inverse, where autograd would scatter with atomics."""

    @staticmethod
    def forward(ctx: Any, x_MD: Tensor, order_M: Tensor, inverse_M: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_M)
        return x_MD[order_M]

    @staticmethod
    def backward(ctx: Any, grad_MD: Tensor) -> tuple[Tensor, None, None]:
        (inverse_M,) = ctx.saved_tensors
        return grad_MD[inverse_M], None, None
