"""Every backend of row_update against a plain reading of the rules and against the reference; stochastic rounding.

Letters: N rows, V values per row, L reads, X source rows, U rows touched.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import pytest
import torch
from tolerances import assert_close
from torch import Tensor

from pkm_lightning.ops.row_update import (
    RowGradient,
    RowRule,
    UpdateStep,
    find_rule,
    new_state,
    row_gradient,
    row_gradient_norm,
    row_update,
    rule_names,
)
from pkm_lightning.ops.row_update.rounding import round_stochastically
from pkm_lightning.ops.segments import Segments

BACKENDS = ["eager", "cpu", *(["triton"] if os.environ.get("TRITON_INTERPRET") == "1" else []), "reference"]
FAST = [backend for backend in BACKENDS if backend != "reference"]
KINDS = rule_names()
DTYPES = [torch.float32, torch.bfloat16]


class Step(NamedTuple):
    """What one step has read: row, coefficient and source row of each read, and the source rows."""

    ids_L: Tensor
    coefficients_L: Tensor
    sources_L: Tensor
    rows_XV: Tensor


def step(n: int, d: int, reads: int, *, dtype: torch.dtype = torch.float32, ids: str = "uniform") -> Step:
    if ids == "equal":
        ids_L = torch.full((reads,), n // 2)
    elif ids == "zipf":
        ids_L = (n ** torch.rand(reads)).long().clamp(max=n - 1)
    else:
        ids_L = torch.randint(n, (reads,))
    return Step(ids_L, torch.randn(reads), torch.randint(5, (reads,)), torch.randn(5, d).to(dtype))


def update(kind: str, number: int = 1, **numbers: float) -> tuple[RowRule, UpdateStep]:
    """A rule with its constants, and the numbers of one update."""
    betas = (0.0, 0.9) if kind == "catch_up_adam" else (0.8, 0.9)
    step = {"lr": 0.1, "number": number, "seed": 77 * number, **numbers}
    return find_rule(kind)(betas=betas, eps=1e-6), UpdateStep(**step)  # type: ignore[arg-type]


def states(kind: str, n: int, d: int, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
    """A table and a state in the middle of a run."""
    table_NV = torch.randn(n, d).to(dtype)
    state = new_state(find_rule(kind), table_NV)
    for name, value in state.items():
        value.copy_(torch.randint(2, value.shape) if name == "last_step" else torch.rand(value.shape))
    return table_NV, state


def assert_same_update(backend: str, kind: str, reads: Step, n: int, **numbers: float) -> None:
    dtype, d = reads.rows_XV.dtype, reads.rows_XV.shape[1]
    table_NV, state = states(kind, n, d, dtype)
    expected_NV, expected = table_NV.clone(), {name: value.clone() for name, value in state.items()}
    gradient = row_gradient(n, *reads)
    row_update(table_NV, gradient, *update(kind, 3, **numbers), state, scale=torch.tensor(0.5), backend=backend)
    row_update(expected_NV, gradient, *update(kind, 3, **numbers), expected, scale=0.5, backend="reference")
    assert_close(table_NV, expected_NV)
    for name, value in expected.items():
        assert_close(state[name].float(), value.float())


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_reference(kind: str, dtype: torch.dtype, backend: str) -> None:
    assert_same_update(backend, kind, step(13, 7, 50, dtype=dtype), 13, weight_decay=0.2)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dim", [1, 3, 63, 64, 100, 257])
def test_any_width(dim: int, backend: str) -> None:
    assert_same_update(backend, "lazy_adam", step(9, dim, 17), 9)


def padded(gradient: RowGradient) -> RowGradient:
    """The same gradient as an accelerator has it: room for more segments than there are."""
    order_L, rows_U, starts_M = gradient.segments
    pad, end = torch.nn.functional.pad, len(order_L)
    return gradient._replace(
        segments=Segments(order_L, pad(rows_U, (0, 3), value=-1), pad(starts_M, (0, 3), value=end))
    )


@pytest.mark.skipif("triton" not in BACKENDS, reason="needs Triton's interpreter")
@pytest.mark.parametrize("first", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_the_gpu_kernels_pass_over_empty_segments(kind: str, first: int) -> None:
    reads = step(9, 5, 30)
    gradient = row_gradient(9, *reads._replace(ids_L=reads.ids_L.clamp(min=first)))
    table_NV, state = states(kind, 9, 5, torch.float32)
    # What stands before the first row must not be taken for row -1.
    around_NV = torch.cat([torch.full((1, 5), torch.nan), table_NV])
    expected_NV, expected = table_NV.clone(), {name: value.clone() for name, value in state.items()}
    row_update(around_NV[1:], padded(gradient), *update(kind, 3), state, backend="triton")
    row_update(expected_NV, gradient, *update(kind, 3), expected, backend="reference")
    assert around_NV[0].isnan().all()
    assert_close(around_NV[1:], expected_NV)
    for name, value in expected.items():
        assert_close(state[name].float(), value.float())
    norm = row_gradient_norm(padded(gradient), backend="triton")
    assert_close(norm, row_gradient_norm(gradient, backend="reference"))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("seed", [0, 1, 77, 2**31 - 1])
def test_every_backend_rounds_by_the_same_bits(seed: int, backend: str) -> None:
    # One read a row and no state: nothing but the hash can differ.
    reads = Step(torch.arange(6), torch.ones(6), torch.arange(6) % 5, torch.randn(5, 33).bfloat16())
    table_NV = torch.randn(6, 33).bfloat16()
    expected_NV = table_NV.clone()
    row_update(table_NV, row_gradient(6, *reads), *update("sgd", seed=seed), {}, backend=backend)
    row_update(expected_NV, row_gradient(6, *reads), *update("sgd", seed=seed), {}, backend="reference")
    assert torch.equal(table_NV, expected_NV)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize(("ids", "reads"), [("equal", 1), ("equal", 700), ("zipf", 400), ("uniform", 0)])
def test_hot_rows_and_empty_steps(ids: str, reads: int, backend: str) -> None:
    assert_same_update(backend, "row_adagrad", step(40, 5, reads, ids=ids), 40)


def test_chunks_of_rows_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pkm_lightning.ops.row_update.eager._CHUNK_VALUES", 12)
    assert_same_update("eager", "lazy_adam", step(50, 5, 90, ids="zipf"), 50)


@pytest.mark.parametrize("kind", KINDS)
def test_reference_equals_the_rule_written_out(kind: str) -> None:
    reads = step(4, 3, 9)
    table_NV, state = states(kind, 4, 3, torch.float32)
    before_NV, before = table_NV.double(), {name: value.double().clone() for name, value in state.items()}
    row_update(table_NV, row_gradient(4, *reads), *update(kind, 3), state, backend="reference")
    for row in range(4):
        grad = [0.0, 0.0, 0.0]
        for id_, coefficient, source in zip(reads.ids_L, reads.coefficients_L, reads.sources_L, strict=True):
            if id_ == row:
                grad = [g + float(coefficient) * float(x) for g, x in zip(grad, reads.rows_XV[source], strict=True)]
        if row not in reads.ids_L:
            assert torch.equal(table_NV[row], before_NV[row].float())
            continue
        total = (float(before["sum"][row]) if "sum" in before else 0.0) + sum(g * g for g in grad) / 3
        for d, g in enumerate(grad):
            m = 0.8 * float(before["exp_avg"][row, d]) + 0.2 * g if "exp_avg" in before else 0.0
            v = float(before["exp_avg_sq"][row, d]) if "exp_avg_sq" in before else 0.0
            missed = 3 - int(before["last_step"][row]) if "last_step" in before else 1
            root = ((0.9**missed * v + 0.1 * g * g) / (1 - 0.9**3)) ** 0.5 + 1e-6
            move = {
                "sgd": g,
                "row_adagrad": g / (total**0.5 + 1e-6),
                "lazy_adam": m / (1 - 0.8**3) / root,
                "catch_up_adam": g / root,
            }[kind]
            assert float(table_NV[row, d]) == pytest.approx(float(before_NV[row, d]) - 0.1 * move, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_nobody_read_are_left_alone(dtype: torch.dtype, backend: str) -> None:
    table_NV, state = states("lazy_adam", 30, 5, dtype)
    reads = step(30, 5, 20, dtype=dtype)
    unread_N = torch.ones(30, dtype=torch.bool).index_fill(0, reads.ids_L, False)
    for tensor in (table_NV, *state.values()):
        tensor[unread_N] = torch.nan
    row_update(table_NV, row_gradient(30, *reads), *update("lazy_adam"), state, backend=backend)
    for tensor in (table_NV, *state.values()):
        assert tensor[unread_N].isnan().all()
        assert tensor[~unread_N].isfinite().all()


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", DTYPES)
def test_two_runs_are_bitwise_equal(dtype: torch.dtype, backend: str) -> None:
    reads = step(20, 33, 300, dtype=dtype, ids="zipf")
    table_NV, state = states("lazy_adam", 20, 33, dtype)
    results = []
    for _ in range(2):
        run_NV, run = table_NV.clone(), {name: value.clone() for name, value in state.items()}
        row_update(run_NV, row_gradient(20, *reads), *update("lazy_adam"), run, backend=backend)
        results.append((run_NV, run["exp_avg"], row_gradient_norm(row_gradient(20, *reads), backend=backend)))
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_is_that_of_the_dense_gradient(dtype: torch.dtype, backend: str) -> None:
    reads = step(11, 13, 200, dtype=dtype, ids="zipf")
    gradient = row_gradient(11, *reads)
    dense_NV = torch.zeros(11, 13, dtype=torch.float64)
    dense_NV.index_add_(
        0, reads.ids_L, reads.coefficients_L.double()[:, None] * reads.rows_XV.double()[reads.sources_L]
    )
    assert_close(row_gradient_norm(gradient, backend=backend), dense_NV.norm())


@pytest.mark.parametrize("backend", ["eager", "reference"])
def test_float64_tables(backend: str) -> None:
    reads = step(5, 4, 12)._replace(rows_XV=torch.randn(5, 4, dtype=torch.float64))
    table_NV = torch.zeros(5, 4, dtype=torch.float64)
    row_update(table_NV, row_gradient(5, *reads), *update("sgd", lr=1.0), {}, backend=backend)
    expected_NV = torch.zeros(5, 4, dtype=torch.float64)
    expected_NV.index_add_(0, reads.ids_L, reads.coefficients_L.double()[:, None] * reads.rows_XV[reads.sources_L])
    assert_close(-table_NV, expected_NV)


@pytest.mark.parametrize("backend", FAST)
def test_updates_below_the_last_bit_arrive_on_average(backend: str) -> None:
    table_NV = torch.ones(1, 64, dtype=torch.bfloat16)
    reads = Step(torch.zeros(1).long(), torch.ones(1), torch.zeros(1).long(), torch.ones(1, 64, dtype=torch.bfloat16))
    for number in range(1, 201):
        row_update(table_NV, row_gradient(1, *reads), *update("sgd", number, lr=1e-3), {}, backend=backend)
    # 200 steps of 1e-3 from 1; rounded to nearest, bf16 would not have moved.
    assert table_NV.float().mean().item() == pytest.approx(0.8, abs=0.01)


def test_stochastic_rounding_is_unbiased_and_keeps_what_is_exact() -> None:
    values_UV = torch.full((200, 500), 1.001)
    rounded_UV = round_stochastically(values_UV, torch.arange(200), seed=3).float()
    assert set(rounded_UV.unique().tolist()) == {1.0, 1.0078125}
    assert rounded_UV.mean().item() == pytest.approx(1.001, abs=1e-4)
    exact_UV = torch.tensor([[0.0, -0.0, 1.5, -2.0, torch.inf, -torch.inf, torch.nan, 3.3895e38]])
    assert_same = round_stochastically(exact_UV, torch.zeros(1), seed=1)
    assert torch.equal(assert_same.nan_to_num(7), exact_UV.bfloat16().nan_to_num(7))


def test_refusals_name_what_is_wrong() -> None:
    table_NV, gradient = torch.zeros(4, 3), row_gradient(4, *step(4, 3, 6))
    with pytest.raises(ValueError, match=r"row_update: rule='adam' is unknown; allowed: catch_up_adam, lazy_adam"):
        find_rule("adam")
    with pytest.raises(ValueError, match=r"number=0; updates are counted from 1"):
        update("sgd", 0)
    with pytest.raises(ValueError, match=r"the table is torch.float16; allowed: torch.float32"):
        row_update(table_NV.half(), gradient, *update("sgd"), {})
    with pytest.raises(ValueError, match=r"source rows are torch.float32 of 3 values, the table torch.float32 of 5"):
        row_update(torch.zeros(4, 5), gradient, *update("sgd"), {})
    with pytest.raises(ValueError, match=r"lazy_adam needs the state .*exp_avg"):
        row_update(table_NV, gradient, *update("lazy_adam"), {})
    with pytest.raises(ValueError, match=r"the table must be contiguous"):
        row_update(torch.zeros(3, 4).T, gradient, *update("sgd"), {})
    with pytest.raises(ValueError, match=r"the gradient is of a table of 4 rows, this has 5"):
        row_update(torch.zeros(5, 3), gradient, *update("sgd"), {})
    with pytest.raises(ValueError, match=r"row_gradient: ids has 4; allowed: 0 to 3"):
        row_gradient(4, torch.tensor([4]), torch.ones(1), torch.zeros(1).long(), torch.ones(1, 3))
    with pytest.raises(ValueError, match=r"row_gradient: needs ids, coefficients and sources of one shape"):
        row_gradient(4, torch.zeros(2).long(), torch.ones(2), torch.zeros(2).long(), torch.ones(3))
    wide = row_gradient(4, *step(4, 3, 6)._replace(rows_XV=torch.ones(5, 3, dtype=torch.float64)))
    with pytest.raises(ValueError, match=r"backend='cpu' sums in float32; use backend=eager for float64"):
        row_update(table_NV.double(), wide, *update("sgd"), {}, backend="cpu")
    for betas in ((0.9, 1.0), (1.0, 0.9)):
        with pytest.raises(ValueError, match=r"each must be from 0 to below 1"):
            find_rule("lazy_adam")(betas=betas)
    with pytest.raises(ValueError, match=r"catch_up_adam is exact without momentum only"):
        find_rule("catch_up_adam")()
    with pytest.raises(ValueError, match=r"seed=-1; allowed: 0 to"):
        update("sgd", seed=-1)
    with pytest.raises(ValueError, match=r"backend='cuda' is not available; allowed: auto, eager"):
        row_update(table_NV, gradient, *update("sgd"), {}, backend="cuda")
