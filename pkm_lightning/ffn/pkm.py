"""Product-key memory (Lample et al. 2019, "Large Memory Layers with Product Keys", arXiv 1907.05242).

Letters: B sequences, T tokens (B * T inside), D model dimension, H heads, K slots read a head, V values a slot.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import nn

from pkm_lightning.errors import check_choice
from pkm_lightning.ffn.base import FFNContext, FFNCost, FFNOutput, TableSpec
from pkm_lightning.ffn.memory_cost import read_cost
from pkm_lightning.memory import Addressing, Cures, Values, ValueTable, check_table, half_key_dim, product_slots

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["PKM"]


class PKM(nn.Module):
    """One memory layer that replaces the FFN of a middle layer:

        I = top-k over slots (i, j) of K1[i] q1 + K2[j] q2        (section 3.1, per head)
        w = softmax of those scores, in fp32
        y = sum over heads and slots of w_i V_i

    with the queries of all heads batch-normalised (section 4.3), which needs the whole micro-batch: in training, and
    only then, a token's output depends on later tokens too.

    | paper | here |
    |---|---|
    | values | `table.weight`, (n_keys**2, dim), shared by the heads (and by layers, with `table.shared`) |
    | sub-keys | `addressing.keys.keys`, (heads, 2, n_keys, key_dim / 2) |
    | query network | `addressing.query.projection`, `addressing.query.norm` |

    Args:
        dim: model dimension D, also the values a slot.
        table: the value table, owned by the model.
        n_keys: sub-keys a half S; the table has n_keys**2 slots.
        heads: queries a token H.
        knn: slots read a head K, 1 to n_keys.
        key_dim: dimension of both half keys together, even.
        query_norm: `batch`, `layer` or `none`.
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
        query_norm: str,
        cures: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__()
        check_choice("ffn.query_norm", query_norm, ("batch", "layer", "none"))
        options = Cures.of(cures)
        self.addressing = Addressing(
            dim=dim,
            heads=heads,
            n_keys=n_keys,
            knn=knn,
            key_dim=key_dim,
            query_norm=query_norm,
            key_norm=False,
            activation="softmax",
            temperature=False,
            key_bound=half_key_dim(key_dim) ** -0.5,
            cures=options,
        )
        check_table(table, product_slots(n_keys), dim, named=f"ffn.n_keys={n_keys} and model.dim={dim}")
        self.values = Values(table=table, out_dim=dim if options.simvq else None)

    @classmethod
    def table_spec(cls, *, dim: int, n_keys: int, cures: Mapping[str, object] | None = None, **_: object) -> TableSpec:
        """n_keys**2 rows of `dim` values from N(0, 1/dim)."""
        return TableSpec(rows=product_slots(n_keys), dim=dim, trainable=not Cures.of(cures).simvq)

    def reset_parameters(self) -> None:
        """Query xavier-uniform without bias, sub-keys uniform in +-1/sqrt(key_dim / 2)."""
        self.addressing.reset_parameters()
        self.values.reset_parameters()

    def forward(self, x_BTD: Tensor, context: FFNContext) -> FFNOutput:
        """Looks up every token of `x_BTD`; the slots read and their weights are the trace."""
        valid_T = None if context.valid_BT is None else context.valid_BT.flatten()
        read = self.addressing(x_BTD.flatten(0, -2), valid_T)
        y_TD = self.values(read.ids_TC, read.weights_TC).to(x_BTD.dtype)
        trace = read.trace(x_BTD.shape[:-1]) if context.observe else {}
        return FFNOutput(y_TD.view_as(x_BTD), read.aux_losses, trace, read.step_stats)

    def after_step(self, stats: dict[str, Tensor]) -> None:
        """Moves the running statistics of the query's batch normalisation."""
        self.addressing.after_step(stats)

    def cost(self) -> FFNCost:
        """Query, all 2 S sub-key scores a head, H * K table rows; top-k and norms count no FLOPs."""
        return read_cost(self, self.addressing, self.values)
