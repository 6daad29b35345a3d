"""Naive rotary: head by head, pair by pair.

Letters: H heads, C values of a head, F = C / 2 angles, I sequences with angles of their own: B, or 1 for all.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_reference(x_BTHC: Tensor, cos_ITF: Tensor, sin_ITF: Tensor) -> Tensor:
    """Computes `pkm_lightning.ops.rotary`: the matrix ((cos, -sin), (sin, cos)) times each pair."""
    pairs, y_BTHC = x_BTHC.shape[-1] // 2, torch.empty_like(x_BTHC)
    cos_BTF, sin_BTF = (angles_ITF.expand(len(x_BTHC), -1, -1) for angles_ITF in (cos_ITF, sin_ITF))
    for head in range(x_BTHC.shape[2]):
        for f in range(pairs):
            first_BT, second_BT = x_BTHC[:, :, head, f], x_BTHC[:, :, head, pairs + f]
            cos_BT, sin_BT = cos_BTF[..., f], sin_BTF[..., f]
            y_BTHC[:, :, head, f] = first_BT * cos_BT - second_BT * sin_BT
            y_BTHC[:, :, head, pairs + f] = first_BT * sin_BT + second_BT * cos_BT
    return y_BTHC
