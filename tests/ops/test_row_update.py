"""Every rule in every backend that has a kernel for it, against the rule written out and against the reference.

Letters: N rows, V values per row, L reads.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from row_reads import device_of, on_the_cpu, padded, read
from tolerances import assert_close
from torch import Tensor

from pkm_lightning.errors import ConfigError
from pkm_lightning.memory import RowOptimizer
from pkm_lightning.ops.row_update import (
    COLUMN_STATE,
    RowGradient,
    RowRule,
    RowState,
    UpdateStep,
    find_rule,
    new_state,
    row_gradient,
    row_update,
    rule_names,
    rules,
    state_bytes,
)
from pkm_lightning.ops.row_update.rounding import round_stochastically

RULES = rule_names()
DTYPES = [torch.float32, torch.bfloat16]
#: A rule with a constant for which its kernels have code of their own.
BY_ROW = "lazy_adam by row"
#: Rules and the backends that have more than the reference for them.
KERNELS = [(name, backend) for name in RULES for backend in ("eager", *find_rule(name).kernels)]
CASES = [*KERNELS, *((BY_ROW, backend) for backend in ("eager", "cpu", "triton"))]


def made(name: str) -> RowRule:
    """Returns a rule with its constants."""
    constants: dict[str, Any] = {"betas": (0.0, 0.9) if name in ("catch_up_adam", "factored_adam") else (0.8, 0.9)}
    if name == BY_ROW:
        name, constants["bias_correction"] = "lazy_adam", "row"
    return find_rule(name)(**constants, eps=1e-6)


def update(name: str, number: int = 1, **numbers: float) -> tuple[RowRule, UpdateStep]:
    """Returns a rule and the numbers of one update."""
    step = {"lr": 0.1, "number": number, "seed": 77 * number, **numbers}
    return made(name), UpdateStep(**step)  # type: ignore[arg-type]


def mid_run(name: str, n: int, v: int, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, dict[str, Tensor]]:
    """Returns a table and a state as in the middle of a run."""
    table_NV = torch.randn(n, v).to(device, dtype)
    state = new_state(made(name), table_NV)
    for value in state.values():
        value.copy_(torch.rand(value.shape) if value.is_floating_point() else torch.randint(2, value.shape))
    return table_NV, state


def copies(table_NV: Tensor, state: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    return table_NV.cpu().clone(), {name: value.cpu().clone() for name, value in state.items()}


def check_update(backend: str, name: str, gradient: RowGradient, **numbers: float) -> None:
    """Compares an update with the reference's, twice, and leaves rows that were not read alone."""
    dtype, v = gradient.source_rows_XV.dtype, gradient.source_rows_XV.shape[1]
    table_NV, state = mid_run(name, gradient.n_rows, v, dtype, gradient.source_rows_XV.device.type)
    live_U = gradient.segments.rows_U >= 0
    is_read_N = torch.zeros(gradient.n_rows, dtype=torch.bool)
    is_read_N[gradient.segments.rows_U[live_U].cpu().long()] = True
    by_row = {key: value for key, value in state.items() if not key.startswith(COLUMN_STATE)}
    for tensor in (table_NV, *(value for value in by_row.values() if value.is_floating_point())):
        tensor[~is_read_N] = torch.nan
    expected_NV, expected = copies(table_NV, state)
    step = update(name, 3, **numbers)
    row_update(expected_NV, on_the_cpu(gradient), *step, expected, scale=0.5, backend="reference")
    results = []
    for _ in range(2):
        run_NV, run = table_NV.clone(), {key: value.clone() for key, value in state.items()}
        row_update(run_NV, gradient, *step, run, scale=torch.tensor(0.5, device=run_NV.device), backend=backend)
        results.append((run_NV.cpu(), {key: value.cpu() for key, value in run.items()}))
    (actual_NV, actual), (again_NV, again) = results
    assert actual_NV[~is_read_N].isnan().all()
    assert_close(actual_NV[is_read_N], expected_NV[is_read_N])
    assert torch.equal(actual_NV[is_read_N], again_NV[is_read_N])
    for key, value in expected.items():
        which = is_read_N if key in by_row else ...
        assert_close(actual[key][which].float(), value[which].float())
        assert torch.equal(actual[key][which], again[key][which])
        assert key not in by_row or not value.is_floating_point() or actual[key][~is_read_N].isnan().all()


@pytest.mark.parametrize(("name", "backend"), CASES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_reference_on_every_run(name: str, backend: str, dtype: torch.dtype) -> None:
    decay = {} if made(name).refuses_decay else {"weight_decay": 0.2}
    check_update(backend, name, read(13, 7, 20, dtype, device_of(backend)), **decay)


@pytest.mark.parametrize("backend", ["eager", "cpu", "triton"])
def test_any_width_hot_rows_and_empty_steps(backend: str) -> None:
    device = device_of(backend)
    for v in (1, 64, 257):
        check_update(backend, "lazy_adam", read(5, v, 6, device=device))
        check_update(backend, "factored_adam", read(5, v, 6, device=device))
    # On a GPU a program takes 128 and 32 rows of these widths: at the second several programs, the last not full.
    for name in ("lazy_adam", "factored_adam"):
        check_update(backend, name, read(40, 16, 70, device=device))
    for name in ("row_adagrad", "factored_adam", BY_ROW):
        check_update(backend, name, read(90, 20, 150, device=device))
    for gradient in (read(4, 5, 150, device=device, row=2), read(4, 5, 0, device=device)):
        for name in ("row_adagrad", "factored_adam", BY_ROW):
            check_update(backend, name, gradient)


@pytest.mark.parametrize("name", [name for name, backend in CASES if backend == "triton"])
def test_the_gpu_kernels_pass_over_empty_segments(name: str) -> None:
    device = device_of("triton")
    for first in (0, 2):
        ids_L = torch.randint(first, 6, (10,))
        parts = ids_L, torch.randn(10), torch.randint(5, (10,)), torch.randn(5, 3)
        gradient = row_gradient(6, *(part.to(device) for part in parts))
        table_NV, state = mid_run(name, 6, 3, torch.float32, device)
        # What stands before the first row must not be taken for row -1.
        around_NV = torch.cat([torch.full((1, 3), torch.nan, device=device), table_NV])
        expected_NV, expected = copies(table_NV, state)
        row_update(around_NV[1:], padded(gradient), *update(name, 3), state, backend="triton")
        row_update(expected_NV, on_the_cpu(gradient), *update(name, 3), expected, backend="reference")
        assert around_NV[0].isnan().all()
        assert_close(around_NV[1:].cpu(), expected_NV)
        for key, value in expected.items():
            assert_close(state[key].cpu().float(), value.float())


def test_chunks_of_rows_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pkm_lightning.ops.row_update.eager._CHUNK_VALUES", 12)
    check_update("eager", "lazy_adam", read(20, 5, 30))


@pytest.mark.parametrize("name", ["sgd", "row_adagrad", "lazy_adam", "catch_up_adam"])
def test_reference_equals_the_rule_written_out(name: str) -> None:
    gradient = read(4, 3, 9)
    table_NV, state = mid_run(name, 4, 3, torch.float32)
    before_NV, before = copies(table_NV, state)
    row_update(table_NV, gradient, *update(name, 3), state, backend="reference")
    _, (order_L, rows_U, starts), coefficients_L, sources_L, source_rows_XV = gradient
    for row in range(4):
        grad = [0.0, 0.0, 0.0]
        for u in (rows_U == row).nonzero().flatten().tolist():
            for read_ in order_L[starts[u] : starts[u + 1]].tolist():
                source = source_rows_XV[sources_L[read_]]
                grad = [g + float(coefficients_L[read_]) * float(x) for g, x in zip(grad, source, strict=True)]
        if row not in rows_U:
            assert torch.equal(table_NV[row], before_NV[row])
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
            }[name]
            assert float(table_NV[row, d]) == pytest.approx(float(before_NV[row, d]) - 0.1 * move, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("backend", ["eager", "reference"])
def test_float64_tables(backend: str) -> None:
    gradient = read(5, 4, 12, torch.float64)
    table_NV, expected_NV = torch.ones(5, 4, dtype=torch.float64), torch.ones(5, 4, dtype=torch.float64)
    row_update(table_NV, gradient, *update("sgd", lr=1.0, weight_decay=0.25), {}, backend=backend)
    _, (order_L, rows_U, starts), coefficients_L, sources_L, rows_XV = gradient
    expected_NV[rows_U] *= 0.75
    ids_L = rows_U.repeat_interleave(starts.diff())
    expected_NV.index_add_(0, ids_L, -(coefficients_L[:, None] * rows_XV[sources_L])[order_L])
    assert_close(table_NV, expected_NV)


@pytest.mark.parametrize("backend", ["eager", "cpu", "triton"])
def test_every_backend_rounds_by_the_same_bits(backend: str) -> None:
    # One read per row and no state, and products that are exact with or without a fused multiply-add: nothing but the
    # hash can differ.
    parts = torch.arange(6), torch.ones(6), torch.arange(6) % 5, torch.randn(5, 33).bfloat16()
    gradient = row_gradient(6, *(part.to(device_of(backend)) for part in parts))
    before_NV = torch.randn(6, 33).bfloat16()
    for seed in (0, 1, 2**31 - 1):
        table_NV, expected_NV = before_NV.to(device_of(backend), copy=True), before_NV.clone()
        row_update(table_NV, gradient, *update("sgd", lr=0.5, seed=seed), {}, backend=backend)
        row_update(expected_NV, on_the_cpu(gradient), *update("sgd", lr=0.5, seed=seed), {}, backend="reference")
        assert torch.equal(table_NV.cpu(), expected_NV)


def test_stochastic_rounding_is_unbiased_and_keeps_exact_values() -> None:
    values_UV = torch.full((200, 500), 1.001)
    rounded_UV = round_stochastically(values_UV, torch.arange(200), seed=3).float()
    assert set(rounded_UV.unique().tolist()) == {1.0, 1.0078125}
    assert rounded_UV.mean().item() == pytest.approx(1.001, abs=1e-4)
    exact_UV = torch.tensor([[0.0, -0.0, 1.5, -2.0, torch.inf, -torch.inf, torch.nan, 3.3895e38]])
    rounded_UV = round_stochastically(exact_UV, torch.zeros(1), seed=1)
    assert torch.equal(rounded_UV.nan_to_num(7), exact_UV.bfloat16().nan_to_num(7))
    # 200 steps of 1e-3 from 1; rounded to nearest, bf16 would not have moved.
    table_NV, ones = torch.ones(1, 64, dtype=torch.bfloat16), torch.ones(1, 64, dtype=torch.bfloat16)
    gradient = row_gradient(1, torch.zeros(1).long(), torch.ones(1), torch.zeros(1).long(), ones)
    for number in range(1, 201):
        row_update(table_NV, gradient, *update("sgd", number, lr=1e-3), {})
    assert table_NV.float().mean().item() == pytest.approx(0.8, abs=0.01)


def test_rules_are_found_by_the_names_of_their_files(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {"sgd", "row_adagrad", "lazy_adam", "catch_up_adam"} <= set(RULES)
    for backend in ("cpu", "triton"):
        module = importlib.import_module(f"pkm_lightning.ops.row_update.{backend}")
        assert set(module._KINDS) == {name for name, kernels in KERNELS if kernels == backend}
    table_NV = torch.empty(10, 4, dtype=torch.bfloat16, device="meta")
    sizes = {name: state_bytes(made(name), table_NV) for name in (*RULES, BY_ROW)}
    adams = {"lazy_adam": 320, BY_ROW: 340, "catch_up_adam": 200, "factored_adam": 10 * 3 + 4 * 4}
    assert sizes == {"sgd": 0, "row_adagrad": 40, **adams}
    with pytest.raises(ValueError, match=r"row_update: rule='base' is unknown; allowed: catch_up_adam, factored_adam"):
        find_rule("base")
    monkeypatch.setattr(find_rule("sgd"), "name", "gradient_descent")
    find_rule.cache_clear()
    with pytest.raises(ValueError, match=r"SGD.name is 'gradient_descent'; it must be the name of its file, 'sgd'"):
        find_rule("sgd")
    monkeypatch.undo()
    monkeypatch.setattr(find_rule("sgd"), "state", {"step": RowState("row")})
    find_rule.cache_clear()
    with pytest.raises(ValueError, match=r"SGD.state has the name 'step', which the number of the update has"):
        find_rule("sgd")
    for name, per in (("share", "column"), ("column_share", "row")):
        monkeypatch.setattr(find_rule("lazy_adam"), "state", {name: RowState(per)})
        find_rule.cache_clear()
        with pytest.raises(ValueError, match=rf"LazyAdam.state has '{name}' per {per}; the names of states per column"):
            find_rule("lazy_adam")
        monkeypatch.undo()


def test_refusals_name_the_value() -> None:
    table_NV, gradient, sgd = torch.zeros(4, 3), read(4, 3, 6), update("sgd")
    with pytest.raises(ValueError, match=r"number=0; updates are counted from 1"):
        update("sgd", 0)
    with pytest.raises(ValueError, match=r"seed=-1; allowed: 0 to"):
        update("sgd", seed=-1)
    with pytest.raises(ValueError, match=r"the table is torch.float16; allowed: torch.float32"):
        row_update(table_NV.half(), gradient, *sgd, {})
    with pytest.raises(ValueError, match=r"source rows are torch.float32 of 3 values, the table torch.float32 of 5"):
        row_update(torch.zeros(4, 5), gradient, *sgd, {})
    with pytest.raises(ValueError, match=r"lazy_adam needs the state .*exp_avg"):
        row_update(table_NV, gradient, *update("lazy_adam"), {})
    with pytest.raises(ValueError, match=r"the table must be contiguous"):
        row_update(torch.zeros(3, 4).T, gradient, *sgd, {})
    with pytest.raises(ValueError, match=r"the gradient is of a table of 4 rows, this has 5"):
        row_update(torch.zeros(5, 3), gradient, *sgd, {})
    with pytest.raises(ValueError, match=r"row_gradient: ids has 4; allowed: 0 to 3"):
        row_gradient(4, torch.tensor([4]), torch.ones(1), torch.zeros(1).long(), torch.ones(1, 3))
    with pytest.raises(ValueError, match=r"row_gradient: needs ids, coefficients and sources of one shape"):
        row_gradient(4, torch.zeros(2).long(), torch.ones(2), torch.zeros(2).long(), torch.ones(3))
    with pytest.raises(ValueError, match=r"backend='cpu' sums in float32; use backend=eager for float64"):
        row_update(table_NV.double(), read(4, 3, 6, torch.float64), *sgd, {}, backend="cpu")
    for betas in ((0.9, 1.0), (1.0, 0.9)):
        with pytest.raises(ValueError, match=r"each must be from 0 to below 1"):
            find_rule("lazy_adam")(betas=betas)
    with pytest.raises(ValueError, match=r"catch_up_adam is exact without momentum only; set the first to 0"):
        find_rule("catch_up_adam")()
    with pytest.raises(ValueError, match=r"backend='cuda' is not available; allowed: auto, eager"):
        row_update(table_NV, gradient, *sgd, {}, backend="cuda")


@pytest.mark.parametrize("listed", ['["Rule", "Other"]', '["Missing"]', '["NUMBER"]'])
def test_a_file_with_anything_but_one_rule_is_refused(
    listed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "mine_" + listed.strip('[]"').replace('", "', "_").lower()
    (tmp_path / f"{name}.py").write_text(f"class Rule: ...\nclass Other: ...\nNUMBER = 3\n__all__ = {listed}\n")
    monkeypatch.setattr(rules, "__path__", [*rules.__path__, str(tmp_path)])
    with pytest.raises(ConfigError, match=rf"rule={name}: row_update: the __all__ of rules/{name}.py .* one RowRule"):
        RowOptimizer(rule=name)
