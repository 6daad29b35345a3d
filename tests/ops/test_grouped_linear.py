"""Every backend of grouped_linear against a row-by-row definition: output and both gradients.

Letters: M rows, E groups, I values in, O values out.
"""

from __future__ import annotations

import pytest
import torch
from tolerances import assert_close
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pkm_lightning.ops import grouped_linear

DTYPES = [torch.float32, torch.float64, torch.bfloat16]
# (Values in, values out), rows per group: odd sizes, empty groups first, between and last, one group, one row, no rows.
ODD = [
    ((7, 5), [3, 0, 1, 6]),
    ((1, 3), [0, 0, 4]),
    ((6, 1), [9]),
    ((3, 3), [0, 1, 0]),
    ((5, 2), [0, 0]),
]
ALIGNED = [((16, 8), [3, 0, 1, 6]), ((8, 24), [0, 17, 0, 0]), ((8, 8), [1])]
CASES = [("loop", sizes, dtype) for sizes in [*ODD, *ALIGNED] for dtype in DTYPES] + [
    ("grouped_mm", sizes, dtype) for sizes in ALIGNED for dtype in (torch.float32, torch.bfloat16)
]
Sizes = tuple[tuple[int, int], list[int]]


def operands(sizes: Sizes, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    (n_in, n_out), counts = sizes
    x_MI = torch.randn(sum(counts), n_in, dtype=dtype, requires_grad=True)
    weight_EIO = (torch.randn(len(counts), n_in, n_out) * n_in**-0.5).to(dtype).requires_grad_()
    return x_MI, weight_EIO, torch.tensor(counts)


def groups_of_rows(counts_E: Tensor) -> list[int]:
    return [e for e, count in enumerate(counts_E.tolist()) for _ in range(count)]


@pytest.mark.parametrize(("backend", "sizes", "dtype"), CASES)
def test_output_and_gradients_equal_the_definition(backend: str, sizes: Sizes, dtype: torch.dtype) -> None:
    x_MI, weight_EIO, counts_E = operands(sizes, dtype)
    y_MO = grouped_linear(x_MI, weight_EIO, counts_E, backend=backend)
    g_MO = torch.randn_like(y_MO)
    x_grad_MI, weight_grad_EIO = torch.autograd.grad(y_MO, (x_MI, weight_EIO), g_MO)
    x, weight, g = x_MI.detach().double(), weight_EIO.detach().double(), g_MO.double()
    expected_y, expected_x, expected_weight = torch.zeros_like(g), torch.zeros_like(x), torch.zeros_like(weight)
    for m, e in enumerate(groups_of_rows(counts_E)):
        expected_y[m] = x[m] @ weight[e]
        expected_x[m] = weight[e] @ g[m]
        expected_weight[e] += torch.outer(x[m], g[m])
    assert y_MO.dtype is dtype
    assert_close(y_MO, expected_y)
    assert_close(x_grad_MI, expected_x, kind="grad")
    assert_close(weight_grad_EIO, expected_weight, kind="grad")


@pytest.mark.parametrize("backend", ["loop", "grouped_mm"])
def test_accepts_the_expanded_gradient_of_a_sum(backend: str) -> None:
    x_MI, weight_EIO, counts_E = operands(ALIGNED[0], torch.float32)
    grouped_linear(x_MI, weight_EIO, counts_E, backend=backend).sum().backward()
    assert x_MI.grad is not None
    expected_MI = torch.stack([weight_EIO[e].sum(-1) for e in groups_of_rows(counts_E)])
    assert_close(x_MI.grad, expected_MI.detach(), kind="grad")


@pytest.mark.parametrize("backend", ["loop", "grouped_mm"])
def test_rows_and_weights_in_any_layout(backend: str) -> None:
    x_MI, weight_EIO, counts_E = operands(((16, 16), [3, 0, 1, 6]), torch.float32)
    strided_MI, strided_EIO = x_MI.T.contiguous().T, weight_EIO.mT.contiguous().mT
    y_MO = grouped_linear(strided_MI, strided_EIO, counts_E.int(), backend=backend)
    assert_close(y_MO, grouped_linear(x_MI, weight_EIO, counts_E, backend="loop"))


def test_gradcheck() -> None:
    x_MI, weight_EIO, counts_E = operands(ODD[0], torch.float64)
    assert torch.autograd.gradcheck(lambda x, weight: grouped_linear(x, weight, counts_E), (x_MI, weight_EIO))


@pytest.mark.parametrize("sizes", [*ODD, *ALIGNED])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_flop_counter_counts_every_product(sizes: Sizes, device: str) -> None:
    x_MI, weight_EIO, counts_E = (operand.to(device) for operand in operands(sizes, torch.float32))
    with FlopCounterMode(display=False) as counter:
        y_MO = grouped_linear(x_MI, weight_EIO, counts_E)
    assert counter.get_total_flops() == 2 * y_MO.numel() * x_MI.shape[1]
    assert y_MO.shape == (len(x_MI), weight_EIO.shape[2])
    assert y_MO.requires_grad


@pytest.mark.parametrize("backend", ["loop", "grouped_mm"])
def test_autocast_casts_both_operands(backend: str) -> None:
    x_MI, weight_EIO, counts_E = operands(ALIGNED[0], torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y_MO = grouped_linear(x_MI.bfloat16(), weight_EIO, counts_E, backend=backend)
    assert y_MO.dtype is torch.bfloat16
    expected_MO = grouped_linear(x_MI.bfloat16().double(), weight_EIO.bfloat16().double(), counts_E)
    assert_close(y_MO, expected_MO)
    y_MO.sum().backward()
    assert weight_EIO.grad is not None
    assert weight_EIO.grad.dtype is torch.float32


def test_autocast_leaves_float64_alone() -> None:
    x_MI, weight_EIO, counts_E = operands(ODD[0], torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert grouped_linear(x_MI, weight_EIO, counts_E).dtype is torch.float64


@pytest.mark.parametrize(
    ("rows", "weights", "counts"), [((4, 2), (3, 2, 5), (2,)), ((4, 2), (3, 3, 5), (3,)), ((2,), (3, 2, 5), (3,))]
)
def test_refuses_shapes_that_do_not_fit(rows: tuple[int, ...], weights: tuple[int, ...], counts: tuple[int]) -> None:
    with pytest.raises(ValueError, match=r"grouped_linear: needs rows \(M, I\), weights \(E, I, O\) and counts \(E,\)"):
        grouped_linear(torch.zeros(rows), torch.zeros(weights), torch.zeros(counts, dtype=torch.int64))


def test_refuses_two_dtypes() -> None:
    with pytest.raises(ValueError, match=r"rows are torch.float32, weights torch.float64; both need one dtype"):
        grouped_linear(torch.zeros(2, 3), torch.zeros(1, 3, 4, dtype=torch.float64), torch.tensor([2]))


@pytest.mark.parametrize("counts", [[1, 2], [3, 2]])
def test_the_loop_refuses_counts_of_more_or_fewer_rows(counts: list[int]) -> None:
    with pytest.raises(ValueError, match=rf"counts add up to {sum(counts)}, but there are 4 rows"):
        grouped_linear(torch.zeros(4, 3), torch.zeros(2, 3, 5), torch.tensor(counts))


@pytest.mark.parametrize(
    ("dtype", "width", "device", "reason"),
    [
        (torch.float64, 8, "cpu", "it takes float32, bfloat16 and float16, not float64"),
        (torch.float32, 6, "cpu", "its rows must be multiples of 16 bytes, and 6 values of float32 are 24"),
        (torch.bfloat16, 4, "cpu", "its rows must be multiples of 16 bytes, and 4 values of bfloat16 are 8"),
        (torch.float32, 8, "meta", "on the meta device it takes bfloat16 only, not float32"),
    ],
)
def test_grouped_mm_refuses_operands_with_a_reason(dtype: torch.dtype, width: int, device: str, reason: str) -> None:
    x_MI, weight_EIO = (
        torch.zeros(2, 8, dtype=dtype, device=device),
        torch.zeros(1, 8, width, dtype=dtype, device=device),
    )
    with pytest.raises(ValueError, match=f"backend='grouped_mm' cannot run, {reason}; use auto or loop"):
        grouped_linear(x_MI, weight_EIO, torch.tensor([2], device=device), backend="grouped_mm")


def test_refuses_an_unknown_backend() -> None:
    with pytest.raises(ValueError, match=r"backend='triton' is not available; allowed: auto, loop, grouped_mm"):
        grouped_linear(torch.zeros(2, 3), torch.zeros(1, 3, 4), torch.tensor([2]), backend="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backends_agree_on_a_gpu(dtype: torch.dtype) -> None:
    operands_cpu = operands(((64, 48), [70, 0, 1, 129, 56]), dtype)
    x_MI, weight_EIO, counts_E = (operand.detach().cuda() for operand in operands_cpu)
    x_MI.requires_grad_()
    weight_EIO.requires_grad_()
    g_MO = torch.randn(len(x_MI), 48, dtype=dtype, device="cuda")
    results = []
    for backend in ("auto", "loop"):
        y_MO = grouped_linear(x_MI, weight_EIO, counts_E, backend=backend)
        results.append((y_MO, *torch.autograd.grad(y_MO, (x_MI, weight_EIO), g_MO)))
    actual, expected = results
    assert_close(actual[0], expected[0])
    for grad, expected_grad in zip(actual[1:], expected[1:], strict=True):
        assert_close(grad, expected_grad, kind="grad")
