"""The grouped read of weighted_gather against a loop over groups: output and both gradients, empty groups, duplicates.

Letters: N rows, D values a row, T reads, K rows a read, G groups a read.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from tolerances import assert_close
from torch import Tensor

from pkm_lightning.ops import weighted_gather

BACKENDS = ["eager", "reference"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16]
# rows, values a row, reads, rows a read, groups: odd sizes, one read, one row, one group, more groups than rows a read
SIZES = [(11, 7, 5, 3, 4), (1, 3, 4, 5, 2), (9, 1, 1, 1, 1), (31, 13, 1, 6, 3), (8, 5, 17, 1, 9), (50, 17, 9, 32, 4)]


class Read(NamedTuple):
    table_ND: Tensor
    ids_TK: Tensor
    weights_TK: Tensor
    groups_TK: Tensor

    def run(self, n_groups: int, backend: str) -> Tensor:
        return weighted_gather(*self[:3], groups_TK=self.groups_TK, n_groups=n_groups, backend=backend)


def read(n: int, d: int, t: int, k: int, g: int, dtype: torch.dtype) -> Read:
    return Read(
        torch.randn(n, d, dtype=dtype, requires_grad=True),
        torch.randint(n, (t, k), dtype=torch.int32),
        (torch.rand(t, k) / k).to(dtype).requires_grad_(),
        torch.randint(g, (t, k), dtype=torch.int32),
    )


def by_definition(given: Read, n_groups: int) -> Tensor:
    y_TGD = torch.zeros(len(given.ids_TK), n_groups, given.table_ND.shape[1], dtype=torch.float64)
    for t, k in torch.cartesian_prod(*map(torch.arange, given.ids_TK.shape)).view(-1, 2).tolist():
        row_D = given.table_ND[given.ids_TK[t, k]].detach().double()
        y_TGD[t, given.groups_TK[t, k]] += given.weights_TK[t, k].item() * row_D
    return y_TGD


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_output_equals_the_definition(sizes: tuple[int, int, int, int, int], dtype: torch.dtype, backend: str) -> None:
    given = read(*sizes, dtype)
    y_TGD = given.run(sizes[-1], backend)
    assert y_TGD.dtype is dtype
    assert_close(y_TGD, by_definition(given, sizes[-1]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_gradients_equal_the_formulas(sizes: tuple[int, int, int, int, int], dtype: torch.dtype, backend: str) -> None:
    given = read(*sizes, dtype)
    y_TGD = given.run(sizes[-1], backend)
    g_TGD = torch.randn_like(y_TGD)
    table_grad_ND, weights_grad_TK = torch.autograd.grad(y_TGD, (given.table_ND, given.weights_TK), g_TGD)
    upstream_TKD = g_TGD.double().gather(1, given.groups_TK.long().unsqueeze(-1).expand(-1, -1, sizes[1]))
    rows_XD = (given.weights_TK.detach().double().unsqueeze(-1) * upstream_TKD).flatten(0, 1)
    expected_ND = torch.zeros(given.table_ND.shape, dtype=torch.float64).index_add(0, given.ids_TK.flatten(), rows_XD)
    expected_TK = (given.table_ND.detach().double()[given.ids_TK.long()] * upstream_TKD).sum(-1)
    assert_close(table_grad_ND, expected_ND, kind="grad")
    assert_close(weights_grad_TK, expected_TK, kind="grad")


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck_with_duplicates_and_an_empty_group(backend: str) -> None:
    given = read(4, 3, 3, 3, 3, torch.float64)
    ids_TK, groups_TK = torch.tensor([[1, 1, 1], [0, 3, 0], [3, 2, 1]]), torch.tensor([[2, 0, 2], [0, 0, 0], [2, 2, 0]])
    assert torch.autograd.gradcheck(
        lambda table, weights: Read(table, ids_TK, weights, groups_TK).run(3, backend),
        (given.table_ND, given.weights_TK),
    )
    assert not given._replace(ids_TK=ids_TK, groups_TK=groups_TK).run(3, backend)[:, 1].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_groups_of_a_read_add_up_to_the_plain_read(backend: str) -> None:
    given = read(11, 7, 5, 6, 3, torch.float64)
    assert_close(given.run(3, backend).sum(1), weighted_gather(*given[:3]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_that_nobody_reads_do_not_leak(backend: str) -> None:
    given = read(9, 5, 4, 3, 2, torch.float32)
    clean_TGD = given.run(2, backend)
    unread_N = torch.ones(9, dtype=torch.bool).index_fill(0, given.ids_TK.unique().long(), False)
    with torch.no_grad():
        given.table_ND[unread_N] = torch.nan
    y_TGD = given.run(2, backend)
    y_TGD.sum().backward()
    assert torch.equal(y_TGD, clean_TGD)
    assert given.table_ND.grad is not None
    assert not given.table_ND.grad[unread_N].any()
    assert bool(given.table_ND.grad[~unread_N].all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_integer_dtypes_no_reads_and_the_meta_device(backend: str) -> None:
    given = read(11, 7, 5, 3, 4, torch.float32)
    wide = given._replace(ids_TK=given.ids_TK.long(), groups_TK=given.groups_TK.long())
    assert torch.equal(given.run(4, backend), wide.run(4, backend))
    assert read(4, 3, 0, 2, 5, torch.float32).run(5, backend).shape == (0, 5, 3)
    assert Read(*(part.to("meta") for part in given)).run(4, backend).shape == (5, 4, 7)


def test_each_row_is_read_once_by_one_kernel() -> None:
    given = read(11, 7, 5, 3, 4, torch.float32)
    with torch.profiler.profile() as profile:
        given.run(4, "eager")
    assert sum(event.count for event in profile.key_averages() if event.key == "aten::_embedding_bag") == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_refuses_groups_that_do_not_fit(backend: str) -> None:
    given = read(4, 3, 2, 3, 2, torch.float32)
    message = r"weighted_gather: needs groups of the shape \(2, 3\) of ids together with n_groups of 1 or more, got "
    with pytest.raises(ValueError, match=message + r"None and n_groups=2\."):
        weighted_gather(*given[:3], n_groups=2, backend=backend)
    with pytest.raises(ValueError, match=message + r"\(2, 3\) and n_groups=None\."):
        weighted_gather(*given[:3], groups_TK=given.groups_TK, backend=backend)
    with pytest.raises(ValueError, match=message + r"\(2, 3\) and n_groups=0\."):
        given.run(0, backend)
    with pytest.raises(ValueError, match=message + r"\(3, 2\) and n_groups=2\."):
        given._replace(groups_TK=given.groups_TK.T).run(2, backend)
