"""Factored Adam: against the formulas in plain loops, as an estimate of g**2, over parts of a table, and its limits.

Letters: N rows, V values per row.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from row_reads import device_of, padded, read
from tolerances import assert_close
from torch import Tensor

from pkm_lightning.ops.row_update import (
    RowGradient,
    UpdateStep,
    find_rule,
    new_state,
    row_gradient,
    row_gradient_squares,
    row_update,
    state_bytes,
)

BETA2 = 0.75
RULE = find_rule("factored_adam")(betas=(0.0, BETA2), eps=1e-6)


def of_rows(grad_UV: Tensor, rows: list[int], n_rows: int) -> RowGradient:
    """Returns the gradient of a step that reads each of `rows` once."""
    numbers_U = torch.arange(len(rows))
    return row_gradient(
        n_rows, torch.tensor(rows).long(), torch.ones(len(rows), dtype=grad_UV.dtype), numbers_U, grad_UV
    )


class Naive:
    """The module's docstring in Python's floats, one row and one column at a time; no count ends anywhere."""

    def __init__(self, table: list[list[float]]) -> None:
        self.w, self.t = table, 0
        self.r, self.k, self.c = [0.0] * len(table), [0] * len(table), [1.0] * len(table[0])

    def step(self, grads: dict[int, list[float]], lr: float, decay: float) -> None:
        self.t += 1
        sums = [0.0] * len(self.c)
        for n, g in grads.items():
            self.k[n] += 1
            q = sum(x * x / c for x, c in zip(g, self.c, strict=True)) / len(g)
            self.r[n] += max(1 / self.k[n], 1 - BETA2) * (q - self.r[n])
            for d, x in enumerate(g):
                self.w[n][d] -= lr * decay * self.w[n][d]
                self.w[n][d] -= lr * x / (math.sqrt(self.r[n] * self.c[d]) + 1e-6)
                sums[d] += x * x / q
        mean = sum(sums) / len(sums)
        weight = max(1 / self.t, 1 - BETA2)
        self.c = [c + weight * (total / mean - c) for c, total in zip(self.c, sums, strict=True)]


@pytest.mark.parametrize("backend", ["eager", "reference"])
def test_many_steps_equal_the_formulas_in_plain_loops(backend: str) -> None:
    table_NV = torch.randn(4, 3, dtype=torch.float64)
    naive, state = Naive(table_NV.tolist()), new_state(RULE, table_NV)
    for number in range(1, 25):
        # Row 0 is read in each step, so that its count ends at 4; row 3 is first read in step 20.
        rows = [0, *([1] if number % 2 else []), *([2] if number % 8 == 0 else []), *([3] if number >= 20 else [])]
        grad_UV = torch.randn(len(rows), 3, dtype=torch.float64) * torch.tensor([1.0, 10.0, 0.1])
        step = UpdateStep(lr=0.1, weight_decay=0.2, number=number)
        row_update(table_NV, of_rows(grad_UV, rows, 4), RULE, step, state, scale=0.5, backend=backend)
        naive.step(dict(zip(rows, (grad_UV * 0.5).tolist(), strict=True)), 0.1, 0.2)
    assert_close(table_NV, torch.tensor(naive.w, dtype=torch.float64))
    assert_close(state["row_square"], torch.tensor(naive.r, dtype=torch.float64))
    assert_close(state["column_share"], torch.tensor(naive.c, dtype=torch.float64))
    assert naive.k == [24, 12, 3, 5]
    assert state["updates"].tolist() == [4, 4, 3, 4]


@pytest.mark.parametrize("beta2", [0.0, 0.5, 0.95, 0.99])
def test_the_count_in_8_bits_loses_nothing(beta2: float) -> None:
    rule = find_rule("factored_adam")(betas=(0.0, beta2))
    state = new_state(rule, torch.zeros(1, 1, dtype=torch.float64))
    row = torch.zeros(1).long()
    expected = 0.0
    for k in range(1, 300):
        q = float(torch.rand(()))
        expected += max(1 / k, 1 - beta2) * (q - expected)
        row_1, updates_1 = rule.row_factors(state, row, torch.tensor([q], dtype=torch.float64))  # type: ignore[attr-defined]
        state["row_square"][row], state["updates"][row] = row_1, updates_1
        assert float(row_1) == pytest.approx(expected, rel=1e-12)


def test_a_row_that_is_first_read_late_moves_by_the_rate_as_in_step_1() -> None:
    table_NV, state = torch.zeros(2, 4), new_state(RULE, torch.zeros(2, 4))
    for number in range(1, 50):
        row_update(table_NV, of_rows(torch.randn(1, 4), [0], 2), RULE, UpdateStep(lr=0.1, number=number), state)
    assert not table_NV[1].any()
    grad_UV = torch.randn(1, 4) * 1000
    row_update(table_NV, of_rows(grad_UV, [1], 2), RULE, UpdateStep(lr=0.1, number=50), state)
    move_V = table_NV[1] / 0.1
    assert torch.equal(move_V.sign(), -grad_UV[0].sign())
    assert float(move_V.square().mean()) == pytest.approx(1, abs=0.3)  # to 1 exactly by the shares before the update


def test_no_move_exceeds_the_bound_of_adam_however_a_gradient_jumps() -> None:
    rule, table_NV = find_rule("factored_adam")(betas=(0.0, 0.95)), torch.zeros(3, 5)
    state = new_state(rule, table_NV)
    for number in range(1, 60):
        grad_UV = torch.randn(3, 5) * (1e4 if number % 20 == 0 else 1.0)
        grad_UV[:, 0] *= 1e-6 if number < 40 else 1e3  # a column that was silent
        before_NV, share_V = table_NV.clone(), rule.column_factors(state, UpdateStep(lr=1, number=number))  # type: ignore[attr-defined]
        row_update(table_NV, of_rows(grad_UV, [0, 1, 2], 3), rule, UpdateStep(lr=1.0, number=number), state)
        assert (table_NV - before_NV).square().mean(1).sqrt().max() <= (1 / 0.05) ** 0.5 * 1.01
        assert share_V.isfinite().all()


def test_the_product_of_the_factors_estimates_the_square_of_the_gradient() -> None:
    rho_N, gamma_V = 10.0 ** torch.linspace(-4, 4, 40), torch.linspace(0.2, 2, 16)
    rule, table_NV = find_rule("factored_adam")(betas=(0.0, 0.95)), torch.zeros(40, 16)
    state, estimates = new_state(rule, table_NV), []
    for number in range(1, 301):
        rows = torch.randperm(40)[:10].tolist()
        grad_UV = torch.randn(10, 16) * (rho_N[rows, None] * gamma_V).sqrt()
        row_update(table_NV, of_rows(grad_UV, rows, 40), rule, UpdateStep(lr=0.1, number=number), state)
        if number > 100:
            estimates.append(state["row_square"].float()[:, None] * state["column_share"] / (rho_N[:, None] * gamma_V))
    assert state["column_share"].mean().item() == pytest.approx(1, abs=1e-4)
    mean_NV = torch.stack(estimates).mean(0)
    # Rows that differ by 8 orders of magnitude have the same columns. Some 50 independent updates per row are left.
    assert float((mean_NV - 1).abs().max()) < 0.4
    assert float(mean_NV.mean()) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("beta2", [0.9, 0.95, 0.99])
def test_a_moment_in_bf16_stays_within_the_stated_bound(beta2: float) -> None:
    rule = find_rule("factored_adam")(betas=(0.0, beta2))
    narrow, wide = (new_state(rule, torch.zeros(64, 1, dtype=dtype)) for dtype in (torch.float32, torch.float64))
    index_U, largest = torch.arange(64), 0.0
    for number in range(400):
        # Nearly constant values are the worst: what is rounded away has always the same sign.
        q_U = torch.ones(64) + (0.01 * torch.rand(64) if number < 200 else torch.randn(64).square())
        for state in (narrow, wide):
            dtype = state["row_square"].dtype
            row_U, updates_U = rule.row_factors(state, index_U, q_U.to(torch.promote_types(dtype, torch.float32)))  # type: ignore[attr-defined]
            state["row_square"].copy_(row_U)
            state["updates"].copy_(updates_U)
        ratio_U = narrow["row_square"].double() / wide["row_square"]
        largest = max(largest, float((ratio_U - 1).abs().max()))
    assert 0 < largest <= 2**-8 / (1 - beta2)


@pytest.mark.usefixtures("on_the_backends_device")
@pytest.mark.parametrize("backend", ["eager", "cpu", "triton"])
def test_rows_and_columns_without_gradient_leave_the_factors_finite(backend: str) -> None:
    table_NV = torch.ones(3, 4)
    state = new_state(RULE, table_NV)
    for number in range(1, 4):
        grad_UV = torch.randn(2, 4)
        grad_UV[1], grad_UV[:, 2] = 0, 0
        row_update(
            table_NV, of_rows(grad_UV, [0, 2], 3), RULE, UpdateStep(lr=0.1, number=number), state, backend=backend
        )
    assert torch.equal(table_NV[1:], torch.ones(2, 4))
    assert torch.equal(table_NV[:, 2], torch.ones(3))
    share_V = state["column_share"].clone()
    assert share_V[2].item() == pytest.approx(1e-6)
    for grad_UV in (torch.zeros(2, 4), torch.zeros(0, 4)):  # a step of zeros, and one without reads
        gradient = of_rows(grad_UV, [0, 2][: len(grad_UV)], 3)
        row_update(table_NV, gradient, RULE, UpdateStep(lr=0.1, number=4), state, backend=backend)
        assert torch.equal(state["column_share"], share_V)
    assert table_NV.isfinite().all()
    for value in (math.nan, math.inf):  # a row that is lost leaves the columns as they are
        gradient = of_rows(torch.tensor([[1, value, 1, 1]]), [1], 3)
        row_update(table_NV, gradient, RULE, UpdateStep(lr=0.1, number=5), state, backend=backend)
        assert torch.equal(state["column_share"], share_V)


@pytest.mark.usefixtures("on_the_backends_device")
@pytest.mark.parametrize(
    ("backend", "dtype"), [("eager", torch.float64), ("cpu", torch.float32), ("triton", torch.float32)]
)
@pytest.mark.parametrize("shard", ["dim", "row"])
def test_parts_of_a_table_learn_what_the_whole_table_learns(backend: str, dtype: torch.dtype, shard: str) -> None:
    n, v = 6, 8
    whole_NV = torch.randn(n, v, dtype=dtype)
    state, every = new_state(RULE, whole_NV), slice(None)
    limits = [slice(0, 4), slice(4, n if shard == "row" else v)]
    places = [(limit, every) if shard == "row" else (every, limit) for limit in limits]
    parts = [whole_NV[place].clone() for place in places]
    states = [new_state(RULE, part_NV) for part_NV in parts]
    for number in (1, 2):
        step, gradient = UpdateStep(lr=0.1, weight_decay=0.1, number=number), read(n, v, 12, dtype)
        local = [part_gradient(gradient, place) for place in places]
        mean_squares = None
        if shard == "dim":
            weights = [RULE.column_weights(part, step) for part in states]
            mean_squares = sum(map(row_gradient_squares, local, weights)) / v
        # The first pass finds out what each part sums up, the second uses the sum of both.
        sums: list[Tensor] = []
        for trial in (True, False):
            for part_NV, part, part_state in zip(parts, local, states, strict=True):
                table_NV, kept = (
                    (part_NV.clone(), {k: x.clone() for k, x in part_state.items()}) if trial else (part_NV, part_state)
                )
                row_update(
                    table_NV, part, RULE, step, kept, scale=0.4, mean_squares_U=mean_squares, backend=backend,
                    column_sums=functools.partial(total, sums, shard, trial),
                )  # fmt: skip
        row_update(whole_NV, gradient, RULE, step, state, scale=0.4, backend=backend)
    for place, part_NV, part_state in zip(places, parts, states, strict=True):
        assert_close(part_NV, whole_NV[place])
        assert_close(part_state["row_square"].to(dtype), state["row_square"][place[0]].to(dtype))
        assert_close(part_state["column_share"], state["column_share"][place[1]])


def part_gradient(gradient: RowGradient, place: tuple[slice, slice]) -> RowGradient:
    """Returns the gradient of some rows or some columns."""
    rows, columns = place
    ids_L = torch.empty_like(gradient.sources_L)
    order_L, rows_U, starts_Z = gradient.segments
    ids_L[order_L] = rows_U.repeat_interleave(starts_Z.diff())
    low, high, _ = rows.indices(gradient.n_rows)
    kept_L = (ids_L >= low) & (ids_L < high)
    values = (
        gradient.coefficients_L[kept_L],
        gradient.sources_L[kept_L],
        gradient.source_rows_XV[:, columns].contiguous(),
    )
    return row_gradient(high - low, ids_L[kept_L] - low, *values)


def total(sums: list[Tensor], shard: str, trial: bool, sums_V: Tensor) -> tuple[Tensor, Tensor]:
    """Returns what the ranks of a table would."""
    if trial:
        sums.append(sums_V)
        return sums_V, sums_V.mean()
    every = torch.stack(sums)
    return (sums_V, every.mean()) if shard == "dim" else (every.sum(0), every.sum(0).mean())


def test_the_state_is_three_bytes_per_row() -> None:
    for v, dtype, share in ((160, torch.float32, 0.0047), (750, torch.float32, 0.001), (1500, torch.bfloat16, 0.001)):
        table_NV = torch.empty(2**20, v, dtype=dtype, device="meta")
        assert state_bytes(RULE, table_NV) == 3 * 2**20 + 4 * v
        assert state_bytes(RULE, table_NV) / table_NV.nbytes == pytest.approx(share, rel=0.01)


@pytest.mark.parametrize(
    ("betas", "message"),
    [
        ((0.9, 0.95), r"betas=\[0.9, 0.95\]: factored_adam has no first moment; set the first to 0"),
        ((0.0, 0.999), r"betas=\[0.0, 0.999\]: the second must be at most 0.99, because"),
        ((0.0, 1.0), r"each must be from 0 to below 1"),
    ],
)
def test_refused_betas(betas: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_rule("factored_adam")(betas=betas)


@pytest.mark.parametrize("name", ["factored_adam", "lazy_adam"])
def test_a_rank_whose_rows_nobody_read_changes_nothing(name: str) -> None:
    """On an accelerator such a step has segments, but all of them are padding."""
    device = device_of("triton")
    rule = RULE if name == "factored_adam" else find_rule(name)(bias_correction="row")
    table_NV = torch.randn(4, 5, device=device)
    state = {key: torch.ones_like(value) for key, value in new_state(rule, table_NV).items()}
    before_NV = table_NV.clone()
    gradient = padded(read(4, 5, 0, device=device))
    row_update(table_NV, gradient, rule, UpdateStep(lr=0.1, number=3), state, backend="triton")
    assert torch.equal(table_NV, before_NV)
    assert all(bool((value == 1).all()) for value in state.values())


def test_padding_leaves_the_states_of_the_row_that_it_repeats() -> None:
    device, tables = device_of("triton"), []
    gradient = read(9, 5, 4, device=device)
    for one in (gradient, padded(gradient)):
        table_NV = torch.ones(9, 5, device=device)
        state = new_state(RULE, table_NV)
        row_update(table_NV, one, RULE, UpdateStep(lr=0.1), state, backend="triton")
        tables.append([table_NV, *state.values()])
    assert all(torch.equal(plain, same) for plain, same in zip(*tables, strict=True))
