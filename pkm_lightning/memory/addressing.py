"""Addressing: from the input of a layer to the slots that it reads and their weights.

The steps are queries, product keys, top-k and activation.

Letters: P values of a half key, C reads per token over all heads, J candidates per head: K, or K * K in training where
the straight-through gradient reads all of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn

from pkm_lightning.errors import check_choice, check_flag, check_integer
from pkm_lightning.memory.cures import balance_loss, candidate_grid, entropy_loss, gumbel, mean_probabilities
from pkm_lightning.memory.precision import ieee_scores
from pkm_lightning.memory.product_keys import ProductKeys, half_key_dim
from pkm_lightning.memory.query import QueryNetwork
from pkm_lightning.ops import MAX_SUB_KEYS, SCORE_PRECISIONS, product_topk

if TYPE_CHECKING:
    from jaxtyping import Bool, Float
    from torch import Tensor

    from pkm_lightning.memory.cures import Cures

ACTIVATIONS = ("softmax", "relu", "sigmoid")


class Addresses(NamedTuple):
    """The slots of each token: those to read, those selected, and the reports of the plugin."""

    #: Slots to read and their weights, (T, C).
    ids_TC: Tensor
    weights_TC: Tensor
    #: The selected slots and their weights, (T, H, K); the same reads unless the gradient is straight-through.
    ids_THK: Tensor
    weights_THK: Tensor
    aux_losses: dict[str, Tensor]
    step_stats: dict[str, Tensor]

    def trace(self, shape: torch.Size) -> dict[str, Tensor]:
        """Returns `slot_ids` and `slot_weights` of shape (*shape, H, K), detached."""
        return {
            "slot_ids": self.ids_THK.detach().unflatten(0, shape),
            "slot_weights": self.weights_THK.detach().unflatten(0, shape),
        }


class Addressing(nn.Module):
    """Product-key retrieval (Lample et al. 2019, arXiv 1907.05242, section 3.1).

    Args:
        dim: model dimension D.
        heads: queries per token H.
        n_keys: sub-keys per half S.
        knn: slots read per head K, 1 to n_keys**2.
        key_dim: dimension of both half keys together, even.
        query_norm: `none`, `rms`, `batch` or `layer`; see `QueryNetwork`.
        key_norm: RMSNorm on the sub-keys; see `ProductKeys`.
        activation: weights from scores: `softmax` over the slots of a head, or elementwise `relu` or `sigmoid`
            (Csordas et al. 2023, arXiv 2310.10837).
        temperature: whether scores are divided by a learned number per head, initially 1.
        shared_keys: whether all heads use one set of sub-keys.
        score_precision: `ieee` or `tf32x3`, see `ProductKeys`.
        key_bound: sub-keys are initialised uniform in +-key_bound; None takes 1/sqrt(key_dim).
        cures: measures against slots that are never read.

    Raises:
        ConfigError: a size out of range, an odd `key_dim`, an unknown choice, or a switch that is not a boolean.
    """

    def __init__(
        self,
        *,
        dim: int,
        heads: int,
        n_keys: int,
        knn: int,
        key_dim: int,
        query_norm: str,
        key_norm: bool,
        activation: str,
        temperature: bool,
        cures: Cures,
        shared_keys: bool = False,
        key_bound: float | None = None,
        score_precision: str = "tf32x3",
    ) -> None:
        super().__init__()
        check_integer("ffn.heads", heads, low=1)
        check_integer("ffn.n_keys", n_keys, low=1, high=MAX_SUB_KEYS)
        check_integer("ffn.knn", knn, low=1, high=n_keys**2)
        half_key_dim(key_dim)
        check_choice("ffn.activation", activation, ACTIVATIONS)
        check_choice("ffn.score_precision", score_precision, SCORE_PRECISIONS)
        check_flag("ffn.temperature", temperature)
        self.knn, self.activation, self.cures = knn, activation, cures
        self.query = QueryNetwork(dim=dim, heads=heads, key_dim=key_dim, norm=query_norm)
        self.keys = ProductKeys(
            heads=heads,
            n_keys=n_keys,
            key_dim=key_dim,
            norm=key_norm,
            shared=shared_keys,
            bound=key_bound,
            score_precision=score_precision,
        )
        self.log_temperature = nn.Parameter(torch.empty(heads)) if temperature else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Resets query and keys, and sets the temperature to 1."""
        self.query.reset_parameters()
        self.keys.reset_parameters()
        if self.log_temperature is not None:
            nn.init.zeros_(self.log_temperature)

    def forward(self, x_TD: Float[Tensor, "T D"], valid_T: Bool[Tensor, " T"] | None = None) -> Addresses:
        """Selects the slots of every token; padding is looked up too, but excluded from statistics and losses."""
        q_TH2P, stats = self.query(x_TD, valid_T)
        losses: dict[str, Tensor] = {}
        if self.training and self.cures.need_all_scores:
            halves_2HTS = self.keys(q_TH2P)
            with ieee_scores(halves_2HTS[0]):
                selection_2HTS = self._with_noise(halves_2HTS)
                if self.cures.straight_through:
                    ids_HTJ, weights_HTJ, ids_HTK, weights_HTK = self._straight_through(halves_2HTS, selection_2HTS)
                else:
                    ids_HTK, weights_HTK = self._select(halves_2HTS, selection_2HTS)
                    ids_HTJ, weights_HTJ = ids_HTK, weights_HTK
                losses = self._losses(halves_2HTS, ids_HTK, valid_T)
            by_head = (ids_HTJ, weights_HTJ, ids_HTK, weights_HTK)
            ids_THJ, weights_THJ, ids_THK, weights_THK = (part.transpose(0, 1) for part in by_head)
        else:
            # Without cures the scores of all sub-keys, (H, T, S) per half, are never written to memory.
            scores_THK, ids_THK = self.keys.search(q_TH2P, self.knn)
            with ieee_scores(scores_THK):
                weights_THK = self._activate(scores_THK, head_dim=1)
            ids_THJ, weights_THJ = ids_THK, weights_THK
        return Addresses(ids_THJ.flatten(1), weights_THJ.flatten(1), ids_THK, weights_THK, losses, stats)

    @property
    def _noisy(self) -> bool:
        return self.cures.gumbel_noise > 0

    def _with_noise(self, halves_2HTS: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        if not self._noisy:
            return halves_2HTS
        scale = self.cures.gumbel_noise
        # These scores only select, so no gradient flows through them.
        first_HTS, second_HTS = (scores_HTS.detach() for scores_HTS in halves_2HTS)
        return first_HTS + scale * gumbel(first_HTS), second_HTS + scale * gumbel(second_HTS)

    def _select(
        self, halves_2HTS: tuple[Tensor, Tensor], selection_2HTS: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Returns ids and weights of the best slots, with noise if set; the weights come from the scores without it."""
        scores_HTK, ids_HTK = product_topk(*selection_2HTS, self.knn)
        if self._noisy:
            n_keys = halves_2HTS[0].shape[-1]
            key1_HTK, key2_HTK = ids_HTK.long() // n_keys, ids_HTK.long() % n_keys
            scores_HTK = halves_2HTS[0].gather(-1, key1_HTK) + halves_2HTS[1].gather(-1, key2_HTK)
        return ids_HTK, self._activate(scores_HTK)

    def _straight_through(
        self, halves_2HTS: tuple[Tensor, Tensor], selection_2HTS: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns all candidates and the selected ones, with weights.

        The weights of the candidates have the values of the selected weights (0 for all others), and the gradient of an
        activation over all candidates.
        """
        scores_HTJ, ids_HTJ, best_HTK = candidate_grid(halves_2HTS, selection_2HTS, self.knn)
        soft_HTJ = self._activate(scores_HTJ)
        weights_HTK = self._activate(scores_HTJ.gather(-1, best_HTK)).detach()
        hard_HTJ = torch.zeros_like(soft_HTJ).scatter(-1, best_HTK, weights_HTK)
        # The difference is 0 in forward; in backward it has the gradient of `soft`.
        return ids_HTJ, hard_HTJ + (soft_HTJ - soft_HTJ.detach()), ids_HTJ.gather(-1, best_HTK), weights_HTK

    def _activate(self, scores: Tensor, *, head_dim: int = 0) -> Tensor:
        """Returns the weights of scores (H, T, K), or (T, H, K) with `head_dim=1`."""
        if self.log_temperature is not None:
            # The logarithm is the parameter, so that the temperature stays positive.
            factor_H = torch.exp(-self.log_temperature.to(scores.dtype))
            scores = scores * factor_H.view(-1, *(1,) * (scores.ndim - 1 - head_dim))
        if self.activation == "softmax":
            return torch.softmax(scores, dim=-1)
        return torch.relu(scores) if self.activation == "relu" else torch.sigmoid(scores)

    def _losses(self, halves_2HTS: tuple[Tensor, Tensor], ids_HTK: Tensor, valid_T: Tensor | None) -> dict[str, Tensor]:
        balance_weight, entropy_weight = self.cures.balance_loss, self.cures.entropy_loss
        if not (balance_weight or entropy_weight):
            return {}
        n_keys = halves_2HTS[0].shape[-1]
        keys_2HTK = (ids_HTK // n_keys, ids_HTK % n_keys)
        p_2HS = [mean_probabilities(scores_HTS, valid_T) for scores_HTS in halves_2HTS]
        losses: dict[str, Tensor] = {}
        if balance_weight:
            first, second = (balance_loss(p, keys, valid_T) for p, keys in zip(p_2HS, keys_2HTK, strict=True))
            losses["balance"] = balance_weight * (first + second) / 2
        if entropy_weight:
            losses["entropy"] = entropy_weight * (entropy_loss(p_2HS[0]) + entropy_loss(p_2HS[1])) / 2
        return losses

    def diagnostics(self, output: Addresses, x_TD: Tensor, valid_T: Tensor | None = None) -> dict[str, Tensor]:
        """Returns norms of half queries and sub-keys, extremes of the scores, and the saturation of the weights.

        `query_norm`, `key_norm`: mean L2 norms as the scores use them; `score_max`, `score_min`: of the selected slots;
        `weight_top`: mean share of the largest weight in the sum of the weights of a head.
        """
        q_TH2P, _ = self.query(x_TD, valid_T)
        scores_THK, _ = self.keys.search(q_TH2P, self.knn)
        weights_THK = output.weights_THK.abs()
        shares_TH = weights_THK.amax(-1) / weights_THK.sum(-1).clamp(min=1e-20)
        return {
            "query_norm": q_TH2P.norm(dim=-1).mean(),
            "key_norm": self.keys.score_keys(q_TH2P).norm(dim=-1).mean(),
            "score_max": scores_THK.amax(),
            "score_min": scores_THK.amin(),
            "weight_top": shares_TH.mean(),
        }

    def after_step(self, stats: dict[str, Tensor]) -> None:
        """Updates the running statistics of batch normalisation, if the queries use it."""
        self.query.after_step(stats)

    @property
    def n_keys(self) -> int:
        """Sub-keys per half, S; the slot of sub-keys i and j is i * S + j."""
        return self.keys.n_keys

    @property
    def reads(self) -> int:
        """Rows that each token reads in evaluation, H * K."""
        return self.query.heads * self.knn

    @property
    def training_reads(self) -> int:
        """Rows that each token reads in training: all candidates with the straight-through gradient."""
        per_head = min(self.knn, self.n_keys) ** 2 if self.cures.straight_through else self.knn
        return self.query.heads * per_head

    def flops(self) -> int:
        """Returns the forward FLOPs per token: the query's matrix and 2 * S half scores per head, without top-k."""
        half = self.keys.keys.shape[3]
        return 2 * (self.query.projection.weight.numel() + 2 * self.query.heads * self.n_keys * half)
