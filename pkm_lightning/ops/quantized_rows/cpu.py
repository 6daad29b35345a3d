"""Reads of quantised rows on the CPU by numba kernels: codes become values in registers.

Letters: C bytes of codes per row, Q scales per row, G groups per token, X = T * G sums.
"""

from __future__ import annotations

from typing import Any

import numba
import torch
from numba import types
from numba.extending import intrinsic
from torch import Tensor

from pkm_lightning.ops.numba_arrays import numpy_view
from pkm_lightning.ops.numba_intrinsics import prefetch, widened
from pkm_lightning.ops.numba_kernels import ALL, CALLED, KERNEL, share
from pkm_lightning.ops.numba_threads import use_torch_threads
from pkm_lightning.ops.quantized_rows.format import VALUES_PER_SCALE, QuantizedRows
from pkm_lightning.ops.segments import read_sources

#: Reads ahead of which a row is requested from memory.
_AHEAD = 8


def gather_sum(
    rows: QuantizedRows, ids_TK: Tensor, weights_TK: Tensor, groups_TK: Tensor | None, n_groups: int
) -> Tensor:
    """Computes `eager.gather_sum`."""
    y_XV = torch.zeros(len(ids_TK) * n_groups, rows.dim)
    inputs = rows.codes_NC, rows.scales_NQ, ids_TK.int(), weights_TK, read_sources(ids_TK, groups_TK, n_groups), y_XV
    use_torch_threads()
    _sums(*map(numpy_view, inputs), rows.bits, ALL)
    return y_XV


def gather_dot(rows: QuantizedRows, x_TV: Tensor, ids_TK: Tensor) -> Tensor:
    """Computes `eager.gather_dot`."""
    dots_TK = torch.empty(ids_TK.shape, dtype=torch.float32)
    use_torch_threads()
    _dots(*map(numpy_view, (rows.codes_NC, rows.scales_NQ, x_TV, ids_TK.int(), dots_TK)), rows.bits, ALL)
    return dots_TK


# numba computes with integers of 64 bits, eight of which fill a vector register, and not all CPUs convert them to
# floats in vectors: this takes sixteen of 32 bits.
@intrinsic
def _code(typing_context, byte, shift, mask):  # type: ignore[no-untyped-def]
    """Compiles to the float32 of the bits of `byte` above `shift` that are in `mask`."""

    def compiled(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        word = context.get_value_type(types.uint32)
        byte, shift, mask = builder.zext(arguments[0], word), *(builder.trunc(a, word) for a in arguments[1:])
        bits = builder.and_(builder.lshr(byte, shift), mask)
        # Signed, for which there is an instruction.
        return builder.sitofp(bits, context.get_value_type(types.float32))

    return types.float32(types.uint8, types.int64, types.int64), compiled


# A row lies anywhere in the table, and its few lines of the cache come one after another: without a request ahead the
# sum over rows of int8 takes 2.5 times as long as over rows in the cache.
@numba.njit(**CALLED)
def _request(codes_NC, scales_NQ, n):  # type: ignore[no-untyped-def]
    for c in range(0, codes_NC.shape[1], 64):
        prefetch(codes_NC, n, c)
    for q in range(0, scales_NQ.shape[1], 32):
        prefetch(scales_NQ, n, q)


# The flags are those of weighted_gather's kernels: sums may be regrouped, once, when the kernel is compiled.
@numba.njit(**KERNEL, fastmath={"reassoc", "contract"})
def _sums(codes_NC, scales_NQ, ids_TK, weights_TK, sources_TK, y_XV, bits, worker):  # type: ignore[no-untyped-def]
    mask, per_plane, dim = (1 << bits) - 1, codes_NC.shape[1], y_XV.shape[1]
    middle = numba.float32(mask) / numba.float32(2)
    first_token, last_token = share(ids_TK.shape[0], worker)
    for t in range(first_token, last_token):
        for k in range(ids_TK.shape[1]):
            if k + _AHEAD < ids_TK.shape[1]:
                _request(codes_NC, scales_NQ, ids_TK[t, k + _AHEAD])
            n, sum_V = ids_TK[t, k], y_XV[sources_TK[t, k]]
            for plane in range(8 // bits):
                low, high = plane * per_plane, min((plane + 1) * per_plane, dim)
                first = low
                while first < high:
                    q = first // VALUES_PER_SCALE
                    last = min(high, (q + 1) * VALUES_PER_SCALE)
                    factor = weights_TK[t, k] * widened(scales_NQ[n, q])
                    shift, codes_I, sum_I = bits * plane, codes_NC[n, first - low : last - low], sum_V[first:last]
                    for i in range(sum_I.shape[0]):
                        sum_I[i] += factor * (_code(codes_I[i], shift, mask) - middle)
                    first = last


@numba.njit(**KERNEL, fastmath={"reassoc", "contract"})
def _dots(codes_NC, scales_NQ, x_TV, ids_TK, dots_TK, bits, worker):  # type: ignore[no-untyped-def]
    mask, per_plane, dim = (1 << bits) - 1, codes_NC.shape[1], x_TV.shape[1]
    middle = numba.float32(mask) / numba.float32(2)
    first_token, last_token = share(ids_TK.shape[0], worker)
    for t in range(first_token, last_token):
        for k in range(ids_TK.shape[1]):
            if k + _AHEAD < ids_TK.shape[1]:
                _request(codes_NC, scales_NQ, ids_TK[t, k + _AHEAD])
            n, dot = ids_TK[t, k], numba.float32(0)
            for plane in range(8 // bits):
                low, high = plane * per_plane, min((plane + 1) * per_plane, dim)
                first = low
                while first < high:
                    q = first // VALUES_PER_SCALE
                    last = min(high, (q + 1) * VALUES_PER_SCALE)
                    shift, codes_I, x_I = bits * plane, codes_NC[n, first - low : last - low], x_TV[t, first:last]
                    part = numba.float32(0)
                    for i in range(x_I.shape[0]):
                        part += x_I[i] * (_code(codes_I[i], shift, mask) - middle)
                    dot += part * widened(scales_NQ[n, q])
                    first = last
            dots_TK[t, k] = dot
