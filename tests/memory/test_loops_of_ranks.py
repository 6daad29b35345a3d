"""Rows in a loop of the user's own over several ranks: they learn the mean, unless fully_shard has sharded them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_group import Groups
from tolerances import assert_close
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from pkm_lightning.errors import ConfigError
from pkm_lightning.ffn import MemoryPlus
from pkm_lightning.memory import TableOptimizer, ValueTable, row_learning_tables

DIM, KEYS, STEPS = 8, 6, 3


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        table = ValueTable(rows=KEYS**2, dim=DIM, learning="rows")
        self.memory = MemoryPlus(dim=DIM, n_keys=KEYS, knn=2, table=table)

    def forward(self, x_TD: Tensor) -> Tensor:
        y_TD: Tensor = self.memory(x_TD).y_BTD
        return y_TD


def optimizer_of(model: nn.Module) -> TableOptimizer:
    dense = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    return TableOptimizer(dense, row_learning_tables(model), rows="sgd", lr=0.1)


def train(wrap: str, rank: int, world: int) -> Tensor:
    """Trains on this rank's part of each batch and returns the table."""
    # DistributedDataParallel copies the first rank's parameters, fully_shard nothing.
    torch.manual_seed(rank if wrap == "ddp" else 0)
    model: Any = Network().double()
    inner, table = model, model.memory.values.table
    if wrap == "ddp":
        model = DistributedDataParallel(model)
    elif wrap == "fsdp":
        model = fully_shard(model, ignored_params={table.weight})
    optimizer = optimizer_of(inner)
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        x_TD = torch.randn(4, DIM, generator=generator, dtype=torch.float64)
        model(x_TD.chunk(world)[rank]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    rows: Tensor = table.weight.detach().clone()
    return rows


def train_in_group(wrap: str) -> Tensor:
    return train(wrap, dist.get_rank(), dist.get_world_size())


def shard_the_table() -> str:
    with pytest.raises(ConfigError) as refused:
        optimizer_of(fully_shard(Network()))
    return str(refused.value)


@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
def test_rows_learn_the_mean_over_ranks(ranks: Groups, wrap: str) -> None:
    alone_NV = train("none", 0, 1)
    for rows_NV in ranks(2).run(train_in_group, wrap):
        assert_close(rows_NV, alone_NV)


def test_a_sharded_table_is_refused(ranks: Groups) -> None:
    for message in ranks(2).run(shard_the_table):
        assert message.startswith(
            "memory.values.reference.table is sharded by fully_shard, which a table that learns by"
        )
        assert "ignored_params={table.weight}" in message
