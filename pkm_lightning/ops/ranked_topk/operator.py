"""Ranked top-k by kernels, as an operator that compiled code calls without a break.

Letters: `...` any leading shape, R rows, S scores, K kept.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor, library


def ranked_topk_kernels(scores_XS: Tensor, k: int, *, backend: str) -> Tensor:
    """See `pkm_lightning.ops.ranked_topk`; `backend` is `cpu` or `triton`."""
    result: Tensor = _ranked_topk(scores_XS.detach(), k, backend)
    return result


@library.custom_op("pkm_lightning::ranked_topk", mutates_args=())
def _ranked_topk(scores: Tensor, k: int, backend: str) -> Tensor:
    scores_RS = scores.reshape(-1, scores.shape[-1])
    # bf16 and fp16 are float32 with fewer bits: the order stays.
    scores_RS = (scores_RS if scores_RS.element_size() >= 4 else scores_RS.float()).contiguous()
    values_RK = scores_RS.new_empty(len(scores_RS), k)
    indices_RK = values_RK.new_empty(values_RK.shape, dtype=torch.int32)
    importlib.import_module(f"pkm_lightning.ops.ranked_topk.{backend}").rank_rows(scores_RS, values_RK, indices_RK)
    return indices_RK.long().view(*scores.shape[:-1], k)


@_ranked_topk.register_fake
def _(scores: Tensor, k: int, backend: str) -> Tensor:
    return scores.new_empty(*scores.shape[:-1], k, dtype=torch.int64)
