"""causal_convolution in torch operations: a depthwise convolution, or with documents a masked product per tap.

Letters: L taps of the filter, P = T tokens and those in front, X = (L - 1) * dilation + T tokens that taps reach.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def convolve(x_BPD: Tensor, weight_DL: Tensor, doc_ids_BP: Tensor | None, length: int, dilation: int) -> Tensor:
    """Computes `pkm_lightning.ops.causal_convolution`."""
    # Exactly the tokens that the taps reach: zeros in front where there are fewer, and none where there are more.
    front = (weight_DL.shape[1] - 1) * dilation + length - x_BPD.shape[1]
    x_BXD = functional.pad(x_BPD, (0, 0, front, 0))
    if doc_ids_BP is None:
        weight_D1L = weight_DL.unsqueeze(1)
        return functional.conv1d(x_BXD.mT, weight_D1L, dilation=dilation, groups=len(weight_DL)).mT
    # What a tap may see differs from token to token, which no convolution can express.
    docs_BX, docs_BT = functional.pad(doc_ids_BP, (front, 0)), doc_ids_BP[:, doc_ids_BP.shape[1] - length :]
    taps = []
    for tap, weight_D in enumerate(weight_DL.unbind(1)):
        window = slice(tap * dilation, tap * dilation + length)
        is_same_BT1 = (docs_BX[:, window] == docs_BT).unsqueeze(-1)
        taps.append(x_BXD[:, window] * weight_D * is_same_BT1)
    return sum(taps[1:], start=taps[0])
