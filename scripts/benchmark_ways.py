"""Retrieval and reads as peers do them, and as the package does them.

Letters: T tokens, H heads, K rows a token, k kept a head, J kept a half, S sub-keys a half, E dimension of a half key,
N rows, D values a row.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from pkm_lightning.ops import product_combine, product_topk
from pkm_lightning.ops.half_topk import half_topk


def textbook_combine(
    values1_XJ: Tensor, keys1_XJ: Tensor, values2_XJ: Tensor, keys2_XJ: Tensor, n_keys: int, k: int
) -> tuple[Tensor, Tensor]:
    """All J * J sums and their slots, then top-k (Lample et al. 2019, section 3.1)."""
    sums_XJJ = values1_XJ.unsqueeze(-1) + values2_XJ.unsqueeze(-2)
    ids_XJJ = keys1_XJ.unsqueeze(-1) * n_keys + keys2_XJ.unsqueeze(-2)
    sums_XK, best_XK = torch.topk(sums_XJJ.flatten(-2), k)
    return sums_XK, ids_XJJ.flatten(-2).gather(-1, best_XK)


def textbook(q_2HTE: Tensor, keys_2HSE: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """All scores, top-k of each half, then of the k * k sums."""
    scores_2HTS = torch.einsum("xhte,xhse->xhts", q_2HTE, keys_2HSE)
    values_2HTK, chosen_2HTK = torch.topk(scores_2HTS, k)
    halves = values_2HTK[0], chosen_2HTK[0], values_2HTK[1], chosen_2HTK[1]
    return textbook_combine(*halves, keys_2HSE.shape[-2], k)


def search(q_2HTE: Tensor, keys_2HSE: Tensor, k: int, backend: str) -> tuple[Tensor, Tensor]:
    """The package's way: no score leaves the processor but those kept."""
    values_2HTK, chosen_2HTK = half_topk(q_2HTE, keys_2HSE, k, backend=backend)
    halves = values_2HTK[0], chosen_2HTK[0], values_2HTK[1], chosen_2HTK[1]
    return product_combine(*halves, keys_2HSE.shape[-2], k, backend=backend)


def search_given_scores(q_2HTE: Tensor, keys_2HSE: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Where all scores are wanted anyway, for a loss on them."""
    return product_topk(*torch.einsum("xhte,xhse->xhts", q_2HTE, keys_2HSE).unbind(), k)


def gather_einsum(table_ND: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """PEER's published way: the rows that are read, T * K * D values."""
    return torch.einsum("tk,tkd->td", weights_TK, table_ND[ids_TK.long()])


def gather_einsum_dot(table_ND: Tensor, x_TD: Tensor, ids_TK: Tensor) -> Tensor:
    """The same for inner products."""
    return torch.einsum("td,tkd->tk", x_TD, table_ND[ids_TK.long()])


def bag(table_ND: Tensor, ids_TK: Tensor, weights_TK: Tensor, sparse: bool = False) -> Tensor:
    """torch's operation, which XLM and others use."""
    return functional.embedding_bag(ids_TK, table_ND, per_sample_weights=weights_TK, mode="sum", sparse=sparse)
