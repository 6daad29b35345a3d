"""Product-key memory (Lample et al. 2019, "Large Memory Layers with Product Keys", arXiv 1907.05242)."""

from __future__ import annotations

from collections.abc import Mapping

from pkm_lightning.errors import check_choice
from pkm_lightning.ffn.memory_layer import MemoryLayer
from pkm_lightning.memory import ValueTable, half_key_dim

__all__ = ["PKM"]


class PKM(MemoryLayer):
    """One memory layer that replaces the FFN of a middle layer:

        I = top-k over slots (i, j) of K1[i] q1 + K2[j] q2        (section 3.1, per head)
        w = softmax of those scores, in fp32
        y = sum over heads and slots of w_i V_i

    The queries of all heads are batch-normalised (section 4.3), which needs the whole micro-batch: in training, and
    only then, a token's output depends on later tokens too.

    | paper | here |
    |---|---|
    | values | `table.weight`, (n_keys**2, dim), shared by the heads (and by layers, with `table.shared`) |
    | sub-keys | `addressing.keys.keys`, (heads, 2, n_keys, key_dim / 2) |
    | query network | `addressing.query.projection`, `addressing.query.norm` |

    Args:
        dim, table, n_keys, heads, knn, key_dim, score_precision, cures: see `MemoryLayer`; a slot has `dim`
            values.
        query_norm: `batch`, `layer` or `none`.

    Raises:
        ConfigError: a size out of range, an odd `key_dim`, an unknown choice, or a table of another shape.

    Example:
        >>> import torch
        >>> from pkm_lightning import PKM
        >>> PKM(dim=8, n_keys=16)(torch.randn(2, 5, 8)).y_BTD.shape
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
        query_norm: str = "batch",
        score_precision: str = "tf32x3",
        cures: Mapping[str, object] | None = None,
    ) -> None:
        check_choice("ffn.query_norm", query_norm, ("batch", "layer", "none"))
        super().__init__(
            dim=dim,
            table=table,
            n_keys=n_keys,
            heads=heads,
            knn=knn,
            key_dim=key_dim,
            query_norm=query_norm,
            key_norm=False,
            # A half query is scored against keys of half the dimension, which sets their scale.
            key_bound=half_key_dim(key_dim) ** -0.5,
            score_precision=score_precision,
            cures=cures,
        )
