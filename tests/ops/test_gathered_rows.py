"""Every backend of gathered_rows against indexing: the same bits, and the table's gradient; odd sizes, every dtype."""

from __future__ import annotations

import itertools

import pytest
import torch
from op_backends import device_of
from tolerances import assert_close
from torch import Tensor, library

from pkm_lightning.ops import gathered_rows

BACKENDS = ["triton", "eager", "reference"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# Rows, values per row, tokens, reads per token: wide, narrow and odd rows, one read, one row that all reads share.
SIZES = [(31, 257, 1, 9), (70, 16, 50, 3), (11, 7, 5, 3), (1, 3, 4, 5), (9, 1, 1, 1), (40, 160, 7, 2)]
CASES = [
    *itertools.product(SIZES[:1], DTYPES, BACKENDS),
    *((sizes, DTYPES[i % 3], backend) for i, sizes in enumerate(SIZES[1:]) for backend in BACKENDS),
]


def inputs(n: int, v: int, t: int, k: int, dtype: torch.dtype, backend: str) -> tuple[Tensor, Tensor]:
    device = device_of(backend)
    table_NV = (torch.randn(n, v) / v**0.5).to(device, dtype).requires_grad_()
    return table_NV, torch.randint(n, (t, k), dtype=torch.int32, device=device)


@pytest.mark.parametrize(("sizes", "dtype", "backend"), CASES)
def test_rows_are_copied_and_their_gradients_added_up(
    sizes: tuple[int, int, int, int], dtype: torch.dtype, backend: str
) -> None:
    table_NV, ids_TK = inputs(*sizes, dtype, backend)
    y_TKV = gathered_rows(table_NV, ids_TK, backend=backend)
    assert torch.equal(y_TKV, table_NV.detach()[ids_TK.long()])
    g_TKV = (torch.randn(y_TKV.shape) / sizes[2] ** 0.5).to(y_TKV)
    (grad_NV,) = torch.autograd.grad(y_TKV, table_NV, g_TKV)
    assert grad_NV.dtype is dtype
    wide_NV = torch.zeros(table_NV.shape, dtype=torch.float64)
    expected_NV = wide_NV.index_add_(0, ids_TK.flatten().cpu(), g_TKV.flatten(0, 1).double().cpu())
    assert_close(grad_NV.cpu(), expected_NV.to(dtype), kind="grad")


@pytest.mark.parametrize("backend", BACKENDS)
def test_int64_ids_strided_inputs_and_a_second_run_give_the_same_bits(backend: str) -> None:
    table_NV, ids_TK = inputs(11, 7, 5, 3, torch.float32, backend)
    strided_NV, strided_TK = table_NV.detach().T.contiguous().T.requires_grad_(), ids_TK.long().T.contiguous().T
    y_TKV, strided_TKV = (
        gathered_rows(table_NV, ids_TK, backend=backend),
        gathered_rows(strided_NV, strided_TK, backend=backend),
    )
    assert torch.equal(y_TKV, strided_TKV)
    g_TKV = torch.randn_like(y_TKV).movedim(0, 2).contiguous().movedim(2, 0)
    (first_NV,), (again_NV,) = (
        torch.autograd.grad(y_TKV, table_NV, g_TKV),
        torch.autograd.grad(strided_TKV, strided_NV, g_TKV),
    )
    assert torch.equal(first_NV, again_NV)


def test_the_operators_are_registered_completely_and_one_graph_gives_the_same_bits() -> None:
    table_NV, ids_TK = inputs(11, 7, 5, 3, torch.float32, "eager")
    library.opcheck(torch.ops.pkm_lightning.gathered_rows.default, (table_NV, ids_TK, "eager"))
    backward = torch.ops.pkm_lightning.gathered_rows_backward.default
    library.opcheck(backward, (ids_TK, torch.randn(5, 3, 7), 11, "eager"))

    def loss(rows_NV: Tensor) -> Tensor:
        return gathered_rows(rows_NV, ids_TK).square().sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    assert torch.equal(*(torch.autograd.grad(run(table_NV), table_NV)[0] for run in (compiled, loss)))


def test_the_backward_does_not_hold_the_table() -> None:
    table_NV, ids_TK = inputs(11, 7, 5, 3, torch.float32, "eager")
    y_TKV = gathered_rows(table_NV, ids_TK)
    with torch.no_grad():
        table_NV.add_(1)  # an error if the backward needed the rows
    y_TKV.sum().backward()
    assert table_NV.grad is not None


def test_runs_on_meta_tensors() -> None:
    with torch.device("meta"):
        assert gathered_rows(torch.empty(4, 3), torch.empty(2, 5, dtype=torch.int32)).shape == (2, 5, 3)


@pytest.mark.usefixtures("on_the_backends_device")
@pytest.mark.parametrize("backend", BACKENDS)
def test_runs_without_reads(backend: str) -> None:
    table_NV = torch.randn(4, 3, requires_grad=True)
    y_TKV = gathered_rows(table_NV, torch.zeros(2, 0, dtype=torch.int32), backend=backend)
    assert y_TKV.shape == (2, 0, 3)
    if backend != "reference":
        y_TKV.sum().backward()
        assert table_NV.grad is not None
        assert not table_NV.grad.any()


def test_refusals() -> None:
    table_NV, ids_TK = torch.zeros(11, 7), torch.zeros(2, 3, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"needs table \(N, V\) and ids \(T, K\), got \(11, 7\) and \(6,\)"):
        gathered_rows(table_NV, ids_TK.flatten())
    with pytest.raises(ValueError, match=r"got torch\.float32 and torch\.int16"):
        gathered_rows(table_NV, ids_TK.short())
    with pytest.raises(ValueError, match="the table is on cpu, ids on meta"):
        gathered_rows(table_NV, ids_TK.to("meta"))
    with pytest.raises(ValueError, match=r"gathered_rows: ids has 11; allowed: 0 to 10\."):
        gathered_rows(table_NV, torch.full((2, 3), 11))
