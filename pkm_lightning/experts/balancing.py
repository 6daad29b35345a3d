"""What keeps the experts equally busy: auxiliary losses, and the update of a selection bias.

Counts have no gradient, so every loss pulls through the probabilities alone. Padding (`valid` False) enters none.

Letters: B sequences, T tokens (of one sequence, or of all of them where there is no B), E experts, K choices a token.
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
    """How many (token, choice) pairs of each sequence went to each expert, int64."""
    counted_BT = ids_BTK.new_ones(ids_BTK.shape[:2]) if valid_BT is None else valid_BT.to(ids_BTK.dtype)
    counted_BTK = counted_BT.unsqueeze(-1).expand_as(ids_BTK)
    counts_BE = ids_BTK.new_zeros(len(ids_BTK), n_experts)
    return counts_BE.scatter_add(1, ids_BTK.flatten(1), counted_BTK.flatten(1))


def load_balance_loss(
    counts_E: Int[Tensor, " E"], probs_TE: Float[Tensor, "T E"], valid_T: Bool[Tensor, " T"] | None
) -> Float[Tensor, ""]:
    """`E * sum_i f_i P_i` (Fedus et al. 2021, arXiv 2101.03961, eq. 4-6): 1 in perfect balance, at most E.

    `f_i` is the share of the (token, choice) pairs that went to expert i, so that the f_i add up to 1 for every K
    (Switch has K = 1; a sum over choices instead would be K times as large). `P_i` is the mean over tokens of the
    probability of expert i.

    Args:
        counts_E: pairs of each expert; from all ranks, where `probs_TE` are one rank's. The loss is linear in P, so the
            ranks' losses with shares of the whole batch average to the loss of the whole batch, and P stays local.
        probs_TE: probabilities, which add up to 1 over the experts.
        valid_T: False at padding.
    """
    shares_E = counts_E.to(probs_TE.dtype) / counts_E.sum().clamp(min=1)
    return len(counts_E) * (shares_E * _mean(probs_TE, valid_T)).sum()


def router_z_loss(logits_TE: Float[Tensor, "T E"], valid_T: Bool[Tensor, " T"] | None) -> Float[Tensor, ""]:
    """Mean over tokens of `logsumexp(logits)**2` (Zoph et al. 2022, arXiv 2202.08906, eq. 5): keeps logits small."""
    return _mean(logits_TE.logsumexp(dim=-1).square().unsqueeze(-1), valid_T).squeeze(-1)


def sequence_wise_loss(
    counts_BE: Int[Tensor, "B E"], probs_BTE: Float[Tensor, "B T E"], valid_BT: Bool[Tensor, "B T"] | None
) -> Float[Tensor, ""]:
    """`load_balance_loss` of each sequence by itself, averaged (DeepSeek-AI 2024, arXiv 2412.19437, eq. 17-20).

    The paper's `f_i = E / (K T) * (tokens of the sequence whose top K have expert i)` is E times the share here.
    Sequences are weighted by their real tokens.
    """
    shares_BE = counts_BE.to(probs_BTE.dtype) / counts_BE.sum(dim=-1, keepdim=True).clamp(min=1)
    weighted_BTE = probs_BTE * shares_BE.unsqueeze(1)
    return (
        counts_BE.shape[-1] * _mean(weighted_BTE.flatten(0, 1), None if valid_BT is None else valid_BT.flatten()).sum()
    )


def bias_direction(counts_E: Int[Tensor, " E"]) -> Int[Tensor, " E"]:
    """`sign(mean load - load)` (Wang et al. 2024, arXiv 2408.15664, algorithm 1), exact in whole numbers."""
    return torch.sign(counts_E.sum() - counts_E * len(counts_E))


def relative_maximum(counts_E: Int[Tensor, " E"]) -> Float[Tensor, ""]:
    """Largest load over the mean load: 1 in perfect balance, E where one expert gets everything, 0 without tokens."""
    return counts_E.max() * len(counts_E) / counts_E.sum().clamp(min=1)


def _mean(x_TX: Tensor, valid_T: Tensor | None) -> Tensor:
    """Mean over real tokens, (X,); zero where there are none."""
    if valid_T is None:
        return x_TX.sum(dim=0) / max(1, len(x_TX))
    # Padding may hold anything, NaN too, which a multiplication by zero would keep.
    real_TX = x_TX.masked_fill(~valid_T.unsqueeze(-1), 0)
    return real_TX.sum(dim=0) / valid_T.sum().clamp(min=1)
