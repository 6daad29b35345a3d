"""A short causal convolution along the tokens, one filter per channel.

Letters: L taps of the filter, P = T tokens and those in front.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from pkm_lightning.ops import causal_convolution

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

    def forward(  # type: ignore[override]
        self, x_BPD: Float[Tensor, "B P D"], doc_ids_BP: Int64[Tensor, "B P"] | None = None, *, length: int
    ) -> Float[Tensor, "B T D"]:
        """Computes the outputs of the last `length` tokens; taps in front of the first token count as zeros.

        Args:
            x_BPD: tokens in front, which may be fewer than `context`, then T tokens.
            doc_ids_BP: document number of each token: taps on other documents count as zeros.
            length: tokens T of the output.
        """
        weight_DL = self.weight.squeeze(1)
        return causal_convolution(x_BPD, weight_DL, doc_ids_BP, length=length, dilation=self.dilation[0])
