"""Every backend of causal_convolution against the definition in fp64: outputs and gradients, documents, odd sizes."""

from __future__ import annotations

import itertools

import pytest
import torch
from op_backends import BACKENDS, device_of
from tolerances import assert_close
from torch import Tensor, library

from pkm_lightning.ops import causal_convolution

KERNELS = ["cpu", "triton"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# Sequences, tokens in front, tokens, channels, taps, dilation: fewer and more tokens in front than taps reach, one tap,
# one token, one channel, taps that reach further than the sequence, many taps, several tiles of tokens and channels.
SIZES = [
    (2, 0, 13, 37, 4, 3),
    (1, 2, 11, 5, 3, 2),
    (3, 9, 4, 16, 4, 3),
    (2, 0, 7, 1, 1, 5),
    (1, 3, 1, 70, 4, 1),
    (2, 1, 3, 3, 2, 9),
    (1, 0, 37, 3, 64, 1),
    (2, 3, 66, 70, 5, 4),
    (2, 2, 1, 300, 2, 2),
]
Sizes = tuple[int, int, int, int, int, int]
CASES = [
    *itertools.product(SIZES[:1], DTYPES, BACKENDS),
    *((sizes, DTYPES[i % 2], backend) for i, sizes in enumerate(SIZES[1:]) for backend in BACKENDS),
]


def inputs(sizes: Sizes, dtype: torch.dtype, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """Draws vectors, filters and documents of one to four tokens, whose numbers do not ascend."""
    B, front, T, D, taps, _ = sizes
    device = device_of(backend)
    doc_ids_BP = (torch.randint(4, (B, front + T)) == 0).cumsum(1) * 7 % 5
    x_BPD, weight_DL = torch.randn(B, front + T, D), torch.randn(D, taps) / taps
    parameters = [one.to(device, dtype).requires_grad_() for one in (x_BPD, weight_DL)]
    return parameters[0], parameters[1], doc_ids_BP.to(device)


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(("sizes", "dtype", "backend"), CASES)
def test_outputs_and_gradients(sizes: Sizes, dtype: torch.dtype, backend: str, documents: bool) -> None:
    x_BPD, weight_DL, doc_ids_BP = inputs(sizes, dtype, backend)
    options = {"length": sizes[2], "dilation": sizes[5]}
    docs_BP = doc_ids_BP if documents else None
    y_BTD = causal_convolution(x_BPD, weight_DL, docs_BP, **options, backend=backend)
    wide = [one.detach().cpu().double().requires_grad_() for one in (x_BPD, weight_DL)]
    wide_docs_BP = doc_ids_BP.cpu() if documents else None
    expected_BTD = causal_convolution(*wide, wide_docs_BP, **options, backend="reference")
    assert y_BTD.dtype is dtype
    assert_close(y_BTD.cpu(), expected_BTD)
    upstream_BTD = torch.randn(y_BTD.shape).to(y_BTD) / sizes[2] ** 0.5
    grads = torch.autograd.grad(y_BTD, (x_BPD, weight_DL), upstream_BTD)
    wide_grads = torch.autograd.grad(expected_BTD, wide, upstream_BTD.cpu().double())
    for grad, expected in zip(grads, wide_grads, strict=True):
        assert grad.dtype is dtype
        assert_close(grad.cpu(), expected, kind="grad")


# `eager` multiplies by a mask, which turns infinities into NaN.
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("backend", [*KERNELS, "reference"])
def test_other_documents_do_not_leak(backend: str) -> None:
    x_BPD, weight_DL, _ = inputs((1, 0, 9, 4, 3, 2), torch.float32, backend)
    doc_ids_BP = torch.tensor([[1, 1, 1, 1, 0, 0, 0, 0, 0]], device=x_BPD.device)
    with torch.no_grad():
        x_BPD[0, :4] = torch.inf
    y_BTD = causal_convolution(x_BPD, weight_DL, doc_ids_BP, length=9, dilation=2, backend=backend)
    assert y_BTD[0, 4:].isfinite().all()
    (grad_DL,) = torch.autograd.grad(y_BTD.sum(), weight_DL)
    # From each infinite token the first tap reaches another document only.
    assert grad_DL[:, 0].isfinite().all()


@pytest.mark.parametrize("backend", [*KERNELS, "reference"])
def test_taps_beyond_32_bits_count_as_zeros(backend: str) -> None:
    x_BPD, weight_DL, _ = inputs((1, 0, 3, 2, 4, 1), torch.float32, backend)
    y_BTD = causal_convolution(x_BPD, weight_DL, length=3, dilation=2**30, backend=backend)
    assert torch.equal(y_BTD, x_BPD * weight_DL[:, -1])
    (grad_BPD,) = torch.autograd.grad(y_BTD.sum(), x_BPD)
    assert torch.equal(grad_BPD, weight_DL[:, -1].expand_as(x_BPD))


@pytest.mark.parametrize("backend", KERNELS)
def test_strided_inputs_and_a_second_run_give_the_same_bits(backend: str) -> None:
    x_BPD, weight_DL, doc_ids_BP = inputs((2, 1, 70, 37, 4, 3), torch.float32, backend)
    strided = [one.detach().mT.contiguous().mT for one in (x_BPD, weight_DL, doc_ids_BP)]
    strided[0].requires_grad_(), strided[1].requires_grad_()
    options = {"length": 70, "dilation": 3, "backend": backend}
    y_BTD, other_BTD = (
        causal_convolution(x_BPD, weight_DL, doc_ids_BP, **options),
        causal_convolution(*strided, **options),
    )
    assert torch.equal(y_BTD, other_BTD)
    upstream_BTD = torch.randn(37, 70, 2).to(y_BTD).permute(2, 1, 0)
    grads = torch.autograd.grad(y_BTD, (x_BPD, weight_DL), upstream_BTD)
    others = torch.autograd.grad(other_BTD, strided[:2], upstream_BTD.contiguous())
    assert all(torch.equal(one, other) for one, other in zip(grads, others, strict=True))


@pytest.mark.parametrize("backend", KERNELS)
def test_the_operators_are_registered_completely_and_one_graph_gives_the_same_bits(backend: str) -> None:
    x_BPD, weight_DL, doc_ids_BP = inputs((2, 1, 5, 3, 2, 2), torch.bfloat16, backend)
    forward = torch.ops.pkm_lightning.causal_convolution.default
    library.opcheck(forward, (x_BPD, weight_DL, doc_ids_BP, 5, 2, backend))
    backward = torch.ops.pkm_lightning.causal_convolution_backward.default
    upstream_BTD = torch.randn(2, 5, 3).to(x_BPD)
    library.opcheck(backward, (upstream_BTD, x_BPD.detach(), weight_DL.detach(), doc_ids_BP, 2, backend))

    def loss(x_BPD: Tensor) -> Tensor:
        return causal_convolution(x_BPD, weight_DL, doc_ids_BP, length=5, dilation=2, backend=backend).square().sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    assert torch.equal(*(torch.autograd.grad(run(x_BPD), x_BPD)[0] for run in (compiled, loss)))


@pytest.mark.parametrize("backend", KERNELS)
def test_half_precision_is_not_copied_to_float32(backend: str) -> None:
    x_BPD, weight_DL, _ = inputs((1, 0, 5, 3, 2, 2), torch.bfloat16, backend)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: saved.append(one) or one, lambda one: one):
        causal_convolution(x_BPD, weight_DL, length=5, dilation=2, backend=backend)
    assert [one.data_ptr() for one in saved] == [x_BPD.data_ptr(), weight_DL.data_ptr()]


# 2**21 tokens of 1024 channels: offsets that int32 does not hold.
@pytest.mark.parametrize("front", [31, pytest.param(2**21, marks=pytest.mark.gpu)])
def test_tokens_far_in_front_change_nothing(front: int) -> None:
    tail_BPD, weight_DL, _ = inputs((1, 4, 5, 1024, 3, 2), torch.bfloat16, "triton")
    x_BPD = torch.zeros(1, front + 9, 1024).to(tail_BPD)
    x_BPD[:, front:] = tail_BPD.detach()
    x_BPD.requires_grad_()
    options = {"length": 5, "dilation": 2, "backend": "triton"}
    y_BTD, expected_BTD = (causal_convolution(one, weight_DL, **options) for one in (x_BPD, tail_BPD))
    assert torch.equal(y_BTD, expected_BTD)
    upstream_BTD = torch.randn(1, 5, 1024).to(y_BTD)
    grad_BPD, grad_DL = torch.autograd.grad(y_BTD, (x_BPD, weight_DL), upstream_BTD)
    tail_grad_BPD, tail_grad_DL = torch.autograd.grad(expected_BTD, (tail_BPD, weight_DL), upstream_BTD)
    assert torch.equal(grad_BPD[:, front:], tail_grad_BPD)
    assert not grad_BPD[:, :front].any()
    # Its tiles are others, and so is the order of its sums.
    assert_close(grad_DL, tail_grad_DL, kind="grad")


def test_runs_on_meta_tensors_and_without_tokens() -> None:
    with torch.device("meta"):
        assert causal_convolution(torch.empty(2, 5, 3), torch.empty(3, 4), length=4, dilation=2).shape == (2, 4, 3)
    for backend, sequences in itertools.product(BACKENDS, (2, 0)):
        x_BPD, weight_DL, doc_ids_BP = inputs((sequences, 3, 0, 4, 2, 1), torch.float32, backend)
        y_BTD = causal_convolution(x_BPD, weight_DL, doc_ids_BP, length=0, dilation=1, backend=backend)
        assert y_BTD.shape == (sequences, 0, 4)
        if backend != "reference":
            grads = torch.autograd.grad(y_BTD.sum(), (x_BPD, weight_DL))
            assert not any(grad.any() for grad in grads)
            assert [grad.shape for grad in grads] == [x_BPD.shape, weight_DL.shape]


def test_refusals() -> None:
    x_BPD, weight_DL = torch.zeros(2, 5, 3), torch.zeros(3, 4)
    with pytest.raises(ValueError, match=r"needs x \(B, P, D\) and weight \(D, L\) .*, got \(2, 5, 3\) and \(4, 3\)"):
        causal_convolution(x_BPD, weight_DL.T, length=5, dilation=1)
    with pytest.raises(ValueError, match=r"needs a document per token \(2, 5\), got \(2, 4\)\."):
        causal_convolution(x_BPD, weight_DL, torch.zeros(2, 4, dtype=torch.int64), length=4, dilation=1)
    for length, dilation in ((6, 1), (-1, 1), (5, 0)):
        with pytest.raises(ValueError, match=rf"a length of 0 to 5 .*, got length={length} and dilation={dilation}\."):
            causal_convolution(x_BPD, weight_DL, length=length, dilation=dilation)
    with pytest.raises(
        ValueError, match=r"backend='cuda' is not available; allowed: auto, cpu, triton, eager, reference"
    ):
        causal_convolution(x_BPD, weight_DL, length=5, dilation=1, backend="cuda")
