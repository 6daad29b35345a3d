"""Half scores against a loop over heads and sub-keys; they stay fp32 whatever the model's precision.

Letters: T tokens, H heads, 2 halves, S sub-keys per half, P values of a half key.
"""

from __future__ import annotations

import pytest
import torch
from tolerances import assert_close
from torch import Tensor

from pkm_lightning.memory import ProductKeys


def product_keys(*, norm: bool, dtype: torch.dtype = torch.float64) -> ProductKeys:
    keys = ProductKeys(heads=3, n_keys=7, key_dim=10, norm=norm).to(dtype)
    if keys.norm is not None:
        torch.nn.init.uniform_(keys.norm.weight, 0.5, 1.5)
    return keys


def by_definition(keys: ProductKeys, q_TH2P: Tensor, half: int) -> Tensor:
    """Computes the scores head-major, (H, T, S)."""
    scores = []
    for token, head in torch.cartesian_prod(torch.arange(len(q_TH2P)), torch.arange(3)).tolist():
        for key_P in keys.keys[head, half]:
            if keys.norm is not None:
                key_P = key_P / key_P.square().mean().sqrt() * keys.norm.weight / 5**0.5
            scores.append(q_TH2P[token, head, half] @ key_P)
    return torch.stack(scores).view(len(q_TH2P), 3, 7).transpose(0, 1)


@pytest.mark.parametrize("norm", [False, True])
def test_equals_the_definition_with_gradients(norm: bool) -> None:
    keys = product_keys(norm=norm)
    q_TH2P = torch.randn(4, 3, 2, 5, dtype=torch.float64, requires_grad=True)
    inputs = [q_TH2P, *keys.parameters()]
    for half, scores_HTS in enumerate(keys(q_TH2P)):
        expected_HTS = by_definition(keys, q_TH2P, half)
        assert_close(scores_HTS, expected_HTS)
        upstream_HTS = torch.randn_like(expected_HTS)
        actual = torch.autograd.grad(scores_HTS, inputs, upstream_HTS, retain_graph=True)
        for grad, expected in zip(actual, torch.autograd.grad(expected_HTS, inputs, upstream_HTS), strict=True):
            assert_close(grad, expected, kind="grad")


@pytest.mark.parametrize("norm", [False, True])
def test_scores_are_fp32_products_of_bf16_keys(norm: bool) -> None:
    keys = product_keys(norm=norm, dtype=torch.bfloat16)
    q_TH2P = torch.randn(4, 3, 2, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores_HTS = keys(q_TH2P)[1]
    assert scores_HTS.dtype is torch.float32
    exact = product_keys(norm=norm)
    exact.load_state_dict(keys.state_dict())
    assert_close(scores_HTS, exact(q_TH2P.double())[1])


def test_initialisation() -> None:
    keys = ProductKeys(heads=2, n_keys=64, key_dim=32, norm=True)
    assert keys.norm is not None
    assert keys.keys.abs().max() <= 32**-0.5
    assert keys.keys.std().item() == pytest.approx((32 * 3) ** -0.5, rel=0.05)
    assert bool((keys.norm.weight == 1).all())
