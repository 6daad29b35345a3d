"""The cost of a model: parameters, FLOPs and bytes per token, in training and in decoding, from formulas.

A FLOP counter needs a model that runs and counts no bytes, so the figures are analytic; tests compare them with the
built module and with `torch.utils.flop_counter`.

Conventions: multiply and add are two FLOPs; backward is twice forward; attention over a context of T tokens counts all
T positions for each token, as torch's counter does, although a causal kernel may skip half of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from pkm_lightning.ffn import FFNCost
from pkm_lightning.model.plugin_checks import plugin_cost

if TYPE_CHECKING:
    from pkm_lightning.memory import ValueTable
    from pkm_lightning.model.block import Block
    from pkm_lightning.model.trunk import Trunk


@dataclass(frozen=True, kw_only=True)
class ModelCost:
    """The cost of a whole model. The trunk is all layers and norms, without embedding and unembedding.

    Args:
        params_total: all parameters; a shared table counts once.
        params_active: parameters that enter the arithmetic of one token's output: one row of the embedding, the rows
            read of a table, also if heads or layers read the same, but at most all parameters. A tied embedding counts
            in full, since unembedding uses all of it.
        table_rows, table_dim, table_params: sizes of the value tables: rows and parameters are sums over tables, the
            dim is the largest.
        context: tokens in attention, which the FLOPs grow with.
        trunk_flops, model_flops: forward FLOPs per token at evaluation.
        trunk_train_flops: forward FLOPs of the trunk per token in training, where some plugins need more.
        train_bytes: bytes of embedding and table rows that one token moves in forward and backward (read, read again
            for the weights' gradient, row gradients written), without weights that the batch shares.
        decode_bytes: bytes of parameters read to decode one token at batch 1.
        unknown: class names of plugins without `cost`; only `params_total` includes them.

    Example: that of `model_cost`.
    """

    params_total: int
    params_active: int
    table_rows: int
    table_dim: int
    table_params: int
    context: int
    trunk_flops: int
    trunk_train_flops: int
    model_flops: int
    train_bytes: int
    decode_bytes: int
    unknown: tuple[str, ...] = ()

    @property
    def train_flops(self) -> int:
        """FLOPs per token of forward and backward of the whole model."""
        return 3 * (self.model_flops - self.trunk_flops + self.trunk_train_flops)


def model_cost(model: Trunk, context: int) -> ModelCost:
    """Returns the cost of `model` with `context` tokens in attention; weights may be on the meta device.

    Example:
        >>> from pkm_lightning import Dense, Transformer, model_cost
        >>> ffns = [Dense(dim=8, hidden_dim=16)]
        >>> model_cost(Transformer(vocab_size=50, dim=8, n_heads=2, n_kv_heads=2, ffns=ffns), context=1).params_total
        1464
    """
    costs, unknown = _plugin_costs(model)
    own = model.own_cost(context)
    tables: list[ValueTable] = list(model.tables)  # type: ignore[arg-type]
    # The weight of a sharded table is this rank's shard; `size` is that of the whole table.
    table_weights = {id(weight) for table in tables for weight in table.parameters()}
    dense_params = sum(p.numel() for p in model.parameters() if id(p) not in table_weights)
    table_params = sum(table.size for table in tables)
    embedding = model.embedding.weight
    active = own.active_params + sum(c.active_params for c in costs)
    # Without tying, a token reads one row of the embedding and the whole unembedding, a matrix of the same size.
    active += embedding.numel() + (0 if model.is_tied else model.embedding.embedding_dim)
    # Heads and layers of one table may read the same rows: a small table has fewer than their reads.
    active = min(active, dense_params + table_params)
    trunk = own.flops + sum(c.flops for c in costs)
    trunk_train = own.flops + sum(c.flops if c.train_flops is None else c.train_flops for c in costs)
    lookup_bytes = sum(c.lookup_bytes for c in costs)
    row_bytes = model.embedding.embedding_dim * embedding.element_size()
    return ModelCost(
        params_total=dense_params + table_params,
        params_active=active,
        table_rows=sum(table.rows for table in tables),
        table_dim=max((table.dim for table in tables), default=0),
        table_params=table_params,
        context=context,
        trunk_flops=trunk,
        trunk_train_flops=trunk_train,
        model_flops=trunk + 2 * embedding.numel(),
        train_bytes=3 * lookup_bytes + 2 * row_bytes,
        decode_bytes=active * embedding.element_size(),
        unknown=tuple(sorted(unknown)),
    )


def attention_flops(block: Block, context: int) -> int:
    """Counts forward FLOPs per token: four projections, scores and weighted values over `context` positions."""
    attention = block.attention
    projections = sum(p.numel() for p in attention.parameters())
    return 2 * projections + 4 * context * attention.query.out_features


def _plugin_costs(model: Trunk) -> tuple[list[FFNCost], set[str]]:
    costs: list[FFNCost] = []
    unknown: set[str] = set()
    for _, _, plugin in model.plugins():
        cost = plugin_cost(plugin)
        if cost is None:
            unknown.add(type(plugin).__name__)
        else:
            costs.append(cost)
    return costs, unknown


def optimizer_bytes(model: nn.Module, states: int = 2) -> int:
    """Counts bytes of optimizer state: `states` values in the dtype of each trained parameter (AdamW keeps two)."""
    return sum(states * p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
