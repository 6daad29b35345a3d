"""Every backend of gathered_dot against the definition: output and both gradients, odd sizes, duplicates, dtypes.

Letters: G groups per token, X = T * G.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from op_backends import BACKENDS, device_of
from tolerances import assert_close
from torch import Tensor

from pkm_lightning.ops import gathered_dot
from pkm_lightning.ops.weighted_gather import eager

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# Rows, values per row, tokens, reads per token: odd sizes, one token, one read per token, one row (all duplicates).
SIZES = [(31, 257, 1, 9), (11, 7, 5, 3), (1, 3, 4, 5), (9, 1, 1, 1), (8, 63, 7, 1), (5, 1536, 2, 3)]
# Every backend takes one size in all dtypes, and each of the other sizes in one dtype.
CASES = [
    *itertools.product(SIZES[:1], DTYPES, BACKENDS),
    *((sizes, DTYPES[i % 3], backend) for i, sizes in enumerate(SIZES[1:]) for backend in BACKENDS),
]


def inputs(n: int, d: int, t: int, k: int, dtype: torch.dtype, backend: str = "eager") -> tuple[Tensor, Tensor, Tensor]:
    device = device_of(backend)
    table_NV = (torch.randn(n, d) / d**0.5).to(device, dtype).requires_grad_()
    x_TV = torch.randn(t, d).to(device, dtype).requires_grad_()
    return table_NV, x_TV, torch.randint(n, (t, k), dtype=torch.int32, device=device)


def by_definition(table_NV: Tensor, x_TV: Tensor, ids_TK: Tensor) -> Tensor:
    rows_TKV = table_NV.cpu().double()[ids_TK.cpu().long()]
    return torch.stack([rows_KV @ x_V for rows_KV, x_V in zip(rows_TKV, x_TV.cpu().double(), strict=True)])


@pytest.mark.parametrize(("sizes", "dtype", "backend"), CASES)
def test_output_and_gradients_equal_the_definition(
    sizes: tuple[int, int, int, int], dtype: torch.dtype, backend: str
) -> None:
    table_NV, x_TV, ids_TK = inputs(*sizes, dtype, backend)
    a_TK, expected_TK = gathered_dot(table_NV, x_TV, ids_TK, backend=backend), by_definition(table_NV, x_TV, ids_TK)
    assert a_TK.dtype is dtype
    assert_close(a_TK.cpu(), expected_TK)
    g_TK = (torch.randn(expected_TK.shape) / sizes[3]).to(a_TK)
    grads = torch.autograd.grad(a_TK, (table_NV, x_TV), g_TK)
    expected = torch.autograd.grad(expected_TK, (table_NV, x_TV), g_TK.cpu().double())
    for grad, expected_grad in zip(grads, expected, strict=True):
        assert grad.dtype is dtype
        assert_close(grad, expected_grad.to(dtype), kind="grad")


@pytest.mark.parametrize("backend", BACKENDS)
def test_int64_ids_strided_inputs_and_a_second_run_give_the_same_bits(backend: str) -> None:
    table_NV, x_TV, ids_TK = inputs(11, 7, 5, 3, torch.float32, backend)
    strided = [part.detach().T.contiguous().T for part in (table_NV, x_TV, ids_TK.long())]
    a_TK = gathered_dot(table_NV, x_TV, ids_TK, backend=backend)
    assert torch.equal(a_TK, gathered_dot(*strided, backend=backend))
    g_TK = torch.randn_like(a_TK).T.contiguous().T
    first = torch.autograd.grad(a_TK, (table_NV, x_TV), g_TK)
    again = torch.autograd.grad(gathered_dot(table_NV, x_TV, ids_TK, backend=backend), (table_NV, x_TV), g_TK)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_are_not_read_get_no_gradient(backend: str) -> None:
    table_NV, x_TV, ids_TK = inputs(6, 3, 4, 2, torch.float32, backend)
    gathered_dot(table_NV, x_TV, torch.full_like(ids_TK, 5), backend=backend).sum().backward()
    assert table_NV.grad is not None
    assert not table_NV.grad[:5].any()
    assert table_NV.grad[5].any()


@pytest.mark.parametrize("groups", [None, 3])
def test_the_product_in_chunks_equals_the_whole(groups: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks the arithmetic of what half precision takes on CUDA, three tokens at a time."""
    monkeypatch.setattr(eager, "_CHUNK_VALUES", 3 * 4 * 5 + 1)
    table_NV, _, ids_TK = inputs(9, 5, 11, 4, torch.float64)
    rows_XV = torch.randn(11 * (groups or 1), 5, dtype=torch.float64)
    groups_TK = None if groups is None else torch.randint(groups, (11, 4))
    inputs_of_both = table_NV, rows_XV, ids_TK, groups_TK, groups or 1
    assert_close(eager.dot_in_chunks(*inputs_of_both), eager.gather_dot(*inputs_of_both))


def test_runs_on_meta_tensors() -> None:
    with torch.device("meta"):
        assert gathered_dot(torch.empty(4, 3), torch.empty(2, 3), torch.empty(2, 5, dtype=torch.int32)).shape == (2, 5)


@pytest.mark.usefixtures("on_the_backends_device")
@pytest.mark.parametrize("backend", BACKENDS)
def test_runs_without_reads(backend: str) -> None:
    table_NV, x_TV = torch.randn(4, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    gathered_dot(table_NV, x_TV, torch.zeros(2, 0, dtype=torch.int32), backend=backend).sum().backward()
    assert table_NV.grad is not None
    assert not table_NV.grad.any()
    assert x_TV.grad is not None
    assert not x_TV.grad.any()


@pytest.mark.parametrize(("x", "ids"), [((5, 6), (5, 3)), ((4, 7), (5, 3)), ((5, 7), (15,))])
def test_refuses_shapes_that_do_not_fit(x: tuple[int, ...], ids: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"gathered_dot: needs table \(N, V\), x \(T, V\) and ids \(T, K\), got"):
        gathered_dot(torch.zeros(11, 7), torch.zeros(x), torch.zeros(ids, dtype=torch.int32))


def test_refuses_other_dtypes_and_ids_out_of_range() -> None:
    table_NV, x_TV = torch.zeros(11, 7), torch.zeros(2, 7)
    with pytest.raises(ValueError, match=r"gathered_dot: ids are torch.int16; allowed: torch.int32, torch.int64\."):
        gathered_dot(table_NV, x_TV, torch.zeros(2, 3, dtype=torch.int16))
    with pytest.raises(ValueError, match=r"needs table and x of floating dtypes, got torch.float32 and torch.int64\."):
        gathered_dot(table_NV, x_TV.long(), torch.zeros(2, 3, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"gathered_dot: ids has 11; allowed: 0 to 10\."):
        gathered_dot(table_NV, x_TV, torch.full((2, 3), 11))
