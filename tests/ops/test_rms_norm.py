"""Every backend of rms_norm and rms_norm_dot against the formulas in fp64: values and every gradient, odd sizes.

Letters: G equal parts of a vector.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from tolerances import assert_close
from torch import Tensor, library

from pkm_lightning.ops import rms_norm, rms_norm_dot

BACKENDS = ["cpu", "eager", "reference"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# Shape of the vectors, groups: one and several parts, parts of one value, one vector, many vectors.
SIZES: list[tuple[tuple[int, ...], int]] = [((2, 7, 37), 1), ((5, 12), 3), ((3, 4), 4), ((70, 2, 6), 2)]
CASES = [
    *itertools.product(SIZES[:1], DTYPES, BACKENDS),
    *((sizes, DTYPES[i % 2], backend) for i, sizes in enumerate(SIZES[1:]) for backend in BACKENDS),
]
EPS = 1e-3


def formula(tensors: list[Tensor], groups: int) -> Tensor:
    """Computes the norm of one vector, or the inner products of two, in fp64."""
    *vectors, gain_D = (one.double() for one in tensors)
    normed = [
        (one / (one.square().mean(-1, keepdim=True) + EPS).sqrt()).flatten(-2)
        for one in (vector.unflatten(-1, (groups, -1)) for vector in vectors)
    ]
    if len(vectors) == 1:
        return normed[0] * gain_D
    return (normed[0] * normed[1] * gain_D).unflatten(-1, (groups, -1)).sum(-1)


def inputs(shape: tuple[int, ...], dtype: torch.dtype, vectors: int) -> list[Tensor]:
    """Draws vectors of which one is zero and one is large, and gains of the size of 1 / values per vector."""
    scale_T1 = torch.ones(shape[:-1]).flatten()
    scale_T1[0], scale_T1[-1] = 0, 100
    drawn = [(torch.randn(shape) * scale_T1.view(*shape[:-1], 1)).to(dtype) for _ in range(vectors)]
    gain_D = torch.randn(shape[-1]) / (1 if vectors == 1 else shape[-1])
    return [one.requires_grad_() for one in (*drawn, gain_D.to(dtype))]


@pytest.mark.parametrize("op", [rms_norm, rms_norm_dot])
@pytest.mark.parametrize(("sizes", "dtype", "backend"), CASES)
def test_values_and_gradients(sizes: tuple[tuple[int, ...], int], dtype: torch.dtype, backend: str, op: Any) -> None:
    shape, groups = sizes
    tensors = inputs(shape, dtype, vectors=1 if op is rms_norm else 2)
    value, expected = op(*tensors, groups=groups, eps=EPS, backend=backend), formula(tensors, groups)
    assert value.dtype is (dtype if op is rms_norm else torch.promote_types(dtype, torch.float32))
    assert value.shape == expected.shape
    assert_close(value.to(dtype), expected)
    upstream = torch.randn_like(value) / shape[0] ** 0.5
    grads = torch.autograd.grad(value, tensors, upstream)
    for grad, expected_grad in zip(grads, torch.autograd.grad(expected, tensors, upstream.double()), strict=True):
        assert grad.dtype is dtype
        assert_close(grad, expected_grad, kind="grad")


@pytest.mark.parametrize("op", [rms_norm, rms_norm_dot])
def test_strided_inputs_and_a_second_run_give_the_same_bits(op: Any) -> None:
    tensors = inputs((9, 12), torch.float32, vectors=1 if op is rms_norm else 2)
    strided = [one.detach().T.contiguous().T.requires_grad_() for one in tensors[:-1]]
    strided.append(torch.stack([tensors[-1].detach()] * 2, 1)[:, 0].requires_grad_())
    first, second = (op(*one, groups=3, eps=EPS, backend="cpu") for one in (tensors, strided))
    assert torch.equal(first, second)
    upstream = torch.randn_like(first).T.contiguous().T
    grads, others = torch.autograd.grad(first, tensors, upstream), torch.autograd.grad(second, strided, upstream)
    assert all(torch.equal(one, other) for one, other in zip(grads, others, strict=True))


@pytest.mark.parametrize("op", [rms_norm, rms_norm_dot])
def test_one_graph_gives_the_same_bits(op: Any) -> None:
    tensors = inputs((5, 12), torch.float32, vectors=1 if op is rms_norm else 2)

    def loss(*tensors: Tensor) -> Tensor:
        result: Tensor = op(*tensors, groups=3, eps=EPS, backend="cpu").square().sum()
        return result

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    first, second = (torch.autograd.grad(run(*tensors), tensors) for run in (compiled, loss))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_the_operators_are_registered_completely() -> None:
    x_TGC, y_TGC, gain_GC = torch.randn(5, 2, 3), torch.randn(5, 2, 3), torch.randn(2, 3)
    ops = torch.ops.pkm_lightning
    roots_TG = ops.rms_norm(x_TGC, gain_GC, EPS)[1]
    dots_TG, roots_2TG = ops.rms_norm_dot(x_TGC, y_TGC, gain_GC, EPS)
    learned = [one.clone().requires_grad_() for one in (x_TGC, y_TGC, gain_GC)]
    library.opcheck(ops.rms_norm.default, (learned[0], learned[2], EPS))
    library.opcheck(ops.rms_norm_dot.default, (*learned, EPS))
    library.opcheck(ops.rms_norm_backward.default, (y_TGC, x_TGC, gain_GC, roots_TG))
    library.opcheck(ops.rms_norm_dot_backward.default, (dots_TG, x_TGC, y_TGC, gain_GC, dots_TG, roots_2TG))


def test_runs_on_meta_tensors_and_without_vectors() -> None:
    for device, backend in (("meta", "auto"), *(("cpu", backend) for backend in BACKENDS)):
        with torch.device(device):
            x_TD, gain_D = torch.empty(0, 6, requires_grad=True), torch.empty(6, requires_grad=True)
            assert rms_norm(x_TD, gain_D, groups=2, eps=EPS, backend=backend).shape == (0, 6)
            dots_TG = rms_norm_dot(x_TD, x_TD, gain_D, groups=2, eps=EPS, backend=backend)
            assert dots_TG.shape == (0, 2)
            assert torch.autograd.grad(dots_TG.sum(), gain_D)[0].shape == (6,)


def test_refusals() -> None:
    x_TD, gain_D = torch.zeros(4, 6), torch.zeros(6)
    for groups in (0, 4):
        with pytest.raises(ValueError, match=rf"groups that divide D, got \(4, 6\), \(6,\) and groups={groups}\."):
            rms_norm(x_TD, gain_D, groups=groups, eps=EPS)
    with pytest.raises(ValueError, match=r"vectors of one shape .*, got \(4, 6\), \(3, 6\), \(6,\) and groups=1\."):
        rms_norm_dot(x_TD, x_TD[:3], gain_D, groups=1, eps=EPS)
    with pytest.raises(ValueError, match=r"of floating dtypes, got torch\.int64, torch\.float32\."):
        rms_norm(x_TD.long(), gain_D, groups=1, eps=EPS)
    with pytest.raises(ValueError, match=r"rms_norm: backend='triton' is not available; allowed: auto, cpu, eager"):
        rms_norm(x_TD, gain_D, groups=1, eps=EPS, backend="triton")
