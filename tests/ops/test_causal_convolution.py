"""Every backend of causal_convolution against the definition in fp64: outputs and gradients, documents, odd sizes."""

from __future__ import annotations

import itertools

import pytest
import torch
from tolerances import assert_close
from torch import Tensor, library

from pkm_lightning.ops import causal_convolution

BACKENDS = ["cpu", "eager", "reference"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# Sequences, tokens in front, tokens, channels, taps, dilation: fewer and more tokens in front than taps reach, one tap,
# one token, one channel, taps that reach further than the sequence.
SIZES = [
    (2, 0, 13, 37, 4, 3),
    (1, 2, 11, 5, 3, 2),
    (3, 9, 4, 16, 4, 3),
    (2, 0, 7, 1, 1, 5),
    (1, 3, 1, 70, 4, 1),
    (2, 1, 3, 3, 2, 9),
]
Sizes = tuple[int, int, int, int, int, int]
CASES = [
    *itertools.product(SIZES[:1], DTYPES, BACKENDS),
    *((sizes, DTYPES[i % 2], backend) for i, sizes in enumerate(SIZES[1:]) for backend in BACKENDS),
]


def inputs(sizes: Sizes, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Draws vectors, filters and documents of one to four tokens, whose numbers do not ascend."""
    B, front, T, D, taps, _ = sizes
    doc_ids_BP = (torch.randint(4, (B, front + T)) == 0).cumsum(1) * 7 % 5
    x_BPD, weight_DL = torch.randn(B, front + T, D), torch.randn(D, taps) / taps
    return x_BPD.to(dtype).requires_grad_(), weight_DL.to(dtype).requires_grad_(), doc_ids_BP


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize(("sizes", "dtype", "backend"), CASES)
def test_outputs_and_gradients(sizes: Sizes, dtype: torch.dtype, backend: str, documents: bool) -> None:
    x_BPD, weight_DL, doc_ids_BP = inputs(sizes, dtype)
    options = {"length": sizes[2], "dilation": sizes[5]}
    docs_BP = doc_ids_BP if documents else None
    y_BTD = causal_convolution(x_BPD, weight_DL, docs_BP, **options, backend=backend)
    wide = [one.detach().double().requires_grad_() for one in (x_BPD, weight_DL)]
    expected_BTD = causal_convolution(*wide, docs_BP, **options, backend="reference")
    assert y_BTD.dtype is dtype
    assert_close(y_BTD, expected_BTD)
    upstream_BTD = torch.randn_like(y_BTD) / sizes[2] ** 0.5
    grads = torch.autograd.grad(y_BTD, (x_BPD, weight_DL), upstream_BTD)
    for grad, expected in zip(grads, torch.autograd.grad(expected_BTD, wide, upstream_BTD.double()), strict=True):
        assert grad.dtype is dtype
        assert_close(grad, expected, kind="grad")


# `eager` multiplies by a mask, which turns infinities into NaN.
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_other_documents_do_not_leak(backend: str) -> None:
    x_BPD, weight_DL, _ = inputs((1, 0, 9, 4, 3, 2), torch.float32)
    doc_ids_BP = torch.tensor([[1, 1, 1, 1, 0, 0, 0, 0, 0]])
    with torch.no_grad():
        x_BPD[0, :4] = torch.inf
    y_BTD = causal_convolution(x_BPD, weight_DL, doc_ids_BP, length=9, dilation=2, backend=backend)
    assert y_BTD[0, 4:].isfinite().all()


def test_strided_inputs_and_a_second_run_give_the_same_bits() -> None:
    x_BPD, weight_DL, doc_ids_BP = inputs(SIZES[0], torch.float32)
    strided = [one.detach().mT.contiguous().mT for one in (x_BPD, weight_DL, doc_ids_BP)]
    strided[0].requires_grad_(), strided[1].requires_grad_()
    options = {"length": 13, "dilation": 3, "backend": "cpu"}
    y_BTD, other_BTD = (
        causal_convolution(x_BPD, weight_DL, doc_ids_BP, **options),
        causal_convolution(*strided, **options),
    )
    assert torch.equal(y_BTD, other_BTD)
    upstream_BTD = torch.randn(37, 13, 2).permute(2, 1, 0)
    grads = torch.autograd.grad(y_BTD, (x_BPD, weight_DL), upstream_BTD)
    others = torch.autograd.grad(other_BTD, strided[:2], upstream_BTD.contiguous())
    assert all(torch.equal(one, other) for one, other in zip(grads, others, strict=True))


def test_the_operators_are_registered_completely_and_one_graph_gives_the_same_bits() -> None:
    x_BPD, weight_DL, doc_ids_BP = inputs((2, 1, 5, 3, 2, 2), torch.float32)
    library.opcheck(torch.ops.pkm_lightning.causal_convolution.default, (x_BPD, weight_DL, doc_ids_BP, 5, 2))
    backward = torch.ops.pkm_lightning.causal_convolution_backward.default
    library.opcheck(backward, (torch.randn(2, 5, 3), x_BPD.detach(), weight_DL.detach(), doc_ids_BP, 2))

    def loss(x_BPD: Tensor) -> Tensor:
        return causal_convolution(x_BPD, weight_DL, doc_ids_BP, length=5, dilation=2, backend="cpu").square().sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    assert torch.equal(*(torch.autograd.grad(run(x_BPD), x_BPD)[0] for run in (compiled, loss)))


def test_runs_on_meta_tensors_and_without_tokens() -> None:
    with torch.device("meta"):
        assert causal_convolution(torch.empty(2, 5, 3), torch.empty(3, 4), length=4, dilation=2).shape == (2, 4, 3)
    for backend in BACKENDS:
        x_BPD = torch.randn(2, 3, 4, requires_grad=True)
        y_BTD = causal_convolution(
            x_BPD, torch.randn(4, 2), torch.zeros(2, 3, dtype=torch.int64), length=0, dilation=1, backend=backend
        )
        assert y_BTD.shape == (2, 0, 4)


def test_refusals() -> None:
    x_BPD, weight_DL = torch.zeros(2, 5, 3), torch.zeros(3, 4)
    with pytest.raises(ValueError, match=r"needs x \(B, P, D\) and weight \(D, L\) .*, got \(2, 5, 3\) and \(4, 3\)"):
        causal_convolution(x_BPD, weight_DL.T, length=5, dilation=1)
    with pytest.raises(ValueError, match=r"needs a document per token \(2, 5\), got \(2, 4\)\."):
        causal_convolution(x_BPD, weight_DL, torch.zeros(2, 4, dtype=torch.int64), length=4, dilation=1)
    for length, dilation in ((6, 1), (-1, 1), (5, 0)):
        with pytest.raises(ValueError, match=rf"a length of 0 to 5 .*, got length={length} and dilation={dilation}\."):
            causal_convolution(x_BPD, weight_DL, length=length, dilation=dilation)
    with pytest.raises(ValueError, match=r"backend='cuda' is not available; allowed: auto, cpu, eager, reference"):
        causal_convolution(x_BPD, weight_DL, length=5, dilation=1, backend="cuda")
