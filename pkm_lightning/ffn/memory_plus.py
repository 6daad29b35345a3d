"""Memory+ of "Memory Layers at Scale" (Berges et al. 2024, arXiv 2412.09764, section 3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

from pkm_lightning.errors import check_choice, check_flag
from pkm_lightning.ffn.memory_layer import MemoryLayer
from pkm_lightning.ffn.zero_start import zero_rows
from pkm_lightning.memory import ValueTable

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["MemoryPlus"]


class MemoryPlus(MemoryLayer):
    """Product-key lookup in a value table that layers may share, gated by the layer's input.

    For each head h, with half queries q1, q2 and half keys K1, K2 (all RMS-normalised with `qk_norm`):

        I   = top-k over slots (i, j) of K1[i] q1 + K2[j] q2        (section 3.1)
        s   = softmax of those scores, in fp32
        y   = sum over heads and slots of s_i V_i                    (eq. 1)
        out = W2 (y * silu(W1 x))                                    ("Memory+", section 3.3)

    The paper's ablations (table 3) and later ones of the field are options: `gate=sigmoid` computes
    W2 y * sigmoid(w x) with one number per token; `activation` weights each slot by its own score;
    `value_projection` maps y before the gate.

    | paper | here |
    |---|---|
    | N, values | `table.weight`, (n_keys**2, value_dim), shared by layers |
    | K1, K2 | `addressing.keys.keys`, (heads, 2, n_keys, key_dim / 2), per layer |
    | q(x) | `addressing.query.projection` |
    | W1, W2 | `gate`, `out` |

    Args:
        dim, table, n_keys, heads, knn, key_dim, value_dim, activation, temperature, score_precision, cures: see
            `MemoryLayer`.
        qk_norm: RMSNorm on half queries and sub-keys.
        gate: `swilu`, the paper's name for silu(W1 x) (table 3), `sigmoid` (one number per token) or `none`.
        value_projection: a learned V x V map before the gate.

    Raises:
        ConfigError: a size out of range, an odd `key_dim`, an unknown choice, or a table of another shape.

    Example:
        >>> import torch
        >>> from pkm_lightning import MemoryPlus
        >>> MemoryPlus(dim=8, n_keys=16)(torch.randn(2, 5, 8)).y_BTD.shape
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
        value_dim: int | None = None,
        qk_norm: bool = True,
        gate: str = "swilu",
        activation: str = "softmax",
        temperature: bool = False,
        value_projection: bool = False,
        score_precision: str = "tf32x3",
        cures: Mapping[str, object] | None = None,
    ) -> None:
        check_choice("ffn.gate", gate, ("swilu", "sigmoid", "none"))
        check_flag("ffn.qk_norm", qk_norm)
        check_flag("ffn.value_projection", value_projection)
        super().__init__(
            dim=dim,
            table=table,
            n_keys=n_keys,
            heads=heads,
            knn=knn,
            key_dim=key_dim,
            query_norm="rms" if qk_norm else "none",
            key_norm=qk_norm,
            value_dim=value_dim,
            activation=activation,
            temperature=temperature,
            value_projection=value_projection,
            score_precision=score_precision,
            cures=cures,
        )
        values = self.values.table.dim
        self.gate_kind = gate
        self.gate = None if gate == "none" else nn.Linear(dim, values if gate == "swilu" else 1, bias=False)
        self.out = nn.Linear(values, dim, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws addressing and values, W1 and W2 from N(0, 1/fan_out), and a sigmoid gate from N(0, 1/D)."""
        super().reset_parameters()
        if self.gate is not None:
            # A sigmoid gate has one output, so its fan_out of 1 does not bound the scale of w x.
            fan = self.gate.out_features if self.gate_kind == "swilu" else self.gate.in_features
            nn.init.normal_(self.gate.weight, std=fan**-0.5)
        nn.init.normal_(self.out.weight, std=self.out.out_features**-0.5)

    def zero_output(self) -> None:
        """Sets the rows to zero, or where they must stay W2."""
        zero_rows(self, self.values.table, self.out.weight)

    def match_stream(self, *, input_rms: float, stream_length: float) -> None:
        """Divides the gate and an unnormalised query by the input's RMS, and multiplies W2 by the stream's length."""
        self.addressing.query.match_input(input_rms)
        with torch.no_grad():
            if self.gate is not None:
                self.gate.weight /= input_rms
            self.out.weight *= stream_length

    def during_read(self, x_TD: Tensor) -> Tensor | None:
        """Computes the gate, (T, V) or (T, 1), or None without one."""
        if self.gate is None:
            return None
        gate_TV: Tensor = self.gate(x_TD)
        return functional.silu(gate_TV) if self.gate_kind == "swilu" else gate_TV.sigmoid()

    def after_read(self, y_TV: Tensor, gate_TV: Tensor | None) -> Tensor:
        """Multiplies the gated read by W2."""
        y_TD: Tensor = self.out(y_TV if gate_TV is None else y_TV * gate_TV)
        return y_TD
