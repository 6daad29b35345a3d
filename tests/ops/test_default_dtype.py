"""Ops under other default dtypes: Lightning sets that of the weights in a forward (`trainer.precision=bf16-true`).

Letters: N rows, V values per row, P values of a half key.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from row_reads import read
from torch import Tensor

from pkm_lightning.ops import gathered_dot, half_topk, product_topk, ranked_topk, weighted_gather
from pkm_lightning.ops.row_update import UpdateStep, find_rule, new_state, row_gradient_norm, row_gradient_squares
from pkm_lightning.ops.row_update import row_update as update

#: A call with everything that is random already drawn.
Call = Callable[[], tuple[Tensor, ...]]


def gather(table_NV: Tensor, backend: str) -> Call:
    ids_TK, groups_TK, weights_TK = torch.randint(9, (4, 3)), torch.randint(2, (4, 3)), torch.randn(4, 3)

    def call() -> tuple[Tensor, ...]:
        sums_TV = weighted_gather(table_NV, ids_TK, weights_TK, backend=backend)
        grouped_TGV = weighted_gather(table_NV, ids_TK, weights_TK, groups_TK=groups_TK, n_groups=2, backend=backend)
        return sums_TV, grouped_TGV, *torch.autograd.grad(grouped_TGV.sum() + sums_TV.sum(), table_NV)

    return call


def dot(table_NV: Tensor, backend: str) -> Call:
    ids_TK, x_TV = torch.randint(9, (4, 3)), table_NV[:4].detach().requires_grad_()

    def call() -> tuple[Tensor, ...]:
        dots_TK = gathered_dot(table_NV, x_TV, ids_TK, backend=backend)
        return dots_TK, *torch.autograd.grad(dots_TK.sum(), (table_NV, x_TV))

    return call


def best(table_NV: Tensor, backend: str) -> Call:
    q_1TP, keys_1SP = table_NV.detach().float()[None], torch.randn(1, 7, table_NV.shape[1])
    scores_1TS = q_1TP @ keys_1SP.mT
    return lambda: (
        *half_topk(q_1TP, keys_1SP, 3, backend=backend),
        *product_topk(scores_1TS, scores_1TS.flip(-1), 3, backend=backend),
        ranked_topk(scores_1TS, 3, backend=backend),
    )


def rows(table_NV: Tensor, backend: str) -> Call:
    reads = read(9, table_NV.shape[1], 20, table_NV.dtype)
    rule = find_rule("lazy_adam")(betas=(0.8, 0.9), eps=1e-6)

    def call() -> tuple[Tensor, ...]:
        updated_NV = table_NV.detach().clone()
        state = new_state(find_rule("lazy_adam"), updated_NV)
        update(updated_NV, reads, rule, UpdateStep(lr=0.1, number=1, seed=7), state, backend=backend)
        norms = row_gradient_norm(reads, backend=backend), row_gradient_squares(reads, backend=backend)
        return updated_NV, *state.values(), *norms

    return call


@pytest.fixture(autouse=True)
def _default_dtype() -> Iterator[None]:
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("op", [gather, dot, best, rows])
def test_no_op_depends_on_the_default_dtype(
    op: Callable[[Tensor, str], Call], backend: str, dtype: torch.dtype
) -> None:
    call = op(torch.randn(9, 10).to(dtype).requires_grad_(), backend)
    expected = call()
    for default in (torch.bfloat16, torch.float64):
        torch.set_default_dtype(default)
        for result, wanted in zip(call(), expected, strict=True):
            assert result.dtype is wanted.dtype
            assert torch.equal(result, wanted), f"{default}"
