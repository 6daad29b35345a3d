"""Every backend of product_topk against a definition in plain Python and against the brute-force reference.

Letters: X leading shape, S sub-keys a half, K slots kept.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_close
from torch import Tensor

from pkm_lightning.ops import product_topk
from pkm_lightning.ops.product_topk.candidates import candidate_ranks

BACKENDS = ["cpu", "eager", "reference"]
# leading shape, sub-keys a half, slots kept: odd sizes, k = 1, k = S, k = S * S, no and several leading dimensions
SIZES = [
    ((), 1, 1),
    ((), 5, 25),
    ((3,), 7, 1),
    ((3,), 7, 7),
    ((1,), 9, 81),
    ((2, 3), 11, 8),
    ((2, 1, 3), 13, 40),
    ((4, 2), 33, 32),
]


def halves(shape_X: tuple[int, ...], n_keys: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(*shape_X, n_keys, dtype=dtype), torch.randn(*shape_X, n_keys, dtype=dtype)


def assert_same_as_reference(scores1_XS: Tensor, scores2_XS: Tensor, k: int) -> None:
    sums_XK, ids_XK = product_topk(scores1_XS, scores2_XS, k, backend="eager")
    expected_sums_XK, expected_ids_XK = product_topk(scores1_XS, scores2_XS, k, backend="reference")
    assert ids_XK.dtype is torch.int32
    assert sums_XK.dtype is scores1_XS.dtype
    assert torch.equal(sums_XK, expected_sums_XK)
    assert torch.equal(ids_XK, expected_ids_XK)


def by_definition(scores1: list[float], scores2: list[float], k: int) -> tuple[list[float], list[int]]:
    """All pairs, best sum first, equal sums by (rank in half 1, rank in half 2)."""
    size = len(scores1)
    order1 = sorted(range(size), key=lambda i: (-scores1[i], i))
    order2 = sorted(range(size), key=lambda j: (-scores2[j], j))
    pairs = [
        (-(scores1[i] + scores2[j]), rank1, rank2, i * size + j)
        for (rank1, i), (rank2, j) in itertools.product(enumerate(order1), enumerate(order2))
    ]
    best = sorted(pairs)[:k]
    return [-pair[0] for pair in best], [pair[3] for pair in best]


@st.composite
def small_cases(draw: st.DrawFn) -> tuple[list[float], list[float], int]:
    size = draw(st.integers(1, 5))
    level = st.sampled_from([-math.inf, -1.0, 0.0, 0.5, 2.0])
    row = st.lists(level, min_size=size, max_size=size)
    return draw(row), draw(row), draw(st.integers(1, size * size))


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=120, deadline=None)
@given(case=small_cases())
def test_small_cases_equal_the_definition(backend: str, case: tuple[list[float], list[float], int]) -> None:
    scores1, scores2, k = case
    sums_K, ids_K = product_topk(torch.tensor(scores1), torch.tensor(scores2), k, backend=backend)
    assert (sums_K.tolist(), ids_K.tolist()) == by_definition(scores1, scores2, k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("shape_X", "n_keys", "k"), SIZES)
def test_same_as_reference(shape_X: tuple[int, ...], n_keys: int, k: int, dtype: torch.dtype) -> None:
    assert_same_as_reference(*halves(shape_X, n_keys, dtype), k)


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize(("shape_X", "n_keys", "k"), SIZES)
def test_same_as_reference_with_heavy_ties(shape_X: tuple[int, ...], n_keys: int, k: int, levels: int) -> None:
    scores1_XS = torch.randint(levels, (*shape_X, n_keys)).float()
    scores2_XS = torch.randint(levels, (*shape_X, n_keys)).float()
    assert_same_as_reference(scores1_XS, scores2_XS, k)


@pytest.mark.parametrize("k", [1, 8, 32, 100])
def test_same_as_reference_for_scores_rounded_to_bf16(k: int) -> None:
    scores1_XS, scores2_XS = halves((64,), 48)
    assert_same_as_reference(scores1_XS.bfloat16().float(), scores2_XS.bfloat16().float(), k)


@pytest.mark.parametrize("k", [1, 6, 36])
def test_same_as_reference_with_infinities(k: int) -> None:
    scores1_XS, scores2_XS = halves((5,), 6)
    scores1_XS[:, ::2] = -math.inf
    scores2_XS[1:3] = -math.inf
    assert_same_as_reference(scores1_XS, scores2_XS, k)


def test_signed_zeros_are_equal() -> None:
    assert_same_as_reference(torch.tensor([-0.0, 0.0, -0.0]), torch.tensor([0.0, -0.0, 0.0]), 5)


def test_traced_code_takes_the_same_slots() -> None:
    scores1_XS = torch.randint(3, (6, 9)).float()
    scores2_XS = torch.randn(6, 9)
    sums_XK, ids_XK = torch.compile(product_topk, backend="eager", fullgraph=True)(scores1_XS, scores2_XS, 8)
    expected_sums_XK, expected_ids_XK = product_topk(scores1_XS, scores2_XS, 8, backend="reference")
    assert torch.equal(sums_XK, expected_sums_XK)
    assert torch.equal(ids_XK, expected_ids_XK)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("shape_X", "n_keys", "k"), SIZES)
def test_gradients_equal_the_reference(shape_X: tuple[int, ...], n_keys: int, k: int, dtype: torch.dtype) -> None:
    halves_XS = [half.requires_grad_() for half in halves(shape_X, n_keys, dtype)]
    upstream_XK = torch.randn(*shape_X, k, dtype=dtype)
    grads = {}
    for backend in BACKENDS:
        sums_XK, _ = product_topk(*halves_XS, k, backend=backend)
        grads[backend] = torch.autograd.grad(sums_XK, halves_XS, upstream_XK)
    for actual_XS, expected_XS in zip(grads["eager"], grads["reference"], strict=True):
        assert_close(actual_XS, expected_XS, kind="grad")


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend: str) -> None:
    # Scores far apart, so that finite differences do not change the order; odd sizes.
    scores1_XS = torch.randperm(15).double().view(3, 5).requires_grad_()
    scores2_XS = (torch.randperm(15).double().view(3, 5) / 16).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: product_topk(a, b, 7, backend=backend)[0], (scores1_XS, scores2_XS))


@pytest.mark.parametrize("backend", BACKENDS)
def test_tied_slots_share_no_gradient(backend: str) -> None:
    scores1_S, scores2_S = torch.zeros(4, requires_grad=True), torch.zeros(4, requires_grad=True)
    product_topk(scores1_S, scores2_S, 3, backend=backend)[0].sum().backward()
    assert scores1_S.grad is not None
    assert scores2_S.grad is not None
    assert scores1_S.grad.tolist() == [3, 0, 0, 0]
    assert scores2_S.grad.tolist() == [1, 1, 1, 0]


@pytest.mark.parametrize(("k", "candidates"), [(1, 1), (4, 8), (8, 20), (16, 50), (32, 119), (64, 280), (128, 645)])
def test_number_of_candidates(k: int, candidates: int) -> None:
    rank1_C, rank2_C = candidate_ranks(k, k, torch.device("cpu"))
    assert len(rank1_C) == len(rank2_C) == candidates


def test_refuses_halves_of_different_shape() -> None:
    with pytest.raises(ValueError, match=r"both halves need one shape and dtype, got"):
        product_topk(torch.zeros(2, 3), torch.zeros(2, 4), 1)


@pytest.mark.parametrize("k", [0, -1, 10])
def test_refuses_k_out_of_range(k: int) -> None:
    with pytest.raises(ValueError, match=rf"k={k} is out of range; allowed: 1 to 9 "):
        product_topk(torch.zeros(2, 3), torch.zeros(2, 3), k)


def test_refuses_an_unknown_backend() -> None:
    with pytest.raises(
        ValueError, match=r"product_topk: backend='knn' is not available; allowed: auto, cpu, triton, eager, ref"
    ):
        product_topk(torch.zeros(2, 3), torch.zeros(2, 3), 1, backend="knn")


def test_refuses_more_slots_than_int32_counts() -> None:
    scores_XS = torch.zeros(1, 46_341)
    with pytest.raises(ValueError, match="do not fit int32 ids; at most 46,340"):
        product_topk(scores_XS, scores_XS, 1)
