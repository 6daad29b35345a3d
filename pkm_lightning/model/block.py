"""One pre-norm transformer block: attention, then the layer's FFN plugin."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from pkm_lightning.ffn import FFNContext, FFNOutput
from pkm_lightning.model.attention import Attention, AttentionInputs
from pkm_lightning.model.plugin_checks import checked_output

if TYPE_CHECKING:
    from pkm_lightning.model.cache import LayerCache


class Block(nn.Module):
    """A block `x + attention(norm(x))`, then `x + ffn(norm(x))` (Xiong et al. 2020, arXiv 2002.04745)."""

    def __init__(self, *, attention: Attention, ffn: nn.Module, dim: int, norm_eps: float) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(dim, eps=norm_eps)
        self.attention = attention
        self.ffn_norm = nn.RMSNorm(dim, eps=norm_eps)
        self.ffn = ffn

    def forward(
        self, x_BTD: Tensor, shared: AttentionInputs, context: FFNContext, cached: LayerCache | None = None
    ) -> FFNOutput:
        """Returns the plugin's output with `y_BTD` replaced by the new residual stream."""
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), shared, cached)
        output = checked_output(self.ffn, x_BTD, self.ffn(self.ffn_norm(x_BTD), context))
        return output._replace(y_BTD=x_BTD + output.y_BTD)
