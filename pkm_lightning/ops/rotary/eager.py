"""rotary in torch operations.

Letters: H heads, C values of a head, F = C / 2 angles, I sequences with angles of their own: B, or 1 for all.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_eager(x_BTHC: Tensor, cos_ITF: Tensor, sin_ITF: Tensor) -> Tensor:
    """Computes `pkm_lightning.ops.rotary`."""
    first, second = x_BTHC.to(cos_ITF.dtype).chunk(2, dim=-1)
    cos_IT1F, sin_IT1F = cos_ITF.unsqueeze(2), sin_ITF.unsqueeze(2)
    rotated = torch.cat([first * cos_IT1F - second * sin_IT1F, second * cos_IT1F + first * sin_IT1F], dim=-1)
    return rotated.type_as(x_BTHC)
