"""Every backend of half_topk against all scores in float64: values, keys and both gradients, odd sizes, ties, chunks.

Letters: X leading shape, T tokens, E dimension of a key, S keys, K kept.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator

import pytest
import torch
from tolerances import VALUE, assert_close, assert_same_gradients
from torch import Tensor, library
from torch.utils.flop_counter import FlopCounterMode

from pkm_lightning.ops import product_topk
from pkm_lightning.ops.half_topk import half_topk
from pkm_lightning.ops.product_topk import product_combine
from pkm_lightning.ops.segments import Segments

BACKENDS = ["cpu", "triton", "eager", "reference"]
Sizes = tuple[tuple[int, ...], int, int, int, int]
# leading shape, tokens, dimension of a key, keys, kept: odd sizes, one of each, k = S, blocks of keys and columns
SIZES: list[Sizes] = [
    ((1,), 1, 1, 1, 1),
    ((2,), 5, 7, 11, 3),
    ((), 17, 24, 70, 7),
    ((2, 2), 3, 35, 9, 9),
    ((1,), 2, 65, 130, 4),
]
# The GPU kernel takes float32 only, and its interpreter is slow.
CASES = [(b, s, d) for b in ("cpu", "eager", "reference") for s in SIZES for d in (torch.float32, torch.float64)] + [
    ("triton", size, torch.float32) for size in (*SIZES[:3], ((1,), 1, 130, 3, 1))
]


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """In torch's deterministic mode memory that is not written holds NaN."""
    torch.set_deterministic_debug_mode("warn")
    yield
    torch.set_deterministic_debug_mode("default")


def inputs(sizes: Sizes, backend: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    shape_X, tokens, dim, n_keys, _ = sizes
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    q_XTE = torch.randn(*shape_X, tokens, dim).to(device, dtype).requires_grad_()
    return q_XTE, (torch.randn(*shape_X, n_keys, dim) / dim**0.5).to(device, dtype).requires_grad_()


def grid(shape_X: tuple[int, ...], rows: int, dim: int, backend: str) -> Tensor:
    """Quarters of small integers: their products add up exactly in any order, and tie often."""
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    return (torch.randint(-3, 4, (*shape_X, rows, dim)) / 4).to(device).requires_grad_()


@pytest.mark.parametrize(("backend", "sizes", "dtype"), CASES)
def test_values_and_gradients_equal_those_of_all_scores(backend: str, sizes: Sizes, dtype: torch.dtype) -> None:
    q_XTE, keys_XSE = inputs(sizes, backend, dtype)
    values_XTK, indices_XTK = half_topk(q_XTE, keys_XSE, sizes[-1], backend=backend)
    wide_XTE, wide_XSE = (given.detach().cpu().double().requires_grad_() for given in (q_XTE, keys_XSE))
    scores_XTS = wide_XTE @ wide_XSE.mT
    assert (values_XTK.dtype, indices_XTK.dtype) == (dtype, torch.int32)
    assert_close(values_XTK.cpu(), scores_XTS.topk(sizes[-1]).values.detach())
    # Scores within rounding may have changed places; the values at the chosen keys say whether anything else did.
    expected_XTK = scores_XTS.gather(-1, indices_XTK.long().cpu())
    assert_close(values_XTK.cpu(), expected_XTK.detach())
    assert (indices_XTK.sort(-1).values.diff(dim=-1) > 0).all()
    g_XTK = torch.randn_like(values_XTK)
    grads = torch.autograd.grad(values_XTK, (q_XTE, keys_XSE), g_XTK)
    expected = torch.autograd.grad(expected_XTK, (wide_XTE, wide_XSE), g_XTK.cpu().double())
    for grad, expected_grad in zip(grads, expected, strict=True):
        assert_close(grad.cpu(), expected_grad, kind="grad")


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_scores_rank_by_key(backend: str) -> None:
    q_XTE, keys_XSE = grid((1,), 6, 5, backend), grid((1,), 70, 5, backend)
    values_XTK, indices_XTK = half_topk(q_XTE, keys_XSE, 8, backend=backend)
    expected_XTK, expected_ids_XTK = half_topk(q_XTE, keys_XSE, 8, backend="reference")
    assert torch.equal(values_XTK, expected_XTK)
    assert torch.equal(indices_XTK, expected_ids_XTK)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_infinity_come_first(backend: str) -> None:
    q_XTE, keys_XSE = inputs(((1,), 3, 4, 20, 3), backend)
    with torch.no_grad():
        keys_XSE[0, 7], keys_XSE[0, 15], q_XTE[0, :, 0], keys_XSE[0, 11] = torch.nan, torch.nan, 1.0, 0.0
        keys_XSE[0, 11, 0] = torch.inf
        q_XTE[..., 1:] = q_XTE[..., 1:].abs() + 1
    values_XTK, indices_XTK = half_topk(q_XTE, keys_XSE, 3, backend=backend)
    assert indices_XTK[0].tolist() == [[7, 15, 11]] * 3
    assert values_XTK[0, :, :2].isnan().all()
    assert values_XTK[0, :, 2].isposinf().all()


@pytest.mark.parametrize("chunk", [1, 40, 300])
def test_chunks_on_the_cpu_change_nothing(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One token, three tokens of one head, two heads at a time."""
    q_XTE, keys_XSE = grid((3,), 10, 4, "cpu"), grid((3,), 13, 4, "cpu")
    expected_XTK, expected_ids_XTK = half_topk(q_XTE, keys_XSE, 5, backend="reference")
    monkeypatch.setattr(importlib.import_module("pkm_lightning.ops.half_topk.cpu"), "_CHUNK_SCORES", chunk)
    values_XTK, indices_XTK = half_topk(q_XTE, keys_XSE, 5, backend="cpu")
    assert torch.equal(values_XTK, expected_XTK)
    assert torch.equal(indices_XTK, expected_ids_XTK)


def test_values_equal_those_of_the_whole_product() -> None:
    q_XTE, keys_XSE = inputs(((4,), 600, 32, 1024, 16), "cpu")
    values_XTK, indices_XTK = half_topk(q_XTE, keys_XSE, 16, backend="cpu")
    expected_XTK, expected_ids_XTK = half_topk(q_XTE, keys_XSE, 16, backend="eager")
    assert_close(values_XTK, expected_XTK.detach())
    near_XTK = (values_XTK - expected_XTK).abs() <= VALUE[torch.float32][1]
    assert (near_XTK | (indices_XTK == expected_ids_XTK)).all()
    assert (indices_XTK == expected_ids_XTK).float().mean() > 0.999


def test_the_gpu_gradient_passes_over_empty_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the segments are padded to a number that the host knows; the interpreter's are not, so pad them here."""
    pytest.importorskip("triton")
    backend = importlib.import_module("pkm_lightning.ops.half_topk.triton")
    exact = backend.read_segments

    def padded(ids_L: Tensor, n_rows: int) -> Segments:
        order_L, rows_U, starts_Z = exact(ids_L, n_rows)
        no_row_2, stop_2 = -torch.ones_like(rows_U[:2]), starts_Z[-1:].expand(2)
        return Segments(order_L, torch.cat([rows_U, no_row_2]), torch.cat([starts_Z, stop_2]))

    q_XTE, keys_XSE = inputs(((1,), 3, 4, 9, 2), "triton")
    grads = []
    for segments in (exact, padded):
        monkeypatch.setattr(backend, "read_segments", segments)
        values_XTK, _ = half_topk(q_XTE, keys_XSE, 2, backend="triton")
        grads.append(torch.autograd.grad(values_XTK.sum(), keys_XSE)[0])
    assert torch.equal(*grads)


def test_the_gpu_gradient_in_several_groups_of_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(importlib.import_module("pkm_lightning.ops.half_topk.triton"), "_READS", 2)
    given = inputs(((2,), 7, 5, 4, 3), "triton")
    values_XTK, indices_XTK = half_topk(*given, 3, backend="triton")
    expected_XTK, expected_ids_XTK = half_topk(*given, 3, backend="reference")
    assert torch.equal(indices_XTK, expected_ids_XTK)
    assert_same_gradients(values_XTK, expected_XTK, dict(zip("qk", given, strict=True)))


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_two_runs_agree_bitwise_in_any_layout(backend: str) -> None:
    q_XTE, keys_XSE = inputs(((3,), 6, 5, 12, 4), backend)
    runs = []
    for turned in (False, True):
        given = [part.mT.contiguous().mT if turned else part for part in (q_XTE, keys_XSE)]
        values_XTK, indices_XTK = half_topk(*given, 4, backend=backend)
        upstream_XTK = torch.ones_like(values_XTK[..., :1]).expand(values_XTK.shape)
        runs.append((values_XTK, indices_XTK, *torch.autograd.grad(values_XTK, (q_XTE, keys_XSE), upstream_XTK)))
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens(backend: str) -> None:
    q_XTE, keys_XSE = inputs(((2,), 0, 5, 12, 4), backend)
    values_XTK, _ = half_topk(q_XTE, keys_XSE, 4, backend=backend)
    values_XTK.sum().backward()
    assert values_XTK.shape == (2, 0, 4)
    assert keys_XSE.grad is not None
    assert not keys_XSE.grad.any()


def test_threads_change_nothing() -> None:
    q_XTE, keys_XSE = inputs(((1,), 40, 70, 33, 4), "cpu")
    runs = []
    for threads in (2, 1):
        torch.set_num_threads(threads)
        values_XTK, _ = half_topk(q_XTE, keys_XSE, 4, backend="cpu")
        runs.append(torch.autograd.grad(values_XTK.square().sum(), (q_XTE, keys_XSE)))
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


def test_with_the_combination_it_is_the_product_topk_of_all_scores() -> None:
    q_2TE, keys_2SE = grid((2,), 9, 4, "cpu"), grid((2,), 20, 4, "cpu")
    values_2TK, indices_2TK = half_topk(q_2TE, keys_2SE, 6)
    sums_TK, ids_TK = product_combine(values_2TK[0], indices_2TK[0], values_2TK[1], indices_2TK[1], 20, 6)
    expected_TK, expected_ids_TK = product_topk(*torch.bmm(q_2TE, keys_2SE.mT), 6, backend="reference")
    assert torch.equal(sums_TK, expected_TK)
    assert torch.equal(ids_TK, expected_ids_TK)
    g_TK = torch.randn_like(sums_TK)
    grads = torch.autograd.grad(sums_TK, (q_2TE, keys_2SE), g_TK)
    for grad, expected in zip(grads, torch.autograd.grad(expected_TK, (q_2TE, keys_2SE), g_TK), strict=True):
        assert_close(grad, expected, kind="grad")


def test_operator_is_registered_completely_and_traced_without_a_break() -> None:
    q_XTE, keys_XSE = inputs(((2,), 5, 7, 11, 3), "cpu")
    library.opcheck(torch.ops.pkm_lightning.half_topk.default, (q_XTE, keys_XSE, 3, "cpu"))
    values_XTK, _ = torch.compile(half_topk, backend="aot_eager", fullgraph=True)(q_XTE, keys_XSE, 3)
    expected_XTK, _ = half_topk(q_XTE, keys_XSE, 3, backend="cpu")
    assert torch.equal(values_XTK, expected_XTK)
    for grad, expected in zip(
        torch.autograd.grad(values_XTK.sum(), (q_XTE, keys_XSE)),
        torch.autograd.grad(expected_XTK.sum(), (q_XTE, keys_XSE)),
        strict=True,
    ):
        assert torch.equal(grad, expected)


def test_the_counter_sees_the_products_that_are_computed() -> None:
    q_XTE, keys_XSE = inputs(((2,), 5, 7, 11, 3), "cpu")
    with FlopCounterMode(display=False) as counter:
        values_XTK, _ = half_topk(q_XTE, keys_XSE, 3, backend="cpu")
        assert counter.get_total_flops() == 2 * 2 * 5 * 7 * 11
        values_XTK.sum().backward()
    assert counter.get_total_flops() == 2 * 2 * 5 * 7 * 11 + 4 * 2 * 5 * 3 * 7


@pytest.mark.parametrize(
    ("q", "keys", "k", "message"),
    [
        (
            (2, 3, 4),
            (2, 5, 6),
            2,
            r"needs queries \(..., T, F\) and keys \(..., S, F\), got \(2, 3, 4\) and \(2, 5, 6\)",
        ),
        ((2, 3, 4), (1, 5, 4), 2, r"needs queries \(..., T, F\)"),
        ((2, 3, 4), (2, 5, 4), 6, r"k=6 is out of range; allowed: 1 to 5 \(keys\)\."),
    ],
)
def test_refuses_what_does_not_fit(q: tuple[int, ...], keys: tuple[int, ...], k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        half_topk(torch.zeros(q), torch.zeros(keys), k)


def test_refuses_dtypes_that_it_would_have_to_round() -> None:
    q_XTE, keys_XSE = torch.zeros(1, 2, 3), torch.zeros(1, 4, 3)
    with pytest.raises(
        ValueError, match=r"queries are torch.bfloat16 and keys torch.bfloat16; both need torch.float32"
    ):
        half_topk(q_XTE.bfloat16(), keys_XSE.bfloat16(), 2)
    with pytest.raises(ValueError, match=r"half_topk: backend='triton' takes float32, got float64; use backend=eager"):
        half_topk(q_XTE.double(), keys_XSE.double(), 2, backend="triton")
