"""causal_convolution on a GPU: each program computes a tile of tokens by channels, all taps of it.

The tokens that the taps of a tile share are read from memory once and then come from the caches. Backward, tiles are of
source tokens, each of which adds up over its targets: no two programs write to one place.

Letters: L taps of the filter, P = T tokens and those in front, X tiles of tokens; suffixes in kernels: R tokens and C
channels of a tile.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pkm_lightning.ops.example_tables import TOKENS

#: Values of a tile, most tokens of it, and values per warp. A tile of many tokens has 64 channels, which fill the cache
#: lines of half-precision rows: the more tokens it has, the fewer tokens are read by two tiles. Where a sequence has
#: few, a tile is wider. Two loads of 128 bits per thread and tap in half precision.
_FORWARD = 2048, 32, 512
#: Few values per thread, which holds three of each, and few warps, over which the sums of the filters are taken.
_BACKWARD = 2048, 32, 512
#: Most channels of a tile.
_CHANNELS = 256


def convolve(x_BPD: Tensor, weight_DL: Tensor, doc_ids_BP: Tensor | None, length: int, dilation: int) -> Tensor:
    """Returns the outputs of the last T tokens; all tensors contiguous but the weight."""
    sequences, tokens, dim = x_BPD.shape
    y_BTD = x_BPD.new_empty(sequences, length, dim)
    if not y_BTD.numel():
        return y_BTD
    weight_LD, docs = weight_DL.mT.contiguous(), _documents(x_BPD, doc_ids_BP)
    sizes = _sizes(length, weight_DL, _FORWARD, documents=doc_ids_BP is not None)
    grid = sequences * triton.cdiv(length, sizes["BLOCK_T"]) * triton.cdiv(dim, sizes["BLOCK_D"])
    # Triton launches on the current device, which need not be that of the tensors.
    with torch.cuda.device_of(x_BPD):
        _convolve[(grid,)](x_BPD, weight_LD, docs, y_BTD, tokens, length, dilation, **sizes)
    return y_BTD


def gradients(
    grad_BTD: Tensor, x_BPD: Tensor, weight_DL: Tensor, doc_ids_BP: Tensor | None, dilation: int
) -> tuple[Tensor, Tensor]:
    """Returns the gradients of x and weight; all tensors contiguous but the weight."""
    sequences, tokens, dim = x_BPD.shape
    x_grad_BPD = torch.empty_like(x_BPD)
    if not x_grad_BPD.numel():
        return x_grad_BPD, weight_DL.new_zeros(weight_DL.shape)
    weight_LD, docs = weight_DL.mT.contiguous(), _documents(x_BPD, doc_ids_BP)
    sizes = _sizes(tokens, weight_DL, _BACKWARD, documents=doc_ids_BP is not None)
    tiles = sequences * triton.cdiv(tokens, sizes["BLOCK_T"])
    parts_XLD = torch.empty(tiles, *weight_LD.shape, dtype=torch.float32, device=x_BPD.device)
    with torch.cuda.device_of(x_BPD):
        _gradients[(tiles * triton.cdiv(dim, sizes["BLOCK_D"]),)](
            grad_BTD, x_BPD, weight_LD, docs, x_grad_BPD, parts_XLD, tokens, grad_BTD.shape[1], dilation, **sizes
        )
    return x_grad_BPD, parts_XLD.sum(0).mT.to(weight_DL.dtype).contiguous()


def _documents(x_BPD: Tensor, doc_ids_BP: Tensor | None) -> Tensor:
    """Returns the documents; without them `x`, which the kernels do not read, but Triton needs some tensor there."""
    return x_BPD if doc_ids_BP is None else doc_ids_BP


def _sizes(tokens: int, weight_DL: Tensor, tile: tuple[int, int, int], *, documents: bool) -> dict[str, Any]:
    """Returns constants and number of warps, by shapes only; blocks are powers of two, as Triton requires."""
    (dim, taps), (values, most, per_warp) = weight_DL.shape, tile
    rows = min(triton.next_power_of_2(tokens), most)
    channels = max(16, min(triton.next_power_of_2(dim), _CHANNELS, values // rows))
    constants = {"DOCUMENTS": documents, "L": taps, "D": dim, "BLOCK_T": rows, "BLOCK_D": channels}
    return constants | {"num_warps": max(1, rows * channels // per_warp)}


@triton.jit
def _tile(tokens, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):  # type: ignore[no-untyped-def]
    """Returns the number of a program's tile of tokens, its sequence, its tokens and its channels."""
    # Channels first: programs that run at the same time read whole rows.
    blocks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    tiles = tl.cdiv(tokens, BLOCK_T)
    tile = tl.program_id(0) // blocks
    token_R = tile % tiles * BLOCK_T + tl.arange(0, BLOCK_T)
    d_C = tl.program_id(0) % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    # int64: the offsets of large inputs pass 2**31.
    return tile.to(tl.int64), (tile // tiles).to(tl.int64), token_R, d_C


@triton.jit
def _convolve(  # type: ignore[no-untyped-def]
    x, weight, docs, y, tokens, length, dilation,
    DOCUMENTS: tl.constexpr, L: tl.constexpr, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Computes BLOCK_D channels of BLOCK_T outputs of one sequence."""
    _, b, t_R, d_C = _tile(length, D, BLOCK_T, BLOCK_D)
    is_output_R, is_channel_C = t_R < length, d_C < D
    token_R = tokens - length + t_R
    if DOCUMENTS:
        doc_R = tl.load(docs + b * tokens + token_R, mask=is_output_R, other=0)
    total_RC = tl.zeros((BLOCK_T, BLOCK_D), dtype=tl.float32)
    # int64: a tap far in front of the first token must not wrap around.
    step = tl.cast(dilation, tl.int64)
    # Unrolled, so that the loads of four taps are under way at a time.
    for tap in tl.range(0, L, loop_unroll_factor=4):
        source_R = token_R - (L - 1 - tap) * step
        is_seen_R = is_output_R & (source_R >= 0)
        weight_C = tl.load(weight + tap * D + d_C, mask=is_channel_C, other=0.0).to(tl.float32)
        x_RC = tl.load(
            x + (b * tokens + source_R)[:, None] * D + d_C[None, :],
            mask=is_seen_R[:, None] & is_channel_C[None, :],
            other=0.0,
        )
        if DOCUMENTS:
            # Not in the mask of the load, which would then have to wait for the documents.
            is_same_R = tl.load(docs + b * tokens + source_R, mask=is_seen_R, other=0) == doc_R
            x_RC = tl.where(is_same_R[:, None], x_RC, 0.0)
        total_RC += weight_C[None, :] * x_RC.to(tl.float32)
    mask_RC = is_output_R[:, None] & is_channel_C[None, :]
    tl.store(y + (b * length + t_R)[:, None] * D + d_C[None, :], total_RC.to(y.dtype.element_ty), mask=mask_RC)


@triton.jit
def _gradients(  # type: ignore[no-untyped-def]
    grad, x, weight, docs, x_grad, parts, tokens, length, dilation,
    DOCUMENTS: tl.constexpr, L: tl.constexpr, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Computes the gradient of a tile of x, and what the tile adds to the gradients of the filters."""
    tile, b, source_R, d_C = _tile(tokens, D, BLOCK_T, BLOCK_D)
    is_source_R, is_channel_C = source_R < tokens, d_C < D
    mask_RC = is_source_R[:, None] & is_channel_C[None, :]
    place_RC = (b * tokens + source_R)[:, None] * D + d_C[None, :]
    x_RC = tl.load(x + place_RC, mask=mask_RC, other=0.0).to(tl.float32)
    if DOCUMENTS:
        doc_R = tl.load(docs + b * tokens + source_R, mask=is_source_R, other=0)
    x_grad_RC = tl.zeros((BLOCK_T, BLOCK_D), dtype=tl.float32)
    step = tl.cast(dilation, tl.int64)
    for tap in range(L):
        token_R = source_R + (L - 1 - tap) * step
        t_R = token_R - (tokens - length)
        is_target_R = is_source_R & (t_R >= 0) & (t_R < length)
        weight_C = tl.load(weight + tap * D + d_C, mask=is_channel_C, other=0.0).to(tl.float32)
        grad_RC = tl.load(
            grad + (b * length + t_R)[:, None] * D + d_C[None, :],
            mask=is_target_R[:, None] & is_channel_C[None, :],
            other=0.0,
        ).to(tl.float32)
        if DOCUMENTS:
            is_target_R &= tl.load(docs + b * tokens + token_R, mask=is_target_R, other=0) == doc_R
            grad_RC = tl.where(is_target_R[:, None], grad_RC, 0.0)
        x_grad_RC += weight_C[None, :] * grad_RC
        # A product with an infinite x would be NaN where its target is masked.
        part_C = tl.sum(tl.where(is_target_R[:, None], x_RC * grad_RC, 0.0), axis=0)
        tl.store(parts + (tile * L + tap) * D + d_C, part_C, mask=is_channel_C)
    tl.store(x_grad + place_RC, x_grad_RC.to(x_grad.dtype.element_ty), mask=mask_RC)


def launch_examples() -> None:
    """Launches every kernel: see `pkm_lightning.ops.example_tables`."""
    # Training, decoding one token, many taps, and a width that is no power of two.
    for dtype, length, dim, taps, documents in (
        (torch.float32, TOKENS, 1024, 4, True), (torch.bfloat16, TOKENS, 1024, 4, True),
        (torch.bfloat16, TOKENS, 1024, 4, False), (torch.bfloat16, 1, 1024, 4, False),
        (torch.bfloat16, TOKENS, 64, 64, True), (torch.bfloat16, TOKENS, 100, 3, True),
    ):  # fmt: skip
        # Decoding reads the tokens before the one that it writes.
        x_BPD = torch.empty(8, max(length, taps), dim, dtype=dtype)
        weight_DL = torch.empty(dim, taps, dtype=dtype)
        doc_ids_BP = torch.empty(x_BPD.shape[:2], dtype=torch.int64) if documents else None
        y_BTD = convolve(x_BPD, weight_DL, doc_ids_BP, length, 1)
        gradients(y_BTD, x_BPD, weight_DL, doc_ids_BP, 1)
