"""Every backend of gathered_dot against the definition: output and both gradients, odd sizes, duplicates, dtypes.

Letters: N rows, D values a row, T tokens, K rows a token.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from tolerances import assert_close
from torch import Tensor

from pkm_lightning.ops import gathered_dot
from pkm_lightning.ops.weighted_gather import eager

BACKENDS = ["cpu", "triton", "eager", "reference"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# rows, values a row, tokens, rows a token: odd sizes, one token, one row a token, one row only (all duplicates)
SIZES = [(11, 7, 5, 3), (1, 3, 4, 5), (9, 1, 1, 1), (31, 257, 1, 9), (8, 63, 7, 1), (5, 1536, 2, 3)]


def inputs(n: int, d: int, t: int, k: int, dtype: torch.dtype, backend: str = "eager") -> tuple[Tensor, Tensor, Tensor]:
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    table_ND = (torch.randn(n, d) / d**0.5).to(device, dtype).requires_grad_()
    x_TD = torch.randn(t, d).to(device, dtype).requires_grad_()
    return table_ND, x_TD, torch.randint(n, (t, k), dtype=torch.int32, device=device)


def by_definition(table_ND: Tensor, x_TD: Tensor, ids_TK: Tensor) -> Tensor:
    rows_TKD = table_ND.cpu().double()[ids_TK.cpu().long()]
    return torch.stack([rows_KD @ x_D for rows_KD, x_D in zip(rows_TKD, x_TD.cpu().double(), strict=True)])


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """In torch's deterministic mode memory that is not written holds NaN."""
    torch.set_deterministic_debug_mode("warn")
    yield
    torch.set_deterministic_debug_mode("default")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_output_and_gradients_equal_the_definition(
    sizes: tuple[int, int, int, int], dtype: torch.dtype, backend: str
) -> None:
    table_ND, x_TD, ids_TK = inputs(*sizes, dtype, backend)
    a_TK, expected_TK = gathered_dot(table_ND, x_TD, ids_TK, backend=backend), by_definition(table_ND, x_TD, ids_TK)
    assert a_TK.dtype is dtype
    assert_close(a_TK.cpu(), expected_TK)
    g_TK = (torch.randn(expected_TK.shape) / sizes[3]).to(a_TK)
    grads = torch.autograd.grad(a_TK, (table_ND, x_TD), g_TK)
    expected = torch.autograd.grad(expected_TK, (table_ND, x_TD), g_TK.cpu().double())
    for grad, expected_grad in zip(grads, expected, strict=True):
        assert grad.dtype is dtype
        assert_close(grad, expected_grad.to(dtype), kind="grad")


@pytest.mark.parametrize("backend", BACKENDS)
def test_wide_ids_strided_inputs_and_a_second_run_give_the_same_bits(backend: str) -> None:
    table_ND, x_TD, ids_TK = inputs(11, 7, 5, 3, torch.float32, backend)
    strided = [part.detach().T.contiguous().T for part in (table_ND, x_TD, ids_TK.long())]
    a_TK = gathered_dot(table_ND, x_TD, ids_TK, backend=backend)
    assert torch.equal(a_TK, gathered_dot(*strided, backend=backend))
    g_TK = torch.randn_like(a_TK).T.contiguous().T
    first = torch.autograd.grad(a_TK, (table_ND, x_TD), g_TK)
    again = torch.autograd.grad(gathered_dot(table_ND, x_TD, ids_TK, backend=backend), (table_ND, x_TD), g_TK)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_nobody_addresses_get_no_gradient(backend: str) -> None:
    table_ND, x_TD, ids_TK = inputs(6, 3, 4, 2, torch.float32, backend)
    gathered_dot(table_ND, x_TD, torch.full_like(ids_TK, 5), backend=backend).sum().backward()
    assert table_ND.grad is not None
    assert not table_ND.grad[:5].any()
    assert table_ND.grad[5].any()


@pytest.mark.parametrize("groups", [None, 3])
def test_the_chunked_path_equals_the_whole(groups: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """It serves half precision on CUDA; its arithmetic is checked here, three tokens at a time."""
    monkeypatch.setattr(eager, "_CHUNK_VALUES", 3 * 4 * 5 + 1)
    table_ND, _, ids_TK = inputs(9, 5, 11, 4, torch.float64)
    rows_XD = torch.randn(11 * (groups or 1), 5, dtype=torch.float64)
    groups_TK = None if groups is None else torch.randint(groups, (11, 4))
    given = table_ND, rows_XD, ids_TK, groups_TK, groups or 1
    assert_close(eager.dot_in_chunks(*given), eager.gather_dot(*given))


def test_runs_on_meta_and_on_nothing() -> None:
    with torch.device("meta"):
        assert gathered_dot(torch.empty(4, 3), torch.empty(2, 3), torch.empty(2, 5, dtype=torch.int32)).shape == (2, 5)
    for backend in BACKENDS[:1] + BACKENDS[2:]:
        table_ND, x_TD = torch.randn(4, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
        gathered_dot(table_ND, x_TD, torch.zeros(2, 0, dtype=torch.int32), backend=backend).sum().backward()
        assert table_ND.grad is not None
        assert not table_ND.grad.any()
        assert x_TD.grad is not None
        assert not x_TD.grad.any()


@pytest.mark.parametrize(("x", "ids"), [((5, 6), (5, 3)), ((4, 7), (5, 3)), ((5, 7), (15,))])
def test_refuses_shapes_that_do_not_fit(x: tuple[int, ...], ids: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"gathered_dot: needs table \(N, V\), x \(T, V\) and ids \(T, K\), got"):
        gathered_dot(torch.zeros(11, 7), torch.zeros(x), torch.zeros(ids, dtype=torch.int32))


def test_refuses_other_dtypes_and_ids_out_of_range() -> None:
    table_ND, x_TD = torch.zeros(11, 7), torch.zeros(2, 7)
    with pytest.raises(ValueError, match=r"gathered_dot: ids are torch.int16; allowed: torch.int32, torch.int64\."):
        gathered_dot(table_ND, x_TD, torch.zeros(2, 3, dtype=torch.int16))
    with pytest.raises(ValueError, match=r"needs table and x of floating dtypes, got torch.float32 and torch.int64\."):
        gathered_dot(table_ND, x_TD.long(), torch.zeros(2, 3, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"gathered_dot: ids has 11; allowed: 0 to 10\."):
        gathered_dot(table_ND, x_TD, torch.full((2, 3), 11))
