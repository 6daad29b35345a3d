"""The analytic cost against the built model and against torch's own counter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from toys import DIM, VOCAB, Constant, dense, memory_ffns, memory_plus, transformer

from pkm_lightning.memory import ValueTable
from pkm_lightning.model import Transformer, model_cost
from pkm_lightning.model.accounting import optimizer_bytes
from pkm_lightning.model.plugin_outputs import ParallelFFN

LOOKUP_FLOPS = 2 * 2 * 3 * 10  # a layer: 2 heads x 3 rows x 10 values, a multiplication and an addition each


def dense_model(**changes: Any) -> tuple[Transformer, int]:
    return transformer([dense(2, hidden_dim=21), dense(2, hidden_dim=7)], **changes), 0


def memory_model(**changes: Any) -> tuple[Transformer, int]:
    ffns, tables = memory_ffns()
    return transformer(ffns, tables, **changes), 2 * LOOKUP_FLOPS


def parallel_model(**changes: Any) -> tuple[Transformer, int]:
    table = ValueTable(rows=49, dim=10)
    ffns: list[nn.Module] = [ParallelFFN(dense(2), memory_plus(table), defer=True), dense(2)]
    return transformer(ffns, [table], write_after=1, **changes), LOOKUP_FLOPS


MODELS = pytest.mark.parametrize("build", [dense_model, memory_model, parallel_model])


@MODELS
@pytest.mark.parametrize(
    ("changes", "length"), [({}, 9), ({"n_kv_heads": 4, "tied": True}, 1), ({"n_kv_heads": 1}, 13)]
)
def test_flops_equal_the_counter(
    build: Callable[..., tuple[Transformer, int]], changes: dict[str, Any], length: int
) -> None:
    model, _ = build(**changes)
    ids_BT = torch.randint(VOCAB, (2, length))
    counts = {}
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        hidden_BTD = model(ids_BT).hidden_BTD
        counts["trunk"] = counter.get_total_flops()
        model.unembed(hidden_BTD)
        counts["model"] = counter.get_total_flops()
    cost = model_cost(model, length)
    tokens = 2 * length
    assert cost.trunk_flops * tokens == counts["trunk"]
    assert cost.model_flops * tokens == counts["model"]
    assert cost.train_flops == 3 * cost.model_flops


@MODELS
@pytest.mark.parametrize("tied", [False, True])
def test_parameters_equal_the_built_model(build: Callable[..., tuple[Transformer, int]], tied: bool) -> None:
    model, lookup_flops = build(tied=tied)
    cost = model_cost(model, 5)
    total = sum(p.numel() for p in model.parameters())
    tables = sum(table.weight.numel() for table in model.tables)
    rows_read = lookup_flops // 2
    assert cost.params_total == total
    assert cost.table_params == tables
    # Of an untied embedding one row is active; a tied one is wholly needed to unembed.
    unused_embedding = 0 if tied else VOCAB * DIM - DIM
    assert cost.params_active == total - tables - unused_embedding + rows_read
    assert cost.decode_bytes == 4 * cost.params_active
    assert cost.train_bytes == 3 * 4 * rows_read + 2 * 4 * DIM
    assert cost.unknown == ()


def test_a_shared_table_counts_once_and_several_add_up() -> None:
    ffns, tables = memory_ffns()
    shared = model_cost(transformer(ffns, tables), 5)
    assert (shared.table_rows, shared.table_dim, shared.table_params) == (49, 10, 490)
    separate = [ValueTable(rows=49, dim=10) for _ in range(2)]
    unshared = model_cost(transformer([dense(3), *map(memory_plus, separate)], separate), 5)
    assert (unshared.table_rows, unshared.table_dim, unshared.table_params) == (98, 10, 980)
    assert unshared.params_total == shared.params_total + 490
    assert unshared.params_active == shared.params_active


def test_no_more_parameters_are_active_than_there_are() -> None:
    table = ValueTable(rows=16, dim=10)
    small = transformer([memory_plus(table, n_keys=4, heads=2, knn=16) for _ in range(3)], [table], tied=True)
    cost = model_cost(small, context=1)
    assert cost.params_active == cost.params_total


def test_meta_weights_cost_the_same() -> None:
    with torch.device("meta"):
        meta, _ = memory_model()
    assert model_cost(meta, 7) == model_cost(memory_model()[0], 7)


def test_a_plugin_without_cost_is_named() -> None:
    cost = model_cost(transformer([dense(), Constant()]), 5)
    assert cost.unknown == ("Constant",)
    assert cost.params_total == sum(p.numel() for p in transformer([dense(), Constant()]).parameters())


def test_optimizer_bytes_count_trained_parameters_in_their_own_dtype() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2).bfloat16())
    assert optimizer_bytes(model) == 2 * (20 * 4 + 12 * 2)
    model[0].weight.requires_grad_(False)
    assert optimizer_bytes(model, states=1) == 5 * 4 + 12 * 2
