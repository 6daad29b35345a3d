"""Retrieval and reads as other packages do them, and as this package does them.

Letters: X heads and tokens, J sub-keys kept per half, F dimension of a half key; `k` is K of one head.
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
    """Adds all J * J pairs and keeps the best k (Lample et al. 2019, arXiv 1907.05242, section 3.1)."""
    sums_XJJ = values1_XJ.unsqueeze(-1) + values2_XJ.unsqueeze(-2)
    ids_XJJ = keys1_XJ.unsqueeze(-1) * n_keys + keys2_XJ.unsqueeze(-2)
    sums_XK, best_XK = torch.topk(sums_XJJ.flatten(-2), k)
    return sums_XK, ids_XJJ.flatten(-2).gather(-1, best_XK)


def textbook(q_2HTF: Tensor, keys_2HSF: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Computes all scores, keeps the best k of each half, then the best k of their k * k sums."""
    scores_2HTS = torch.einsum("xhtf,xhsf->xhts", q_2HTF, keys_2HSF)
    values_2HTK, chosen_2HTK = torch.topk(scores_2HTS, k)
    halves = values_2HTK[0], chosen_2HTK[0], values_2HTK[1], chosen_2HTK[1]
    return textbook_combine(*halves, keys_2HSF.shape[-2], k)


def search(q_2HTF: Tensor, keys_2HSF: Tensor, k: int, backend: str) -> tuple[Tensor, Tensor]:
    """Searches with the package's operations, which write only the scores that are kept to memory."""
    # Scores of all S sub-keys stay in registers or caches; a textbook search writes and reads them.
    values_2HTK, chosen_2HTK = half_topk(q_2HTF, keys_2HSF, k, backend=backend)
    halves = values_2HTK[0], chosen_2HTK[0], values_2HTK[1], chosen_2HTK[1]
    return product_combine(*halves, keys_2HSF.shape[-2], k, backend=backend)


def search_given_scores(q_2HTF: Tensor, keys_2HSF: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Searches where all scores are computed anyway, for example for a loss on them."""
    return product_topk(*torch.einsum("xhtf,xhsf->xhts", q_2HTF, keys_2HSF).unbind(), k)


def gather_einsum(table_NV: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Reads as PEER was published (arXiv 2407.04153): gathers T * K * V values."""
    return torch.einsum("tk,tkv->tv", weights_TK, table_NV[ids_TK.long()])


def gather_einsum_dot(table_NV: Tensor, x_TV: Tensor, ids_TK: Tensor) -> Tensor:
    """Gathers rows for inner products with `x_TV`."""
    return torch.einsum("tv,tkv->tk", x_TV, table_NV[ids_TK.long()])


def bag(table_NV: Tensor, ids_TK: Tensor, weights_TK: Tensor, sparse: bool = False) -> Tensor:
    """Reads with torch's `embedding_bag`, as other implementations of product-key memories do."""
    return functional.embedding_bag(ids_TK, table_NV, per_sample_weights=weights_TK, mode="sum", sparse=sparse)
