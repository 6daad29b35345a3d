"""Cures for slots that are rarely or never updated, each off by default (SimVQ arXiv 2411.02038, IBQ arXiv 2412.02692).

A slot that nobody reads gets no gradient. The losses here work on the scores of the halves, which every sub-key has for
every token, at the cost of two softmaxes over S: the same idea over all S * S slots could not be paid for.

Letters: T tokens, H heads, S sub-keys a half, K slots read a head, C = K * K candidate pairs.
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
    """What a memory does against unread slots.

    Args:
        simvq: the rows stay as drawn and a trained linear map follows the read, so that every row moves in every step.
        balance_loss: coefficient of `balance_loss`.
        entropy_loss: coefficient of `entropy_loss`.
        straight_through: the gradient of the weights is that of the activation over all candidate pairs, which are
            read in training.
        gumbel_noise: scale of the Gumbel noise on the half scores that decides, in training, which slots are read.

    Raises:
        ConfigError: a value of a wrong type or below 0.
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
        """The cures that `ffn.cures` of a configuration names; those that it leaves out are off.

        Raises:
            ConfigError: an unknown name.
        """
        known = [field.name for field in fields(cls)]
        if settings is not None and not isinstance(settings, Mapping):
            raise ConfigError(f"ffn.cures={settings!r} is no mapping; set a cure, as in ffn.cures.{known[0]}=true.")
        for name in settings or {}:
            if name not in known:
                raise ConfigError(f"ffn.cures.{name} is not known; allowed: {', '.join(known)}.{nearest(name, known)}")
        return cls(**(settings or {}))  # type: ignore[arg-type]

    @property
    def need_all_scores(self) -> bool:
        """Whether training needs the scores of sub-keys that are not kept."""
        return bool(self.straight_through or self.gumbel_noise or self.balance_loss or self.entropy_loss)


def gumbel(like: Tensor) -> Tensor:
    """Independent standard Gumbel draws: -log of standard exponential ones."""
    return -torch.empty_like(like).exponential_().clamp(min=torch.finfo(like.dtype).tiny).log()


def mean_probabilities(scores_HTS: Float[Tensor, "H T S"], valid_T: Bool[Tensor, " T"] | None) -> Float[Tensor, "H S"]:
    """Softmax over a half's sub-keys, averaged over the real tokens of the micro-batch of all ranks."""
    if valid_T is not None:
        # Padding may hold anything, NaN too, which a multiplication by zero would keep.
        scores_HTS = scores_HTS.where(valid_T.unsqueeze(-1), 0)
    p_HTS = scores_HTS.softmax(-1)
    if valid_T is not None:
        p_HTS = p_HTS * valid_T.unsqueeze(-1)
    tokens = p_HTS.new_full((), scores_HTS.shape[1]) if valid_T is None else valid_T.sum().to(p_HTS.dtype)
    return sum_over_ranks(p_HTS.sum(1)) / sum_over_ranks(tokens).clamp(min=1)


def entropy_loss(p_HS: Float[Tensor, "H S"]) -> Float[Tensor, ""]:
    """log S - H(p), a mean over heads: 0 where all sub-keys are equally likely on average, or no token is real.

    FwPKM (arXiv 2601.00671) takes -H(p) of both halves, which differs by a constant and a factor.
    """
    # A probability may underflow to 0, where log has no finite gradient; without a real token all of them are 0.
    log_HS = p_HS.clamp(min=torch.finfo(p_HS.dtype).tiny).log()
    return (p_HS * (math.log(p_HS.shape[-1]) + log_HS)).sum(-1).mean()


def balance_loss(
    p_HS: Float[Tensor, "H S"], keys_HTK: Int[Tensor, "H T K"], valid_T: Bool[Tensor, " T"] | None
) -> Float[Tensor, ""]:
    """S * sum_n f_n p_n, a mean over heads, f_n the share of reads with sub-key n: 1 where either is uniform
    (UltraMemV2, arXiv 2508.18756)."""
    ones_HTK = torch.ones_like(keys_HTK, dtype=p_HS.dtype)
    if valid_T is not None:
        ones_HTK = ones_HTK * valid_T.unsqueeze(-1)
    f_HS = torch.zeros_like(p_HS).scatter_add(-1, keys_HTK.flatten(1).long(), ones_HTK.flatten(1))
    f_HS = sum_over_ranks(f_HS)
    f_HS = f_HS / f_HS.sum(-1, keepdim=True).clamp(min=1)
    return p_HS.shape[-1] * (f_HS * p_HS).sum(-1).mean()


def candidate_grid(
    halves_2HTS: tuple[Tensor, Tensor], choosing_2HTS: tuple[Tensor, Tensor], k: int
) -> tuple[Float[Tensor, "H T C"], Int[Tensor, "H T C"], Int[Tensor, "H T K"]]:
    """All pairs of the `k` best sub-keys of each half, by rank in half 1, then in half 2: all that can be chosen.

    Args:
        halves_2HTS: the scores of both halves.
        choosing_2HTS: the scores that choose: the same, or with noise.
        k: slots to choose, at most the sub-keys of a half.

    Returns:
        Scores and slot ids of the candidates, and the places among them of the `k` best, best first.
    """
    n_keys = halves_2HTS[0].shape[-1]
    key1_HTK, key2_HTK = (ranked_topk(scores_HTS.detach(), k) for scores_HTS in choosing_2HTS)

    def sums(scores1_HTS: Tensor, scores2_HTS: Tensor) -> Tensor:
        return (
            scores1_HTS.gather(-1, key1_HTK).unsqueeze(-1) + scores2_HTS.gather(-1, key2_HTK).unsqueeze(-2)
        ).flatten(-2)

    ids_HTC = (key1_HTK.unsqueeze(-1) * n_keys + key2_HTK.unsqueeze(-2)).flatten(-2).int()
    return sums(*halves_2HTS), ids_HTC, ranked_topk(sums(*choosing_2HTS).detach(), k)
