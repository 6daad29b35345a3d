"""half_topk on a GPU: a program scores its tokens against one block of keys after the other.

Scores exist in registers only. The gradient of a key is a sum over its reads, which are sorted by key: there are no
atomic additions, so that two runs agree bitwise.

Letters: X heads and halves, F dimension of a half key; K sub-keys kept per query, P = K padded to a power of two,
L = X * T * K reads, U segments, Z = U + 1 limits; M tokens of a program; I keys, C columns and G reads of a block.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pkm_lightning.ops.example_tables import TOKENS, ids
from pkm_lightning.ops.ranked_topk.triton import below_all, merge_best, pack, packed_places, packed_scores
from pkm_lightning.ops.segments import read_segments

_READS = 32  # whose rows one program of a gradient loads at once


@triton.jit
def _best_keys(  # type: ignore[no-untyped-def]
    q_XTF, keys_XSF, values_XTK, indices_XTK, tokens,
    S: tl.constexpr, F: tl.constexpr, K: tl.constexpr, P: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_F: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # int64: the offsets of large inputs pass 2**31.
    x = tl.program_id(1).to(tl.int64)
    t_M1 = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T))[:, None]
    query_M1 = x * tokens + t_M1
    best_MP = below_all((BLOCK_T, P))
    for first in range(0, S, BLOCK_S):
        s_1I = (first + tl.arange(0, BLOCK_S))[None, :]
        scores_MI = tl.zeros((BLOCK_T, BLOCK_S), tl.float32)
        for column in range(0, F, BLOCK_F):
            f_C = column + tl.arange(0, BLOCK_F)
            q_mask, keys_mask = (t_M1 < tokens) & (f_C < F)[None, :], (s_1I < S) & (f_C < F)[:, None]
            q_MC = tl.load(q_XTF + query_M1 * F + f_C[None, :], mask=q_mask, other=0.0)
            keys_CI = tl.load(keys_XSF + (x * S + s_1I) * F + f_C[:, None], mask=keys_mask, other=0.0)
            scores_MI = tl.dot(q_MC, keys_CI, scores_MI, input_precision=PRECISION)
        # Keys beyond S have the score 0, which could win, so they are replaced.
        best_MP = merge_best(best_MP, tl.where(s_1I < S, pack(scores_MI, s_1I), below_all((BLOCK_T, BLOCK_S))))
    rank_1P = tl.arange(0, P)[None, :]
    is_kept_MP = (t_M1 < tokens) & (rank_1P < K)
    tl.store(values_XTK + query_M1 * K + rank_1P, packed_scores(best_MP), mask=is_kept_MP)
    tl.store(indices_XTK + query_M1 * K + rank_1P, packed_places(best_MP), mask=is_kept_MP)


@triton.jit
def _query_gradient(  # type: ignore[no-untyped-def]
    grad_XTK, indices_XTK, keys_XSF, q_grad_XTF, tokens,
    S: tl.constexpr, F: tl.constexpr, K: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    query = tl.program_id(0).to(tl.int64)
    x = query // tokens
    f_C = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    sum_C = tl.zeros((BLOCK_F,), tl.float32)
    for first in range(0, K, BLOCK_K):
        rank_G = first + tl.arange(0, BLOCK_K)
        grad_G = tl.load(grad_XTK + query * K + rank_G, mask=rank_G < K, other=0.0)
        s_G = tl.load(indices_XTK + query * K + rank_G, mask=rank_G < K, other=0)
        mask_GC = (rank_G < K)[:, None] & (f_C < F)[None, :]
        keys_GC = tl.load(keys_XSF + (x * S + s_G)[:, None] * F + f_C[None, :], mask=mask_GC, other=0.0)
        sum_C += tl.sum(grad_G[:, None] * keys_GC, 0)
    tl.store(q_grad_XTF + query * F + f_C, sum_C, mask=f_C < F)


@triton.jit
def _key_gradient(  # type: ignore[no-untyped-def]
    grad_L, q_XTF, keys_grad_XSF, order_L, rows_U, starts_Z,
    F: tl.constexpr, K: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    segment = tl.program_id(0)
    row = tl.load(rows_U + segment).to(tl.int64)
    # The grid covers the largest possible number of segments; the rows of those that do not exist are -1.
    if row < 0:
        return
    read, stop = tl.load(starts_Z + segment), tl.load(starts_Z + segment + 1)
    f_C = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    sum_C = tl.zeros((BLOCK_F,), tl.float32)
    # Not `for`: the interpreter of Triton 3.6 does not take a range that is known at run time only.
    while read < stop:
        read_G = read + tl.arange(0, BLOCK_K)
        place_G = tl.load(order_L + read_G, mask=read_G < stop, other=0)
        grad_G = tl.load(grad_L + place_G, mask=read_G < stop, other=0.0)
        mask_GC = (read_G < stop)[:, None] & (f_C < F)[None, :]
        # Read l belongs to query l // K, as reads are numbered (x, t, k).
        q_GC = tl.load(q_XTF + (place_G // K)[:, None] * F + f_C[None, :], mask=mask_GC, other=0.0)
        sum_C += tl.sum(grad_G[:, None] * q_GC, 0)
        read += BLOCK_K
    tl.store(keys_grad_XSF + row * F + f_C, sum_C, mask=f_C < F)


def best_keys(q_XTF: Tensor, keys_XSF: Tensor, values_XTK: Tensor, indices_XTK: Tensor, precision: str) -> None:
    """Writes the K best scores of every query and the indices of their keys; all tensors contiguous, float32."""
    entries, tokens, dim = q_XTF.shape
    if entries and tokens:
        precision = precision if _has_tf32(q_XTF.device) else "ieee"
        sizes = _forward_sizes(tokens, keys_XSF.shape[1], dim, values_XTK.shape[-1], precision)
        grid = (triton.cdiv(tokens, sizes["BLOCK_T"]), entries)
        # Triton launches on the current device, which need not be that of the tensors.
        with torch.cuda.device_of(q_XTF):
            _best_keys[grid](q_XTF, keys_XSF, values_XTK, indices_XTK, tokens, **sizes)


def add_gradients(
    grad_XTK: Tensor, indices_XTK: Tensor, q_XTF: Tensor, keys_XSF: Tensor, q_grad_XTF: Tensor, keys_grad_XSF: Tensor
) -> None:
    """Writes the gradients of queries and keys over zeros; all tensors contiguous, float32."""
    (entries, tokens, dim), n_keys = q_XTF.shape, keys_XSF.shape[1]
    sizes = _backward_sizes(dim, grad_XTK.shape[-1])
    columns = triton.cdiv(dim, sizes["BLOCK_F"])
    # Keys of all entries are numbered through, so that one sort and one launch serve all of them.
    first_X11 = torch.arange(entries, dtype=torch.int32, device=q_XTF.device).view(-1, 1, 1) * n_keys
    segments = read_segments((indices_XTK + first_X11).flatten(), entries * n_keys)
    with torch.cuda.device_of(q_XTF):
        _query_gradient[(entries * tokens, columns)](
            grad_XTK, indices_XTK, keys_XSF, q_grad_XTF, tokens, S=n_keys, **sizes
        )
        _key_gradient[(len(segments.rows_U), columns)](grad_XTK, q_XTF, keys_grad_XSF, *segments, **sizes)


def _has_tf32(device: torch.device) -> bool:
    return torch.version.hip is None and (device.type != "cuda" or torch.cuda.get_device_capability(device)[0] >= 8)


def _forward_sizes(tokens: int, n_keys: int, dim: int, k: int, precision: str) -> dict[str, Any]:
    padded = triton.next_power_of_2(k)
    # Tokens, keys and columns of a block. Without matrix units, with long lists and with wider blocks of columns, 64
    # tokens would need more registers than there are.
    if precision == "ieee":
        block = 16, 64, 64
    else:
        block = (16, 64, 32) if tokens <= 16 or padded > 64 else (64, 64, 32)
    return {
        "S": n_keys, "F": dim, "K": k, "P": padded, "BLOCK_T": block[0],
        # The best of a block are merged with the best so far, so a block has at least P keys.
        "BLOCK_S": max(block[1], padded),
        "BLOCK_F": min(block[2], max(16, triton.next_power_of_2(dim))), "PRECISION": precision,
    }  # fmt: skip


def _backward_sizes(dim: int, k: int) -> dict[str, int]:
    return {"F": dim, "K": k, "BLOCK_F": min(128, triton.next_power_of_2(dim)), "BLOCK_K": _READS}


def launch_examples() -> None:
    """Launches every kernel: see `pkm_lightning.ops.example_tables`."""
    # A usual size, wide keys, a long list, one token, and odd sizes.
    for tokens, n_keys, dim, k in (
        (TOKENS, 1024, 128, 32),
        (TOKENS, 1024, 256, 32),
        (TOKENS, 1024, 128, 128),
        (1, 1024, 64, 32),
        (TOKENS, 100, 25, 7),
    ):
        q_XTF, keys_XSF = torch.empty(8, tokens, dim), torch.empty(8, n_keys, dim)
        values_XTK, indices_XTK = torch.empty(8, tokens, k), ids(8, tokens, k)
        for precision in ("tf32x3", "ieee"):
            best_keys(q_XTF, keys_XSF, values_XTK, indices_XTK, precision)
        gradients = torch.empty_like(q_XTF), torch.empty_like(keys_XSF)
        add_gradients(torch.empty(8, tokens, k), indices_XTK, q_XTF, keys_XSF, *gradients)
