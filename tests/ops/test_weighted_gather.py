"""Every backend of weighted_gather against a loop and against the reference: output and both gradients.

Letters: N rows, D values a row, T reads, K rows a read.
"""

from __future__ import annotations

import pytest
import torch
from tolerances import assert_close
from torch import Tensor

from pkm_lightning.ops import weighted_gather

BACKENDS = ["eager", "reference"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
# rows, values a row, reads, rows a read: odd sizes, T = 1, K = 1, one row only (all duplicates)
SIZES = [(11, 7, 5, 3), (1, 3, 4, 5), (9, 1, 1, 1), (31, 13, 1, 6), (8, 5, 17, 1), (50, 33, 9, 32)]


def read(n: int, d: int, t: int, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    table_ND = torch.randn(n, d, dtype=dtype, requires_grad=True)
    ids_TK = torch.randint(n, (t, k), dtype=torch.int32)
    weights_TK = (torch.rand(t, k) / k).to(dtype).requires_grad_()  # as after a softmax: a read adds up to about 1
    return table_ND, ids_TK, weights_TK


def by_definition(table_ND: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    y_TD = torch.zeros(len(ids_TK), table_ND.shape[1], dtype=torch.float64)
    for t, (ids_K, weights_K) in enumerate(zip(ids_TK.tolist(), weights_TK.tolist(), strict=True)):
        for row, weight in zip(ids_K, weights_K, strict=True):
            y_TD[t] += weight * table_ND[row].double()
    return y_TD


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_output_equals_the_definition(sizes: tuple[int, int, int, int], dtype: torch.dtype, backend: str) -> None:
    table_ND, ids_TK, weights_TK = read(*sizes, dtype)
    y_TD = weighted_gather(table_ND, ids_TK, weights_TK, backend=backend)
    assert y_TD.dtype is dtype
    assert_close(y_TD, by_definition(table_ND, ids_TK, weights_TK))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_gradients_equal_the_formulas(sizes: tuple[int, int, int, int], dtype: torch.dtype, backend: str) -> None:
    table_ND, ids_TK, weights_TK = read(*sizes, dtype)
    y_TD = weighted_gather(table_ND, ids_TK, weights_TK, backend=backend)
    g_TD = torch.randn_like(y_TD)
    table_grad_ND, weights_grad_TK = torch.autograd.grad(y_TD, (table_ND, weights_TK), g_TD)
    expected_table_ND = torch.zeros(table_ND.shape, dtype=torch.float64)
    for (t, k), row in zip(torch.cartesian_prod(*map(torch.arange, ids_TK.shape)), ids_TK.flatten(), strict=True):
        expected_table_ND[row] += weights_TK[t, k].detach().double() * g_TD[t].double()
    expected_weights_TK = (table_ND.detach().double()[ids_TK.long()] * g_TD.double().unsqueeze(1)).sum(-1)
    assert_close(table_grad_ND, expected_table_ND, kind="grad")
    assert_close(weights_grad_TK, expected_weights_TK, kind="grad")


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck_with_duplicates(backend: str) -> None:
    table_ND, _, weights_TK = read(4, 3, 3, 3, torch.float64)
    ids_TK = torch.tensor([[1, 1, 1], [0, 3, 0], [3, 2, 1]])
    assert torch.autograd.gradcheck(
        lambda table, weights: weighted_gather(table, ids_TK, weights, backend=backend), (table_ND, weights_TK)
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_int32_and_int64_ids_are_equal(backend: str) -> None:
    table_ND, ids_TK, weights_TK = read(11, 7, 5, 3, torch.float32)
    short_TD = weighted_gather(table_ND, ids_TK, weights_TK, backend=backend)
    assert torch.equal(short_TD, weighted_gather(table_ND, ids_TK.long(), weights_TK, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_are_cast_to_the_dtype_of_the_table(backend: str) -> None:
    table_ND, ids_TK, _ = read(11, 7, 5, 3, torch.bfloat16)
    weights_TK = torch.rand(5, 3, requires_grad=True)
    y_TD = weighted_gather(table_ND, ids_TK, weights_TK, backend=backend)
    y_TD.float().sum().backward()
    assert y_TD.dtype is torch.bfloat16
    assert weights_TK.grad is not None
    assert weights_TK.grad.dtype is torch.float32
    assert_close(y_TD, by_definition(table_ND, ids_TK, weights_TK.bfloat16()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_nobody_reads_do_not_leak(backend: str) -> None:
    table_ND, _, weights_TK = read(9, 5, 4, 3, torch.float32)
    ids_TK = torch.tensor([[0, 2, 4], [4, 4, 2], [8, 0, 8], [2, 2, 2]])
    clean_TD = weighted_gather(table_ND, ids_TK, weights_TK, backend=backend)
    unread_N = torch.ones(9, dtype=torch.bool).index_fill(0, ids_TK.unique(), False)
    with torch.no_grad():
        table_ND[unread_N] = torch.nan
    y_TD = weighted_gather(table_ND, ids_TK, weights_TK, backend=backend)
    y_TD.sum().backward()
    assert torch.equal(y_TD, clean_TD)
    assert table_ND.grad is not None
    assert weights_TK.grad is not None
    assert not table_ND.grad[unread_N].any()
    assert bool(table_ND.grad[~unread_N].all())
    assert weights_TK.grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_reads_give_no_rows(backend: str) -> None:
    table_ND, ids_TK, weights_TK = read(4, 3, 0, 2, torch.float32)
    assert weighted_gather(table_ND, ids_TK, weights_TK, backend=backend).shape == (0, 3)


@pytest.mark.parametrize(
    ("table", "ids", "weights"), [((4,), (2, 3), (2, 3)), ((4, 2), (6,), (6,)), ((4, 2), (2, 3), (3, 2))]
)
def test_refuses_shapes_that_do_not_fit(table: tuple[int, ...], ids: tuple[int, ...], weights: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"weighted_gather: needs table \(N, D\) and ids, weights of one shape"):
        weighted_gather(torch.zeros(table), torch.zeros(ids, dtype=torch.int64), torch.zeros(weights))


def test_refuses_an_unknown_backend() -> None:
    with pytest.raises(ValueError, match=r"weighted_gather: backend='cuda' is not available; allowed: auto, eager"):
        weighted_gather(torch.zeros(4, 2), torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3), backend="cuda")
