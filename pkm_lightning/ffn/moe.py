"""A token-choice mixture of experts: OLMoE's routing by default, Mixtral's and DeepSeek-V3's by configuration.

Letters: K experts per token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from pkm_lightning.errors import ConfigError, check_choice, check_flag, check_integer, check_range
from pkm_lightning.experts import Router, SwiGLUExperts, run_experts
from pkm_lightning.experts.balancing import (
    bias_direction,
    count_choices,
    load_balance_loss,
    relative_maximum,
    router_z_loss,
    sequence_wise_loss,
)
from pkm_lightning.ffn.base import NO_CONTEXT, FFNContext, FFNCost, FFNOutput, Slots, replaced
from pkm_lightning.ffn.dense import Dense
from pkm_lightning.ffn.inputs import check_input
from pkm_lightning.ops import ranked_topk, sum_over_ranks

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["MoE"]


class MoE(nn.Module):
    """A mixture in which every token runs through its `top_k` best experts, weighted by their scores; none is dropped.

        s   = softmax(x W_r) or sigmoid(x W_r), in fp32
        I   = top-k of s + b, ties by lower index; b = 0 unless `balancing=bias`
        g_i = s_i for i in I              (`select=before`: scored before the selection)
            = softmax over I of (x W_r)_i (`select=after`: the logits of the selected experts alone)
        g_i = g_i / sum over I of g_i     (with `renormalise`)
        y   = routed_scale * sum over I of g_i E_i(x) + E_shared(x)

    The losses, in training, are over real tokens only and summed over layers: `balance` (Switch), `router_z` (ST-MoE)
    and `sequence_balance` (DeepSeek-V3, on the top-k of s without b, as in its eq. 18); see
    `pkm_lightning.experts.balancing`. The metric `expert_load_max` is the largest load over the mean load in one rank's
    micro-batch. Padding is computed like other tokens, but enters no loss and no count.

    | OLMoE (arXiv 2409.02060) | Mixtral (2401.04088) | DeepSeek-V3 (2412.19437) | here |
    |---|---|---|---|
    | N_E, k | n, K | N_r, K_r | `n_experts`, `top_k` |
    | | | N_s | `shared_experts` |
    | r(x) | x W_g | e_i (centroids) | `router.weight` |
    | | | b_i, gamma | `bias_rate * bias_steps`, `bias_rate` |
    | alpha, beta | | alpha | `balance_loss`, `z_loss`; `sequence_balance_loss` |

    Args:
        dim: model dimension D.
        n_layers: layers of the model, for the residual scale of the outputs' initialisation.
        n_experts: routed experts E.
        top_k: experts per token K, 1 to n_experts.
        dense_hidden_dim: hidden dimension of the dense FFN whose active size is matched where `hidden_dim` is None.
        hidden_dim: hidden dimension of one expert; None takes dense_hidden_dim / (top_k + shared_experts).
        shared_experts: further experts that every token runs through, built as one SwiGLU of their joint size.
        score: `softmax` over all experts, or `sigmoid` of each.
        select: whether scores are computed `before` or `after` the selection; `after` needs `score=softmax`.
        renormalise: divide the weights of the selected experts by their sum.
        routed_scale: factor on the routed output.
        balancing: `loss` (uses `balance_loss`), `bias` (uses `bias_rate`), or `none`. The other two losses are
            independent of it.
        balance_loss, z_loss, sequence_balance_loss: coefficients of the losses; 0 disables a loss.
        bias_rate: step of the selection bias b after each optimizer step (Wang et al. 2024, arXiv 2408.15664).

    Raises:
        ConfigError: a size or a coefficient out of range, an unknown choice, or `select=after` with `score=sigmoid`.

    Example:
        >>> import torch
        >>> from pkm_lightning import MoE
        >>> MoE(dim=8, dense_hidden_dim=16, n_experts=4, top_k=2)(torch.randn(2, 5, 8)).y_BTD.shape
        torch.Size([2, 5, 8])
    """

    position_wise = True

    #: Net number of steps of each expert's bias, an integer, so that a cast of the model to bf16 cannot round the bias.
    bias_steps: Tensor

    def __init__(
        self,
        *,
        dim: int,
        dense_hidden_dim: int,
        n_layers: int = 1,
        n_experts: int = 64,
        top_k: int = 8,
        hidden_dim: int | None = None,
        shared_experts: int = 0,
        score: str = "softmax",
        select: str = "before",
        renormalise: bool = False,
        routed_scale: float = 1.0,
        balancing: str = "loss",
        balance_loss: float = 0.02,
        z_loss: float = 0.001,
        sequence_balance_loss: float = 0.0,
        bias_rate: float = 0.001,
    ) -> None:
        super().__init__()
        _check_sizes(n_experts=n_experts, top_k=top_k, shared_experts=shared_experts)
        _check_words(score=score, select=select, balancing=balancing)
        check_flag("ffn.renormalise", renormalise)
        factors = {"routed_scale": routed_scale, "balance_loss": balance_loss, "z_loss": z_loss}
        factors |= {"sequence_balance_loss": sequence_balance_loss, "bias_rate": bias_rate}
        for name, value in factors.items():
            check_range(f"ffn.{name}", value, 0)
        if hidden_dim is None:
            check_integer("ffn.dense_hidden_dim", dense_hidden_dim, low=1)
            hidden_dim = max(1, round(dense_hidden_dim / (top_k + shared_experts)))
        check_integer("ffn.hidden_dim", hidden_dim, low=1)
        self.top_k, self.score, self.select, self.renormalise = top_k, score, select, renormalise
        self.routed_scale, self.balancing, self.bias_rate = routed_scale, balancing, bias_rate
        self.balance_loss = balance_loss if balancing == "loss" else 0.0
        self.z_loss, self.sequence_balance_loss = z_loss, sequence_balance_loss
        self.router = Router(dim=dim, n_experts=n_experts)
        self.experts = SwiGLUExperts(n_experts=n_experts, dim=dim, hidden_dim=hidden_dim, n_layers=n_layers)
        # Shared experts all run with weight 1, so one SwiGLU of their joint width computes the same sum.
        shared_dim = shared_experts * hidden_dim
        self.shared = Dense(dim=dim, n_layers=n_layers, hidden_dim=shared_dim) if shared_experts else None
        if balancing == "bias":
            self.register_buffer("bias_steps", torch.zeros(n_experts, dtype=torch.int64))

    def reset_parameters(self) -> None:
        """Draws router and experts, and sets the bias to zero."""
        self.router.reset_parameters()
        self.experts.reset_parameters()
        if self.shared is not None:
            self.shared.reset_parameters()
        if self.balancing == "bias":
            self.bias_steps.zero_()

    def zero_output(self) -> None:
        """Sets the output matrices of all experts to zero."""
        self.experts.zero_output()
        if self.shared is not None:
            self.shared.zero_output()

    def match_stream(self, *, input_rms: float, stream_length: float) -> None:
        """Matches all experts; the router is divided by the input's RMS."""
        self.experts.match_stream(input_rms=input_rms, stream_length=stream_length)
        if self.shared is not None:
            self.shared.match_stream(input_rms=input_rms, stream_length=stream_length)
        self.router.match_input(input_rms)

    def forward(self, x_BTD: Tensor, context: FFNContext = NO_CONTEXT) -> FFNOutput:
        """Routes every token of `x_BTD`; the trace holds the experts chosen and their weights."""
        check_input(self, x_BTD, self.router.weight.shape[-1], context)
        if x_BTD.ndim == 2:  # the losses are over sequences
            output = self.forward(x_BTD.unsqueeze(0), context)
            return replaced(output, y_BTD=output.y_BTD.squeeze(0))
        logits_BTE = self.router(x_BTD.flatten(0, -2)).unflatten(0, x_BTD.shape[:-1])
        scores_BTE = logits_BTE.softmax(dim=-1) if self.score == "softmax" else logits_BTE.sigmoid()
        # Top-k has no gradient: the router learns through the weights of the experts that it selects.
        ids_BTK = self._selected(scores_BTE.detach())
        weights_BTK = self._weights(logits_BTE, scores_BTE, ids_BTK)
        y_TD = run_experts(self.experts, x_BTD.flatten(0, 1), ids_BTK.flatten(0, 1), weights_BTK.flatten(0, 1))
        y_BTD = y_TD.view_as(x_BTD)
        if self.shared is not None:
            y_BTD = y_BTD + self.shared(x_BTD, context).y_BTD
        trace = {}
        if context.observe:
            trace = {"expert_ids": ids_BTK.int(), "expert_weights": weights_BTK.detach()}
        if not self.training:
            return FFNOutput(y_BTD, trace=trace)
        counts_BE = count_choices(ids_BTK, scores_BTE.shape[-1], context.valid_BT)
        counts_E = counts_BE.sum(dim=0)
        # Counts leave through the output instead of a buffer, so that a recomputed forward cannot count twice.
        return FFNOutput(
            y_BTD,
            aux_losses=self._losses(logits_BTE, scores_BTE, counts_BE, context.valid_BT),
            trace=trace,
            step_stats={"expert_counts": counts_E} if self.balancing == "bias" else {},
            metrics={"expert_load_max": relative_maximum(counts_E)},
        )

    def after_step(self, stats: dict[str, Tensor]) -> None:
        """Moves the bias of each expert one step towards the mean load of the whole optimizer step."""
        if self.balancing == "bias" and "expert_counts" in stats:
            self.bias_steps += bias_direction(stats["expert_counts"])

    def slots(self) -> list[Slots]:
        """Returns the routed experts; shared experts run for every token and are not counted."""
        return [Slots(name="expert", count=self.experts.n_experts)]

    def cost(self) -> FFNCost:
        """Counts the router, `top_k` experts and the shared ones; sorting and weighting count no FLOPs."""
        params = sum(p.numel() for p in self.parameters())
        idle = (self.experts.n_experts - self.top_k) * self.experts.params_per_expert()
        return FFNCost(params=params, active_params=params - idle, flops=2 * (params - idle))

    def _selected(self, scores_BTE: Tensor) -> Tensor:
        if self.balancing == "bias":
            scores_BTE = scores_BTE + self.bias_rate * self.bias_steps.to(scores_BTE.dtype)
        return ranked_topk(scores_BTE, self.top_k)

    def _weights(self, logits_BTE: Tensor, scores_BTE: Tensor, ids_BTK: Tensor) -> Tensor:
        if self.select == "after":
            weights_BTK = logits_BTE.gather(-1, ids_BTK).softmax(dim=-1)
        else:
            weights_BTK = scores_BTE.gather(-1, ids_BTK)
        if self.renormalise:
            # The bias may select experts whose scores are all zero in fp32.
            weights_BTK = weights_BTK / weights_BTK.sum(dim=-1, keepdim=True).clamp(min=1e-20)
        return weights_BTK * self.routed_scale

    def _losses(
        self, logits_BTE: Tensor, scores_BTE: Tensor, counts_BE: Tensor, valid_BT: Tensor | None
    ) -> dict[str, Tensor]:
        """Returns the losses of a non-zero coefficient; sigmoid scores are divided by their sum to be probabilities."""
        valid_T = None if valid_BT is None else valid_BT.flatten()
        probs_BTE = scores_BTE
        if self.score == "sigmoid":
            probs_BTE = scores_BTE / scores_BTE.sum(dim=-1, keepdim=True).clamp(min=1e-20)
        losses = {}
        if self.balance_loss:
            # The shares are those of all ranks; probabilities stay local, since the loss is linear in them.
            loads_E = sum_over_ranks(counts_BE.sum(dim=0))
            losses["balance"] = self.balance_loss * load_balance_loss(loads_E, probs_BTE.flatten(0, 1), valid_T)
        if self.z_loss:
            losses["router_z"] = self.z_loss * router_z_loss(logits_BTE.flatten(0, 1), valid_T)
        if self.sequence_balance_loss:
            # DeepSeek-V3's eq. 18 ranks the scores without the bias, which the selection above includes.
            if self.balancing == "bias":
                ids_BTK = ranked_topk(scores_BTE.detach(), self.top_k)
                counts_BE = count_choices(ids_BTK, scores_BTE.shape[-1], valid_BT)
            loss = sequence_wise_loss(counts_BE, probs_BTE, valid_BT)
            losses["sequence_balance"] = self.sequence_balance_loss * loss
        return losses


def _check_sizes(*, n_experts: int, top_k: int, shared_experts: int) -> None:
    check_integer("ffn.n_experts", n_experts, low=1)
    check_integer("ffn.top_k", top_k, low=1, high=n_experts)
    check_integer("ffn.shared_experts", shared_experts, low=0)


def _check_words(*, score: str, select: str, balancing: str) -> None:
    check_choice("ffn.score", score, ("softmax", "sigmoid"))
    check_choice("ffn.select", select, ("before", "after"))
    check_choice("ffn.balancing", balancing, ("loss", "bias", "none"))
    if select == "after" and score == "sigmoid":
        raise ConfigError(
            "ffn.select=after is a softmax over the selected logits; with ffn.score=sigmoid use ffn.select=before and "
            "ffn.renormalise=true."
        )
