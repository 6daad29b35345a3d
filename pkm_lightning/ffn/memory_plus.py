"""Memory+ of "Memory Layers at Scale" (Berges et al. 2024, arXiv 2412.09764, section 3).

Letters: B sequences, T tokens (B * T inside), D model dimension, H heads, S sub-keys a half, K slots read a head,
V values a slot.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import nn
from torch.nn import functional

from pkm_lightning.errors import check_choice, check_integer
from pkm_lightning.ffn.base import FFNContext, FFNCost, FFNOutput, TableSpec
from pkm_lightning.ffn.memory_cost import read_cost
from pkm_lightning.memory import Addressing, Cures, Values, ValueTable, check_table, product_slots

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

    The paper's ablations (table 3) and others of the field are options: `gate=sigmoid` takes W2 y * sigmoid(w x) with
    one number a token; `activation` weights each slot for itself; `value_projection` maps y before the gate.

    | paper | here |
    |---|---|
    | N, values | `table.weight`, (n_keys**2, value_dim), shared by layers |
    | K1, K2 | `addressing.keys.keys`, (heads, 2, n_keys, key_dim / 2), per layer |
    | q(x) | `addressing.query.projection` |
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
        gate: `swilu` (W1, silu), `sigmoid` (one number a token) or `none`.
        activation: `softmax`, or each slot for itself: `relu`, `sigmoid`.
        temperature: scores are divided by a learned number a head, at first 1.
        value_projection: a learned V x V map before the gate.
        cures: what is done against unread slots; see `pkm_lightning.memory.Cures`. None: nothing.

    Raises:
        ConfigError: a size out of range, an odd `key_dim`, an unknown word, or a table of another shape.
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
        gate: str = "swilu",
        activation: str = "softmax",
        temperature: bool = False,
        value_projection: bool = False,
        cures: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__()
        check_choice("ffn.gate", gate, ("swilu", "sigmoid", "none"))
        options = Cures.of(cures)
        spec = self.table_spec(dim=dim, n_keys=n_keys, value_dim=value_dim, cures=cures)
        self.gate_kind = gate
        self.addressing = Addressing(
            dim=dim,
            heads=heads,
            n_keys=n_keys,
            knn=knn,
            key_dim=key_dim,
            query_norm="rms" if qk_norm else "none",
            key_norm=qk_norm,
            activation=activation,
            temperature=temperature,
            cures=options,
        )
        check_table(table, spec.rows, spec.dim, named=f"ffn.n_keys={n_keys} and ffn.value_dim={value_dim}")
        self.values = Values(table=table, out_dim=spec.dim if value_projection or options.simvq else None)
        self.gate = None if gate == "none" else nn.Linear(dim, spec.dim if gate == "swilu" else 1, bias=False)
        self.out = nn.Linear(spec.dim, dim, bias=False)
        self.reset_parameters()

    @classmethod
    def table_spec(
        cls,
        *,
        dim: int,
        n_keys: int,
        value_dim: int | None,
        cures: Mapping[str, object] | None = None,
        **_: object,
    ) -> TableSpec:
        """n_keys**2 rows of `value_dim` values from N(0, 1/value_dim)."""
        rows = product_slots(n_keys)
        if value_dim is not None:
            check_integer("ffn.value_dim", value_dim, low=1)
        return TableSpec(rows=rows, dim=dim if value_dim is None else value_dim, trainable=not Cures.of(cures).simvq)

    def reset_parameters(self) -> None:
        """Addressing and values as their modules say; W1 and W2 from N(0, 1/fan_out), a sigmoid gate from N(0, 1/D)."""
        self.addressing.reset_parameters()
        self.values.reset_parameters()
        if self.gate is not None:
            fan = self.gate.out_features if self.gate_kind == "swilu" else self.gate.in_features
            nn.init.normal_(self.gate.weight, std=fan**-0.5)
        nn.init.normal_(self.out.weight, std=self.out.out_features**-0.5)

    def forward(self, x_BTD: Tensor, context: FFNContext) -> FFNOutput:
        """Looks up every token of `x_BTD`; the slots read and their weights are the trace."""
        x_TD = x_BTD.flatten(0, -2)
        valid_T = None if context.valid_BT is None else context.valid_BT.flatten()
        read = self.addressing(x_TD, valid_T)
        y_TV = self.values(read.ids_TC, read.weights_TC).to(x_TD.dtype)
        if self.gate is not None:
            gate_TV = self.gate(x_TD)
            y_TV = y_TV * (functional.silu(gate_TV) if self.gate_kind == "swilu" else gate_TV.sigmoid())
        trace = read.trace(x_BTD.shape[:-1]) if context.observe else {}
        return FFNOutput(self.out(y_TV).view_as(x_BTD), read.aux_losses, trace, read.step_stats)

    def cost(self) -> FFNCost:
        """Query, all 2 S sub-key scores a head, H * K table rows, gate and output; top-k counts no FLOPs."""
        matrices = self.out.weight.numel() + (0 if self.gate is None else self.gate.weight.numel())
        return read_cost(self, self.addressing, self.values, matrices)
