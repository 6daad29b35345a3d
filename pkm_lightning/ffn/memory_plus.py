"""Memory+ of "Memory Layers at Scale" (Berges et al. 2024, arXiv 2412.09764, section 3).

Letters: B sequences, T tokens (B * T inside), D model dimension, H heads, S sub-keys a half, K slots read a head,
V values a slot.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from pkm_lightning.errors import ConfigError, check_integer
from pkm_lightning.ffn.base import FFNContext, FFNCost, FFNOutput, TableSpec
from pkm_lightning.memory import ProductKeys, QueryNetwork, TableReference, ValueTable
from pkm_lightning.ops import product_topk

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["MemoryPlus"]


class MemoryPlus(nn.Module):
    """Product-key lookup in a value table that layers may share, gated by the layer's input.

    For each head h, with half queries q1, q2 and half keys K1, K2 (all RMS-normalised if `qk_norm`):

        I   = top-k over slots (i, j) of K1[i] q1 + K2[j] q2        (section 3.1)
        s   = softmax of those scores, in fp32
        y   = sum over heads and slots of s_i V_i                    (eq. 1)
        out = W2 (y * silu(W1 x))                                    ("Memory+", section 3.3)

    | paper | here |
    |---|---|
    | N, values | `table.weight`, (n_keys**2, value_dim), shared by layers |
    | K1, K2 | `keys.keys`, (heads, 2, n_keys, key_dim / 2), per layer |
    | q(x) | `query.projection` |
    | W1, W2 | `gate`, `out` |

    Args:
        dim: model dimension D.
        table: the value table, owned by the model.
        n_keys: sub-keys a half S; the table has n_keys**2 slots.
        heads: queries a token H.
        knn: slots read a head K, 1 to n_keys.
        key_dim: dimension of both half keys together, even.
        value_dim: values a slot V; None takes `dim`.
        qk_norm: RMSNorm on half queries and sub-keys.

    Raises:
        ConfigError: a size out of range, an odd `key_dim`, or a table of another shape.
    """

    def __init__(
        self,
        *,
        dim: int,
        table: ValueTable,
        n_keys: int,
        heads: int,
        knn: int,
        key_dim: int,
        value_dim: int | None,
        qk_norm: bool,
    ) -> None:
        super().__init__()
        spec = self.table_spec(dim=dim, n_keys=n_keys, value_dim=value_dim)
        _check_sizes(heads=heads, knn=knn, n_keys=n_keys, key_dim=key_dim)
        if tuple(table.weight.shape) != (spec.rows, spec.dim):
            raise ConfigError(
                f"table has shape {tuple(table.weight.shape)}, but ffn.n_keys={n_keys} and ffn.value_dim={value_dim} "
                f"need {(spec.rows, spec.dim)}: layers that share a table need the same n_keys and value_dim."
            )
        self.knn = knn
        self._table = TableReference(table)
        self.query = QueryNetwork(dim=dim, heads=heads, key_dim=key_dim, norm=qk_norm)
        self.keys = ProductKeys(heads=heads, n_keys=n_keys, key_dim=key_dim, norm=qk_norm)
        self.gate = nn.Linear(dim, spec.dim, bias=False)
        self.out = nn.Linear(spec.dim, dim, bias=False)
        self.reset_parameters()

    @classmethod
    def table_spec(cls, *, dim: int, n_keys: int, value_dim: int | None, **_: object) -> TableSpec:
        """n_keys**2 rows of `value_dim` values."""
        check_integer("ffn.n_keys", n_keys, low=1, high=46_340)
        if value_dim is not None:
            check_integer("ffn.value_dim", value_dim, low=1)
        return TableSpec(rows=n_keys**2, dim=dim if value_dim is None else value_dim)

    def reset_parameters(self) -> None:
        """Query and keys as their modules say; W1 and W2 from N(0, 1/fan_out)."""
        self.query.reset_parameters()
        self.keys.reset_parameters()
        nn.init.normal_(self.gate.weight, std=self.gate.out_features**-0.5)
        nn.init.normal_(self.out.weight, std=self.out.out_features**-0.5)

    def forward(self, x_BTD: Tensor, context: FFNContext) -> FFNOutput:
        """Looks up every token of `x_BTD`; the slots read and their weights are the trace."""
        x_TD = x_BTD.flatten(0, -2)
        scores1_HTS, scores2_HTS = self.keys(self.query(x_TD))
        scores_HTK, ids_HTK = product_topk(scores1_HTS, scores2_HTS, self.knn)
        weights_THK, ids_THK = torch.softmax(scores_HTK, dim=-1).transpose(0, 1), ids_HTK.transpose(0, 1)
        y_TV = self._table.table(ids_THK.flatten(1), weights_THK.flatten(1))
        y_TD = self.out(y_TV.to(x_TD.dtype) * functional.silu(self.gate(x_TD)))
        trace = {}
        if context.observe:
            trace = {
                "slot_ids": ids_THK.detach().unflatten(0, x_BTD.shape[:-1]),
                "slot_weights": weights_THK.detach().unflatten(0, x_BTD.shape[:-1]),
            }
        return FFNOutput(y_TD.view_as(x_BTD), trace=trace)

    def cost(self) -> FFNCost:
        """Query, all 2 S sub-key scores a head, H * K table rows and the two gate matrices; top-k counts no FLOPs."""
        table = self._table.table.weight
        heads, _, n_keys, half = self.keys.keys.shape
        rows_read = heads * self.knn * table.shape[1]
        matrices = self.query.projection.weight.numel() + self.gate.weight.numel() + self.out.weight.numel()
        params = sum(p.numel() for p in self.parameters())
        return FFNCost(
            params=params,
            table_params=table.numel(),
            active_params=params + rows_read,
            flops=2 * (matrices + 2 * heads * n_keys * half + rows_read),
            lookup_bytes=rows_read * table.element_size(),
        )


def _check_sizes(*, heads: int, knn: int, n_keys: int, key_dim: int) -> None:
    check_integer("ffn.heads", heads, low=1)
    check_integer("ffn.knn", knn, low=1, high=n_keys)
    check_integer("ffn.key_dim", key_dim, low=2)
    if key_dim % 2:
        raise ConfigError(f"ffn.key_dim={key_dim} is odd; it is split into two half keys: use {key_dim + 1}.")
