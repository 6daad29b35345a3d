"""Rows that would learn nothing: a loop without a `TableOptimizer`, or one that uses it wrongly, ends with an error."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from pkm_lightning.errors import ConfigError
from pkm_lightning.ffn import MemoryPlus
from pkm_lightning.memory import TableOptimizer, ValueTable, row_learning_tables
from pkm_lightning.memory.staging import _PASSES_WITHOUT_OPTIMIZER

DIM, KEYS = 8, 6
UNTAKEN = r"^a value table with learning='rows' was read in 10 backward passes, and no optimizer has taken these reads"


def layers(count: int = 2) -> nn.ModuleList:
    table = ValueTable(rows=KEYS**2, dim=DIM, learning="rows")
    return nn.ModuleList(MemoryPlus(dim=DIM, n_keys=KEYS, knn=2, table=table) for _ in range(count))


def loss(model: nn.ModuleList) -> Tensor:
    x_TD = torch.randn(3, DIM)
    for layer in model:
        x_TD = x_TD + layer(x_TD).y_BTD
    return x_TD.square().mean()


def dense(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)


def test_a_loop_without_an_optimizer_of_the_rows_ends() -> None:
    model = layers(3)  # three reads of one table in each pass
    optimizer = dense(model)

    def step() -> None:
        loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(_PASSES_WITHOUT_OPTIMIZER):
        step()
    with pytest.raises(ConfigError, match=UNTAKEN):
        step()


def test_a_few_gradients_of_a_model_that_nobody_trains_are_no_error() -> None:
    model = layers()
    for _ in range(3 * _PASSES_WITHOUT_OPTIMIZER):
        loss(model).backward()
        for table in row_learning_tables(model).values():
            assert table.stage is not None
            table.stage.clear()  # whoever takes the reads himself


def test_gradients_of_inputs_alone_need_no_optimizer() -> None:
    model = layers()
    expected = None
    for _ in range(2 * _PASSES_WITHOUT_OPTIMIZER):
        x_TD = torch.linspace(-1, 1, 3 * DIM).view(3, DIM).requires_grad_()
        (grad_TD,) = torch.autograd.grad(model[0](x_TD).y_BTD.sum(), x_TD)
        expected = grad_TD if expected is None else expected
        assert torch.equal(grad_TD, expected)
        for table in row_learning_tables(model).values():
            table.stage = None  # as the message advises


def test_autocast_to_float16_is_refused() -> None:
    model = layers()
    with torch.autocast("cpu", torch.float16), torch.no_grad():
        loss(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss(model)
    with torch.autocast("cpu", torch.float16), pytest.raises(ConfigError, match="a GradScaler does not unscale"):
        loss(model)


def test_a_step_may_have_many_micro_batches() -> None:
    model = layers()
    optimizer = TableOptimizer(dense(model), row_learning_tables(model), lr=0.01)
    before = model[0].values.table.weight.detach().clone()  # type: ignore[union-attr]
    for _ in range(5 * _PASSES_WITHOUT_OPTIMIZER):
        loss(model).backward()
    optimizer.step()
    optimizer.zero_grad()
    assert not torch.equal(model[0].values.table.weight, before)  # type: ignore[union-attr]


def test_the_wrong_step_ends_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pkm_lightning.memory.staging._PASSES_WITH_OPTIMIZER", 10)
    model = layers()
    of_all, of_dense = TableOptimizer(inner := dense(model), row_learning_tables(model), lr=0.01), inner
    for _ in range(10):
        loss(model).backward()
        of_dense.step()
        of_dense.zero_grad()
    with pytest.raises(ConfigError, match=UNTAKEN):
        loss(model).backward()
    of_all.zero_grad()


def test_reads_that_are_never_cleared_end_a_loop() -> None:
    model = layers()
    optimizer = TableOptimizer(dense(model), row_learning_tables(model), lr=0.01)
    for _ in range(10):
        loss(model).backward()
        optimizer.step()
        model.zero_grad()
    loss(model).backward()
    with pytest.raises(
        ConfigError, match=r"^10 steps were made without clearing the staged reads.*call zero_grad\(\) of"
    ):
        optimizer.step()
    optimizer.zero_grad()
    loss(model).backward()
    optimizer.step()


def test_a_dense_optimizer_of_the_table_is_refused() -> None:
    model = layers()
    with pytest.raises(
        ValueError, match=r"^0\.values\.reference\.table is also among the parameters of the dense optimizer; make"
    ):
        TableOptimizer(torch.optim.SGD(model.parameters(), lr=0.01), row_learning_tables(model), lr=0.01)
