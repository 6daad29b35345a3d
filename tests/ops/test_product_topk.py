"""Every backend of product_topk against a definition in plain Python and against the brute-force reference.

Letters: X leading shape, S sub-keys a half, K slots kept.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import assert_close
from torch import Tensor

from pkm_lightning.ops import product_topk
from pkm_lightning.ops.product_topk.candidates import candidate_ranks

BACKENDS = ["cpu", "triton", "eager", "reference"]
KERNELS = ["cpu", "triton", "eager"]
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
# The interpreter of GPU kernels is slow: it takes some of the sizes.
CASES = [(backend, *size) for size in SIZES for backend in ("cpu", "eager")] + [
    ("triton", *size) for size in (SIZES[1], SIZES[2], SIZES[5])
]


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """In torch's deterministic mode memory that is not written holds NaN."""
    torch.set_deterministic_debug_mode("warn")
    yield
    torch.set_deterministic_debug_mode("default")


def halves(shape_X: tuple[int, ...], n_keys: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(*shape_X, n_keys, dtype=dtype), torch.randn(*shape_X, n_keys, dtype=dtype)


def place(scores_XS: Tensor, backend: str) -> Tensor:
    return scores_XS.to("cuda" if backend == "triton" and torch.cuda.is_available() else "cpu")


def assert_same_as_reference(scores1_XS: Tensor, scores2_XS: Tensor, k: int, backend: str) -> None:
    placed_XS = place(scores1_XS, backend), place(scores2_XS, backend)
    sums_XK, ids_XK = product_topk(*placed_XS, k, backend=backend)
    expected_sums_XK, expected_ids_XK = product_topk(scores1_XS, scores2_XS, k, backend="reference")
    assert ids_XK.dtype is torch.int32
    assert sums_XK.dtype is scores1_XS.dtype
    assert torch.equal(ids_XK.cpu(), expected_ids_XK)
    assert torch.equal(sums_XK.cpu().nan_to_num(nan=1e30), expected_sums_XK.nan_to_num(nan=1e30))
    assert torch.equal(sums_XK.cpu().isnan(), expected_sums_XK.isnan())


def added(first: float, second: float) -> float:
    """+inf and -inf make -inf."""
    return -math.inf if {first, second} == {math.inf, -math.inf} else first + second


def order(score: float) -> tuple[bool, float]:
    """NaN first, all of them equal, then descending."""
    return (False, 0.0) if math.isnan(score) else (True, -score)


def by_definition(scores1: list[float], scores2: list[float], k: int) -> tuple[list[float], list[int]]:
    """All pairs, best sum first, equal sums by (rank in half 1, rank in half 2)."""
    size = len(scores1)
    order1 = sorted(range(size), key=lambda i: (order(scores1[i]), i))
    order2 = sorted(range(size), key=lambda j: (order(scores2[j]), j))
    pairs = [
        (order(added(scores1[i], scores2[j])), rank1, rank2, i, j)
        for (rank1, i), (rank2, j) in itertools.product(enumerate(order1), enumerate(order2))
    ]
    best = sorted(pairs)[:k]
    return [added(scores1[i], scores2[j]) for *_, i, j in best], [i * size + j for *_, i, j in best]


@st.composite
def small_cases(draw: st.DrawFn) -> tuple[list[float], list[float], int]:
    size = draw(st.integers(1, 5))
    level = st.sampled_from([math.nan, math.inf, -math.inf, -1.0, -0.0, 0.0, 0.5, 2.0])
    row = st.lists(level, min_size=size, max_size=size)
    return draw(row), draw(row), draw(st.integers(1, size * size))


@pytest.mark.parametrize("backend", ["cpu", "eager", "reference"])
@settings(max_examples=80, deadline=None)
@given(case=small_cases())
def test_small_cases_equal_the_definition(backend: str, case: tuple[list[float], list[float], int]) -> None:
    scores1, scores2, k = case
    sums_K, ids_K = product_topk(torch.tensor(scores1), torch.tensor(scores2), k, backend=backend)
    expected, expected_ids = by_definition(scores1, scores2, k)
    assert ids_K.tolist() == expected_ids
    assert str([0.0 if value == 0 else value for value in sums_K.tolist()]) == str(
        [0.0 if value == 0 else value for value in expected]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("backend", "shape_X", "n_keys", "k"), CASES)
def test_same_as_reference(backend: str, shape_X: tuple[int, ...], n_keys: int, k: int, dtype: torch.dtype) -> None:
    if dtype in {"cpu": (torch.bfloat16,), "triton": (torch.bfloat16, torch.float64)}.get(backend, ()):
        with pytest.raises(
            ValueError, match=r"product_topk: backend='\w+' takes float32.*, got \w+; use backend=eager"
        ):
            assert_same_as_reference(*halves(shape_X, n_keys, dtype), k, backend)
        backend = "auto"
    assert_same_as_reference(*halves(shape_X, n_keys, dtype), k, backend)


@pytest.mark.parametrize("levels", [1, 3])
@pytest.mark.parametrize(("backend", "shape_X", "n_keys", "k"), CASES)
def test_same_as_reference_with_heavy_ties(
    backend: str, shape_X: tuple[int, ...], n_keys: int, k: int, levels: int
) -> None:
    scores1_XS = torch.randint(levels, (*shape_X, n_keys)).float()
    scores2_XS = torch.randint(levels, (*shape_X, n_keys)).float()
    assert_same_as_reference(scores1_XS, scores2_XS, k, backend)


@pytest.mark.parametrize("k", [1, 8, 32, 100])
def test_same_as_reference_for_scores_rounded_to_bf16(k: int) -> None:
    scores1_XS, scores2_XS = halves((64,), 48)
    assert_same_as_reference(scores1_XS.bfloat16().float(), scores2_XS.bfloat16().float(), k, "cpu")


@pytest.mark.parametrize(("backend", "k"), [*itertools.product(("cpu", "eager"), (1, 6, 36)), ("triton", 6)])
def test_same_as_reference_with_nan_and_infinities(backend: str, k: int) -> None:
    scores1_XS, scores2_XS = halves((9,), 6)
    scores1_XS[:, ::2] = -math.inf
    scores2_XS[1:3] = -math.inf
    scores1_XS[4:, 1], scores2_XS[5:, 2], scores2_XS[6, 3:] = math.nan, math.inf, -math.inf
    scores1_XS[7:, 1], scores2_XS[8, ::2] = math.inf, math.nan
    assert_same_as_reference(scores1_XS, scores2_XS, k, backend)


@pytest.mark.parametrize("backend", KERNELS)
def test_signed_zeros_are_equal(backend: str) -> None:
    assert_same_as_reference(torch.tensor([-0.0, 0.0, -0.0]), torch.tensor([0.0, -0.0, 0.0]), 5, backend)


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_traced_code_takes_the_same_slots(backend: str) -> None:
    scores1_XS = torch.randint(3, (6, 9)).float()
    scores2_XS = torch.randn(6, 9)
    traced = torch.compile(product_topk, backend="eager", fullgraph=True)
    sums_XK, ids_XK = traced(scores1_XS, scores2_XS, 8, backend=backend)
    expected_sums_XK, expected_ids_XK = product_topk(scores1_XS, scores2_XS, 8, backend="reference")
    assert torch.equal(sums_XK, expected_sums_XK)
    assert torch.equal(ids_XK, expected_ids_XK)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("backend", "shape_X", "n_keys", "k"), CASES)
def test_gradients_equal_the_reference(
    backend: str, shape_X: tuple[int, ...], n_keys: int, k: int, dtype: torch.dtype
) -> None:
    if dtype is torch.bfloat16 or (dtype is torch.float64 and backend == "triton"):
        backend = "eager"
    halves_XS = [half.requires_grad_() for half in halves(shape_X, n_keys, dtype)]
    upstream_XK = torch.randn(*shape_X, k, dtype=dtype)
    sums_XK, _ = product_topk(*(place(half, backend) for half in halves_XS), k, backend=backend)
    actual = torch.autograd.grad(sums_XK, halves_XS, place(upstream_XK, backend))
    expected_XK, _ = product_topk(*halves_XS, k, backend="reference")
    expected = torch.autograd.grad(expected_XK, halves_XS, upstream_XK)
    for actual_XS, expected_XS in zip(actual, expected, strict=True):
        assert_close(actual_XS, expected_XS, kind="grad")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sum_of_minus_infinity_passes_no_gradient(backend: str) -> None:
    scores1_S = torch.tensor([math.inf, 1.0, -math.inf], requires_grad=True)
    scores2_S = torch.tensor([2.0, -math.inf, -math.inf], requires_grad=True)
    sums_K, _ = product_topk(place(scores1_S, backend), place(scores2_S, backend), 9, backend=backend)
    grads = torch.autograd.grad(sums_K, (scores1_S, scores2_S), place(torch.arange(1.0, 10.0), backend))
    assert sums_K.tolist() == [math.inf, 3.0, *[-math.inf] * 7]
    assert [grad.tolist() for grad in grads] == [[1.0, 2.0, 0.0], [3.0, 0.0, 0.0]]


@pytest.mark.parametrize("backend", ["cpu", "eager", "reference"])
def test_gradcheck(backend: str) -> None:
    # Scores far apart, so that finite differences do not change the order; odd sizes.
    scores1_XS = torch.randperm(15).double().view(3, 5).requires_grad_()
    scores2_XS = (torch.randperm(15).double().view(3, 5) / 16).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: product_topk(a, b, 7, backend=backend)[0], (scores1_XS, scores2_XS))


@pytest.mark.parametrize("backend", BACKENDS)
def test_tied_slots_share_no_gradient(backend: str) -> None:
    scores1_S, scores2_S = torch.zeros(4, requires_grad=True), torch.zeros(4, requires_grad=True)
    product_topk(place(scores1_S, backend), place(scores2_S, backend), 3, backend=backend)[0].sum().backward()
    assert scores1_S.grad is not None
    assert scores2_S.grad is not None
    assert scores1_S.grad.tolist() == [3, 0, 0, 0]
    assert scores2_S.grad.tolist() == [1, 1, 1, 0]


@pytest.mark.parametrize(("k", "candidates"), [(1, 1), (4, 8), (8, 20), (16, 50), (32, 119), (64, 280), (128, 645)])
def test_number_of_candidates(k: int, candidates: int) -> None:
    rank1_C, rank2_C = candidate_ranks(k, k, torch.device("cpu"))
    assert len(rank1_C) == len(rank2_C) == candidates


def test_refuses_halves_of_different_shape() -> None:
    with pytest.raises(
        ValueError, match=r"both halves need one shape and dtype, got \(2, 3\) of torch.float32 and \(2, 4\)"
    ):
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
    with pytest.raises(
        ValueError, match="46341 sub-keys per half .* do not fit int32 ids; allowed: at most 46,340 sub-keys per half"
    ):
        product_topk(scores_XS, scores_XS, 1)
