"""Cures for slots that are rarely or never updated, each off by default (SimVQ arXiv 2411.02038, IBQ arXiv 2412.02692).

A slot that is never read gets no gradient. The losses here use the scores of the halves, which every sub-key has for
every token. They cost two softmaxes over S sub-keys; the same losses over all S * S slots would be too expensive.

Letters: M = min(K, S) sub-keys of each half, J = M * M candidate pairs per head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch

from pkm_lightning.errors import ConfigError, check_flag, check_range, nearest
from pkm_lightning.ops import ranked_topk, sum_over_ranks

if TYPE_CHECKING:
    from jaxtyping import Bool, Float, Int
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Cures:
    """The measures of a memory against slots that are never read.

    Args:
        simvq: the rows stay as initialised and a trained linear map follows the read, so that every step changes all.
        balance_loss: coefficient of `balance_loss`.
        entropy_loss: coefficient of `entropy_loss`.
        straight_through: the gradient of the weights is that of the activation over all candidate pairs, which are
            read in training.
        gumbel_noise: scale of the Gumbel noise that is added to the half scores for the selection in training.

    Raises:
        ConfigError: a value of the wrong type or below 0.
    """

    simvq: bool = False
    balance_loss: float = 0.0
    entropy_loss: float = 0.0
    straight_through: bool = False
    gumbel_noise: float = 0.0

    def __post_init__(self) -> None:
        for name in ("balance_loss", "entropy_loss", "gumbel_noise"):
            check_range(f"ffn.cures.{name}", getattr(self, name), 0)
        for name in ("simvq", "straight_through"):
            check_flag(f"ffn.cures.{name}", getattr(self, name))

    @classmethod
    def of(cls, settings: Mapping[str, object] | None) -> Cures:
        """Returns the cures that `ffn.cures` of a configuration sets; all others are off.

        Raises:
            ConfigError: an unknown name.
        """
        known = [field.name for field in fields(cls)]
        if settings is not None and not isinstance(settings, Mapping):
            raise ConfigError(f"ffn.cures={settings!r} is not a mapping; set a cure, as in ffn.cures.{known[0]}=true.")
        for name in settings or {}:
            if name not in known:
                raise ConfigError(f"ffn.cures.{name} is not known; allowed: {', '.join(known)}.{nearest(name, known)}")
        return cls(**(settings or {}))  # type: ignore[arg-type]

    @property
    def need_all_scores(self) -> bool:
        """Whether training needs the scores of all sub-keys, not only of the best ones."""
        return bool(self.straight_through or self.gumbel_noise or self.balance_loss or self.entropy_loss)


def gumbel(like: Tensor) -> Tensor:
    """Draws independent standard Gumbel noise, as -log of standard exponential noise."""
    return -torch.empty_like(like).exponential_().clamp(min=torch.finfo(like.dtype).tiny).log()


def mean_probabilities(scores_HTS: Float[Tensor, "H T S"], valid_T: Bool[Tensor, " T"] | None) -> Float[Tensor, "H S"]:
    """Averages the softmax over the sub-keys of a half over the real tokens of all ranks' micro-batches.

    Collective: call on all ranks.
    """
    if valid_T is not None:
        # Padding may hold NaN, which a multiplication by zero would keep.
        scores_HTS = scores_HTS.where(valid_T.unsqueeze(-1), 0)
    p_HTS = scores_HTS.softmax(-1)
    if valid_T is not None:
        p_HTS = p_HTS * valid_T.unsqueeze(-1)
    tokens = p_HTS.new_full((), scores_HTS.shape[1]) if valid_T is None else valid_T.sum().to(p_HTS.dtype)
    return sum_over_ranks(p_HTS.sum(1)) / sum_over_ranks(tokens).clamp(min=1)


def entropy_loss(p_HS: Float[Tensor, "H S"]) -> Float[Tensor, ""]:
    """Computes log S - H(p), averaged over heads: 0 if p is uniform or no token is real.

    FwPKM (arXiv 2601.00671) takes -H(p) of both halves, which differs by a constant and a factor.
    """
    # Probabilities may underflow to 0, where log has no finite gradient; without a real token all are 0.
    log_HS = p_HS.clamp(min=torch.finfo(p_HS.dtype).tiny).log()
    return (p_HS * (math.log(p_HS.shape[-1]) + log_HS)).sum(-1).mean()


def balance_loss(
    p_HS: Float[Tensor, "H S"], keys_HTK: Int[Tensor, "H T K"], valid_T: Bool[Tensor, " T"] | None
) -> Float[Tensor, ""]:
    """Computes S * sum_n f_n p_n, averaged over heads, where f_n is the share of reads with sub-key n.

    It is 1 where f or p is uniform (UltraMemV2, arXiv 2508.18756). Collective: call on all ranks.
    """
    ones_HTK = torch.ones_like(keys_HTK, dtype=p_HS.dtype)
    if valid_T is not None:
        ones_HTK = ones_HTK * valid_T.unsqueeze(-1)
    f_HS = torch.zeros_like(p_HS).scatter_add(-1, keys_HTK.flatten(1).long(), ones_HTK.flatten(1))
    f_HS = sum_over_ranks(f_HS)
    f_HS = f_HS / f_HS.sum(-1, keepdim=True).clamp(min=1)
    return p_HS.shape[-1] * (f_HS * p_HS).sum(-1).mean()


def candidate_grid(
    halves_2HTS: tuple[Tensor, Tensor], selection_2HTS: tuple[Tensor, Tensor], k: int
) -> tuple[Float[Tensor, "H T J"], Int[Tensor, "H T J"], Int[Tensor, "H T K"]]:
    """Returns all pairs of the `k` best sub-keys of each half, or of all, which contain the `k` best slots.

    Args:
        halves_2HTS: the scores of both halves.
        selection_2HTS: the scores for the selection: the same, or with noise.
        k: slots to select, at most the square of the sub-keys per half.

    Returns:
        Scores and slot ids of the candidates, ordered by rank in half 1, then in half 2, and the positions of the `k`
        best among them, best first.
    """
    n_keys = halves_2HTS[0].shape[-1]
    key1_HTM, key2_HTM = (ranked_topk(scores_HTS.detach(), min(k, n_keys)) for scores_HTS in selection_2HTS)

    def sums(scores1_HTS: Tensor, scores2_HTS: Tensor) -> Tensor:
        return (
            scores1_HTS.gather(-1, key1_HTM).unsqueeze(-1) + scores2_HTS.gather(-1, key2_HTM).unsqueeze(-2)
        ).flatten(-2)

    ids_HTJ = (key1_HTM.unsqueeze(-1) * n_keys + key2_HTM.unsqueeze(-2)).flatten(-2).int()
    return sums(*halves_2HTS), ids_HTJ, ranked_topk(sums(*selection_2HTS).detach(), k)
