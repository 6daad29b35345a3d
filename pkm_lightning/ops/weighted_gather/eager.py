"""The weighted gather through ATen's embedding bag, which never writes the T * K gathered rows.

Letters: N rows, D values a row, T reads, K rows a read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pkm_lightning.ops.weighted_gather.reference import weighted_gather_reference


def weighted_gather_eager(table_ND: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """See `pkm_lightning.ops.weighted_gather`."""
    # ATen has no gradient of bf16 weights on CUDA in the older torch versions that the package allows.
    if table_ND.is_cuda and table_ND.dtype is torch.bfloat16:
        return weighted_gather_reference(table_ND, ids_TK, weights_TK)
    weights_TK = weights_TK.to(table_ND.dtype)
    return torch.nn.functional.embedding_bag(ids_TK, table_ND, per_sample_weights=weights_TK, mode="sum")
