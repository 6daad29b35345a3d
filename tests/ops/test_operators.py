"""Operators: who sees them, their gradients past the dispatcher, and what they refuse."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from pkm_lightning.memory import ValueTable
from pkm_lightning.memory.norm import RMSNorm, normalised
from pkm_lightning.model.loss import token_nll
from pkm_lightning.ops.operators import Operator, operator

calls: list[str] = []


class Unembedding(torch.nn.Module):
    """What `token_nll` needs of a model."""

    def unembed(self, hidden: Tensor) -> Tensor:
        return hidden


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


@pytest.mark.parametrize("function", [lambda y, x: (y[:, :5] * x).sum(), lambda y, _: y.sum()], ids=["product", "sum"])
@pytest.mark.parametrize(
    "layer", [RMSNorm(5), lambda x: token_nll(Unembedding(), x, torch.zeros(3, dtype=torch.int64))]
)
def test_a_gradient_is_not_differentiated_again(layer: Any, function: Any) -> None:
    x = torch.randn(3, 5, requires_grad=True)
    y = function(layer(x).view(3, -1), x)
    (grad,) = torch.autograd.grad(y, x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        torch.autograd.grad(grad.sum(), x, allow_unused=True)


def test_a_gradient_that_depends_on_nothing_is_a_constant() -> None:
    x = torch.randn(3, requires_grad=True)
    (grad,) = torch.autograd.grad(scaled(x, 2.0)[0].sum(), x, create_graph=True)
    assert torch.autograd.grad((grad * x).sum(), x)[0].tolist() == [2.0] * 3


def test_outputs_may_be_changed_in_place() -> None:
    x = torch.randn(2, 8, requires_grad=True)
    y = RMSNorm(8)(x)
    y += 1
    y.sum().backward()
    table = ValueTable(rows=16, dim=8, learning="rows")
    read = table(torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 2, requires_grad=True))
    read += 1
    read.sum().backward()


def test_transforms_take_what_torch_can_transform() -> None:
    x, norm = torch.randn(2, 8), RMSNorm(8)
    expected = nn.RMSNorm(8)
    tangent = torch.func.jvp(norm, (x,), (x + 1,))[1]
    assert torch.allclose(tangent, torch.func.jvp(expected, (x,), (x + 1,))[1], atol=1e-6)
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(norm(forward_ad.make_dual(x, x + 1)))
    assert torch.allclose(dual.tangent, tangent)
    gradient = torch.func.grad(lambda x: norm(x)[0, 0])(x)
    assert torch.allclose(gradient, torch.func.grad(lambda x: expected(x)[0, 0])(x), atol=1e-6)
    # Without the check of shapes that the tests add: the kernel would read beyond the gain.
    with pytest.raises(RuntimeError, match="normalized_shape"):
        inspect.unwrap(normalised)(torch.randn(2, 16), torch.ones(8), None)
    assert torch.equal(RMSNorm(8, elementwise_affine=False)(x), nn.RMSNorm(8, elementwise_affine=False)(x))


def test_an_operator_without_a_gradient_says_so() -> None:
    x = torch.randn(3, requires_grad=True)
    y = scaled_backward(x, 2.0)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        y.sum().backward()
    assert isinstance(scaled_backward, Operator)
