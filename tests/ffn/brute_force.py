"""Memory+ written down once more from the paper, without any product structure: every slot has a key of its own.

Letters: T tokens, D model dimension, H heads, N slots, S sub-keys a half (N = S * S), E dimension of a half key,
K slots read a head, V values a slot.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pkm_lightning.ffn import MemoryPlus


def rms_normalised(x_XE: Tensor, gain_E: Tensor) -> Tensor:
    return x_XE / x_XE.square().mean(-1, keepdim=True).sqrt() * gain_E


def queries(layer: MemoryPlus, x_TD: Tensor) -> Tensor:
    """The two half queries of each head side by side, (T, H, 2 E)."""
    heads, _, _, half = layer.keys.keys.shape
    q_TH2E = (x_TD @ layer.query.projection.weight.T + layer.query.projection.bias).view(-1, heads, 2, half)
    if layer.query.norm is not None:
        q_TH2E = rms_normalised(q_TH2E, layer.query.norm.weight)
    return q_TH2E.flatten(2)


def full_keys(layer: MemoryPlus) -> Tensor:
    """One key a slot: slot n = i * S + j has sub-keys i and j side by side, (H, N, 2 E)."""
    keys_H2SE = layer.keys.keys.to(torch.float64)
    size, half = keys_H2SE.shape[2:]
    if layer.keys.norm is not None:
        keys_H2SE = rms_normalised(keys_H2SE, layer.keys.norm.weight.double()) / math.sqrt(half)
    return torch.stack(
        [torch.cat([keys_H2SE[:, 0, n // size], keys_H2SE[:, 1, n % size]], dim=-1) for n in range(size**2)], dim=1
    )


def best_slots(scores_THN: Tensor, k: int) -> Tensor:
    """The `k` best of all N scores; scores that are equal only by accident do not occur."""
    return scores_THN.topk(k, dim=-1).indices


def memory_plus(
    layer: MemoryPlus,
    table_NV: Tensor,
    x_TD: Tensor,
    q_THE: Tensor | None = None,
    choose: Callable[[Tensor, int], Tensor] = best_slots,
) -> Tensor:
    """(y * silu(W1 x)) W2 with y the softmax-weighted sum of the best slots' values, over all heads."""
    q_THE = queries(layer, x_TD) if q_THE is None else q_THE
    scores_THN = torch.einsum("the,hne->thn", q_THE, full_keys(layer))
    ids_THK = choose(scores_THN.detach(), layer.knn)
    weights_THK = scores_THN.gather(-1, ids_THK).softmax(-1)
    y_TV = (weights_THK.unsqueeze(-1) * table_NV[ids_THK]).sum(dim=(1, 2))
    gate_TV = x_TD @ layer.gate.weight.to(x_TD.dtype).T
    return (y_TV * gate_TV * torch.sigmoid(gate_TV)) @ layer.out.weight.to(x_TD.dtype).T
