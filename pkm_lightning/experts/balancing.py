"""Load balancing of experts: auxiliary losses, and the update of a selection bias.

Counts have no gradient, so the gradient of every loss flows through the probabilities alone. Padding (`valid` False)
enters no loss and no count.

Letters: K choices per token, X values of any kind.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor


def count_choices(
    ids_BTK: Int[Tensor, "B T K"], n_experts: int, valid_BT: Bool[Tensor, "B T"] | None
) -> Int[Tensor, "B E"]:
    """Counts the (token, choice) pairs of each sequence that went to each expert, int64."""
    # A scatter of ones, since `bincount` has an output size that depends on the data and would break a compiled graph.
    counted_BT = ids_BTK.new_ones(ids_BTK.shape[:2]) if valid_BT is None else valid_BT.to(ids_BTK.dtype)
    counted_BTK = counted_BT.unsqueeze(-1).expand_as(ids_BTK)
    counts_BE = ids_BTK.new_zeros(len(ids_BTK), n_experts)
    return counts_BE.scatter_add(1, ids_BTK.flatten(1), counted_BTK.flatten(1))


def load_balance_loss(
    counts_E: Int[Tensor, " E"], probs_TE: Float[Tensor, "T E"], valid_T: Bool[Tensor, " T"] | None
) -> Float[Tensor, ""]:
    """Returns `E * sum_i f_i P_i` (Fedus et al. 2021, arXiv 2101.03961, eq. 4-6): 1 in perfect balance, at most E.

    `f_i` is the share of the (token, choice) pairs that went to expert i, so that the f_i add up to 1 for every K
    (Switch has K = 1; a sum over choices would be K times as large). `P_i` is the mean over tokens of the probability
    of expert i.

    Args:
        counts_E: pairs per expert, of all ranks where `probs_TE` is that of one rank. The loss is linear in P, so that
            the ranks' losses with shares of the whole batch average to the loss of the whole batch.
        probs_TE: probabilities, which add up to 1 over the experts.
        valid_T: False at padding.
    """
    shares_E = counts_E.to(probs_TE.dtype) / counts_E.sum().clamp(min=1)
    return len(counts_E) * (shares_E * _mean(probs_TE, valid_T)).sum()


def router_z_loss(logits_TE: Float[Tensor, "T E"], valid_T: Bool[Tensor, " T"] | None) -> Float[Tensor, ""]:
    """Returns the mean over tokens of `logsumexp(logits)**2`, which keeps logits small (Zoph et al. 2022, arXiv
    2202.08906, eq. 5)."""
    return _mean(logits_TE.logsumexp(dim=-1).square().unsqueeze(-1), valid_T).squeeze(-1)


def sequence_wise_loss(
    counts_BE: Int[Tensor, "B E"], probs_BTE: Float[Tensor, "B T E"], valid_BT: Bool[Tensor, "B T"] | None
) -> Float[Tensor, ""]:
    """Averages `load_balance_loss` over sequences (DeepSeek-AI 2024, arXiv 2412.19437, eq. 17-20).

    The paper's `f_i = E / (K T) * (tokens of the sequence whose top K have expert i)` is E times the share here.
    Sequences are weighted by their number of real tokens.
    """
    shares_BE = counts_BE.to(probs_BTE.dtype) / counts_BE.sum(dim=-1, keepdim=True).clamp(min=1)
    # One mean over the tokens of all sequences weights each sequence by its real tokens.
    weighted_TE = (probs_BTE * shares_BE.unsqueeze(1)).flatten(0, 1)
    valid_T = None if valid_BT is None else valid_BT.flatten()
    return counts_BE.shape[-1] * _mean(weighted_TE, valid_T).sum()


def bias_direction(counts_E: Int[Tensor, " E"]) -> Int[Tensor, " E"]:
    """Returns `sign(mean load - load)` in exact integers (Wang et al. 2024, arXiv 2408.15664, algorithm 1)."""
    # Both sides times E: a mean that is no integer must not round a load of 3 and a mean of 10/3 to a tie.
    return torch.sign(counts_E.sum() - counts_E * len(counts_E))


def relative_maximum(counts_E: Int[Tensor, " E"]) -> Float[Tensor, ""]:
    """Returns the largest load over the mean load: 1 in balance, E with all tokens on one expert, 0 without tokens."""
    return counts_E.max() * len(counts_E) / counts_E.sum().clamp(min=1)


def _mean(x_TX: Tensor, valid_T: Tensor | None) -> Tensor:
    """Returns the mean over real tokens, (X,), or zero without any."""
    if valid_T is None:
        return x_TX.sum(dim=0) / max(1, len(x_TX))
    # Padding may hold any value; a multiplication by zero would keep its NaN.
    real_TX = x_TX.masked_fill(~valid_T.unsqueeze(-1), 0)
    return real_TX.sum(dim=0) / valid_T.sum().clamp(min=1)
