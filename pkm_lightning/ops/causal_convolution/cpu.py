"""causal_convolution in numba: all taps in one pass over the tokens, and both gradients in another.

Letters: L taps of the filter, P = T tokens and those in front, C chunks of tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from numba import njit
from torch import Tensor

from pkm_lightning.ops.numba_arrays import numpy_view
from pkm_lightning.ops.numba_kernels import ALL, KERNEL, share
from pkm_lightning.ops.numba_threads import use_torch_threads

# A constant, so that the order of sums does not depend on the number of threads.
_CHUNKS = 32
# Arrays are indexed in place: with rows as variables of their own the loops over channels take six times as long.
_KERNEL: dict[str, Any] = {**KERNEL, "fastmath": {"contract"}}


def convolve(x_BPD: Tensor, weight_DL: Tensor, doc_ids_BP: Tensor | None, length: int, dilation: int) -> Tensor:
    """Returns the outputs of the last T tokens, computed in float32; all tensors contiguous but the weight."""
    use_torch_threads()
    weight_LD = weight_DL.float().mT.contiguous()
    y_BTD = x_BPD.new_empty(len(x_BPD), length, x_BPD.shape[2], dtype=torch.float32)
    inputs = x_BPD.float(), weight_LD, _documents(doc_ids_BP), y_BTD
    _convolve(*map(numpy_view, inputs), dilation, ALL)
    return y_BTD.to(x_BPD.dtype)


def gradients(
    grad_BTD: Tensor, x_BPD: Tensor, weight_DL: Tensor, doc_ids_BP: Tensor | None, dilation: int
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of x and weight, computed in float32; all tensors contiguous but the weight."""
    use_torch_threads()
    weight_LD = weight_DL.float().mT.contiguous()
    x_grad_BPD = torch.zeros_like(x_BPD, dtype=torch.float32)
    parts_CLD = weight_LD.new_zeros(_CHUNKS, *weight_LD.shape)
    inputs = grad_BTD.float(), x_BPD.float(), weight_LD, _documents(doc_ids_BP), x_grad_BPD, parts_CLD
    _gradients(*map(numpy_view, inputs), dilation, ALL)
    return x_grad_BPD.to(x_BPD.dtype), parts_CLD.sum(0).mT.to(weight_DL.dtype).contiguous()


def _documents(doc_ids_BP: Tensor | None) -> Tensor:
    """Returns the documents; an empty tensor for one per sequence."""
    return torch.empty(0, 0, dtype=torch.int64) if doc_ids_BP is None else doc_ids_BP


@njit(**_KERNEL)
def _convolve(x_BPD, weight_LD, doc_ids_BP, y_BTD, dilation, worker):  # type: ignore[no-untyped-def]
    taps, (length, dim), front = weight_LD.shape[0], y_BTD.shape[1:], x_BPD.shape[1] - y_BTD.shape[1]
    first, last = share(y_BTD.shape[0] * length, worker)
    for token in range(first, last):
        b, t = token // length, token % length
        y_BTD[b, t] = 0
        for tap in range(taps):
            source = front + t - (taps - 1 - tap) * dilation
            if source < 0 or (doc_ids_BP.shape[0] > 0 and doc_ids_BP[b, source] != doc_ids_BP[b, front + t]):
                continue
            for d in range(dim):
                y_BTD[b, t, d] += weight_LD[tap, d] * x_BPD[b, source, d]


@njit(**_KERNEL)
def _gradients(grad_BTD, x_BPD, weight_LD, doc_ids_BP, x_grad_BPD, parts_CLD, dilation, worker):  # type: ignore[no-untyped-def]
    """Adds to the gradients. By source token: each chunk alone writes the gradients of its tokens."""
    taps, (sequences, tokens, dim), length = weight_LD.shape[0], x_BPD.shape, grad_BTD.shape[1]
    front, chunks = tokens - length, parts_CLD.shape[0]
    first, last = share(chunks, worker)
    for chunk in range(first, last):
        for token in range(chunk * sequences * tokens // chunks, (chunk + 1) * sequences * tokens // chunks):
            b, source = token // tokens, token % tokens
            for tap in range(taps):
                target = source + (taps - 1 - tap) * dilation
                if target < front or target >= tokens:
                    continue
                if doc_ids_BP.shape[0] > 0 and doc_ids_BP[b, source] != doc_ids_BP[b, target]:
                    continue
                for d in range(dim):
                    x_grad_BPD[b, source, d] += weight_LD[tap, d] * grad_BTD[b, target - front, d]
                for d in range(dim):
                    parts_CLD[chunk, tap, d] += x_BPD[b, source, d] * grad_BTD[b, target - front, d]
