"""Memory+ of "Memory Layers at Scale" (Berges et al. 2024, arXiv 2412.09764, section 3).

Letters: B sequences, T tokens (B * T inside), D model dimension, H heads, S sub-keys a half, K slots read a head,
V values a slot.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import nn
from torch.nn import functional

from pkm_lightning.errors import check_choice, check_flag
from pkm_lightning.ffn.memory_layer import MemoryLayer
from pkm_lightning.memory import Addressing, Cures, Values, ValueTable, check_table

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["MemoryPlus"]


class MemoryPlus(MemoryLayer):
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
        check_choice("ffn.gate", gate, ("swilu", "sigmoid", "none"))
        check_flag("ffn.qk_norm", qk_norm)
        check_flag("ffn.value_projection", value_projection)
        options = Cures.of(cures)
        spec = self.table_spec(dim=dim, n_keys=n_keys, value_dim=value_dim, cures=cures)
        addressing = Addressing(
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
        mapped = value_projection or options.simvq
        super().__init__(addressing=addressing, values=Values(table=table, out_dim=spec.dim if mapped else None))
        self.gate_kind = gate
        self.gate = None if gate == "none" else nn.Linear(dim, spec.dim if gate == "swilu" else 1, bias=False)
        self.out = nn.Linear(spec.dim, dim, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Addressing and values as their modules say; W1 and W2 from N(0, 1/fan_out), a sigmoid gate from N(0, 1/D)."""
        super().reset_parameters()
        if self.gate is not None:
            fan = self.gate.out_features if self.gate_kind == "swilu" else self.gate.in_features
            nn.init.normal_(self.gate.weight, std=fan**-0.5)
        nn.init.normal_(self.out.weight, std=self.out.out_features**-0.5)

    def during_read(self, x_TD: Tensor) -> Tensor | None:
        """The gate."""
        if self.gate is None:
            return None
        gate_TV: Tensor = self.gate(x_TD)
        return functional.silu(gate_TV) if self.gate_kind == "swilu" else gate_TV.sigmoid()

    def after_read(self, y_TV: Tensor, meanwhile: Tensor | None) -> Tensor:
        """The gated read through W2."""
        y_TD: Tensor = self.out(y_TV if meanwhile is None else y_TV * meanwhile)
        return y_TD
