"""Independent references of product-key memories, without any product structure: one full key per slot.

Functions take named parameters (`dict(layer.named_parameters())`) and tables, and call none of the layer's code.

Letters: N slots (N = S * S), P values of a half key.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Read(NamedTuple):
    """The scores of all slots, and the slots read with their weights."""

    scores_THN: Tensor
    ids_THK: Tensor
    weights_THK: Tensor


def rms_normalised(x_XP: Tensor, gain_P: Tensor) -> Tensor:
    return x_XP / x_XP.square().mean(-1, keepdim=True).sqrt() * gain_P


def parameters(layer: nn.Module) -> dict[str, Tensor]:
    """Returns the parameters in float64, named without the prefix `addressing.`."""
    return {
        name.removeprefix("addressing."): p if p.dtype is torch.float64 else p.double()
        for name, p in layer.named_parameters()
    }


def queries(p: Mapping[str, Tensor], x_TD: Tensor, heads: int, norm: str) -> Tensor:
    """Computes both half queries of each head side by side, (T, H, 2 P), with batch statistics over all of `x_TD`."""
    q_TF = x_TD @ p["query.projection.weight"].T + p["query.projection.bias"]
    if norm == "batch":
        deviation_F = (q_TF.var(0, unbiased=False) + 1e-5).sqrt()
        q_TF = (q_TF - q_TF.mean(0)) / deviation_F * p["query.norm.weight"] + p["query.norm.bias"]
    q_THP = q_TF.view(len(x_TD), heads, -1)
    if norm == "layer":
        centred_THP = q_THP - q_THP.mean(-1, keepdim=True)
        deviation_TH1 = (centred_THP.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        q_THP = centred_THP / deviation_TH1 * p["query.norm.weight"] + p["query.norm.bias"]
    if norm == "rms":
        q_THP = rms_normalised(q_THP.unflatten(-1, (2, -1)), p["query.norm.weight"]).flatten(-2)
    return q_THP


def full_keys(p: Mapping[str, Tensor], heads: int) -> Tensor:
    """Writes out one key per slot, (H, N, 2 P): slot n = i * S + j has the sub-keys i and j side by side."""
    keys_H2SP = p["keys.keys"].double()
    size, half = keys_H2SP.shape[2:]
    if "keys.norm.weight" in p:
        keys_H2SP = rms_normalised(keys_H2SP, p["keys.norm.weight"].double()) / math.sqrt(half)
    full_HNP = torch.stack(
        [torch.cat([keys_H2SP[:, 0, n // size], keys_H2SP[:, 1, n % size]], dim=-1) for n in range(size**2)], dim=1
    )
    return full_HNP.expand(heads, -1, -1)


def best_slots(scores_THN: Tensor, k: int) -> Tensor:
    """Selects the `k` best of all N scores, for random scores, which have no ties."""
    return scores_THN.topk(k, dim=-1).indices


def by_rank_in_both_halves(scores_THN: Tensor, k: int) -> Tensor:
    """Selects the `k` best with ties in the documented order: rank in half 1, then rank in half 2, then sub-key index.

    The ranks follow from the N scores: slots (i, 0) are ordered like the first half, slots (0, j) like the second.
    """
    size = round(scores_THN.shape[-1] ** 0.5)
    grid_THSS = scores_THN.unflatten(-1, (size, size))
    rank1_THS = grid_THSS[..., 0].sort(dim=-1, descending=True, stable=True).indices.argsort(-1)
    rank2_THS = grid_THSS[..., 0, :].sort(dim=-1, descending=True, stable=True).indices.argsort(-1)
    rank_THN = (rank1_THS.unsqueeze(-1) * size + rank2_THS.unsqueeze(-2)).flatten(-2)
    in_rank_order_THN = rank_THN.argsort(-1)
    best_THN = scores_THN.gather(-1, in_rank_order_THN).sort(dim=-1, descending=True, stable=True).indices
    return in_rank_order_THN.gather(-1, best_THN[..., :k])


def read(
    p: Mapping[str, Tensor],
    x_TD: Tensor,
    *,
    heads: int,
    knn: int,
    norm: str,
    activation: str = "softmax",
    q_THP: Tensor | None = None,
    choose: Callable[[Tensor, int], Tensor] = best_slots,
) -> Read:
    """Selects the best slots of every head and applies `activation` to their scores."""
    q_THP = queries(p, x_TD, heads, norm) if q_THP is None else q_THP
    scores_THN = torch.einsum("thp,hnp->thn", q_THP, full_keys(p, heads))
    ids_THK = choose(scores_THN.detach(), knn)
    chosen_THK = scores_THN.gather(-1, ids_THK)
    if "log_temperature" in p:
        chosen_THK = chosen_THK / p["log_temperature"].exp()[:, None]
    if activation == "softmax":
        weights_THK = chosen_THK.exp() / chosen_THK.exp().sum(-1, keepdim=True)
    else:
        weights_THK = chosen_THK.clamp(min=0) if activation == "relu" else 1 / (1 + (-chosen_THK).exp())
    return Read(scores_THN, ids_THK, weights_THK)


def weighted_values(chosen: Read, table_NV: Tensor) -> Tensor:
    """Sums weight times value over heads and slots."""
    return (chosen.weights_THK.unsqueeze(-1) * table_NV[chosen.ids_THK]).sum(dim=(1, 2))


def memory_plus(p: Mapping[str, Tensor], table_NV: Tensor, x_TD: Tensor, chosen: Read, gate: str = "swilu") -> Tensor:
    """Computes (y * silu(W1 x)) W2, or the other gates, where y is the read, mapped if there is a map."""
    y_TV = weighted_values(chosen, table_NV)
    if "values.projection.weight" in p:
        y_TV = y_TV @ p["values.projection.weight"].T
    if gate != "none":
        gate_TV = x_TD @ p["gate.weight"].T
        y_TV = y_TV * torch.sigmoid(gate_TV) * (gate_TV if gate == "swilu" else 1)
    return y_TV @ p["out.weight"].T
