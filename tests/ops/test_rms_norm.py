"""Every backend of rms_norm and rms_norm_dot against the formulas in fp64: values and every gradient, odd sizes.

Letters: G equal parts of a vector.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from op_backends import BACKENDS, device_of
from tolerances import assert_close
from torch import Tensor, library

from pkm_lightning.ops import rms_norm, rms_norm_dot
from pkm_lightning.ops.backends import load_kernels
from pkm_lightning.ops.rms_norm.operator import LARGEST_PART

KERNELS = ["cpu", "triton"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# Shape of the vectors, groups: one and several parts, parts of one value, one vector, many vectors, a part that is
# wider than a usual tile of the GPU's kernels, and one that fills it.
SIZES: list[tuple[tuple[int, ...], int]] = [
    *(((2, 7, 37), 1), ((5, 12), 3), ((3, 4), 4), ((12,), 2), ((70, 2, 6), 2), ((5, 2300), 1), ((3, 4096), 2)),
]
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


def inputs(shape: tuple[int, ...], dtype: torch.dtype, op: Any, device: str = "cpu") -> list[Tensor]:
    """Draws vectors of which one is zero and one is large, and gains of the size of 1 / values per vector."""
    vectors, scale_T1 = 1 if op is rms_norm else 2, torch.ones(shape[:-1]).flatten()
    scale_T1[0], scale_T1[-1] = 0, 100
    drawn = [(torch.randn(shape) * scale_T1.view(*shape[:-1], 1)).to(dtype) for _ in range(vectors)]
    gain_D = torch.randn(shape[-1]) / (1 if vectors == 1 else shape[-1])
    return [one.to(device).requires_grad_() for one in (*drawn, gain_D.to(dtype))]


def assert_formula(op: Any, tensors: list[Tensor], groups: int, backend: str) -> None:
    """Asserts that the value and the gradients of all tensors are those of the formula, in their dtypes."""
    value, expected = op(*tensors, groups=groups, eps=EPS, backend=backend), formula(tensors, groups)
    dtype = tensors[0].dtype
    assert value.dtype is (dtype if op is rms_norm else torch.promote_types(dtype, torch.float32))
    assert value.shape == expected.shape
    assert_close(value.to(dtype), expected)
    upstream = torch.randn_like(value) / value.shape[0] ** 0.5
    grads = torch.autograd.grad(value, tensors, upstream)
    expected_grads = torch.autograd.grad(expected, tensors, upstream.double())
    for tensor, grad, expected_grad in zip(tensors, grads, expected_grads, strict=True):
        assert grad.dtype is tensor.dtype
        assert_close(grad, expected_grad, kind="grad")


@pytest.mark.parametrize("op", [rms_norm, rms_norm_dot])
@pytest.mark.parametrize(("sizes", "dtype", "backend"), CASES)
def test_values_and_gradients(sizes: tuple[tuple[int, ...], int], dtype: torch.dtype, backend: str, op: Any) -> None:
    shape, groups = sizes
    assert_formula(op, inputs(shape, dtype, op, device_of(backend)), groups, backend)


@pytest.mark.parametrize("op", [rms_norm, rms_norm_dot])
@pytest.mark.parametrize("backend", KERNELS)
def test_tensors_of_several_dtypes(backend: str, op: Any) -> None:
    tensors = inputs((6, 12), torch.float32, op, device_of(backend))
    dtypes = [torch.bfloat16, torch.float16, torch.float32][-len(tensors) :]
    mixed = [one.detach().to(dtype).requires_grad_() for one, dtype in zip(tensors, dtypes, strict=True)]
    assert_formula(op, mixed, 3, backend)


@pytest.mark.parametrize("op", [rms_norm, rms_norm_dot])
def test_chunks_of_many_tiles(op: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = load_kernels("rms_norm", "triton")
    monkeypatch.setattr(kernels, "_WARPS", 3 * 2 * 4)  # three chunks for each of two parts
    assert_formula(op, inputs((41, 600), torch.float32, op, device_of("triton")), 2, "triton")
    per_chunk, sums_XGC = kernels._chunks(41, torch.empty(2, 300), kernels._sizes(torch.empty(2, 300)))
    assert (per_chunk, sums_XGC.shape) == (16, (3, 2, 300))


@pytest.mark.parametrize("op", [rms_norm, rms_norm_dot])
def test_parts_too_large_for_a_kernel_go_to_eager(op: Any) -> None:
    tensors = inputs((2, 2 * LARGEST_PART["triton"] + 2), torch.float32, op, device_of("triton"))
    value, expected = (op(*tensors, groups=2, eps=EPS, backend=backend) for backend in ("triton", "eager"))
    assert torch.equal(value, expected)


@pytest.mark.parametrize("op", [rms_norm, rms_norm_dot])
@pytest.mark.parametrize("backend", KERNELS)
def test_strided_inputs_and_a_second_run_give_the_same_bits(backend: str, op: Any) -> None:
    tensors = inputs((9, 12), torch.float32, op, device_of(backend))
    strided = [one.detach().T.contiguous().T.requires_grad_() for one in tensors[:-1]]
    strided.append(torch.stack([tensors[-1].detach()] * 2, 1)[:, 0].requires_grad_())
    first, second = (op(*one, groups=3, eps=EPS, backend=backend) for one in (tensors, strided))
    assert torch.equal(first, second)
    upstream = torch.randn_like(first).T.contiguous().T
    grads, others = torch.autograd.grad(first, tensors, upstream), torch.autograd.grad(second, strided, upstream)
    assert all(torch.equal(one, other) for one, other in zip(grads, others, strict=True))


@pytest.mark.parametrize("op", [rms_norm, rms_norm_dot])
@pytest.mark.parametrize("backend", KERNELS)
def test_one_graph_gives_the_same_bits(backend: str, op: Any) -> None:
    tensors = inputs((5, 12), torch.bfloat16, op, device_of(backend))

    def loss(*tensors: Tensor) -> Tensor:
        result: Tensor = op(*tensors, groups=3, eps=EPS, backend=backend).square().sum()
        return result

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    first, second = (torch.autograd.grad(run(*tensors), tensors) for run in (compiled, loss))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.mark.parametrize("backend", KERNELS)
def test_the_operators_are_registered_completely(backend: str) -> None:
    drawn = [torch.randn(shape, device=device_of(backend)) for shape in ((5, 1, 6), (5, 1, 6), (6,))]
    x_TD, y_TD, gain_D, how = drawn[0].bfloat16(), drawn[1].bfloat16(), drawn[2], (2, EPS, backend)
    ops = torch.ops.pkm_lightning
    roots_TG = ops.rms_norm(x_TD, gain_D, *how)[1]
    dots_TG, roots_2TG = ops.rms_norm_dot(x_TD, y_TD, gain_D, *how)
    learned = [one.clone().requires_grad_() for one in (x_TD, y_TD, gain_D)]
    library.opcheck(ops.rms_norm.default, (learned[0], learned[2], *how))
    library.opcheck(ops.rms_norm_dot.default, (*learned, *how))
    library.opcheck(ops.rms_norm_backward.default, (y_TD, x_TD, gain_D, roots_TG, 2, backend))
    saved = (x_TD, y_TD, gain_D, dots_TG, roots_2TG)
    library.opcheck(ops.rms_norm_dot_backward.default, (dots_TG, *saved, 2, backend))


def test_runs_on_meta_tensors_and_without_vectors() -> None:
    for device, backend in (("meta", "auto"), *((device_of(backend), backend) for backend in BACKENDS)):
        with torch.device(device):
            x_TD, gain_D = torch.empty(0, 6, requires_grad=True), torch.empty(6, requires_grad=True)
            y_TD = rms_norm(x_TD, gain_D, groups=2, eps=EPS, backend=backend)
            dots_TG = rms_norm_dot(x_TD, x_TD, gain_D, groups=2, eps=EPS, backend=backend)
            assert (y_TD.shape, dots_TG.shape) == ((0, 6), (0, 2))
            for value in (y_TD, dots_TG):
                gain_grad_D = torch.autograd.grad(value.sum(), gain_D)[0]
                assert gain_grad_D.shape == (6,)
                assert device == "meta" or not gain_grad_D.any()


def test_refusals() -> None:
    x_TD, gain_D = torch.zeros(4, 6), torch.zeros(6)
    for groups in (0, 4):
        with pytest.raises(ValueError, match=rf"groups that divide D, got \(4, 6\), \(6,\) and groups={groups}\."):
            rms_norm(x_TD, gain_D, groups=groups, eps=EPS)
    with pytest.raises(ValueError, match=r"vectors of one shape .*, got \(4, 6\), \(3, 6\), \(6,\) and groups=1\."):
        rms_norm_dot(x_TD, x_TD[:3], gain_D, groups=1, eps=EPS)
    with pytest.raises(ValueError, match=r"of floating dtypes, got torch\.int64, torch\.float32\."):
        rms_norm(x_TD.long(), gain_D, groups=1, eps=EPS)
    with pytest.raises(ValueError, match=r"rms_norm: backend='fused' is not available; allowed: auto, cpu, triton, "):
        rms_norm(x_TD, gain_D, groups=1, eps=EPS, backend="fused")
