"""What a model costs: parameters, FLOPs and bytes a token, in training and in decoding, from formulas.

FLOP counters count nothing on a model that is not run, and no bytes, so the figures are analytic;
tests hold them to the built module and to `torch.utils.flop_counter`.

Conventions: multiply and add are two FLOPs; backward is twice forward; attention over a context of T tokens counts all
T positions for each token, as torch's counter does, although a causal kernel may skip half of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from pkm_lightning.ffn import FFNCost, HasCost
from pkm_lightning.model.placement import plugins

if TYPE_CHECKING:
    from pkm_lightning.memory import ValueTable
    from pkm_lightning.model.block import Block
    from pkm_lightning.model.transformer import Transformer


@dataclass(frozen=True, kw_only=True)
class ModelCost:
    """The cost of a whole model. The trunk is all layers and norms, without embedding and unembedding.

    Args:
        params_total: every parameter, a shared table once.
        params_active: parameters that one token's output depends on through arithmetic: of the embedding one row, of
            the table the rows read. A tied embedding counts wholly, since unembedding uses all of it.
        table_rows, table_dim, table_params: the value tables, summed where there are several (of the dims the largest).
        trunk_flops, model_flops: forward FLOPs a token, at evaluation.
        trunk_train_flops: forward FLOPs of the trunk a token in training, where some plugins do more.
        train_bytes: bytes of embedding and table rows that a token moves for itself in forward and backward (read,
            read again for the weights' gradient, row gradients written); weights shared by the batch are not in it.
        decode_bytes: bytes of parameters read to decode one token at batch 1.
        unknown: plugins that state no cost; they are missing from every figure but `params_total`.
    """

    params_total: int
    params_active: int
    table_rows: int
    table_dim: int
    table_params: int
    trunk_flops: int
    trunk_train_flops: int
    model_flops: int
    train_bytes: int
    decode_bytes: int
    unknown: tuple[str, ...] = ()

    @property
    def train_flops(self) -> int:
        """Forward and backward of the whole model, FLOPs a token."""
        return 3 * (self.model_flops - self.trunk_flops + self.trunk_train_flops)


def model_cost(model: Transformer, context: int) -> ModelCost:
    """The cost of `model` with `context` tokens in attention; weights may be on the meta device."""
    blocks: list[Block] = list(model.blocks)  # type: ignore[arg-type]
    costs, unknown = _plugin_costs(blocks)
    tables: list[ValueTable] = list(model.tables)  # type: ignore[arg-type]
    # Of a table that is split over ranks each holds a part only.
    apart = {id(table.weight) for table in tables}
    total = sum(p.numel() for p in model.parameters() if id(p) not in apart) + sum(table.size for table in tables)
    embedding = model.embedding.weight
    shared = sum(p.numel() for b in blocks for part in (b.attention, b.attention_norm, b.ffn_norm)
                 for p in part.parameters())  # fmt: skip
    active = shared + sum(p.numel() for p in model.norm.parameters()) + sum(c.active_params for c in costs)
    active += embedding.numel() + (0 if model.unembedding is None else model.embedding.embedding_dim)
    attention = sum(attention_flops(b, context) for b in blocks)
    trunk = attention + sum(c.flops for c in costs)
    trunk_train = attention + sum(c.flops if c.train_flops is None else c.train_flops for c in costs)
    lookup_bytes = sum(c.lookup_bytes for c in costs)
    row_bytes = model.embedding.embedding_dim * embedding.element_size()
    return ModelCost(
        params_total=total,
        params_active=active,
        table_rows=sum(table.rows for table in tables),
        table_dim=max((table.dim for table in tables), default=0),
        table_params=sum(table.size for table in tables),
        trunk_flops=trunk,
        trunk_train_flops=trunk_train,
        model_flops=trunk + 2 * embedding.numel(),
        train_bytes=3 * lookup_bytes + 2 * row_bytes,
        decode_bytes=active * embedding.element_size(),
        unknown=tuple(sorted(unknown)),
    )


def attention_flops(block: Block, context: int) -> int:
    """Forward FLOPs a token: four projections, scores and weighted values over `context` positions."""
    attention = block.attention
    projections = sum(p.numel() for p in attention.parameters())
    return 2 * projections + 4 * context * attention.query.out_features


def _plugin_costs(blocks: list[Block]) -> tuple[list[FFNCost], set[str]]:
    costs: list[FFNCost] = []
    unknown: set[str] = set()
    for block in blocks:
        for _, plugin in plugins(block.ffn):
            if isinstance(plugin, HasCost):
                costs.append(plugin.cost())
            else:
                unknown.add(type(plugin).__name__)
    return costs, unknown


def optimizer_bytes(model: nn.Module, states: int = 2) -> int:
    """Bytes of optimizer state: `states` values of each parameter's own dtype (AdamW keeps two)."""
    return sum(states * p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
