"""Short causal convolutions along the tokens of packed documents, one filter per channel.

Letters: L taps of the filter, P = T tokens and those in front.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from pkm_lightning.ops.backends import best_backend, choose_backend
from pkm_lightning.ops.causal_convolution.eager import convolve
from pkm_lightning.ops.causal_convolution.operator import convolve_in_one_pass
from pkm_lightning.ops.causal_convolution.reference import causal_convolution_reference

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Float, Int64
    from torch import Tensor

_BACKENDS: dict[str, Callable[..., Tensor]] = {
    **{name: functools.partial(convolve_in_one_pass, backend=name) for name in ("cpu", "triton")},
    "eager": convolve,
    "reference": causal_convolution_reference,
}

__all__ = ["causal_convolution"]


def causal_convolution(
    x_BPD: Float[Tensor, "B P D"],
    weight_DL: Float[Tensor, "D L"],
    doc_ids_BP: Int64[Tensor, "B P"] | None = None,
    *,
    length: int,
    dilation: int,
    backend: str = "auto",
) -> Float[Tensor, "B T D"]:
    """Computes `y[t] = sum_j weight[:, j] * x[t - (L - 1 - j) * dilation]` of the last `length` tokens.

    Taps on tokens of other documents, or in front of the first token, count as zeros. Differentiable in `x` and
    `weight`.

    Args:
        x_BPD: `length` tokens T, and any number of tokens in front of them.
        weight_DL: one filter per channel; cast to the dtype of `x`.
        doc_ids_BP: the document of each token; None for one document per sequence.
        length: tokens T of the output.
        dilation: tokens between taps, 1 or more.
        backend: `auto`, `triton`, `cpu` (numba), `eager` (torch) or `reference` (a loop).

    Raises:
        ValueError: shapes, dtypes or sizes do not fit, or the backend is unknown.
    """
    if x_BPD.ndim != 3 or weight_DL.ndim != 2 or len(weight_DL) != x_BPD.shape[2] or not weight_DL.shape[1]:
        raise ValueError(
            "causal_convolution: needs x (B, P, D) and weight (D, L) with a tap or more, got "
            f"{tuple(x_BPD.shape)} and {tuple(weight_DL.shape)}."
        )
    if doc_ids_BP is not None and doc_ids_BP.shape != x_BPD.shape[:2]:
        raise ValueError(
            f"causal_convolution: needs a document per token {tuple(x_BPD.shape[:2])}, got {tuple(doc_ids_BP.shape)}."
        )
    if not 0 <= length <= x_BPD.shape[1] or dilation < 1:
        raise ValueError(
            f"causal_convolution: needs a length of 0 to {x_BPD.shape[1]} tokens and a dilation of 1 or more, got "
            f"length={length} and dilation={dilation}."
        )
    if not x_BPD.is_floating_point() or not weight_DL.is_floating_point():
        raise ValueError(
            f"causal_convolution: needs x and weight of floating dtypes, got {x_BPD.dtype} and {weight_DL.dtype}."
        )
    implementation = choose_backend("causal_convolution", backend, best_backend(x_BPD), _BACKENDS, x_BPD)
    return implementation(x_BPD, weight_DL.to(x_BPD.dtype), doc_ids_BP, length, dilation)
