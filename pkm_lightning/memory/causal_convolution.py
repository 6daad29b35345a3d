"""A short causal convolution along the tokens, one filter per channel.

Letters: L taps of the filter, P = (L - 1) * dilation + T tokens with those in front.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from jaxtyping import Float, Int64
    from torch import Tensor


class CausalConvolution(nn.Conv1d):
    """`y[t] = sum_j weight[j] x[t - (L - 1 - j) * dilation]` per channel, without bias; all zero at first.

    Args:
        dim: channels D.
        kernel: taps L.
        dilation: tokens between taps.
    """

    def __init__(self, *, dim: int, kernel: int, dilation: int) -> None:
        super().__init__(dim, dim, kernel, groups=dim, dilation=dilation, bias=False)

    def reset_parameters(self) -> None:
        """Sets the filters to zero, so that the layer starts without them."""
        nn.init.zeros_(self.weight)

    @property
    def context(self) -> int:
        """Tokens in front of a token that its output depends on."""
        return (self.kernel_size[0] - 1) * self.dilation[0]

    def forward(
        self, x_BPD: Float[Tensor, "B P D"], doc_ids_BT: Int64[Tensor, "B T"] | None = None
    ) -> Float[Tensor, "B T D"]:
        """Computes the outputs of the last T tokens.

        Args:
            x_BPD: `context` tokens in front, then T tokens.
            doc_ids_BT: document number of each of the T tokens: taps on other documents count as zeros.
        """
        if doc_ids_BT is None:
            y_BTD: Tensor = super().forward(x_BPD.transpose(1, 2)).transpose(1, 2)
            return y_BTD
        # What a tap may see differs from token to token, which no convolution can express.
        length, docs_BP = doc_ids_BT.shape[1], nn.functional.pad(doc_ids_BT, (self.context, 0))
        taps = []
        for tap, start in enumerate(range(0, self.context + 1, self.dilation[0])):
            is_same_BT = docs_BP[:, start : start + length] == doc_ids_BT
            tap_BTD = x_BPD[:, start : start + length] * self.weight[:, 0, tap].to(x_BPD.dtype)
            taps.append(tap_BTD * is_same_BT.unsqueeze(-1))
        return sum(taps[1:], start=taps[0])
