"""Reads of quantised rows in torch operations: a chunk of tokens at a time, whose rows are expanded and multiplied.

Letters: G groups per token, X = T * G; M tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pkm_lightning.ops.quantized_rows.format import QuantizedRows, dequantize_rows

#: Expanded values held at a time: 16 MiB.
_CHUNK_VALUES = 2**22


def gather_sum(
    rows: QuantizedRows, ids_TK: Tensor, weights_TK: Tensor, groups_TK: Tensor | None, n_groups: int
) -> Tensor:
    """Computes `y[t * G + g] = sum of weights[t, k] * rows[ids[t, k]]` over the k in group g, as (X, V) in float32."""
    sums = []
    for chunk, values_MKV in _expanded(rows, ids_TK):
        weights_MGK = weights_TK[chunk].unsqueeze(1)
        if groups_TK is not None:
            group_G1 = torch.arange(n_groups, device=ids_TK.device).unsqueeze(-1)
            weights_MGK = weights_MGK * (groups_TK[chunk].unsqueeze(1) == group_G1)
        sums.append(torch.bmm(weights_MGK, values_MKV).flatten(0, 1))
    return torch.cat(sums)


def gather_dot(rows: QuantizedRows, x_TV: Tensor, ids_TK: Tensor) -> Tensor:
    """Computes `a[t, k] = <rows[ids[t, k]], x[t]>` in float32."""
    return torch.cat(
        [torch.bmm(values_MKV, x_TV[chunk].unsqueeze(-1)).squeeze(-1) for chunk, values_MKV in _expanded(rows, ids_TK)]
    )


def _expanded(rows: QuantizedRows, ids_TK: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yields chunks of tokens and the values of the rows that they read, (M, K, V)."""
    step = max(1, _CHUNK_VALUES // (ids_TK.shape[1] * rows.dim))
    for start in range(0, len(ids_TK), step):
        chunk = slice(start, start + step)
        ids_L = ids_TK[chunk].flatten()
        gathered = rows._replace(
            codes_NC=rows.codes_NC.index_select(0, ids_L), scales_NQ=rows.scales_NQ.index_select(0, ids_L)
        )
        yield chunk, dequantize_rows(gathered).unflatten(0, (-1, ids_TK.shape[1]))
