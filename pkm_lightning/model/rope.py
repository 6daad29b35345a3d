"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864, eq. 34).

Letters: C head dimension, F = C / 2 frequencies.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pkm_lightning.ops import rotary


def rope_table(
    positions_BT: Tensor, head_dim: int, theta: float, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Returns cos and sin of `position * theta**(-2 f / C)`, each (B, 1, T, F) in `dtype`."""
    # Computed in every forward: a buffer would be lost when a model is built on the meta device.
    exponents_F = torch.arange(0, head_dim, 2, device=positions_BT.device, dtype=dtype) / head_dim
    angles_BTF = positions_BT.to(dtype).unsqueeze(-1) * theta**-exponents_F
    return angles_BTF.cos().unsqueeze(1), angles_BTF.sin().unsqueeze(1)


def apply_rope(x_BHTC: Tensor, cos_B1TF: Tensor, sin_B1TF: Tensor) -> Tensor:
    """Rotates the pairs (x[f], x[f + C/2]); the result has the dtype of `x`."""
    # In the dtype of the angles, fp32 at least: bf16 would round away the small rotations between neighbours.
    return rotary(x_BHTC.transpose(1, 2), cos_B1TF.squeeze(1), sin_B1TF.squeeze(1)).transpose(1, 2)


def document_positions(doc_ids_BT: Tensor) -> Tensor:
    """Returns positions that start at 0 with every document, (B, T)."""
    # A position is the distance to the last change of document number.
    steps_T = torch.arange(doc_ids_BT.shape[1], device=doc_ids_BT.device)
    starts_BT = torch.zeros_like(doc_ids_BT)
    changed_BT = doc_ids_BT[:, 1:] != doc_ids_BT[:, :-1]
    starts_BT[:, 1:] = torch.where(changed_BT, steps_T[1:], 0)
    return steps_T - starts_BT.cummax(dim=1).values
