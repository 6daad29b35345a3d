"""Sorting by expert and back: the weighted sum over choices, its gradients, and nothing dropped.

Letters: K choices per token.
"""

from __future__ import annotations

import pytest
import torch
from tolerances import assert_close
from torch import Tensor

from pkm_lightning.experts import SwiGLUExperts, run_experts


def by_definition(experts: SwiGLUExperts, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    rows = []
    for x_D, ids_K, weights_K in zip(x_TD, ids_TK.tolist(), weights_TK, strict=True):
        y_D = torch.zeros_like(x_D)
        for e, weight in zip(ids_K, weights_K, strict=True):
            gate_F = x_D @ experts.gate[e]
            y_D = y_D + weight * ((gate_F * torch.sigmoid(gate_F) * (x_D @ experts.up[e])) @ experts.out[e])
        rows.append(y_D)
    return torch.stack(rows)


CHOICES = [
    torch.tensor([[0, 3], [3, 1], [1, 0], [3, 0], [4, 3]]),  # expert 2 has no token
    torch.full((6, 1), 4),  # one expert has them all
    torch.tensor([[4, 3, 2, 1, 0]]),  # one token, every expert
]


@pytest.mark.parametrize("ids_TK", CHOICES)
def test_output_and_gradients_equal_the_definition(ids_TK: Tensor) -> None:
    experts = SwiGLUExperts(n_experts=5, dim=6, hidden_dim=3, n_layers=1).double()
    x_TD = torch.randn(len(ids_TK), 6, dtype=torch.float64, requires_grad=True)
    weights_TK = torch.rand(ids_TK.shape, dtype=torch.float64, requires_grad=True)
    y_TD = run_experts(experts, x_TD, ids_TK, weights_TK)
    expected_TD = by_definition(experts, x_TD, ids_TK, weights_TK)
    assert_close(y_TD, expected_TD)
    inputs = [x_TD, weights_TK, *experts.parameters()]
    g_TD = torch.randn_like(y_TD)
    actual, expected = (torch.autograd.grad(y, inputs, g_TD) for y in (y_TD, expected_TD))
    for grad, expected_grad in zip(actual, expected, strict=True):
        assert_close(grad, expected_grad, kind="grad")


def test_the_order_of_the_sum_is_fixed() -> None:
    experts = SwiGLUExperts(n_experts=4, dim=8, hidden_dim=8, n_layers=1)
    x_TD, ids_TK = torch.randn(50, 8, requires_grad=True), torch.rand(50, 4).argsort(-1)[:, :3]
    runs = []
    for _ in range(2):
        y_TD = run_experts(experts, x_TD, ids_TK, torch.ones(50, 3))
        runs.append([y_TD, *torch.autograd.grad(y_TD.square().sum(), [x_TD, *experts.parameters()])])
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))
