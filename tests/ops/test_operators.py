"""Operators: who sees them, their gradients past the dispatcher, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from pkm_lightning.ops.operators import Operator, operator

calls: list[str] = []


@operator("pkm_lightning_tests::scaled")
def scaled(x: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    calls.append("forward")
    return x.detach() * factor, torch.zeros(2, dtype=torch.int32)


@operator("pkm_lightning_tests::scaled_backward")
def scaled_backward(grad: Tensor, factor: float) -> Tensor:
    calls.append("backward")
    return grad * factor


@scaled.register_fake
def _(x: Tensor, factor: float) -> tuple[Tensor, Tensor]:
    calls.append("fake")
    return torch.empty_like(x), x.new_empty(2, dtype=torch.int32)


@scaled_backward.register_fake
def _(grad: Tensor, factor: float) -> Tensor:
    return torch.empty_like(grad)


def _setup(ctx: Any, inputs: tuple[Tensor, float], output: tuple[Tensor, Tensor]) -> None:
    ctx.factor = inputs[1]
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _integers: None) -> tuple[Tensor, None]:
    return scaled_backward(grad, ctx.factor), None


scaled.register_autograd(_backward, setup_context=_setup)


@pytest.fixture(autouse=True)
def _no_calls() -> None:
    calls.clear()


def test_gradients_with_and_without_the_dispatcher() -> None:
    x = torch.randn(3, requires_grad=True)
    for way in (scaled, scaled.registered):
        y, integers = way(x, 2.0)
        assert y.requires_grad
        assert not integers.requires_grad
        assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.full((3,), 2.0))
    assert calls == ["forward", "backward"] * 2
    assert not scaled(x.detach(), 2.0)[0].requires_grad
    with torch.no_grad():
        assert not scaled(x, 2.0)[0].requires_grad


def test_modes_compilers_and_tensors_without_memory_see_the_operator() -> None:
    x = torch.randn(3, requires_grad=True)
    with FlopCounterMode(display=False) as counter, pytest.MonkeyPatch.context() as patch:
        formulas: dict[Any, Any] = counter.flop_registry
        patch.setitem(formulas, torch.ops.pkm_lightning_tests.scaled_backward, lambda *_, **__: 7)
        scaled(x, 2.0)[0].sum().backward()
    assert counter.get_total_flops() == 7
    calls.clear()
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(x)
    # A fake tensor is one outside of its mode, too.
    for y in (scaled(fake, 2.0)[0], scaled(torch.empty(3, device="meta"), 2.0)[0]):
        assert y.shape == (3,)
    compiled = torch.compile(lambda x: scaled(x, 2.0)[0] + 1, backend="aot_eager", fullgraph=True)
    assert "forward" not in calls
    assert torch.equal(compiled(x), x * 2 + 1)


def test_a_gradient_is_not_differentiated_again() -> None:
    x = torch.randn(3, requires_grad=True)
    (grad,) = torch.autograd.grad((scaled(x, 2.0)[0] * x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


def test_an_operator_without_a_gradient_says_so() -> None:
    x = torch.randn(3, requires_grad=True)
    y = scaled_backward(x, 2.0)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        y.sum().backward()
    assert isinstance(scaled_backward, Operator)
