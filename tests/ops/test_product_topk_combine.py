"""product_combine: halves that are ranked already, in every layout and dtype of ids in which they may come.

Letters: X leading shape, J sub-keys kept per half; S sub-keys per half, K slots kept.
"""

from __future__ import annotations

import importlib

import pytest
import torch
from op_backends import BACKENDS, device_of
from tolerances import assert_same_gradients
from torch import Tensor, library

from pkm_lightning.ops import product_topk, ranked_topk
from pkm_lightning.ops.product_topk import product_combine

Ranked = tuple[Tensor, Tensor, Tensor, Tensor]


def ranked(scores1_XS: Tensor, scores2_XS: Tensor, per_half: int, ids: torch.dtype = torch.int64) -> Ranked:
    """Ranks both halves by the reference."""
    key1_XJ, key2_XJ = (ranked_topk(half, per_half, backend="reference") for half in (scores1_XS, scores2_XS))
    return scores1_XS.gather(-1, key1_XJ), key1_XJ.to(ids), scores2_XS.gather(-1, key2_XJ), key2_XJ.to(ids)


def scores(*shape: int, backend: str = "cpu") -> Tensor:
    return torch.randn(*shape).to(device_of(backend)).requires_grad_()


@pytest.mark.parametrize(("backend", "per_half"), [*((backend, 12) for backend in BACKENDS), ("cpu", 7), ("eager", 7)])
def test_more_sub_keys_than_needed_change_nothing(backend: str, per_half: int) -> None:
    halves = {name: scores(2, 3, 12, backend=backend) for name in ("first", "second")}
    sums_XK, ids_XK = product_combine(*ranked(*halves.values(), per_half, torch.int32), 12, 7, backend=backend)
    expected_XK, expected_ids_XK = product_topk(*halves.values(), 7, backend="reference")
    assert torch.equal(ids_XK, expected_ids_XK)
    assert torch.equal(sums_XK, expected_XK)
    assert_same_gradients(sums_XK, expected_XK, halves)


def test_the_gpu_gradient_in_several_groups_of_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(importlib.import_module("pkm_lightning.ops.product_topk.triton"), "_PAIRS", 2)
    halves = {name: scores(2, 6, backend="triton") for name in ("first", "second")}
    sums_XK, _ = product_combine(*ranked(*halves.values(), 5), 6, 5, backend="triton")
    assert_same_gradients(sums_XK, product_topk(*halves.values(), 5, backend="reference")[0], halves)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_two_runs_agree_bitwise_in_any_layout(backend: str) -> None:
    inputs = [half.detach() for half in ranked(scores(3, 2, 9, backend=backend), scores(3, 2, 9, backend=backend), 5)]
    runs = []
    for transposed in (False, True):
        halves = [half.transpose(0, -1).contiguous().transpose(0, -1) if transposed else half for half in inputs]
        halves[0], halves[2] = halves[0].requires_grad_(), halves[2].requires_grad_()
        sums_XK, ids_XK = product_combine(*halves, 9, 5, backend=backend)
        upstream_XK = torch.linspace(0, 1, 5, device=sums_XK.device).expand(sums_XK.shape)
        runs.append((sums_XK, ids_XK, *torch.autograd.grad(sums_XK, (halves[0], halves[2]), upstream_XK)))
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(backend: str) -> None:
    first_XS, second_XS = scores(0, 4, backend=backend), scores(0, 4, backend=backend)
    sums_XK, ids_XK = product_topk(first_XS, second_XS, 3, backend=backend)
    sums_XK.sum().backward()
    assert sums_XK.shape == ids_XK.shape == (0, 3)


def test_the_number_of_threads_changes_nothing() -> None:
    halves = ranked(scores(13, 40), scores(13, 40), 20)
    runs = []
    for threads in (2, 1):
        torch.set_num_threads(threads)
        sums_XK, ids_XK = product_combine(*halves, 40, 20, backend="cpu")
        runs.append((ids_XK, *torch.autograd.grad(sums_XK.square().sum(), (halves[0], halves[2]))))
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


def test_the_operator_is_registered_completely() -> None:
    values1_XJ, key1_XJ, values2_XJ, key2_XJ = ranked(scores(3, 8), scores(3, 8), 4, torch.int32)
    halves = values1_XJ.detach().requires_grad_(), key1_XJ, values2_XJ.detach().requires_grad_(), key2_XJ
    library.opcheck(torch.ops.pkm_lightning.product_combine.default, (*halves, 8, 4, "cpu"))


def test_refuses_halves_that_do_not_fit() -> None:
    values_XJ, key_XJ = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"product_combine: each half has 3 sub-keys; k=5 of 9 sub-keys needs 5\."):
        product_combine(values_XJ, key_XJ, values_XJ, key_XJ, 9, 5)
    with pytest.raises(ValueError, match=r"values and indices need one shape and both values one dtype, got shapes"):
        product_combine(values_XJ, key_XJ, values_XJ[:1], key_XJ[:1], 9, 3)
    with pytest.raises(ValueError, match=r"product_combine: k=10 is out of range; allowed: 1 to 9 "):
        product_combine(values_XJ, key_XJ, values_XJ, key_XJ, 3, 10)
    wide_XJ, wide_key_XJ = torch.zeros(1, 200), torch.zeros(1, 200, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"product_combine: backend='triton' takes k up to 128, got 200"):
        product_combine(wide_XJ, wide_key_XJ, wide_XJ, wide_key_XJ, 300, 200, backend="triton")
