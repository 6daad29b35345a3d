"""Every backend of weighted_gather, plain and by groups: output and both gradients against the definition.

Letters: N rows, D values a row, T reads, K rows a read, G groups a read, X = T * G.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from tolerances import assert_close
from torch import Tensor

from pkm_lightning.ops import weighted_gather

BACKENDS = ["cpu", "triton", "eager", "reference"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# rows, values a row, reads, rows a read, groups (None: a plain read): odd sizes, one read, one row, one group, more
# groups than rows a read
SIZES = [
    (1, 3, 4, 5, None),
    (9, 1, 1, 1, None),
    (8, 257, 3, 9, None),
    (50, 64, 9, 7, None),
    (5, 1536, 2, 3, None),
    (1, 3, 4, 5, 2),
    (9, 1, 1, 1, 1),
    (31, 100, 1, 6, 3),
    (8, 63, 5, 1, 4),
]
Sizes = tuple[int, int, int, int, int | None]


class Read(NamedTuple):
    table_ND: Tensor
    ids_TK: Tensor
    weights_TK: Tensor
    groups_TK: Tensor | None
    n_groups: int | None

    def run(self, backend: str) -> Tensor:
        groups = {"groups_TK": self.groups_TK, "n_groups": self.n_groups}
        return weighted_gather(self.table_ND, self.ids_TK, self.weights_TK, **groups, backend=backend)

    def by_definition(self) -> Tensor:
        """(T, D) or (T, G, D) in float64, differentiable."""
        rows_TKD = self.table_ND.cpu().double()[self.ids_TK.cpu().long()] * self.weights_TK.cpu().double().unsqueeze(-1)
        read_TK = torch.arange(len(self.ids_TK)).unsqueeze(-1).expand(self.ids_TK.shape)
        x_TK = read_TK if self.groups_TK is None else read_TK * (self.n_groups or 1) + self.groups_TK.cpu()
        belongs_XL = torch.arange(len(self.ids_TK) * (self.n_groups or 1)).unsqueeze(-1) == x_TK.flatten()
        y_XD = belongs_XL.double() @ rows_TKD.flatten(0, 1)
        return y_XD if self.n_groups is None else y_XD.view(-1, self.n_groups, y_XD.shape[1])


def read(n: int, d: int, t: int, k: int, g: int | None, dtype: torch.dtype, backend: str = "eager") -> Read:
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    return Read(
        torch.randn(n, d).to(device, dtype).requires_grad_(),
        torch.randint(n, (t, k), dtype=torch.int32, device=device),
        (torch.rand(t, k) / k).to(device, dtype).requires_grad_(),  # as after a softmax: a read adds up to about 1
        None if g is None else torch.randint(g, (t, k), dtype=torch.int32, device=device),
        g,
    )


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """In torch's deterministic mode memory that is not written holds NaN."""
    torch.set_deterministic_debug_mode("warn")
    yield
    torch.set_deterministic_debug_mode("default")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_output_and_gradients_equal_the_definition(sizes: Sizes, dtype: torch.dtype, backend: str) -> None:
    given = read(*sizes, dtype, backend)
    y_X, expected_X = given.run(backend), given.by_definition()
    assert y_X.dtype is dtype
    assert_close(y_X.cpu(), expected_X)
    inputs, upstream_X = (given.table_ND, given.weights_TK), torch.randn_like(y_X) / sizes[1] ** 0.5
    grads = torch.autograd.grad(y_X, inputs, upstream_X)
    expected = torch.autograd.grad(expected_X, inputs, upstream_X.cpu().double())
    for grad, expected_grad in zip(grads, expected, strict=True):
        assert grad.dtype is dtype
        assert_close(grad, expected_grad.to(dtype), kind="grad")


@pytest.mark.parametrize("backend", ["eager", "reference"])
@pytest.mark.parametrize("groups", [None, 3])
def test_gradcheck_with_duplicates(groups: int | None, backend: str) -> None:
    given = read(4, 3, 3, 3, groups, torch.float64)._replace(ids_TK=torch.tensor([[1, 1, 1], [0, 3, 0], [3, 2, 1]]))
    assert torch.autograd.gradcheck(
        lambda table_ND, weights_TK: given._replace(table_ND=table_ND, weights_TK=weights_TK).run(backend),
        (given.table_ND, given.weights_TK),
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("groups", [None, 2])
def test_wide_ids_strided_inputs_and_a_second_run_give_the_same_bits(groups: int | None, backend: str) -> None:
    given = read(11, 7, 5, 3, groups, torch.float32, backend)
    transposed = Read(*(part.detach().long().T.contiguous().T if part is not None and not part.is_floating_point()
                        else part for part in given[:4]), groups)  # fmt: skip
    strided = transposed._replace(
        table_ND=given.table_ND.detach().T.contiguous().T.requires_grad_(),
        weights_TK=given.weights_TK.detach().T.contiguous().T.requires_grad_(),
    )
    y_X = given.run(backend)
    assert torch.equal(y_X, strided.run(backend))
    upstream_X = torch.randn_like(y_X).movedim(0, -1).contiguous().movedim(-1, 0)
    runs = [
        torch.autograd.grad(one.run(backend), (one.table_ND, one.weights_TK), upstream_X)
        for one in (given, given, strided)
    ]
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_are_cast_to_the_dtype_of_the_table(backend: str) -> None:
    given = read(11, 7, 5, 3, None, torch.bfloat16, backend)
    weights_TK = given.weights_TK.detach().float().requires_grad_()
    y_TD = given._replace(weights_TK=weights_TK).run(backend)
    y_TD.float().sum().backward()
    assert y_TD.dtype is torch.bfloat16
    assert weights_TK.grad is not None
    assert weights_TK.grad.dtype is torch.float32
    assert_close(y_TD.cpu(), given.by_definition())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("groups", [None, 2])
def test_rows_that_nobody_reads_do_not_leak(groups: int | None, backend: str) -> None:
    given = read(9, 5, 4, 3, groups, torch.float32, backend)
    given.ids_TK[given.ids_TK == 6] = 2
    clean_X = given.run(backend)
    unread_N = torch.ones(9, dtype=torch.bool).index_fill(0, given.ids_TK.unique().long().cpu(), False)
    with torch.no_grad():
        given.table_ND[unread_N] = torch.nan
    y_X = given.run(backend)
    y_X.sum().backward()
    assert torch.equal(y_X, clean_X)
    assert given.table_ND.grad is not None
    assert given.weights_TK.grad is not None
    assert not given.table_ND.grad[unread_N].any()
    assert bool(given.table_ND.grad[~unread_N].all())
    assert given.weights_TK.grad.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("groups", [None, 5])
def test_no_reads_give_no_rows_and_no_gradient(groups: int | None, backend: str) -> None:
    given = read(4, 3, 0, 2, groups, torch.float32, backend)
    y_X = given.run(backend)
    assert y_X.shape == ((0, 3) if groups is None else (0, 5, 3))
    y_X.sum().backward()
    assert given.table_ND.grad is not None
    assert not given.table_ND.grad.any()


@pytest.mark.parametrize(
    ("table", "ids", "weights"), [((4,), (2, 3), (2, 3)), ((4, 2), (6,), (6,)), ((4, 2), (2, 3), (3, 2))]
)
def test_refuses_shapes_that_do_not_fit(table: tuple[int, ...], ids: tuple[int, ...], weights: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"weighted_gather: needs table \(N, V\) and ids, weights of one shape"):
        weighted_gather(torch.zeros(table), torch.zeros(ids, dtype=torch.int64), torch.zeros(weights))


@pytest.mark.parametrize(("ids", "weights"), [(torch.float32, torch.float32), (torch.int32, torch.int64)])
def test_refuses_other_dtypes(ids: torch.dtype, weights: torch.dtype) -> None:
    message = (
        "weighted_gather: needs ids of torch.int32 or torch.int64 and table and weights of floating dtypes, got torch."
    )
    with pytest.raises(ValueError, match=message):
        weighted_gather(torch.zeros(4, 2), torch.zeros(2, 3, dtype=ids), torch.zeros(2, 3, dtype=weights))


@pytest.mark.parametrize("row", [-1, 4])
@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_refuses_ids_out_of_range(backend: str, row: int) -> None:
    ids_TK = torch.tensor([[0, 3, 1], [2, row, 0]])
    with pytest.raises(ValueError, match=f"weighted_gather: ids has {row}; allowed: 0 to 3\\."):
        weighted_gather(torch.zeros(4, 2), ids_TK, torch.zeros(2, 3), backend=backend)


def test_refuses_an_unknown_backend() -> None:
    message = r"weighted_gather: backend='cuda' is not available; allowed: auto, cpu, triton, eager, reference\."
    with pytest.raises(ValueError, match=message):
        weighted_gather(torch.zeros(4, 2), torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3), backend="cuda")
