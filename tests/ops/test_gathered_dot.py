"""Every backend of gathered_dot against a loop: output and both gradients, odd sizes, duplicates, dtypes, chunks.

Letters: N rows, D values a row, T tokens, K rows a token.
"""

from __future__ import annotations

import pytest
import torch
from tolerances import assert_close
from torch import Tensor, library

from pkm_lightning.ops import gathered_dot
from pkm_lightning.ops.gathered_dot import eager

BACKENDS = ["eager", "reference"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
# rows, values a row, tokens, rows a token: odd sizes, one token, one row a token, one row only (all duplicates)
SIZES = [(11, 7, 5, 3), (1, 3, 4, 5), (9, 1, 1, 1), (31, 13, 1, 6), (8, 5, 17, 1)]


def inputs(n: int, d: int, t: int, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    table_ND = (torch.randn(n, d) / d**0.5).to(dtype).requires_grad_()
    return table_ND, torch.randn(t, d, dtype=dtype, requires_grad=True), torch.randint(n, (t, k), dtype=torch.int32)


def by_definition(table_ND: Tensor, x_TD: Tensor, ids_TK: Tensor) -> Tensor:
    rows = [[table_ND[i].double() @ x_D.double() for i in ids_K] for ids_K, x_D in zip(ids_TK, x_TD, strict=True)]
    return torch.stack([torch.stack(row) for row in rows])


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_output_and_gradients_equal_the_definition(
    sizes: tuple[int, int, int, int], dtype: torch.dtype, backend: str, ids_dtype: torch.dtype
) -> None:
    table_ND, x_TD, ids_TK = inputs(*sizes, dtype)
    a_TK = gathered_dot(table_ND, x_TD, ids_TK.to(ids_dtype), backend=backend)
    expected_TK = by_definition(table_ND, x_TD, ids_TK)
    assert a_TK.dtype is dtype
    assert_close(a_TK, expected_TK)
    g_TK = (torch.randn_like(expected_TK) / sizes[3]).to(dtype)
    grads = torch.autograd.grad(a_TK, (table_ND, x_TD), g_TK)
    expected = torch.autograd.grad(expected_TK, (table_ND, x_TD), g_TK.double())
    for grad, expected_grad in zip(grads, expected, strict=True):
        assert_close(grad, expected_grad, kind="grad")


def test_rows_that_nobody_addresses_get_no_gradient() -> None:
    table_ND, x_TD, _ = inputs(6, 3, 4, 2, torch.float32)
    gathered_dot(table_ND, x_TD, torch.full((4, 2), 5)).sum().backward()
    assert table_ND.grad is not None
    assert not table_ND.grad[:5].any()
    assert table_ND.grad[5].any()


def test_the_chunked_paths_equal_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    """They serve CUDA; their arithmetic is checked here, three tokens at a time."""
    monkeypatch.setattr(eager, "_CHUNK_VALUES", 3 * 4 * 5 + 1)
    table_ND, x_TD, ids_TK = inputs(9, 5, 11, 4, torch.float64)
    assert len(eager._chunks(ids_TK, 5)) == 4
    expected_TK = by_definition(table_ND, x_TD, ids_TK)
    assert_close(eager._dot_in_chunks(table_ND, x_TD, ids_TK), expected_TK)
    g_TK = torch.randn_like(expected_TK)
    (expected_grad_TD,) = torch.autograd.grad(expected_TK, x_TD, g_TK)
    assert_close(eager._weighted_rows_in_chunks(table_ND, ids_TK, g_TK), expected_grad_TD, kind="grad")
    expected_grad_ND = torch.autograd.grad(by_definition(table_ND, x_TD, ids_TK), table_ND, g_TK)[0]
    assert_close(eager._table_gradient_in_chunks(9, x_TD.detach(), ids_TK, g_TK), expected_grad_ND, kind="grad")


def test_operator_is_registered_completely() -> None:
    table_ND, x_TD, ids_TK = inputs(11, 7, 5, 3, torch.float32)
    library.opcheck(torch.ops.pkm_lightning.gathered_dot.default, (table_ND, x_TD, ids_TK))


def test_runs_on_meta_and_on_nothing() -> None:
    with torch.device("meta"):
        assert gathered_dot(torch.empty(4, 3), torch.empty(2, 3), torch.empty(2, 5, dtype=torch.int32)).shape == (2, 5)
    table_ND, x_TD = torch.randn(4, 3, requires_grad=True), torch.randn(0, 3, requires_grad=True)
    gathered_dot(table_ND, x_TD, torch.zeros(0, 5, dtype=torch.int32)).sum().backward()
    assert table_ND.grad is not None
    assert not table_ND.grad.any()


@pytest.mark.parametrize(("x", "ids"), [((5, 6), (5, 3)), ((4, 7), (5, 3)), ((5, 7), (15,))])
def test_refuses_shapes_that_do_not_fit(x: tuple[int, ...], ids: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"gathered_dot: needs table \(N, D\), x \(T, D\) and ids \(T, K\), got"):
        gathered_dot(torch.zeros(11, 7), torch.zeros(x), torch.zeros(ids, dtype=torch.int32))


def test_refuses_ids_of_another_dtype() -> None:
    with pytest.raises(ValueError, match=r"gathered_dot: ids are torch.int16; allowed: torch.int32, torch.int64\."):
        gathered_dot(torch.zeros(11, 7), torch.zeros(2, 7), torch.zeros(2, 3, dtype=torch.int16))
