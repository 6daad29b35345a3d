"""Every backend of half_topk against all scores in float64: values, keys and both gradients, odd sizes, ties, chunks.

Letters: X leading shape, F dimension of a half key; K sub-keys kept per query.
"""

from __future__ import annotations

import importlib
import itertools

import pytest
import torch
from op_backends import BACKENDS, device_of
from tolerances import VALUE, assert_close, assert_same_gradients
from torch import Tensor, library
from torch.utils.flop_counter import FlopCounterMode

from pkm_lightning.ops import product_topk
from pkm_lightning.ops.half_topk import half_topk
from pkm_lightning.ops.product_topk import product_combine
from pkm_lightning.ops.segments import Segments

Sizes = tuple[tuple[int, ...], int, int, int, int]
# Leading shape, tokens, dimension of a key, keys, kept: one of each, odd sizes, k = S, blocks of tokens, keys, columns.
SIZES: list[Sizes] = [
    ((1,), 1, 1, 1, 1),
    ((2,), 5, 7, 11, 3),
    ((), 17, 24, 70, 7),
    ((2, 2), 3, 35, 9, 9),
    ((1,), 2, 65, 130, 4),
]
# The GPU kernel takes float32 only. Its interpreter is slow: two blocks of tokens and of keys, then three of columns.
CASES = [
    *itertools.product(["cpu", "eager", "reference"], SIZES, [torch.float32, torch.float64]),
    *itertools.product(["triton"], [((), 17, 24, 66, 3), ((1,), 1, 130, 3, 1)], [torch.float32]),
]


def inputs(sizes: Sizes, backend: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    shape_X, tokens, dim, n_keys, _ = sizes
    device = device_of(backend)
    q_XTF = torch.randn(*shape_X, tokens, dim).to(device, dtype).requires_grad_()
    return q_XTF, (torch.randn(*shape_X, n_keys, dim) / dim**0.5).to(device, dtype).requires_grad_()


def grid(shape_X: tuple[int, ...], rows: int, dim: int, backend: str) -> Tensor:
    """Draws quarters of small integers, whose products add up exactly in any order, and tie often."""
    return (torch.randint(-3, 4, (*shape_X, rows, dim)) / 4).to(device_of(backend)).requires_grad_()


@pytest.mark.parametrize(("backend", "sizes", "dtype"), CASES)
def test_values_and_gradients_equal_those_of_all_scores(backend: str, sizes: Sizes, dtype: torch.dtype) -> None:
    q_XTF, keys_XSF = inputs(sizes, backend, dtype)
    values_XTK, indices_XTK = half_topk(q_XTF, keys_XSF, sizes[-1], backend=backend)
    wide_XTF, wide_XSF = (part.detach().cpu().double().requires_grad_() for part in (q_XTF, keys_XSF))
    scores_XTS = wide_XTF @ wide_XSF.mT
    assert (values_XTK.dtype, indices_XTK.dtype) == (dtype, torch.int32)
    assert_close(values_XTK.cpu(), scores_XTS.topk(sizes[-1]).values.detach())
    # Rounding may exchange keys with close scores, so the scores of the chosen keys are compared, not the keys.
    expected_XTK = scores_XTS.gather(-1, indices_XTK.long().cpu())
    assert_close(values_XTK.cpu(), expected_XTK.detach())
    assert (indices_XTK.sort(-1).values.diff(dim=-1) > 0).all()
    g_XTK = torch.randn_like(values_XTK)
    grads = torch.autograd.grad(values_XTK, (q_XTF, keys_XSF), g_XTK)
    expected = torch.autograd.grad(expected_XTK, (wide_XTF, wide_XSF), g_XTK.cpu().double())
    for grad, expected_grad in zip(grads, expected, strict=True):
        assert_close(grad.cpu(), expected_grad, kind="grad")


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_scores_rank_by_key(backend: str) -> None:
    q_XTF, keys_XSF = grid((1,), 6, 5, backend), grid((1,), 70, 5, backend)
    values_XTK, indices_XTK = half_topk(q_XTF, keys_XSF, 4, backend=backend)
    expected_XTK, expected_ids_XTK = half_topk(q_XTF, keys_XSF, 4, backend="reference")
    assert torch.equal(values_XTK, expected_XTK)
    assert torch.equal(indices_XTK, expected_ids_XTK)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_infinity_rank_first(backend: str) -> None:
    q_XTF, keys_XSF = inputs(((1,), 3, 4, 20, 3), backend)
    with torch.no_grad():
        keys_XSF[0, 7], keys_XSF[0, 15], q_XTF[0, :, 0], keys_XSF[0, 11] = torch.nan, torch.nan, 1.0, 0.0
        keys_XSF[0, 11, 0] = torch.inf
        q_XTF[..., 1:] = q_XTF[..., 1:].abs() + 1
    values_XTK, indices_XTK = half_topk(q_XTF, keys_XSF, 3, backend=backend)
    assert indices_XTK[0].tolist() == [[7, 15, 11]] * 3
    assert values_XTK[0, :, :2].isnan().all()
    assert values_XTK[0, :, 2].isposinf().all()


@pytest.mark.parametrize("chunk", [1, 40, 300])
def test_chunks_on_the_cpu_change_nothing(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Covers chunks of one token, of three tokens of one head, and of two heads."""
    q_XTF, keys_XSF = grid((3,), 10, 4, "cpu"), grid((3,), 13, 4, "cpu")
    expected_XTK, expected_ids_XTK = half_topk(q_XTF, keys_XSF, 5, backend="reference")
    monkeypatch.setattr(importlib.import_module("pkm_lightning.ops.half_topk.cpu"), "_CHUNK_SCORES", chunk)
    values_XTK, indices_XTK = half_topk(q_XTF, keys_XSF, 5, backend="cpu")
    assert torch.equal(values_XTK, expected_XTK)
    assert torch.equal(indices_XTK, expected_ids_XTK)


def test_values_equal_those_of_one_large_product() -> None:
    q_XTF, keys_XSF = inputs(((4,), 300, 32, 1024, 16), "cpu")
    values_XTK, indices_XTK = half_topk(q_XTF, keys_XSF, 16, backend="cpu")
    expected_XTK, expected_ids_XTK = half_topk(q_XTF, keys_XSF, 16, backend="eager")
    assert_close(values_XTK, expected_XTK.detach())
    near_XTK = (values_XTK - expected_XTK).abs() <= VALUE[torch.float32][1]
    assert (near_XTK | (indices_XTK == expected_ids_XTK)).all()
    assert (indices_XTK == expected_ids_XTK).float().mean() > 0.999


def test_the_gpu_gradient_skips_empty_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pads the segments to a number that the host knows, as on a GPU; on the CPU they are not padded."""
    pytest.importorskip("triton")
    backend = importlib.import_module("pkm_lightning.ops.half_topk.triton")
    exact = backend.read_segments

    def padded(ids_L: Tensor, n_rows: int) -> Segments:
        order_L, rows_U, starts_Z = exact(ids_L, n_rows)
        no_row_2, stop_2 = -torch.ones_like(rows_U[:2]), starts_Z[-1:].expand(2)
        return Segments(order_L, torch.cat([rows_U, no_row_2]), torch.cat([starts_Z, stop_2]))

    q_XTF, keys_XSF = inputs(((1,), 2, 4, 9, 2), "triton")
    values_XTK, _ = half_topk(q_XTF, keys_XSF, 2, backend="triton")
    grads = []
    for segments in (exact, padded):
        monkeypatch.setattr(backend, "read_segments", segments)
        grads.append(torch.autograd.grad(values_XTK.sum(), keys_XSF, retain_graph=True)[0])
    assert torch.equal(*grads)


def test_the_gpu_gradient_in_several_groups_of_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(importlib.import_module("pkm_lightning.ops.half_topk.triton"), "_READS", 2)
    operands = inputs(((2,), 5, 5, 3, 3), "triton")
    values_XTK, indices_XTK = half_topk(*operands, 3, backend="triton")
    expected_XTK, expected_ids_XTK = half_topk(*operands, 3, backend="reference")
    assert torch.equal(indices_XTK, expected_ids_XTK)
    assert_same_gradients(values_XTK, expected_XTK, dict(zip("qk", operands, strict=True)))


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_two_runs_agree_bitwise_in_any_layout(backend: str) -> None:
    q_XTF, keys_XSF = inputs(((2,), 2, 5, 6, 2), backend)
    runs = []
    for transposed in (False, True):
        operands = [part.mT.contiguous().mT if transposed else part for part in (q_XTF, keys_XSF)]
        values_XTK, indices_XTK = half_topk(*operands, 2, backend=backend)
        upstream_XTK = torch.ones_like(values_XTK[..., :1]).expand(values_XTK.shape)
        runs.append((values_XTK, indices_XTK, *torch.autograd.grad(values_XTK, (q_XTF, keys_XSF), upstream_XTK)))
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens(backend: str) -> None:
    q_XTF, keys_XSF = inputs(((2,), 0, 5, 12, 4), backend)
    values_XTK, _ = half_topk(q_XTF, keys_XSF, 4, backend=backend)
    values_XTK.sum().backward()
    assert values_XTK.shape == (2, 0, 4)
    assert keys_XSF.grad is not None
    assert not keys_XSF.grad.any()


def test_the_number_of_threads_changes_nothing() -> None:
    q_XTF, keys_XSF = inputs(((1,), 40, 70, 33, 4), "cpu")
    runs = []
    for threads in (2, 1):
        torch.set_num_threads(threads)
        values_XTK, _ = half_topk(q_XTF, keys_XSF, 4, backend="cpu")
        runs.append(torch.autograd.grad(values_XTK.square().sum(), (q_XTF, keys_XSF)))
    for first, second in zip(*runs, strict=True):
        assert torch.equal(first, second)


def test_with_product_combine_it_equals_the_product_topk_of_all_scores() -> None:
    q_2TF, keys_2SF = grid((2,), 9, 4, "cpu"), grid((2,), 20, 4, "cpu")
    values_2TK, indices_2TK = half_topk(q_2TF, keys_2SF, 6)
    sums_TK, ids_TK = product_combine(values_2TK[0], indices_2TK[0], values_2TK[1], indices_2TK[1], 20, 6)
    expected_TK, expected_ids_TK = product_topk(*torch.bmm(q_2TF, keys_2SF.mT), 6, backend="reference")
    assert torch.equal(sums_TK, expected_TK)
    assert torch.equal(ids_TK, expected_ids_TK)
    assert_same_gradients(sums_TK, expected_TK, {"q": q_2TF, "keys": keys_2SF})


def test_the_operator_is_registered_completely_and_traced_without_a_break() -> None:
    q_XTF, keys_XSF = inputs(((2,), 5, 7, 11, 3), "cpu")
    library.opcheck(torch.ops.pkm_lightning.half_topk.default, (q_XTF, keys_XSF, 3, "cpu", "ieee"))
    values_XTK, _ = torch.compile(half_topk, backend="aot_eager", fullgraph=True)(q_XTF, keys_XSF, 3)
    expected_XTK, _ = half_topk(q_XTF, keys_XSF, 3, backend="cpu")
    assert torch.equal(values_XTK, expected_XTK)
    for grad, expected in zip(
        torch.autograd.grad(values_XTK.sum(), (q_XTF, keys_XSF)),
        torch.autograd.grad(expected_XTK.sum(), (q_XTF, keys_XSF)),
        strict=True,
    ):
        assert torch.equal(grad, expected)


def test_the_flop_counter_counts_the_products_that_are_computed() -> None:
    q_XTF, keys_XSF = inputs(((2,), 5, 7, 11, 3), "cpu")
    with FlopCounterMode(display=False) as counter:
        values_XTK, _ = half_topk(q_XTF, keys_XSF, 3, backend="cpu")
        assert counter.get_total_flops() == 2 * 2 * 5 * 7 * 11
        values_XTK.sum().backward()
    assert counter.get_total_flops() == 2 * 2 * 5 * 7 * 11 + 4 * 2 * 5 * 3 * 7


@pytest.mark.parametrize(
    ("q", "keys", "k", "message"),
    [
        ((2, 3, 4), (2, 5, 6), 2, r"queries \(..., T, F\) and keys \(..., S, F\), got \(2, 3, 4\) and \(2, 5, 6\)"),
        ((2, 3, 4), (1, 5, 4), 2, r"needs queries \(..., T, F\)"),
        ((2, 3, 4), (2, 5, 4), 6, r"k=6 is out of range; allowed: 1 to 5 \(keys\)\."),
    ],
)
def test_refuses_sizes_that_do_not_fit(q: tuple[int, ...], keys: tuple[int, ...], k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        half_topk(torch.zeros(q), torch.zeros(keys), k)


def test_refuses_precisions_and_dtypes_that_it_would_have_to_round() -> None:
    q_XTF, keys_XSF = torch.zeros(1, 2, 3), torch.zeros(1, 4, 3)
    with pytest.raises(ValueError, match=r"half_topk: precision='tf32'; allowed: ieee, tf32x3\."):
        half_topk(q_XTF, keys_XSF, 2, precision="tf32")
    with pytest.raises(
        ValueError, match=r"queries are torch.bfloat16 and keys torch.bfloat16; both need torch.float32"
    ):
        half_topk(q_XTF.bfloat16(), keys_XSF.bfloat16(), 2)
    with pytest.raises(ValueError, match=r"half_topk: backend='triton' takes float32, got float64; use backend=eager"):
        half_topk(q_XTF.double(), keys_XSF.double(), 2, backend="triton")
