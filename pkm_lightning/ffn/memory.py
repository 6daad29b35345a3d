"""The vanilla memory layer of "Memory Layers at Scale" (Berges et al. 2024, arXiv 2412.09764, section 3.1)."""

from __future__ import annotations

from collections.abc import Mapping

from pkm_lightning.errors import check_flag
from pkm_lightning.ffn.memory_layer import MemoryLayer
from pkm_lightning.memory import ValueTable

__all__ = ["Memory"]


class Memory(MemoryLayer):
    """The product-key layer that Memory+ builds on: it replaces the middle FFN, without gate and output matrix.

        I = top-k over slots (i, j) of K1[i] q1 + K2[j] q2        (section 3.1, per head)
        s = softmax of those scores, in fp32
        y = sum over heads and slots of s_i V_i                    (eq. 1)

    Half queries and sub-keys are RMS-normalised with `qk_norm`.

    | paper | here |
    |---|---|
    | V, values | `table.weight`, (n_keys**2, dim) |
    | K1, K2 | `addressing.keys.keys`, (heads, 2, n_keys, key_dim / 2) |
    | q(x) | `addressing.query.projection` |

    Args:
        dim, table, n_keys, heads, knn, key_dim, score_precision, cures: see `MemoryLayer`; a slot has `dim`
            values.
        qk_norm: RMSNorm on half queries and sub-keys (fig. 3).

    Raises:
        ConfigError: a size out of range, an odd `key_dim` or a table of another shape.

    Example:
        >>> import torch
        >>> from pkm_lightning import Memory
        >>> Memory(dim=8, n_keys=16)(torch.randn(2, 5, 8)).y_BTD.shape
        torch.Size([2, 5, 8])
    """

    def __init__(
        self,
        *,
        dim: int,
        table: ValueTable | None = None,
        n_keys: int = 256,
        heads: int = 1,
        knn: int = 32,
        key_dim: int = 32,
        qk_norm: bool = True,
        score_precision: str = "tf32x3",
        cures: Mapping[str, object] | None = None,
    ) -> None:
        check_flag("ffn.qk_norm", qk_norm)
        super().__init__(
            dim=dim,
            table=table,
            n_keys=n_keys,
            heads=heads,
            knn=knn,
            key_dim=key_dim,
            query_norm="rms" if qk_norm else "none",
            key_norm=qk_norm,
            score_precision=score_precision,
            cures=cures,
        )
