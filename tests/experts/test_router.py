"""The router's logits are fp32 whatever the precision around them."""

from __future__ import annotations

import pytest
import torch
from tolerances import assert_close

from pkm_lightning.experts import Router


def test_logits_and_gradients_are_a_linear_map() -> None:
    router = Router(dim=7, n_experts=5).double()
    x_TD = torch.randn(9, 7, dtype=torch.float64, requires_grad=True)
    logits_TE = router(x_TD)
    expected_TE = torch.stack([torch.stack([x_D @ weight_D for weight_D in router.weight]) for x_D in x_TD])
    assert logits_TE.dtype is torch.float64
    assert_close(logits_TE, expected_TE)
    g_TE = torch.randn_like(logits_TE)
    inputs = (x_TD, router.weight)
    pairs = zip(
        torch.autograd.grad(logits_TE, inputs, g_TE), torch.autograd.grad(expected_TE, inputs, g_TE), strict=True
    )
    for grad, expected in pairs:
        assert_close(grad, expected, kind="grad")


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("autocast", [False, True])
def test_logits_are_exact_to_fp32_in_bf16_models_and_under_autocast(weights: torch.dtype, autocast: bool) -> None:
    router = Router(dim=64, n_experts=16).to(weights)
    x_TD = torch.randn(20, 64).to(weights)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits_TE = router(x_TD)
    assert logits_TE.dtype is torch.float32
    assert_close(logits_TE, x_TD.double() @ router.weight.double().T)


def test_initialisation_gives_logits_of_unit_variance() -> None:
    logits_TE = Router(dim=64, n_experts=100)(torch.randn(200, 64))
    assert logits_TE.std().item() == pytest.approx(1, rel=0.05)
