"""rotary in numba: each pair is read and written once.

Letters: H heads, C values of a head, F = C / 2 angles, I sequences with angles of their own: B, or 1 for all.
"""

from __future__ import annotations

import torch
from numba import njit
from torch import Tensor

from pkm_lightning.ops.numba_arrays import numpy_view
from pkm_lightning.ops.numba_kernels import ALL, KERNEL, share
from pkm_lightning.ops.numba_threads import use_torch_threads


def rotate(x_BTHC: Tensor, cos_ITF: Tensor, sin_ITF: Tensor, inverse: bool) -> Tensor:
    """Returns the rotated pairs, by the opposite angles if `inverse`; all tensors contiguous and float32."""
    use_torch_threads()
    y_BTHC = torch.empty_like(x_BTHC)
    _rotate(*map(numpy_view, (x_BTHC, cos_ITF, -sin_ITF if inverse else sin_ITF, y_BTHC)), ALL)
    return y_BTHC


# No fused multiply-add: torch's operations, whose bits these are, round every product.
@njit(**KERNEL)
def _rotate(x_BTHC, cos_ITF, sin_ITF, y_BTHC, worker):  # type: ignore[no-untyped-def]
    (sequences, tokens, heads, _), pairs = x_BTHC.shape, cos_ITF.shape[2]
    first, last = share(sequences * tokens, worker)
    for token in range(first, last):
        b, t = token // tokens, token % tokens
        cos_F, sin_F = cos_ITF[b % cos_ITF.shape[0], t], sin_ITF[b % cos_ITF.shape[0], t]
        for h in range(heads):
            # Halves as variables of their own, and two loops: so they vectorise.
            first_F, second_F = x_BTHC[b, t, h, :pairs], x_BTHC[b, t, h, pairs:]
            new_first_F, new_second_F = y_BTHC[b, t, h, :pairs], y_BTHC[b, t, h, pairs:]
            for f in range(pairs):
                new_first_F[f] = first_F[f] * cos_F[f] - second_F[f] * sin_F[f]
            for f in range(pairs):
                new_second_F[f] = second_F[f] * cos_F[f] + first_F[f] * sin_F[f]
