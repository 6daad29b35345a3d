"""The largest attention logit of a pretrained layer, read off the one call that all architectures make.

Letters: H query heads, G key-value heads, C head dimension.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode


def add_diagnostics(attentions: Iterable[nn.Module]) -> None:
    """Gives each attention module of transformers the method `diagnostics` that `training.diagnostics.probe` calls."""
    for attention in attentions:
        attention.diagnostics = functools.partial(_diagnostics, attention)  # type: ignore[assignment]


def _diagnostics(attention: nn.Module, output: object, *inputs: Any, **keywords: Any) -> dict[str, Tensor]:
    """Returns `attention_logit_max`, the largest `|<q, k>|` times its scale of a query and a key it may attend to."""
    with _LargestLogit() as largest:
        attention.forward(*inputs, **keywords)  # not the module itself, whose hooks call this function
    return {"attention_logit_max": largest.value}


class _LargestLogit(TorchFunctionMode):
    """Computes the logits of each fused attention within the block, in fp32, as `value`."""

    value: Tensor

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            self.value = _largest(args[0], args[1], given.get("attn_mask"), given.get("scale"))
        return func(*args, **given)


def _largest(q_BHTC: Tensor, k_BGTC: Tensor, mask_B1TT: Tensor | None, scale: float | None) -> Tensor:
    k_BHTC = k_BGTC.repeat_interleave(q_BHTC.shape[1] // k_BGTC.shape[1], dim=1)
    scale = q_BHTC.shape[-1] ** -0.5 if scale is None else scale
    logits_BHTT = q_BHTC.float() @ k_BHTC.float().transpose(-1, -2) * scale
    mask_XTT = torch.ones_like(logits_BHTT[0, 0], dtype=torch.bool).tril() if mask_B1TT is None else mask_B1TT
    return logits_BHTT.abs().masked_fill(~mask_XTT, 0).amax()
