"""The best keys of every query on a GPU: a program scores its tokens against one block of keys after the other.

Scores live in registers only. The gradient of a key sums over its reads, which are sorted by key: no atomic additions,
so that two runs agree bitwise.

Letters: X heads and halves, T tokens, E dimension of a key, S keys, K kept, P = K padded to a power of two, M tokens of
a program, N keys of a block, B columns of a block, G reads of a group, L = X * T * K reads.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pkm_lightning.ops.ranked_topk.triton import below_all, merge_best, pack, packed_places, packed_scores
from pkm_lightning.ops.segments import read_segments

_TOKENS, _SMALLEST_BLOCK, _READS = 16, 64, 32  # a matrix unit wants 16 rows and columns at least


@triton.jit
def _best_keys(  # type: ignore[no-untyped-def]
    q_XTE, keys_XSE, values_XTK, indices_XTK, tokens,
    S: tl.constexpr, E: tl.constexpr, K: tl.constexpr, P: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    x = tl.program_id(1).to(tl.int64)
    t_M1 = (tl.program_id(0) * M + tl.arange(0, M))[:, None]
    query_M1 = x * tokens + t_M1
    best_MP = below_all((M, P))
    for first in range(0, S, N):
        s_1N = (first + tl.arange(0, N))[None, :]
        scores_MN = tl.zeros((M, N), tl.float32)
        for column in range(0, E, B):
            e_B = column + tl.arange(0, B)
            q_mask, keys_mask = (t_M1 < tokens) & (e_B < E)[None, :], (s_1N < S) & (e_B < E)[:, None]
            q_MB = tl.load(q_XTE + query_M1 * E + e_B[None, :], mask=q_mask, other=0.0)
            keys_BN = tl.load(keys_XSE + (x * S + s_1N) * E + e_B[:, None], mask=keys_mask, other=0.0)
            scores_MN = tl.dot(q_MB, keys_BN, scores_MN, input_precision="ieee")
        best_MP = merge_best(best_MP, tl.where(s_1N < S, pack(scores_MN, s_1N), below_all((M, N))))
    rank_1P = tl.arange(0, P)[None, :]
    kept_MP = (t_M1 < tokens) & (rank_1P < K)
    tl.store(values_XTK + query_M1 * K + rank_1P, packed_scores(best_MP), mask=kept_MP)
    tl.store(indices_XTK + query_M1 * K + rank_1P, packed_places(best_MP), mask=kept_MP)


@triton.jit
def _query_gradient(  # type: ignore[no-untyped-def]
    grad_XTK, indices_XTK, keys_XSE, q_grad_XTE, tokens,
    S: tl.constexpr, E: tl.constexpr, K: tl.constexpr, B: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    query = tl.program_id(0).to(tl.int64)
    x = query // tokens
    e_1B = (tl.program_id(1) * B + tl.arange(0, B))[None, :]
    sum_B = tl.zeros((B,), tl.float32)
    for first in range(0, K, G):
        rank_G = first + tl.arange(0, G)
        grad_G = tl.load(grad_XTK + query * K + rank_G, mask=rank_G < K, other=0.0)
        s_G = tl.load(indices_XTK + query * K + rank_G, mask=rank_G < K, other=0)
        mask_GB = (rank_G < K)[:, None] & (e_1B < E)
        keys_GB = tl.load(keys_XSE + (x * S + s_G)[:, None] * E + e_1B, mask=mask_GB, other=0.0)
        sum_B += tl.sum(grad_G[:, None] * keys_GB, 0)
    e_B = tl.program_id(1) * B + tl.arange(0, B)
    tl.store(q_grad_XTE + query * E + e_B, sum_B, mask=e_B < E)


@triton.jit
def _key_gradient(  # type: ignore[no-untyped-def]
    grad_L, q_XTE, keys_grad_XSE, order_L, rows_U, starts_V,
    E: tl.constexpr, K: tl.constexpr, B: tl.constexpr, G: tl.constexpr,
):  # fmt: skip
    segment = tl.program_id(0)
    row = tl.load(rows_U + segment).to(tl.int64)
    if row < 0:  # U counts more segments than there are
        return
    read, stop = tl.load(starts_V + segment), tl.load(starts_V + segment + 1)
    e_B = tl.program_id(1) * B + tl.arange(0, B)
    sum_B = tl.zeros((B,), tl.float32)
    # Not `for`: the interpreter of triton 3.6 takes no range that is known at run time only.
    while read < stop:
        read_G = read + tl.arange(0, G)
        place_G = tl.load(order_L + read_G, mask=read_G < stop, other=0)
        grad_G = tl.load(grad_L + place_G, mask=read_G < stop, other=0.0)
        mask_GB = (read_G < stop)[:, None] & (e_B < E)[None, :]
        q_GB = tl.load(q_XTE + (place_G // K)[:, None] * E + e_B[None, :], mask=mask_GB, other=0.0)
        sum_B += tl.sum(grad_G[:, None] * q_GB, 0)
        read += G
    tl.store(keys_grad_XSE + row * E + e_B, sum_B, mask=e_B < E)


def best_keys(q_XTE: Tensor, keys_XSE: Tensor, values_XTK: Tensor, indices_XTK: Tensor) -> None:
    """Writes the K best scores of every query and their keys; all contiguous, fp32."""
    entries, tokens, dim = q_XTE.shape
    if entries and tokens:
        sizes = _forward_sizes(keys_XSE.shape[1], dim, values_XTK.shape[-1])
        grid = (triton.cdiv(tokens, _TOKENS), entries)
        with torch.cuda.device_of(q_XTE):
            _best_keys[grid](q_XTE, keys_XSE, values_XTK, indices_XTK, tokens, **sizes)


def add_gradients(
    grad_XTK: Tensor, indices_XTK: Tensor, q_XTE: Tensor, keys_XSE: Tensor, q_grad_XTE: Tensor, keys_grad_XSE: Tensor
) -> None:
    """Writes the gradients of queries and keys over zeros; all contiguous, fp32."""
    (entries, tokens, dim), n_keys = q_XTE.shape, keys_XSE.shape[1]
    sizes = _backward_sizes(dim, grad_XTK.shape[-1])
    columns = triton.cdiv(dim, sizes["B"])
    first_X11 = torch.arange(entries, dtype=torch.int32, device=q_XTE.device).view(-1, 1, 1) * n_keys
    segments = read_segments((indices_XTK + first_X11).flatten(), entries * n_keys)
    with torch.cuda.device_of(q_XTE):
        _query_gradient[(entries * tokens, columns)](
            grad_XTK, indices_XTK, keys_XSE, q_grad_XTE, tokens, S=n_keys, **sizes
        )
        _key_gradient[(len(segments.rows_U), columns)](grad_XTK, q_XTE, keys_grad_XSE, *segments, **sizes)


def _forward_sizes(n_keys: int, dim: int, k: int) -> dict[str, int]:
    padded = triton.next_power_of_2(k)
    block, columns = max(_SMALLEST_BLOCK, padded), min(64, max(16, triton.next_power_of_2(dim)))
    return {"S": n_keys, "E": dim, "K": k, "P": padded, "M": _TOKENS, "N": block, "B": columns}


def _backward_sizes(dim: int, k: int) -> dict[str, int]:
    return {"E": dim, "K": k, "B": min(128, triton.next_power_of_2(dim)), "G": _READS}


def aot_signatures() -> list[tuple[Any, dict[str, str], dict[str, int]]]:
    """Kernels with argument types and constants, for compilation ahead of time without a GPU."""
    floats = dict.fromkeys(("q_XTE", "keys_XSE", "values_XTK", "grad_XTK", "grad_L", "q_grad_XTE"), "*fp32")
    types = floats | {"keys_grad_XSE": "*fp32", "indices_XTK": "*i32", "rows_U": "*i32", "tokens": "i32"}
    types |= {"order_L": "*i64", "starts_V": "*i64"}
    cases = []
    for n_keys, dim, k in ((1024, 64, 32), (100, 24, 7)):
        backward = _backward_sizes(dim, k)
        sizes = (_forward_sizes(n_keys, dim, k), backward | {"S": n_keys}, backward)
        for kernel, constants in zip((_best_keys, _query_gradient, _key_gradient), sizes, strict=True):
            runtime = {name: types[name] for name in kernel.arg_names if name not in constants}
            cases.append((kernel, runtime, constants))
    return cases
