"""The gathered inner products through ATen's embedding bag, of whose weights they are the gradient.

With `y[t] = sum_k w[t, k] * table[ids[t, k]]`, the gradient of y in w for the upstream x is exactly
`<table[ids[t, k]], x[t]>`, and ATen computes it without writing the T * K gathered rows. It is registered as a custom
operator, since ATen gives it no gradient of its own.

Letters: N rows, D values a row, T tokens, K rows a token, C tokens a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, library

_SUM = 0  # embedding_bag's mode
_CHUNK_VALUES = 2**24  # gathered values held at a time where ATen has no kernel


def gathered_dot_eager(table_ND: Tensor, x_TD: Tensor, ids_TK: Tensor) -> Tensor:
    """See `pkm_lightning.ops.gathered_dot`."""
    result: Tensor = _dot(table_ND, x_TD, ids_TK)
    return result


@library.custom_op("pkm_lightning::gathered_dot", mutates_args=())
def _dot(table: Tensor, x: Tensor, ids: Tensor) -> Tensor:
    table_ND, x_TD, ids_TK = table, x.contiguous(), ids.contiguous()
    if ids_TK.numel() == 0:
        return x_TD.new_empty(ids_TK.shape)
    # ATen has no bf16 kernel of this on CUDA in the older torch versions that the package allows.
    if table_ND.is_cuda and table_ND.dtype is torch.bfloat16:
        return _dot_in_chunks(table_ND, x_TD, ids_TK)
    offsets_T, token_X = _bags(ids_TK)
    dots_X: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        x_TD, table_ND, ids_TK.flatten(), offsets_T, token_X, _SUM
    )
    return dots_X.view(ids_TK.shape)


@library.custom_op("pkm_lightning::gathered_dot_backward", mutates_args=())
def _dot_backward(table: Tensor, x: Tensor, ids: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    table_ND, x_TD, ids_TK, grad_TK = table, x.contiguous(), ids.contiguous(), grad.contiguous()
    if ids_TK.numel() == 0:
        return torch.zeros_like(table_ND), torch.zeros_like(x_TD)
    if table_ND.is_cuda:
        table_grad_ND = _table_gradient_in_chunks(len(table_ND), x_TD, ids_TK, grad_TK)
        return table_grad_ND, _weighted_rows_in_chunks(table_ND, ids_TK, grad_TK)
    _, token_X = _bags(ids_TK)
    ids_X, bag_sizes_T = ids_TK.flatten(), torch.full_like(ids_TK[:, 0], ids_TK.shape[1])
    table_grad_ND = torch.ops.aten._embedding_bag_dense_backward(
        x_TD, ids_X, token_X, bag_sizes_T, bag_sizes_T, len(table_ND), False, _SUM, grad_TK.flatten()
    )
    x_grad_TD = torch.nn.functional.embedding_bag(ids_TK, table_ND, per_sample_weights=grad_TK, mode="sum")
    return table_grad_ND, x_grad_TD


@_dot.register_fake
def _(table: Tensor, x: Tensor, ids: Tensor) -> Tensor:
    return x.new_empty(ids.shape)


@_dot_backward.register_fake
def _(table: Tensor, x: Tensor, ids: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(table), torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_TK: Tensor) -> tuple[Tensor, Tensor, None]:
    table_grad_ND, x_grad_TD = _dot_backward(*ctx.saved_tensors, grad_TK)
    return table_grad_ND, x_grad_TD, None


_dot.register_autograd(_backward, setup_context=_setup_context)


def _bags(ids_TK: Tensor) -> tuple[Tensor, Tensor]:
    """Where each token's rows begin in the flat ids, and the token of each flat id; both of the ids' own dtype."""
    tokens, per_token = ids_TK.shape
    token_T = torch.arange(tokens, device=ids_TK.device, dtype=ids_TK.dtype)
    return token_T * per_token, token_T.repeat_interleave(per_token)


def _chunks(ids_TK: Tensor, dim: int) -> list[slice]:
    tokens, per_token = ids_TK.shape
    step = max(1, _CHUNK_VALUES // (per_token * dim))
    return [slice(start, start + step) for start in range(0, tokens, step)]


def _dot_in_chunks(table_ND: Tensor, x_TD: Tensor, ids_TK: Tensor) -> Tensor:
    parts = [
        torch.bmm(table_ND[ids_TK[chunk].long()], x_TD[chunk].unsqueeze(-1)).squeeze(-1)
        for chunk in _chunks(ids_TK, x_TD.shape[1])
    ]
    return torch.cat(parts)


def _table_gradient_in_chunks(rows: int, x_TD: Tensor, ids_TK: Tensor, grad_TK: Tensor) -> Tensor:
    # A row may be read thousands of times: bf16 would lose most of such a sum.
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    table_grad_ND = x_TD.new_zeros(rows, x_TD.shape[1], dtype=wide)
    for chunk in _chunks(ids_TK, x_TD.shape[1]):
        rows_XD = (grad_TK[chunk].unsqueeze(-1).to(wide) * x_TD[chunk].unsqueeze(1).to(wide)).flatten(0, 1)
        table_grad_ND.index_add_(0, ids_TK[chunk].flatten(), rows_XD)
    return table_grad_ND.to(x_TD.dtype)


def _weighted_rows_in_chunks(table_ND: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    parts = [
        torch.bmm(weights_TK[chunk].unsqueeze(1), table_ND[ids_TK[chunk].long()]).squeeze(1)
        for chunk in _chunks(ids_TK, table_ND.shape[1])
    ]
    return torch.cat(parts)
