"""TableOptimizer: it equals the dense algorithms over many steps of a table that three layers share; state, errors.

Letters: N rows, V values per row, T reads, K rows per read.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tolerances import assert_close
from torch import Tensor, nn

from pkm_lightning.errors import ConfigError
from pkm_lightning.memory import RowOptimizer, TableOptimizer, ValueTable

N, V, T, K = 40, 6, 4, 3


class Pool(nn.Module):
    """Three layers that read one table by their own weights, in float64 so that nothing depends on rounding."""

    def __init__(self, learning: str) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.table = ValueTable(rows=N, dim=V, learning=learning)
        self.layers = nn.ModuleList(nn.Linear(V, K) for _ in range(3))
        self.double()

    def loss(self, x_TV: Tensor, ids_3TK: Tensor) -> Tensor:
        goal_TV = x_TV.flip(0)
        for layer, ids_TK in zip(self.layers, ids_3TK, strict=True):
            x_TV = x_TV + self.table(ids_TK, layer(x_TV).softmax(-1))
        return (x_TV - goal_TV).square().sum()


def batches(steps: int, micro: int) -> list[list[tuple[Tensor, Tensor]]]:
    generator = torch.Generator().manual_seed(11)

    def batch() -> tuple[Tensor, Tensor]:
        skewed = (N ** torch.rand(3, T, K, generator=generator)).long().clamp(max=N - 1)
        return torch.randn(T, V, generator=generator, dtype=torch.float64), skewed

    return [[batch() for _ in range(micro)] for _ in range(steps)]


def by_rows(pool: Pool, rule: str, **betas: tuple[float, float]) -> TableOptimizer:
    dense = torch.optim.SGD(pool.layers.parameters(), lr=0.01)
    return TableOptimizer(dense, {"pool": pool.table}, rows=RowOptimizer(rule=rule, **betas), lr=0.02)


def train(pool: Pool, optimizer: torch.optim.Optimizer, steps: int, micro: int) -> list[float]:
    losses = []
    for step in batches(steps, micro):
        optimizer.zero_grad()
        total = 0.0
        for batch in step:
            loss = pool.loss(*batch) / micro
            loss.backward()
            total += loss.item()
        optimizer.step()
        losses.append(total)
    return losses


class DenseRowAdagrad(torch.optim.Optimizer):
    """Row-wise Adagrad as it is written down, over the whole gradient."""

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weight_NV in group["params"]:
                sums_N = self.state[weight_NV].setdefault("sum", torch.zeros(len(weight_NV), dtype=weight_NV.dtype))
                sums_N += weight_NV.grad.square().mean(1)
                weight_NV.data -= group["lr"] * weight_NV.grad / (sums_N.sqrt() + 1e-8).unsqueeze(1)


def dense_twin(pool: Pool, rule: str) -> torch.optim.Optimizer:
    groups = [{"params": [pool.table.weight], "lr": 0.02}]
    table: torch.optim.Optimizer = {
        "sgd": lambda: torch.optim.SGD(groups),
        "row_adagrad": lambda: DenseRowAdagrad(groups, {"lr": 0.02}),
        "catch_up_adam": lambda: torch.optim.Adam(groups, betas=(0.0, 0.95)),
    }[rule]()
    return Both(torch.optim.SGD(pool.layers.parameters(), lr=0.01), table)  # type: ignore[return-value]


class Both:
    """Two optimizers stepped together."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = optimizers

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()


BETAS = {rule: {"betas": (0.0, 0.95)} for rule in ("catch_up_adam", "factored_adam")}


@pytest.mark.parametrize("rule", ["sgd", "row_adagrad", "catch_up_adam"])
def test_many_steps_equal_the_dense_algorithm(rule: str) -> None:
    dense_pool, pool = Pool("dense"), Pool("rows")
    expected = train(dense_pool, dense_twin(dense_pool, rule), 24, 2)
    losses = train(pool, by_rows(pool, rule, **BETAS.get(rule, {})), 24, 2)
    assert sum(losses[-10:]) < sum(losses[:10])
    assert max(abs(a / b - 1) for a, b in zip(losses, expected, strict=True)) < 1e-9
    assert_close(pool.table.weight, dense_pool.table.weight, kind="grad")


def test_lazy_adam_is_adam_where_every_row_is_read_each_step() -> None:
    def run(learning: str) -> Tensor:
        pool = Pool(learning)
        every = torch.arange(N).view(1, 1, N).expand(3, 1, N)
        pool.layers = nn.ModuleList(nn.Linear(V, N) for _ in range(3)).double()
        for p in pool.layers.parameters():
            nn.init.constant_(p, 0.1)
        optimizer = (
            by_rows(pool, "lazy_adam", betas=(0.9, 0.95))
            if learning == "rows"
            else torch.optim.Adam([pool.table.weight], lr=0.02, betas=(0.9, 0.95))
        )
        if learning == "rows":
            optimizer.param_groups[0]["lr"] = 0.0
        for step in batches(20, 1):
            optimizer.zero_grad()
            pool.loss(step[0][0][:1], every).backward()
            optimizer.step()
        return pool.table.weight

    assert_close(run("rows"), run("dense"), kind="grad")


def test_a_scheduler_moves_the_tables_rate() -> None:
    pool = Pool("rows")
    optimizer = by_rows(pool, "sgd")
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    moves = []
    for _ in range(3):
        before_NV = pool.table.weight.clone()
        optimizer.zero_grad()
        y_TV = pool.table(torch.arange(N).view(1, -1), torch.ones(1, N, dtype=torch.float64))
        optimizer.step(lambda y=y_TV: y.sum().backward())  # type: ignore[misc]
        moves.append((before_NV - pool.table.weight).mean().item())
        scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.01 / 8, 0.02 / 8]
    assert moves == pytest.approx([0.02, 0.01, 0.005])


@pytest.mark.parametrize("rule", ["sgd", "row_adagrad", "lazy_adam", "lazy_adam row", "catch_up_adam", "factored_adam"])
def test_a_saved_state_continues_bit_for_bit(rule: str) -> None:
    rule, _, by_row = rule.partition(" ")
    constants: dict[str, Any] = BETAS.get(rule, {"betas": (0.9, 0.95)}) | (
        {"bias_correction": by_row} if by_row else {}
    )

    def made() -> tuple[Pool, TableOptimizer, torch.optim.lr_scheduler.LambdaLR]:
        pool = Pool("rows").bfloat16()
        dense = torch.optim.AdamW(pool.layers.parameters(), lr=0.01)
        rows = RowOptimizer(rule=rule, **constants)
        optimizer = TableOptimizer(dense, {"pool": pool.table}, rows=rows, lr=0.02, seed=5)
        return pool, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)

    def run(pool: Pool, optimizer: TableOptimizer, scheduler: object, steps: list[int]) -> None:
        data = batches(8, 1)
        for i in steps:
            optimizer.zero_grad()
            pool.loss(data[i][0][0].bfloat16(), data[i][0][1]).backward()
            optimizer.step()
            scheduler.step()  # type: ignore[attr-defined]

    first = made()
    run(*first, list(range(8)))
    half = made()
    run(*half, list(range(4)))
    saved = copy.deepcopy([part.state_dict() for part in half])
    again = made()
    for part, state in zip(again, saved, strict=True):
        part.load_state_dict(state)  # type: ignore[attr-defined]
    run(*again, list(range(4, 8)))
    assert torch.equal(again[0].table.weight, first[0].table.weight)
    for name, value in first[1].state[first[0].table.weight].items():
        assert torch.equal(torch.as_tensor(again[1].state[again[0].table.weight][name]), torch.as_tensor(value))
        assert name == "row_square" or not torch.is_tensor(value) or value.dtype is not torch.bfloat16


def test_state_of_another_rule_or_model_is_refused() -> None:
    saved = by_rows(Pool("rows"), "lazy_adam").state_dict()
    pool = Pool("rows")
    optimizer = by_rows(pool, "sgd")
    with pytest.raises(ValueError, match=r"saved optimizer state of a table is .*exp_avg.* sgd keeps .*'step'"):
        optimizer.load_state_dict(saved)
    assert optimizer.state is optimizer.dense.state  # nothing is half restored
    plain = torch.optim.AdamW([*pool.layers.parameters(), pool.table.weight]).state_dict()
    with pytest.raises(ValueError, match=r"groups of \[7\] parameters, this model's optimizer of \[6, 1\]"):
        by_rows(Pool("rows"), "lazy_adam").load_state_dict(plain)
    plain = torch.optim.AdamW([{"params": [*pool.layers.parameters()]}, {"params": [pool.table.weight]}]).state_dict()
    with pytest.raises(ValueError, match=r"saved optimizer state of a table is \{\}.*another table/optimizer or table"):
        by_rows(Pool("rows"), "lazy_adam").load_state_dict(plain)


def test_zero_grad_discards_a_bad_step() -> None:
    pool = Pool("rows")
    optimizer = by_rows(pool, "lazy_adam")
    train(pool, optimizer, 2, 1)
    state = copy.deepcopy(optimizer.state[pool.table.weight])
    before_NV = pool.table.weight.clone()
    optimizer.zero_grad()
    (pool.loss(*batches(1, 1)[0][0]) * math.nan).backward()
    optimizer.zero_grad()
    optimizer.step()
    assert torch.equal(pool.table.weight, before_NV)
    assert optimizer.state[pool.table.weight]["step"] == state["step"] == 2
    assert torch.equal(optimizer.state[pool.table.weight]["exp_avg"], state["exp_avg"])


def test_a_table_that_is_read_through_its_weight_is_refused_after_ten_steps() -> None:
    pool = Pool("rows")
    optimizer = by_rows(pool, "sgd")

    def steps(count: int) -> None:
        for _ in range(count):
            optimizer.zero_grad()
            (pool.table.weight[0] * pool.layers[0].weight.sum()).sum().backward()  # type: ignore[union-attr,operator]
            optimizer.step()

    steps(9)
    with pytest.raises(ConfigError, match=r"pool: no read was seen in 10 steps, so nothing is learned"):
        steps(1)


def test_a_table_that_is_first_read_later_learns() -> None:
    pool = Pool("rows")
    optimizer, before_NV = by_rows(pool, "sgd"), pool.table.weight.clone()
    for _ in range(5):
        optimizer.step()
    assert torch.equal(pool.table.weight, before_NV)
    assert optimizer.state[pool.table.weight]["step"] == 0
    train(pool, optimizer, 10, 1)
    assert optimizer.state[pool.table.weight]["step"] == 10


def test_an_unfrozen_weight_is_refused() -> None:
    pool = Pool("rows")
    optimizer = by_rows(pool, "sgd")
    pool.requires_grad_(True)
    with pytest.raises(
        ConfigError, match=r"pool.weight requires a gradient, which a table that learns by rows must not"
    ):
        optimizer.step()


def test_a_group_that_is_added_later_learns() -> None:
    pool, added = Pool("rows"), nn.Parameter(torch.ones(2))
    optimizer = by_rows(pool, "sgd")
    optimizer.add_param_group({"params": [added], "lr": 0.5})
    added.sum().backward()
    optimizer.step()
    assert added.tolist() == [0.5, 0.5]
    assert [len(group["params"]) for group in optimizer.param_groups] == [6, 1, 1]


def test_copies_and_dense_tables_are_refused() -> None:
    with pytest.raises(TypeError, match=r"refers to the tables of its model and cannot be copied"):
        copy.deepcopy(by_rows(Pool("rows"), "sgd"))
    with pytest.raises(ValueError, match=r"pool learns densely or not at all; pass it to the dense optimizer instead"):
        by_rows(Pool("dense"), "sgd")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rule": "adam"}, r"table.optimizer.rule=.adam. is not known"),
        ({"rule": "lazy_adam", "betas": (0.9,)}, r"betas=\(0.9,\) must be two numbers"),
        ({"rule": "lazy_adam", "betas": 0.9}, r"betas=0.9 must be two numbers"),
        ({"rule": "lazy_adam", "betas": (0.9, 1.0)}, r"table.optimizer.betas=1.0"),
        ({"rule": "row_adagrad", "eps": -1.0}, r"table.optimizer.eps=-1.0"),
        ({"rule": "catch_up_adam"}, r"catch_up_adam is exact without momentum only; set the first to 0"),
        ({"rule": "factored_adam"}, r"table.optimizer.betas=\[0.9, 0.95\]: factored_adam has no first moment"),
    ],
)
def test_row_optimizers_refuse_impossible_constants(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RowOptimizer(**arguments)  # type: ignore[arg-type]


def test_catch_up_refuses_decay() -> None:
    pool, rows = Pool("rows"), RowOptimizer(rule="catch_up_adam", betas=(0.0, 0.95))
    dense = torch.optim.SGD(pool.layers.parameters(), lr=0.01)
    with pytest.raises(ConfigError, match=r"table_weight_decay=0.1: catch_up_adam is the dense algorithm without"):
        TableOptimizer(dense, {"pool": pool.table}, rows=rows, lr=0.1, weight_decay=0.1)
