"""Naive causal_convolution: token by token, tap by tap."""

from __future__ import annotations

import torch
from torch import Tensor


def causal_convolution_reference(
    x_BPD: Tensor, weight_DL: Tensor, doc_ids_BP: Tensor | None, length: int, dilation: int
) -> Tensor:
    """Computes `pkm_lightning.ops.causal_convolution`."""
    B, P, D = x_BPD.shape
    taps = weight_DL.shape[1]
    outputs = []
    for b in range(B):
        for t in range(P - length, P):
            y_D = x_BPD.new_zeros(D)
            for tap in range(taps):
                source = t - (taps - 1 - tap) * dilation
                if source >= 0 and (doc_ids_BP is None or doc_ids_BP[b, source] == doc_ids_BP[b, t]):
                    y_D = y_D + weight_DL[:, tap] * x_BPD[b, source]
            outputs.append(y_D)
    return torch.stack(outputs).view(B, length, D) if outputs else x_BPD.new_zeros(B, length, D)
