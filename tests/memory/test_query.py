"""The query network against its formula, and its precision.

Letters: T tokens, D model dimension, H heads, 2 halves, E dimension of a half key.
"""

from __future__ import annotations

import pytest
import torch
from tolerances import assert_close

from pkm_lightning.memory import QueryNetwork


def network(*, norm: bool, dtype: torch.dtype = torch.float64) -> QueryNetwork:
    query = QueryNetwork(dim=5, heads=3, key_dim=14, norm=norm).to(dtype)
    with torch.no_grad():
        query.projection.bias.normal_()
        if query.norm is not None:
            query.norm.weight.uniform_(0.5, 1.5)
    return query


@pytest.mark.parametrize("norm", [False, True])
def test_equals_the_formula_with_gradients(norm: bool) -> None:
    query = network(norm=norm)
    x_TD = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    expected_TH2E = (x_TD @ query.projection.weight.T + query.projection.bias).view(4, 3, 2, 7)
    if query.norm is not None:
        rms_TH21 = expected_TH2E.square().mean(-1, keepdim=True).sqrt()
        expected_TH2E = expected_TH2E / rms_TH21 * query.norm.weight
    q_TH2E = query(x_TD)
    assert_close(q_TH2E, expected_TH2E)
    inputs = [x_TD, *query.parameters()]
    upstream_TH2E = torch.randn_like(q_TH2E)
    actual = torch.autograd.grad(q_TH2E, inputs, upstream_TH2E)
    for grad, expected in zip(actual, torch.autograd.grad(expected_TH2E, inputs, upstream_TH2E), strict=True):
        assert_close(grad, expected, kind="grad")


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_queries_are_fp32(dtype: torch.dtype, norm: bool) -> None:
    query = network(norm=norm, dtype=dtype)
    assert query(torch.randn(4, 5, dtype=dtype)).dtype is torch.float32


def test_queries_are_fp32_under_autocast() -> None:
    query = network(norm=True, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert query(torch.randn(4, 5)).dtype is torch.float32


def test_initialisation() -> None:
    query = network(norm=True)
    query.reset_parameters()
    bound = (6 / (5 + 42)) ** 0.5
    assert query.norm is not None
    assert query.projection.weight.abs().max() <= bound
    assert query.projection.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
    assert not query.projection.bias.any()
    assert bool((query.norm.weight == 1).all())
