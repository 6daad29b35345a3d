"""One pre-norm transformer block: attention, then the layer's FFN plugin, and plugins in front of and behind both."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import Tensor, nn

from pkm_lightning.ffn import FFNContext, FFNOutput, replaced
from pkm_lightning.memory.norm import RMSNorm
from pkm_lightning.model.attention import Attention, AttentionInputs
from pkm_lightning.model.plugin_checks import checked_output
from pkm_lightning.model.plugin_outputs import ParallelFFN, merged_outputs

if TYPE_CHECKING:
    from pkm_lightning.model.cache import LayerCache


class Block(nn.Module):
    """A block `x + attention(norm(x))`, then `x + ffn(norm(x))` (Xiong et al. 2020, arXiv 2002.04745).

    Args:
        attention: the attention.
        ffn: the layer's FFN plugin.
        dim, norm_eps: size and epsilon of the norms.
        before, after: plugins that add to the residual stream before attention and after the FFN; None: nothing.
    """

    def __init__(
        self,
        *,
        attention: Attention,
        ffn: nn.Module,
        dim: int,
        norm_eps: float,
        before: nn.Module | None = None,
        after: nn.Module | None = None,
    ) -> None:
        super().__init__()

        self.before_norm, self.before = stream_norm(before, dim, norm_eps), before
        self.attention_norm = RMSNorm(dim, eps=norm_eps)
        self.attention = attention
        self.ffn_norm = RMSNorm(dim, eps=norm_eps)
        self.ffn = ffn
        self.after_norm, self.after = stream_norm(after, dim, norm_eps), after

    def norms(self) -> list[nn.RMSNorm]:
        """Returns the norms of the block itself, not those within plugins."""
        norms = (self.before_norm, self.attention_norm, self.ffn_norm, self.after_norm)
        return [norm for norm in norms if norm is not None]

    def forward(
        self, x_BTD: Tensor, shared: AttentionInputs, context: FFNContext, cached: LayerCache | None = None
    ) -> FFNOutput:
        """Returns the plugins' output with `y_BTD` replaced by the new residual stream."""
        outputs: dict[str, FFNOutput] = {}
        if self.before is not None:
            outputs["before"] = run_plugin("before", self.before, self.before_norm, x_BTD, context, cached)
            x_BTD = x_BTD + outputs["before"].y_BTD
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), shared, cached)
        outputs["ffn"] = run_plugin("ffn", self.ffn, self.ffn_norm, x_BTD, context, cached)
        x_BTD = x_BTD + outputs["ffn"].y_BTD
        if self.after is not None:
            outputs["after"] = run_plugin("after", self.after, self.after_norm, x_BTD, context, cached)
            x_BTD = x_BTD + outputs["after"].y_BTD
        if len(outputs) == 1:
            return replaced(outputs["ffn"], y_BTD=x_BTD)
        return merged_outputs(x_BTD, outputs)


def stream_norm(plugin: nn.Module | None, dim: int, eps: float) -> nn.RMSNorm | None:
    """Returns the norm of the residual stream in front of `plugin`; None where it normalises its input itself."""
    needs_none = plugin is None or getattr(plugin, "normalises_input", False)
    return None if needs_none else RMSNorm(dim, eps=eps)


def run_plugin(
    name: str,
    plugin: nn.Module,
    norm: nn.Module | None,
    x_BTD: Tensor,
    context: FFNContext,
    cached: LayerCache | None,
) -> FFNOutput:
    """Returns the output of the plugin `name` for the stream `x_BTD`, normalised where there is a norm."""
    if cached is not None:
        context = replaced(context, past=cached.past(name))
    input_BTD = x_BTD if norm is None else norm(x_BTD)
    return checked_output(plugin, input_BTD, plugin(input_BTD, context))


def named_plugins(block: Block) -> Iterator[tuple[str, nn.Module]]:
    """Yields the plugins of a block with their names within it, in the order in which they run."""
    if block.before is not None:
        yield "before", block.before
    if isinstance(block.ffn, ParallelFFN):
        yield "ffn.base", block.ffn.base
        yield "ffn.variant", block.ffn.variant
    else:
        yield "ffn", block.ffn
    if block.after is not None:
        yield "after", block.after
