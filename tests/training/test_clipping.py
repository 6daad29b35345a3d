"""Clipping by norm against torch's own."""

from __future__ import annotations

import pytest
import torch
from tolerances import assert_close
from torch import nn

from pkm_lightning.training import clipping
from pkm_lightning.training.clipping import clip_by_norm, norm_limit


def parameters() -> list[nn.Parameter]:
    """Three with gradients, one without; the same at every call."""
    torch.manual_seed(3)
    made = [nn.Parameter(torch.zeros(shape)) for shape in ((5, 3), (7,), (), (2, 2))]
    for parameter in made[:3]:
        parameter.grad = torch.randn_like(parameter)
    return made


@pytest.mark.parametrize("max_norm", [0.5, 1.0, 100.0])
def test_equals_torch(max_norm: float) -> None:
    ours, theirs = parameters(), parameters()
    norm = clip_by_norm(ours, max_norm)
    assert_close(norm, torch.nn.utils.clip_grad_norm_(theirs, max_norm))
    for actual, expected in zip(ours[:3], theirs[:3], strict=True):
        assert actual.grad is not None
        assert expected.grad is not None
        assert_close(actual.grad, expected.grad)
    assert ours[3].grad is None


def test_none_only_measures() -> None:
    ours, untouched = parameters(), parameters()
    grads = [p.grad for p in untouched[:3] if p.grad is not None]
    expected = torch.cat([grad.flatten() for grad in grads]).norm()
    assert_close(clip_by_norm(ours, None), expected)
    for actual, grad in zip(ours[:3], grads, strict=True):
        assert actual.grad is not None
        assert torch.equal(actual.grad, grad)


def test_no_gradients_have_norm_zero() -> None:
    assert clip_by_norm([nn.Parameter(torch.ones(3))], 1.0) == 0


@pytest.mark.parametrize(("configured", "limit"), [(None, None), (0, None), (0.0, None), (0.5, 0.5)])
def test_a_limit_of_0_means_no_clipping_as_in_lightning_and_deepspeed(
    configured: float | None, limit: float | None
) -> None:
    assert norm_limit(configured) == limit


class Placed(torch.Tensor):
    """A gradient on a mesh, as a `DTensor` is; without processes."""

    device_mesh: str


def test_norms_of_several_meshes_are_those_of_one_vector(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clipping, "DTensor", Placed)
    ours, theirs = parameters(), parameters()
    for parameter, mesh in zip(ours, ("dense", "experts"), strict=False):
        assert parameter.grad is not None
        parameter.grad = parameter.grad.as_subclass(Placed)
        parameter.grad.device_mesh = mesh  # type: ignore[attr-defined]
    norm = clip_by_norm(ours, 0.5)
    assert_close(norm.as_subclass(torch.Tensor), torch.nn.utils.clip_grad_norm_(theirs, 0.5))
    for actual, expected in zip(ours[:3], theirs[:3], strict=True):
        assert actual.grad is not None
        assert expected.grad is not None
        assert_close(actual.grad.as_subclass(torch.Tensor), expected.grad)
