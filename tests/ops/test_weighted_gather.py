"""Every backend of weighted_gather, with and without groups: output and both gradients against the definition.

Letters: G groups per token, X = T * G, L = T * K reads.
"""

from __future__ import annotations

import importlib
import itertools
from typing import NamedTuple

import pytest
import torch
from op_backends import BACKENDS, device_of
from tolerances import assert_close
from torch import Tensor

from pkm_lightning.ops import weighted_gather

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# Rows, values per row, tokens, reads per token, groups (None: no groups): odd sizes, one row, one token, one value per
# row, narrow rows of many tokens and of many reads, several blocks of columns, one group, more groups than reads.
SIZES = [
    (8, 257, 3, 9, None),
    (31, 100, 1, 6, 3),
    (1, 3, 4, 5, None),
    (9, 16, 70, 11, None),
    (50, 64, 9, 7, None),
    (50, 16, 3, 70, None),
    (40, 24, 5, 40, 2),
    (5, 1536, 2, 3, None),
    (1, 3, 4, 5, 2),
    (9, 1, 1, 1, 1),
    (8, 63, 5, 1, 4),
]
Sizes = tuple[int, int, int, int, int | None]
# Every backend takes two sizes in all dtypes, and each of the other sizes in one dtype.
CASES = [
    *itertools.product(SIZES[:2], DTYPES, BACKENDS),
    *((sizes, DTYPES[i % 3], backend) for i, sizes in enumerate(SIZES[2:]) for backend in BACKENDS),
]


class Read(NamedTuple):
    """Arguments of one call of weighted_gather."""

    table_NV: Tensor
    ids_TK: Tensor
    weights_TK: Tensor
    groups_TK: Tensor | None
    n_groups: int | None

    def run(self, backend: str) -> Tensor:
        groups = {"groups_TK": self.groups_TK, "n_groups": self.n_groups}
        return weighted_gather(self.table_NV, self.ids_TK, self.weights_TK, **groups, backend=backend)

    def by_definition(self) -> Tensor:
        """Computes (T, V) or (T, G, V) in float64, differentiable."""
        rows_TKV = self.table_NV.cpu().double()[self.ids_TK.cpu().long()] * self.weights_TK.cpu().double().unsqueeze(-1)
        token_TK = torch.arange(len(self.ids_TK)).unsqueeze(-1).expand(self.ids_TK.shape)
        x_TK = token_TK if self.groups_TK is None else token_TK * (self.n_groups or 1) + self.groups_TK.cpu()
        belongs_XL = torch.arange(len(self.ids_TK) * (self.n_groups or 1)).unsqueeze(-1) == x_TK.flatten()
        y_XV = belongs_XL.double() @ rows_TKV.flatten(0, 1)
        return y_XV if self.n_groups is None else y_XV.view(-1, self.n_groups, y_XV.shape[1])


def read(n: int, d: int, t: int, k: int, g: int | None, dtype: torch.dtype, backend: str = "eager") -> Read:
    device = device_of(backend)
    return Read(
        torch.randn(n, d).to(device, dtype).requires_grad_(),
        torch.randint(n, (t, k), dtype=torch.int32, device=device),
        # Of about the size of those after a softmax, and of both signs, as PEER and UltraMem have them.
        (torch.randn(t, k) / k).to(device, dtype).requires_grad_(),
        None if g is None else torch.randint(g, (t, k), dtype=torch.int32, device=device),
        g,
    )


@pytest.mark.parametrize(("sizes", "dtype", "backend"), CASES)
def test_output_and_gradients_equal_the_definition(sizes: Sizes, dtype: torch.dtype, backend: str) -> None:
    case = read(*sizes, dtype, backend)
    y_X, expected_X = case.run(backend), case.by_definition()
    assert y_X.dtype is dtype
    assert_close(y_X.cpu(), expected_X)
    inputs, upstream_X = (case.table_NV, case.weights_TK), torch.randn_like(y_X) / sizes[1] ** 0.5
    grads = torch.autograd.grad(y_X, inputs, upstream_X)
    expected = torch.autograd.grad(expected_X, inputs, upstream_X.cpu().double())
    for grad, expected_grad in zip(grads, expected, strict=True):
        assert grad.dtype is dtype
        assert_close(grad, expected_grad.to(dtype), kind="grad")


@pytest.mark.parametrize("groups", [None, 2])
def test_tokens_that_share_a_program_read_what_each_reads_alone(
    groups: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = read(9, 20, 35, 6, groups, torch.bfloat16, "triton")
    shared_X = case.run("triton")
    monkeypatch.setattr(importlib.import_module("pkm_lightning.ops.weighted_gather.triton"), "_SHARED_VALUES", 0)
    alone_X = case.run("triton")
    # The threads of a GPU add up the reads of a token in another order; the interpreter has one.
    assert torch.equal(shared_X, alone_X) or shared_X.is_cuda
    assert_close(shared_X, alone_X)


@pytest.mark.parametrize("backend", ["eager", "reference"])
@pytest.mark.parametrize("groups", [None, 3])
def test_gradcheck_with_duplicates(groups: int | None, backend: str) -> None:
    case = read(4, 3, 3, 3, groups, torch.float64)._replace(ids_TK=torch.tensor([[1, 1, 1], [0, 3, 0], [3, 2, 1]]))
    assert torch.autograd.gradcheck(
        lambda table_NV, weights_TK: case._replace(table_NV=table_NV, weights_TK=weights_TK).run(backend),
        (case.table_NV, case.weights_TK),
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("groups", [None, 2])
def test_int64_ids_strided_inputs_and_a_second_run_give_the_same_bits(groups: int | None, backend: str) -> None:
    case = read(11, 7, 5, 3, groups, torch.float32, backend)
    transposed = Read(*(part.detach().long().T.contiguous().T if part is not None and not part.is_floating_point()
                        else part for part in case[:4]), groups)  # fmt: skip
    strided = transposed._replace(
        table_NV=case.table_NV.detach().T.contiguous().T.requires_grad_(),
        weights_TK=case.weights_TK.detach().T.contiguous().T.requires_grad_(),
    )
    y_X = case.run(backend)
    assert torch.equal(y_X, strided.run(backend))
    upstream_X = torch.randn_like(y_X).movedim(0, -1).contiguous().movedim(-1, 0)
    runs = [
        torch.autograd.grad(one.run(backend), (one.table_NV, one.weights_TK), upstream_X)
        for one in (case, case, strided)
    ]
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_are_cast_to_the_dtype_of_the_table(backend: str) -> None:
    case = read(11, 7, 5, 3, None, torch.bfloat16, backend)
    weights_TK = case.weights_TK.detach().float().requires_grad_()
    y_TV = case._replace(weights_TK=weights_TK).run(backend)
    y_TV.float().sum().backward()
    assert y_TV.dtype is torch.bfloat16
    assert weights_TK.grad is not None
    assert weights_TK.grad.dtype is torch.float32
    assert_close(y_TV.cpu(), case.by_definition())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("groups", [None, 2])
def test_rows_that_are_not_read_do_not_leak(groups: int | None, backend: str) -> None:
    case = read(9, 5, 4, 3, groups, torch.float32, backend)
    case.ids_TK[case.ids_TK == 6] = 2
    clean_X = case.run(backend)
    unread_N = torch.ones(9, dtype=torch.bool).index_fill(0, case.ids_TK.unique().long().cpu(), False)
    with torch.no_grad():
        case.table_NV[unread_N] = torch.nan
    y_X = case.run(backend)
    y_X.sum().backward()
    assert torch.equal(y_X, clean_X)
    assert case.table_NV.grad is not None
    assert case.weights_TK.grad is not None
    assert not case.table_NV.grad[unread_N].any()
    assert bool(case.table_NV.grad[~unread_N].all())
    assert case.weights_TK.grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("groups", [None, 5])
def test_no_reads_give_no_rows_and_no_gradient(groups: int | None, backend: str) -> None:
    case = read(4, 3, 0, 2, groups, torch.float32, backend)
    y_X = case.run(backend)
    assert y_X.shape == ((0, 3) if groups is None else (0, 5, 3))
    y_X.sum().backward()
    assert case.table_NV.grad is not None
    assert not case.table_NV.grad.any()


def test_refuses_shapes_and_dtypes_that_do_not_fit() -> None:
    table_NV, ids_TK, weights_TK = torch.zeros(4, 2), torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3)
    for table, ids, weights in (
        (table_NV[:, 0], ids_TK, weights_TK),
        (table_NV, ids_TK.flatten(), weights_TK.flatten()),
        (table_NV, ids_TK, weights_TK.T),
    ):
        with pytest.raises(ValueError, match=r"weighted_gather: needs table \(N, V\) and ids, weights of one shape"):
            weighted_gather(table, ids, weights)
    message = r"needs ids of torch.int32 or torch.int64 and table and weights of floating dtypes, got torch\."
    for table, ids, weights in (
        (table_NV, ids_TK.float(), weights_TK),
        (table_NV, ids_TK, weights_TK.long()),
        (table_NV.long(), ids_TK, weights_TK),
    ):
        with pytest.raises(ValueError, match=message):
            weighted_gather(table, ids, weights)
    with pytest.raises(ValueError, match=r"the table is on cpu, ids on meta, weights on cpu; all need one device\."):
        weighted_gather(table_NV, ids_TK.to("meta"), weights_TK)


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_refuses_ids_out_of_range(backend: str) -> None:
    for row in (-1, 4):
        ids_TK = torch.tensor([[0, 3, 1], [2, row, 0]])
        with pytest.raises(ValueError, match=f"weighted_gather: ids has {row}; allowed: 0 to 3\\."):
            weighted_gather(torch.zeros(4, 2), ids_TK, torch.zeros(2, 3), backend=backend)


def test_refuses_an_unknown_backend() -> None:
    message = r"weighted_gather: backend='cuda' is not available; allowed: auto, cpu, triton, eager, reference\."
    with pytest.raises(ValueError, match=message):
        weighted_gather(torch.zeros(4, 2), torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3), backend="cuda")
