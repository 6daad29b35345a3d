"""The query network against the formula of each normalisation, and its precision.

Letters: T tokens, D model dimension, H heads, 2 halves, P values of a half key.
"""

from __future__ import annotations

import pytest
import torch
from tolerances import assert_close
from torch import Tensor

from pkm_lightning.errors import ConfigError
from pkm_lightning.memory import QueryNetwork

NORMS = ["none", "rms", "layer", "batch"]


def network(*, norm: str, dtype: torch.dtype = torch.float64) -> QueryNetwork:
    query = QueryNetwork(dim=5, heads=3, key_dim=14, norm=norm).to(dtype)
    with torch.no_grad():
        query.projection.bias.normal_()
        for name, parameter in query.named_parameters():
            if name.startswith("norm"):
                parameter.uniform_(0.5, 1.5)
    return query


def by_definition(query: QueryNetwork, norm: str, x_TD: Tensor) -> Tensor:
    q_TF = x_TD @ query.projection.weight.T + query.projection.bias
    named = dict(query.named_parameters())
    if norm == "batch":
        mean_F, var_F = q_TF.mean(0), q_TF.var(0, unbiased=False)
        q_TF = (q_TF - mean_F) / (var_F + 1e-5).sqrt() * named["norm.weight"] + named["norm.bias"]
    if norm == "layer":
        q_THF = q_TF.view(-1, 3, 14)
        centred_THF = q_THF - q_THF.mean(-1, keepdim=True)
        deviation_TH1 = (centred_THF.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        q_TF = (centred_THF / deviation_TH1 * named["norm.weight"] + named["norm.bias"]).flatten(1)
    q_TH2P = q_TF.view(-1, 3, 2, 7)
    if norm == "rms":
        q_TH2P = q_TH2P / q_TH2P.square().mean(-1, keepdim=True).sqrt() * named["norm.weight"]
    return q_TH2P


@pytest.mark.parametrize("norm", NORMS)
def test_equals_the_formula_with_gradients(norm: str) -> None:
    query = network(norm=norm)
    x_TD = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    q_TH2P, _ = query(x_TD)
    expected_TH2P = by_definition(query, norm, x_TD)
    assert_close(q_TH2P, expected_TH2P)
    inputs = [x_TD, *query.parameters()]
    upstream_TH2P = torch.randn_like(q_TH2P)
    actual = torch.autograd.grad(q_TH2P, inputs, upstream_TH2P)
    for grad, expected in zip(actual, torch.autograd.grad(expected_TH2P, inputs, upstream_TH2P), strict=True):
        assert_close(grad, expected, kind="grad")


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_queries_are_fp32(dtype: torch.dtype, norm: str) -> None:
    query = network(norm=norm, dtype=dtype)
    assert query(torch.randn(4, 5, dtype=dtype))[0].dtype is torch.float32


@pytest.mark.parametrize("norm", NORMS)
def test_queries_are_fp32_under_autocast(norm: str) -> None:
    query = network(norm=norm, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert query(torch.randn(4, 5))[0].dtype is torch.float32


def test_initialisation() -> None:
    query = network(norm="rms")
    query.reset_parameters()
    bound = (6 / (5 + 42)) ** 0.5
    assert query.norm is not None
    assert query.projection.weight.abs().max() <= bound
    assert query.projection.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
    assert not query.projection.bias.any()
    assert bool((query.norm.weight == 1).all())


def test_refuses_an_unknown_norm() -> None:
    with pytest.raises(ConfigError, match=r"ffn.query_norm='bach' is not known; .* Did you mean 'batch'\?"):
        network(norm="bach")
