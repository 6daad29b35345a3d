"""product_search of two operations, half_topk and product_combine, which are compared with the fused kernel.

Letters: Y sets of sub-keys: H, or 1 that all heads share; F dimension of a half key, J sub-keys kept per half; 2 is the
two halves.
"""

from __future__ import annotations

from torch import Tensor

from pkm_lightning.ops.half_topk import half_topk
from pkm_lightning.ops.product_topk import product_combine


def search_composed(
    q_TH2F: Tensor, keys_Y2SF: Tensor, k: int, *, precision: str, backend: str
) -> tuple[Tensor, Tensor]:
    """Computes `pkm_lightning.ops.product_search` by the operations of `backend`."""
    keys_2YSF = keys_Y2SF.transpose(0, 1)
    heads, n_keys, dim = q_TH2F.shape[1], keys_2YSF.shape[2], q_TH2F.shape[3]
    per_half = min(k, n_keys)
    # Heads that share sub-keys are treated as further queries of one head.
    q_2YXF = q_TH2F.permute(2, 1, 0, 3).reshape(2, keys_2YSF.shape[1], -1, dim)
    values_2YXJ, indices_2YXJ = half_topk(q_2YXF, keys_2YSF, per_half, precision=precision, backend=backend)
    values_2HTJ, indices_2HTJ = (part.reshape(2, heads, -1, per_half) for part in (values_2YXJ, indices_2YXJ))
    (values1_HTJ, values2_HTJ), (indices1_HTJ, indices2_HTJ) = values_2HTJ.unbind(), indices_2HTJ.unbind()
    sums_HTK, ids_HTK = product_combine(
        values1_HTJ, indices1_HTJ, values2_HTJ, indices2_HTJ, n_keys, k, backend=backend
    )
    return sums_HTK.transpose(0, 1), ids_HTK.transpose(0, 1)
