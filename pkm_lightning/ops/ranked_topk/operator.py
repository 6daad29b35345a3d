"""ranked_topk as a custom operator, which compiled code calls without a graph break.

The arguments of a custom operator form its schema, so they carry no shape suffix.

Letters: X any leading shape, R rows, L scores per row; K indices kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pkm_lightning.ops.backends import load_kernels
from pkm_lightning.ops.operators import operator


def ranked_topk_kernels(scores_XL: Tensor, k: int, *, backend: str) -> Tensor:
    """Computes `pkm_lightning.ops.ranked_topk` by the kernel of `backend`, `cpu` or `triton`."""
    result: Tensor = _ranked_topk(scores_XL.detach(), k, backend)
    return result


@operator("pkm_lightning::ranked_topk")
def _ranked_topk(scores: Tensor, k: int, backend: str) -> Tensor:
    scores_RL = scores.reshape(-1, scores.shape[-1])
    # float32 represents every bf16 and fp16 value exactly, so widening keeps the order.
    scores_RL = (scores_RL if scores_RL.element_size() >= 4 else scores_RL.float()).contiguous()
    values_RK = scores_RL.new_empty(len(scores_RL), k)
    indices_RK = values_RK.new_empty(values_RK.shape, dtype=torch.int32)
    load_kernels("ranked_topk", backend).rank_rows(scores_RL, values_RK, indices_RK)
    return indices_RK.long().view(*scores.shape[:-1], k)


@_ranked_topk.register_fake
def _(scores: Tensor, k: int, backend: str) -> Tensor:
    return scores.new_empty(*scores.shape[:-1], k, dtype=torch.int64)
