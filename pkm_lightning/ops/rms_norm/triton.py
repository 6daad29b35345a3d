"""rms_norm and rms_norm_dot on a GPU: a tile holds one part of several vectors, and is loaded once.

The gradient of the gains is a sum over vectors. Each program sums one chunk of them and torch adds up the chunks, so
that there are no atomic additions and two runs agree bitwise.

Letters: G equal parts of a vector, C = D / G values of a part, X chunks of vectors; suffixes in kernels: R vectors and
C columns of a tile.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pkm_lightning.ops.example_tables import TOKENS

#: Values of a tile, 16 per thread: two or four loads of 128 bits per input are under way at once.
_TILE = 2048
#: Values of a tile per warp.
_PER_WARP = 512
#: Most warps of all chunks and parts together: enough to fill a large GPU, few enough that the sums of the chunks are
#: small beside the vectors. A constant, so that the order of sums does not depend on the GPU.
_WARPS = 2048


def norm(x_TGC: Tensor, gain_GC: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Returns the normalised parts in the dtype of x, and the inverse roots (T, G) in fp32; all tensors contiguous."""
    (tokens, groups, _), sizes = x_TGC.shape, _sizes(gain_GC)
    y_TGC, roots_TG = torch.empty_like(x_TGC), x_TGC.new_empty(tokens, groups, dtype=torch.float32)
    # Triton launches on the current device, which need not be that of the tensors.
    with torch.cuda.device_of(x_TGC):
        _norm[_tiles(tokens, sizes),](x_TGC, gain_GC, y_TGC, roots_TG, tokens, eps, **sizes)
    return y_TGC, roots_TG


def norm_gradients(grad_TGC: Tensor, x_TGC: Tensor, gain_GC: Tensor, roots_TG: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the gradients of x and gain, each in its dtype; all tensors contiguous."""
    sizes = _sizes(gain_GC)
    x_grad_TGC, (per_chunk, sums_XGC) = torch.empty_like(x_TGC), _chunks(len(x_TGC), gain_GC, sizes)
    with torch.cuda.device_of(x_TGC):
        _norm_gradients[sums_XGC.shape[:2].numel(),](
            grad_TGC, x_TGC, gain_GC, roots_TG, x_grad_TGC, sums_XGC, len(x_TGC), per_chunk, **sizes
        )
    return x_grad_TGC, sums_XGC.sum(0).to(gain_GC.dtype)


def dot(x_TGC: Tensor, y_TGC: Tensor, gain_GC: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Returns the inner products (T, G) and the inverse roots of x and y (2, T, G) in fp32; all tensors contiguous."""
    (tokens, groups, _), sizes = x_TGC.shape, _sizes(gain_GC)
    dots_TG, roots_2TG = (x_TGC.new_empty(*n, tokens, groups, dtype=torch.float32) for n in ((), (2,)))
    with torch.cuda.device_of(x_TGC):
        _dot[_tiles(tokens, sizes),](x_TGC, y_TGC, gain_GC, dots_TG, *roots_2TG, tokens, eps, **sizes)
    return dots_TG, roots_2TG


def dot_gradients(
    grad_TG: Tensor, x_TGC: Tensor, y_TGC: Tensor, gain_GC: Tensor, dots_TG: Tensor, roots_2TG: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of x, y and gain, each in its dtype; all tensors contiguous."""
    sizes, grads = _sizes(gain_GC), (torch.empty_like(x_TGC), torch.empty_like(y_TGC))
    per_chunk, sums_XGC = _chunks(len(x_TGC), gain_GC, sizes)
    with torch.cuda.device_of(x_TGC):
        _dot_gradients[sums_XGC.shape[:2].numel(),](
            grad_TG, x_TGC, y_TGC, gain_GC, dots_TG, *roots_2TG, *grads, sums_XGC, len(x_TGC), per_chunk, **sizes
        )
    return *grads, sums_XGC.sum(0).to(gain_GC.dtype)


def _sizes(gain_GC: Tensor) -> dict[str, int]:
    """Returns the constants and the number of warps of all kernels; blocks are powers of two, as Triton requires."""
    groups, values = gain_GC.shape
    columns = max(16, triton.next_power_of_2(values))
    tile = max(_TILE, columns)
    return {
        "G": groups, "C": values, "BLOCK_T": tile // columns, "BLOCK_C": columns, "num_warps": tile // _PER_WARP,
    }  # fmt: skip


def _tiles(tokens: int, sizes: dict[str, int]) -> int:
    return int(triton.cdiv(tokens, sizes["BLOCK_T"])) * sizes["G"]


def _chunks(tokens: int, gain_GC: Tensor, sizes: dict[str, int]) -> tuple[int, Tensor]:
    """Returns the number of vectors per chunk, which is one of whole tiles, and a tensor for sums (X, G, C)."""
    chunks, block = max(1, _WARPS // (sizes["num_warps"] * sizes["G"])), sizes["BLOCK_T"]
    per_chunk = max(1, triton.cdiv(tokens, chunks * block)) * block
    return per_chunk, gain_GC.new_empty(triton.cdiv(tokens, per_chunk), *gain_GC.shape, dtype=torch.float32)


@triton.jit
def _tile(  # type: ignore[no-untyped-def]
    first, stop, g, G: tl.constexpr, C: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Returns the places of part `g` of the vectors from `first` on, and of its values, each with a mask."""
    t_R = first + tl.arange(0, BLOCK_T)
    c_C = tl.arange(0, BLOCK_C)
    part_R = t_R * G + g
    mask_RC = (t_R < stop)[:, None] & (c_C < C)[None, :]
    return part_R, t_R < stop, part_R[:, None] * C + c_C[None, :], mask_RC


@triton.jit
def _gains(gain, g, C: tl.constexpr, BLOCK_C: tl.constexpr):  # type: ignore[no-untyped-def]
    c_C = tl.arange(0, BLOCK_C)
    return tl.load(gain + g * C + c_C, mask=c_C < C, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _norm(  # type: ignore[no-untyped-def]
    x, gain, y, roots, tokens, eps, G: tl.constexpr, C: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Normalises one tile."""
    # int64: the offsets of large inputs pass 2**31.
    program = tl.program_id(0).to(tl.int64)
    g = program % G
    part_R, in_R, place_RC, in_RC = _tile(program // G * BLOCK_T, tokens, g, G, C, BLOCK_T, BLOCK_C)
    x_RC = tl.load(x + place_RC, mask=in_RC, other=0.0).to(tl.float32)
    # Before the sum, which waits for x: the loads of both are under way at once.
    gain_1C = _gains(gain, g, C, BLOCK_C)
    root_R = tl.rsqrt(tl.sum(x_RC * x_RC, axis=1) / C + eps)
    tl.store(roots + part_R, root_R, mask=in_R)
    y_RC = x_RC * root_R[:, None] * gain_1C
    tl.store(y + place_RC, y_RC.to(y.dtype.element_ty), mask=in_RC)


@triton.jit
def _norm_gradients(  # type: ignore[no-untyped-def]
    grad, x, gain, roots, x_grad, sums, tokens, per_chunk,
    G: tl.constexpr, C: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Computes r (w g - x r^2 mean(x w g)) for a part x with the inverse root r, gains w and upstream gradient g."""
    program = tl.program_id(0).to(tl.int64)
    g, first = program % G, program // G * per_chunk
    stop = tl.minimum(first + per_chunk, tokens)
    gain_1C = _gains(gain, g, C, BLOCK_C)
    # Vectors are added up separately and reduced at the end: one reduction per program instead of one per tile.
    sum_RC = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    # Not `for`: the interpreter of Triton 3.6 does not take a range that is known at run time only.
    while first < stop:
        part_R, in_R, place_RC, in_RC = _tile(first, stop, g, G, C, BLOCK_T, BLOCK_C)
        root_R = tl.load(roots + part_R, mask=in_R, other=0.0)
        x_RC = tl.load(x + place_RC, mask=in_RC, other=0.0).to(tl.float32)
        grad_RC = tl.load(grad + place_RC, mask=in_RC, other=0.0).to(tl.float32)
        along_R = tl.sum(grad_RC * gain_1C * x_RC, axis=1) * root_R * root_R / C
        x_grad_RC = root_R[:, None] * (grad_RC * gain_1C - along_R[:, None] * x_RC)
        tl.store(x_grad + place_RC, x_grad_RC.to(x_grad.dtype.element_ty), mask=in_RC)
        sum_RC += grad_RC * root_R[:, None] * x_RC
        first += BLOCK_T
    c_C = tl.arange(0, BLOCK_C)
    tl.store(sums + program * C + c_C, tl.sum(sum_RC, axis=0), mask=c_C < C)


@triton.jit
def _dot(  # type: ignore[no-untyped-def]
    x, y, gain, dots, x_roots, y_roots, tokens, eps,
    G: tl.constexpr, C: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Computes the inner products of one tile."""
    program = tl.program_id(0).to(tl.int64)
    g = program % G
    part_R, in_R, place_RC, in_RC = _tile(program // G * BLOCK_T, tokens, g, G, C, BLOCK_T, BLOCK_C)
    x_RC = tl.load(x + place_RC, mask=in_RC, other=0.0).to(tl.float32)
    y_RC = tl.load(y + place_RC, mask=in_RC, other=0.0).to(tl.float32)
    gain_1C = _gains(gain, g, C, BLOCK_C)
    x_root_R = tl.rsqrt(tl.sum(x_RC * x_RC, axis=1) / C + eps)
    y_root_R = tl.rsqrt(tl.sum(y_RC * y_RC, axis=1) / C + eps)
    dot_R = tl.sum(x_RC * y_RC * gain_1C, axis=1)
    tl.store(x_roots + part_R, x_root_R, mask=in_R)
    tl.store(y_roots + part_R, y_root_R, mask=in_R)
    tl.store(dots + part_R, dot_R * x_root_R * y_root_R, mask=in_R)


@triton.jit
def _dot_gradients(  # type: ignore[no-untyped-def]
    grad, x, y, gain, dots, x_roots, y_roots, x_grad, y_grad, sums, tokens, per_chunk,
    G: tl.constexpr, C: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Computes g (r q w y - x r^2 s / C) for x, with the dot s, inverse roots r of x and q of y, gains w; y alike."""
    program = tl.program_id(0).to(tl.int64)
    g, first = program % G, program // G * per_chunk
    stop = tl.minimum(first + per_chunk, tokens)
    gain_1C = _gains(gain, g, C, BLOCK_C)
    sum_RC = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
    while first < stop:
        part_R, in_R, place_RC, in_RC = _tile(first, stop, g, G, C, BLOCK_T, BLOCK_C)
        x_root_R = tl.load(x_roots + part_R, mask=in_R, other=0.0)
        y_root_R = tl.load(y_roots + part_R, mask=in_R, other=0.0)
        grad_R = tl.load(grad + part_R, mask=in_R, other=0.0)
        across_R = grad_R * x_root_R * y_root_R
        along_R = grad_R * tl.load(dots + part_R, mask=in_R, other=0.0) / C
        x_RC = tl.load(x + place_RC, mask=in_RC, other=0.0).to(tl.float32)
        y_RC = tl.load(y + place_RC, mask=in_RC, other=0.0).to(tl.float32)
        across_RC = across_R[:, None] * gain_1C
        x_grad_RC = across_RC * y_RC - (along_R * x_root_R * x_root_R)[:, None] * x_RC
        y_grad_RC = across_RC * x_RC - (along_R * y_root_R * y_root_R)[:, None] * y_RC
        tl.store(x_grad + place_RC, x_grad_RC.to(x_grad.dtype.element_ty), mask=in_RC)
        tl.store(y_grad + place_RC, y_grad_RC.to(y_grad.dtype.element_ty), mask=in_RC)
        sum_RC += across_R[:, None] * x_RC * y_RC
        first += BLOCK_T
    c_C = tl.arange(0, BLOCK_C)
    tl.store(sums + program * C + c_C, tl.sum(sum_RC, axis=0), mask=c_C < C)


def launch_examples() -> None:
    """Launches every kernel: see `pkm_lightning.ops.example_tables`."""
    # One and several parts, the widest tiles, narrow parts, and a width that needs every mask.
    for dtype, groups, values in (
        (torch.bfloat16, 4, 1024), (torch.float32, 1, 4096), (torch.bfloat16, 1, 8192), (torch.float32, 1, 8192),
        (torch.bfloat16, 4, 16), (torch.float32, 3, 100),
    ):  # fmt: skip
        x_TGC, y_TGC = (torch.empty(TOKENS, groups, values, dtype=dtype) for _ in range(2))
        gain_GC = torch.empty(groups, values)
        _, roots_TG = norm(x_TGC, gain_GC, 1e-6)
        norm_gradients(y_TGC, x_TGC, gain_GC, roots_TG)
        dots_TG, roots_2TG = dot(x_TGC, y_TGC, gain_GC, 1e-6)
        dot_gradients(dots_TG, x_TGC, y_TGC, gain_GC, dots_TG, roots_2TG)
