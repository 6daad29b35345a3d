"""Every backend of ranked_topk against plain Python: ties, NaN, infinities, signed zeros, odd sizes, dtypes.

Letters: R rows, S scores, K kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, library

from pkm_lightning.ops import ranked_topk

BACKENDS = ["cpu", "triton", "eager", "reference"]
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# rows, scores, kept: one score, k = S, k of 1, spans of 64 and blocks of 16 hit and missed, bounds from both kinds
SIZES = [(3, 1, 1), (5, 7, 7), (2, 64, 1), (9, 65, 13), (4, 128, 64), (3, 1000, 32), (2, 1024, 5)]
# The interpreter of GPU kernels is slow: one block of scores with one program's rows and more, then two blocks.
CASES = [(backend, *size) for size in SIZES for backend in ("cpu", "eager", "reference")] + [
    ("triton", 5, 7, 7),
    ("triton", 1, 250, 7),
]


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """In torch's deterministic mode memory that is not written holds NaN."""
    torch.set_deterministic_debug_mode("warn")
    yield
    torch.set_deterministic_debug_mode("default")


def place(scores_RS: Tensor, backend: str) -> Tensor:
    return scores_RS.to("cuda" if backend == "triton" and torch.cuda.is_available() else "cpu")


def by_definition(scores: list[float], k: int) -> list[int]:
    """NaN first, then descending; Python's sort is stable and takes -0.0 for 0.0."""
    return sorted(range(len(scores)), key=lambda i: (not math.isnan(scores[i]), -scores[i]))[:k]


def assert_ranked(scores_RS: Tensor, k: int, backend: str) -> None:
    indices_RK = ranked_topk(place(scores_RS, backend), k, backend=backend)
    assert indices_RK.dtype is torch.int64
    assert indices_RK.tolist() == [by_definition(row, k) for row in scores_RS.tolist()]


@pytest.mark.parametrize("backend", ["cpu", "eager", "reference"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_small_rows_equal_the_definition(backend: str, data: st.DataObject) -> None:
    level = st.sampled_from([math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-40, -1e-40, 1.0, -2.0])
    scores = data.draw(st.lists(level, min_size=1, max_size=40))
    assert_ranked(torch.tensor([scores]), data.draw(st.integers(1, len(scores))), backend)


@pytest.mark.parametrize("levels", [None, 3])
@pytest.mark.parametrize(("backend", "rows", "n_scores", "k"), CASES)
def test_random_rows_equal_the_definition(backend: str, rows: int, n_scores: int, k: int, levels: int | None) -> None:
    scores_RS = torch.randn(rows, n_scores) if levels is None else torch.randint(levels, (rows, n_scores)).float()
    assert_ranked(scores_RS, k, backend)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_dtype_with_what_floats_can_hold(backend: str, dtype: torch.dtype) -> None:
    scores_RS = (torch.randn(4, 75) * 2).round().to(dtype)
    scores_RS[:, ::9], scores_RS[:, 4::9], scores_RS[:, 5::9] = torch.nan, torch.inf, -torch.inf
    scores_RS[1:3, 7::9] = -torch.tensor(torch.nan, dtype=dtype)
    scores_RS[2] = -torch.inf
    scores_RS[3, 1::2] = -0.0
    if backend == "triton" and dtype is torch.float64:
        with pytest.raises(ValueError, match=r"takes float32, bfloat16, float16, got float64; use backend=eager"):
            assert_ranked(scores_RS, 30, backend)
    else:
        assert_ranked(scores_RS, 30, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_layouts_and_no_rows(backend: str) -> None:
    turned_RS = place(torch.randn(9, 2, 3), backend).movedim(0, -1)
    expected_RK = ranked_topk(turned_RS.contiguous(), 4, backend="reference")
    assert torch.equal(ranked_topk(turned_RS, 4, backend=backend), expected_RK)
    assert ranked_topk(turned_RS[:0], 4, backend=backend).shape == (0, 3, 4)
    assert ranked_topk(turned_RS[0, 0], 4, backend=backend).shape == (4,)


def test_rows_of_scores_that_all_tie_but_one() -> None:
    """More ties at the k-th place than a first collection keeps: the bisection down to k, and its rule of ties."""
    scores_RS = torch.zeros(2, 900)
    scores_RS[0, 700], scores_RS[1, :860] = 1.0, 2.0
    assert_ranked(scores_RS, 8, "cpu")
    assert_ranked(scores_RS, 300, "cpu")


def test_threads_change_nothing() -> None:
    scores_RS = torch.randn(11, 300)
    expected_RK = ranked_topk(scores_RS, 9, backend="cpu")
    torch.set_num_threads(2)
    try:
        assert torch.equal(ranked_topk(scores_RS, 9, backend="cpu"), expected_RK)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_operator_is_registered_completely_and_traced_without_a_break() -> None:
    scores_RS = torch.randn(3, 20, requires_grad=True)
    library.opcheck(torch.ops.pkm_lightning.ranked_topk.default, (scores_RS.detach(), 4, "cpu"))
    traced = torch.compile(ranked_topk, backend="eager", fullgraph=True)
    assert torch.equal(traced(scores_RS, 4), ranked_topk(scores_RS, 4, backend="reference"))


def test_large_k_goes_to_torch() -> None:
    scores_RS = torch.randn(2, 700)
    assert torch.equal(ranked_topk(scores_RS, 600), ranked_topk(scores_RS, 600, backend="cpu"))


def test_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ValueError, match=r"ranked_topk: k=5 is out of range; allowed: 1 to 4 \(scores per row\)\."):
        ranked_topk(torch.zeros(2, 4), 5)
    with pytest.raises(ValueError, match=r"ranked_topk: backend='knn' is not available; allowed: auto, cpu, triton"):
        ranked_topk(torch.zeros(2, 4), 2, backend="knn")
    with pytest.raises(ValueError, match=r"ranked_topk: backend='triton' takes k up to 128, got 200; use backend=eag"):
        ranked_topk(torch.zeros(2, 400), 200, backend="triton")
