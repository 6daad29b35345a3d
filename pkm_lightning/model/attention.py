"""Causal grouped-query self-attention (Ainslie et al. 2023, arXiv 2305.13245) through torch's fused kernels.

Letters: H query heads, G key-value heads, C head dimension, F = C / 2 frequencies, P keys: T, and what is cached.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from pkm_lightning.errors import ConfigError, check_integer
from pkm_lightning.model.rope import apply_rope

if TYPE_CHECKING:
    from pkm_lightning.model.cache import LayerCache


class AttentionInputs(NamedTuple):
    """The inputs of attention that all layers share in one forward."""

    cos_B1TF: Tensor
    sin_B1TF: Tensor
    #: True where a query may look, (B, 1, T, P). None allows all earlier positions, which has faster kernels.
    mask_B1TP: Tensor | None


class Attention(nn.Module):
    """Attention with RoPE on queries and keys, key-value heads shared by groups of query heads, and no biases.

    Args:
        dim: model dimension D.
        n_heads: query heads H; divides `dim`.
        n_kv_heads: key-value heads G; divides `n_heads`.

    Raises:
        ConfigError: `dim` not divisible by `n_heads`, `n_heads` not by `n_kv_heads`, or an odd head dimension.
    """

    def __init__(self, *, dim: int, n_heads: int, n_kv_heads: int) -> None:
        super().__init__()
        check_integer("model.n_heads", n_heads, low=1)
        check_integer("model.n_kv_heads", n_kv_heads, low=1)
        if dim % n_heads:
            raise ConfigError(
                f"model.dim={dim} is not divisible by model.n_heads={n_heads}; {_allowed_heads(dim, n_kv_heads)}."
            )
        if n_heads % n_kv_heads:
            raise ConfigError(
                f"model.n_heads={n_heads} is not divisible by model.n_kv_heads={n_kv_heads}; {_divisors(n_heads)}."
            )
        head_dim = dim // n_heads
        if head_dim % 2:
            raise ConfigError(
                f"model.dim={dim} / model.n_heads={n_heads} gives the odd head dimension {head_dim}; "
                f"rotary positions need an even one; {_allowed_heads(dim, n_kv_heads)}."
            )
        self.head_dim = head_dim
        self.query = nn.Linear(dim, n_heads * head_dim, bias=False)
        self.key = nn.Linear(dim, n_kv_heads * head_dim, bias=False)
        self.value = nn.Linear(dim, n_kv_heads * head_dim, bias=False)
        self.out = nn.Linear(n_heads * head_dim, dim, bias=False)

    def forward(self, x_BTD: Tensor, shared: AttentionInputs, cached: LayerCache | None = None) -> Tensor:
        """Computes attention over the positions that `shared.mask_B1TP` allows, causal without a mask."""
        q_BHTC, k_BGPC = self._queries_and_keys(x_BTD, shared)
        v_BGPC = self._heads(self.value(x_BTD))
        # A single new token may look at everything that is cached. Not by comparing sizes: compiled, they are symbols.
        is_causal = shared.mask_B1TP is None and (cached is None or cached.is_empty)
        if cached is not None:
            k_BGPC, v_BGPC = cached.extend(k_BGPC, v_BGPC)
        y_BHTC = functional.scaled_dot_product_attention(
            q_BHTC,
            k_BGPC,
            v_BGPC,
            attn_mask=shared.mask_B1TP,
            is_causal=is_causal,
            # Grouped heads exclude the memory-efficient kernel, so the flag is off without them.
            enable_gqa=k_BGPC.shape[1] != q_BHTC.shape[1],
        )
        return self.out(y_BHTC.transpose(1, 2).flatten(2))

    def diagnostics(
        self, output: Tensor, x_BTD: Tensor, shared: AttentionInputs, cached: LayerCache | None = None
    ) -> dict[str, Tensor]:
        """Returns `attention_logit_max`, the largest `|<q, k>| / sqrt(C)` of a query and a key it may attend to."""
        # The fused kernel returns no logits, so they are computed again, all T * T of them and in fp32.
        q_BHTC, k_BGTC = self._queries_and_keys(x_BTD, shared)
        k_BHTC = k_BGTC.repeat_interleave(q_BHTC.shape[1] // k_BGTC.shape[1], dim=1)
        logits_BHTT = q_BHTC.float() @ k_BHTC.float().transpose(-1, -2) * self.head_dim**-0.5
        mask_XTT = shared.mask_B1TP
        if mask_XTT is None:
            mask_XTT = torch.ones_like(logits_BHTT[0, 0], dtype=torch.bool).tril()
        return {"attention_logit_max": logits_BHTT.abs().masked_fill(~mask_XTT, 0).amax()}

    def _queries_and_keys(self, x_BTD: Tensor, shared: AttentionInputs) -> tuple[Tensor, Tensor]:
        """Returns rotated queries and keys, (B, H, T, C) and (B, G, T, C)."""
        q_BHTC, k_BGTC = self._heads(self.query(x_BTD)), self._heads(self.key(x_BTD))
        return (
            apply_rope(q_BHTC, shared.cos_B1TF, shared.sin_B1TF),
            apply_rope(k_BGTC, shared.cos_B1TF, shared.sin_B1TF),
        )

    def _heads(self, x_BTX: Tensor) -> Tensor:
        return x_BTX.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


def document_mask(doc_ids_BT: Tensor) -> Tensor:
    """Returns the causal mask within documents, (B, 1, T, T); every token attends at least to itself."""
    same_BTT = doc_ids_BT.unsqueeze(2) == doc_ids_BT.unsqueeze(1)
    return torch.tril(same_BTT).unsqueeze(1)


def _allowed_heads(dim: int, n_kv_heads: int) -> str:
    """Names the numbers of heads that all checks accept: an even head dimension, divisible by the key-value heads."""
    heads = [h for h in range(1, dim // 2 + 1) if dim % (2 * h) == 0]
    fitting = [h for h in heads if h % n_kv_heads == 0]
    if fitting:
        return f"allowed with model.n_kv_heads={n_kv_heads}: {', '.join(map(str, fitting))}"
    if heads:
        return f"allowed, each with a model.n_kv_heads that divides it: {', '.join(map(str, heads))}"
    return "an odd dimension cannot be divided into even head dimensions"


def _divisors(number: int) -> str:
    return f"allowed: {', '.join(str(d) for d in range(1, number + 1) if number % d == 0)}"
