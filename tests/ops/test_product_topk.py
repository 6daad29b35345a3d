"""Every backend of product_topk against a definition in plain Python and against the brute-force reference.

Letters: X leading shape; S sub-keys per half, K slots kept.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_backends import BACKENDS, device_of
from tolerances import assert_close
from torch import Tensor

from pkm_lightning.ops import MAX_SUB_KEYS, product_topk
from pkm_lightning.ops.product_topk.candidates import candidate_ranks

# Leading shape, sub-keys per half, slots kept: odd sizes, k = 1, k = S, k = S * S, no and several leading dimensions.
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
Sizes = tuple[tuple[int, ...], int, int]
# Every backend in its dtypes. Triton's interpreter is slow, so the GPU kernel runs in two sizes.
CASES = [
    *itertools.product(["cpu"], SIZES, [torch.float32, torch.float64]),
    *itertools.product(["eager"], SIZES, [torch.float32, torch.float64, torch.bfloat16]),
    *itertools.product(["triton"], [SIZES[2], ((2, 2), 11, 8)], [torch.float32]),
    ("auto", SIZES[3], torch.bfloat16),
]


def halves(shape_X: tuple[int, ...], n_keys: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(*shape_X, n_keys, dtype=dtype), torch.randn(*shape_X, n_keys, dtype=dtype)


def assert_same_as_reference(scores1_XS: Tensor, scores2_XS: Tensor, k: int, backend: str) -> tuple[Tensor, Tensor]:
    """Checks slots and sums bitwise; returns the sums of the backend and of the reference."""
    device = device_of(backend)
    sums_XK, ids_XK = product_topk(scores1_XS.to(device), scores2_XS.to(device), k, backend=backend)
    expected_sums_XK, expected_ids_XK = product_topk(scores1_XS, scores2_XS, k, backend="reference")
    assert ids_XK.dtype is torch.int32
    assert sums_XK.dtype is scores1_XS.dtype
    assert torch.equal(ids_XK.cpu(), expected_ids_XK)
    assert torch.equal(sums_XK.cpu().nan_to_num(nan=1e30), expected_sums_XK.nan_to_num(nan=1e30))
    assert torch.equal(sums_XK.cpu().isnan(), expected_sums_XK.isnan())
    return sums_XK, expected_sums_XK


def sum_of(first: float, second: float) -> float:
    """Adds two scores, with (+inf) + (-inf) = -inf."""
    return -math.inf if {first, second} == {math.inf, -math.inf} else first + second


def sort_key(score: float) -> tuple[bool, float]:
    """Orders NaN first, all of them equal, then descending numbers."""
    return (False, 0.0) if math.isnan(score) else (True, -score)


def by_definition(scores1: list[float], scores2: list[float], k: int) -> tuple[list[float], list[int]]:
    """Ranks all pairs, best sum first, equal sums by (rank in half 1, rank in half 2)."""
    size = len(scores1)
    order1 = sorted(range(size), key=lambda i: (sort_key(scores1[i]), i))
    order2 = sorted(range(size), key=lambda j: (sort_key(scores2[j]), j))
    pairs = [
        (sort_key(sum_of(scores1[i], scores2[j])), rank1, rank2, i, j)
        for (rank1, i), (rank2, j) in itertools.product(enumerate(order1), enumerate(order2))
    ]
    best = sorted(pairs)[:k]
    return [sum_of(scores1[i], scores2[j]) for *_, i, j in best], [i * size + j for *_, i, j in best]


@st.composite
def small_cases(draw: st.DrawFn) -> tuple[list[float], list[float], int]:
    size = draw(st.integers(1, 5))
    level = st.sampled_from([math.nan, math.inf, -math.inf, -1.0, -0.0, 0.0, 0.5, 2.0])
    row = st.lists(level, min_size=size, max_size=size)
    return draw(row), draw(row), draw(st.integers(1, size * size))


@settings(max_examples=80, deadline=None)
@given(case=small_cases())
def test_small_cases_equal_the_definition(case: tuple[list[float], list[float], int]) -> None:
    scores1, scores2, k = case
    expected, expected_ids = by_definition(scores1, scores2, k)
    # As text NaN equals NaN; -0.0 may come back as 0.0.
    expected_text = str([0.0 if value == 0 else value for value in expected])
    for backend in ("cpu", "eager", "reference"):
        sums_K, ids_K = product_topk(torch.tensor(scores1), torch.tensor(scores2), k, backend=backend)
        assert ids_K.tolist() == expected_ids, backend
        assert str([0.0 if value == 0 else value for value in sums_K.tolist()]) == expected_text, backend


@pytest.mark.parametrize(("backend", "sizes", "dtype"), CASES)
def test_slots_sums_and_gradients_equal_the_reference(backend: str, sizes: Sizes, dtype: torch.dtype) -> None:
    shape_X, n_keys, k = sizes
    halves_XS = [half.requires_grad_() for half in halves(shape_X, n_keys, dtype)]
    sums_XK, expected_sums_XK = assert_same_as_reference(*halves_XS, k, backend)
    upstream_XK = torch.randn(*shape_X, k, dtype=dtype)
    grads = torch.autograd.grad(sums_XK, halves_XS, upstream_XK.to(sums_XK.device))
    expected_grads = torch.autograd.grad(expected_sums_XK, halves_XS, upstream_XK)
    for grad_XS, expected_grad_XS in zip(grads, expected_grads, strict=True):
        assert_close(grad_XS, expected_grad_XS, kind="grad")


@pytest.mark.parametrize(
    ("backend", "sizes", "levels"),
    [*itertools.product(["cpu", "eager"], SIZES[1:], [1, 3]), ("triton", ((), 5, 25), 3)],
)
def test_ties_equal_the_reference(backend: str, sizes: Sizes, levels: int) -> None:
    shape_X, n_keys, k = sizes
    scores1_XS, scores2_XS = (torch.randint(levels, (*shape_X, n_keys)).float() for _ in range(2))
    assert_same_as_reference(scores1_XS, scores2_XS, k, backend)


@pytest.mark.parametrize("k", [8, 100])
def test_sums_that_round_to_ties_equal_the_reference(k: int) -> None:
    scores1_XS, scores2_XS = halves((64,), 48)
    assert_same_as_reference(scores1_XS.bfloat16().float(), scores2_XS.bfloat16().float(), k, "cpu")


@pytest.mark.parametrize(("backend", "k"), [*itertools.product(("cpu", "eager"), (1, 6, 36)), ("triton", 6)])
def test_nan_infinities_and_signed_zeros_equal_the_reference(backend: str, k: int) -> None:
    scores1_XS, scores2_XS = halves((8,), 6)
    scores1_XS[1:, ::2] = -math.inf
    scores2_XS[1] = -math.inf
    scores1_XS[3:, 1], scores2_XS[4:, 2], scores2_XS[5, 3:] = math.nan, math.inf, -math.inf
    scores1_XS[6:, 1], scores2_XS[7, ::2] = math.inf, math.nan
    scores1_XS[0], scores2_XS[0] = torch.tensor([-0.0, 0.0, -0.0] * 2), torch.tensor([0.0, -0.0, 0.0] * 2)
    assert_same_as_reference(scores1_XS, scores2_XS, k, backend)


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_traced_code_finds_the_same_slots(backend: str) -> None:
    scores1_XS = torch.randint(3, (6, 9)).float()
    scores2_XS = torch.randn(6, 9)
    traced = torch.compile(product_topk, backend="eager", fullgraph=True)
    sums_XK, ids_XK = traced(scores1_XS, scores2_XS, 8, backend=backend)
    expected_sums_XK, expected_ids_XK = product_topk(scores1_XS, scores2_XS, 8, backend="reference")
    assert torch.equal(sums_XK, expected_sums_XK)
    assert torch.equal(ids_XK, expected_ids_XK)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_ties_and_of_infinite_sums(backend: str) -> None:
    """Shows that only those tied slots that are chosen get a gradient, and that a sum of -inf passes none."""
    inf = math.inf
    scores1_XS = torch.tensor([[0.0] * 4, [inf, 1.0, -inf, -inf]], requires_grad=True)
    scores2_XS = torch.tensor([[0.0] * 4, [2.0, -inf, -inf, -inf]], requires_grad=True)
    device = device_of(backend)
    sums_XK, _ = product_topk(scores1_XS.to(device), scores2_XS.to(device), 9, backend=backend)
    upstream_XK = torch.arange(1.0, 10.0, device=device).expand(2, 9)
    grad1_XS, grad2_XS = torch.autograd.grad(sums_XK, (scores1_XS, scores2_XS), upstream_XK)
    assert sums_XK.tolist() == [[0.0] * 9, [inf, 3.0, *[-inf] * 7]]
    # Slots (0, 0) to (0, 3), (1, 0) to (1, 3) and (2, 0), in this order.
    assert grad1_XS.tolist() == [[1 + 2 + 3 + 4, 5 + 6 + 7 + 8, 9, 0], [1, 2, 0, 0]]
    assert grad2_XS.tolist() == [[1 + 5 + 9, 2 + 6, 3 + 7, 4 + 8], [1 + 2, 0, 0, 0]]


@pytest.mark.parametrize("backend", ["cpu", "eager", "reference"])
def test_gradcheck(backend: str) -> None:
    # Scores far apart, so that finite differences do not change the order; odd sizes.
    scores1_XS = torch.randperm(15).double().view(3, 5).requires_grad_()
    scores2_XS = (torch.randperm(15).double().view(3, 5) / 16).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: product_topk(a, b, 7, backend=backend)[0], (scores1_XS, scores2_XS))


def test_number_of_candidates() -> None:
    numbers = {k: [len(rank_C) for rank_C in candidate_ranks(k, k, torch.device("cpu"))] for k in (1, 4, 8, 32, 128)}
    assert numbers == {1: [1, 1], 4: [8, 8], 8: [20, 20], 32: [119, 119], 128: [645, 645]}


def test_refusals() -> None:
    scores_XS = torch.zeros(2, 3)
    with pytest.raises(
        ValueError, match=r"both halves need one shape and dtype, got \(2, 3\) of torch.float32 and \(2, 4\)"
    ):
        product_topk(scores_XS, torch.zeros(2, 4), 1)
    with pytest.raises(ValueError, match="both halves need one shape and dtype"):
        product_topk(scores_XS, scores_XS.double(), 1)
    for k in (0, -1, 10):
        with pytest.raises(ValueError, match=rf"k={k} is out of range; allowed: 1 to 9 "):
            product_topk(scores_XS, scores_XS, k)
    with pytest.raises(
        ValueError, match=r"product_topk: backend='knn' is not available; allowed: auto, cpu, triton, eager, ref"
    ):
        product_topk(scores_XS, scores_XS, 1, backend="knn")
    for backend, dtype in (("cpu", torch.bfloat16), ("triton", torch.bfloat16), ("triton", torch.float64)):
        with pytest.raises(ValueError, match=rf"product_topk: backend='{backend}' takes float32.*, got \w+; use back"):
            product_topk(scores_XS.to(dtype), scores_XS.to(dtype), 1, backend=backend)


def test_refuses_more_slots_than_int32_ids_can_number() -> None:
    assert MAX_SUB_KEYS**2 <= 2**31 - 1 < (MAX_SUB_KEYS + 1) ** 2
    scores_XS = torch.zeros(1, MAX_SUB_KEYS + 1)
    message = r"46341 sub-keys per half .* do not fit int32 ids; allowed: at most 46,340 sub-keys per half"
    with pytest.raises(ValueError, match=message):
        product_topk(scores_XS, scores_XS, 1)
