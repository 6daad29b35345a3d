"""An expert-choice mixture: each expert selects its tokens, perfectly balanced, but not causal in training.

Letters: C tokens per expert, K experts per token, M = E * C rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from pkm_lightning.errors import ConfigError, check_integer, check_range
from pkm_lightning.experts import Router, SwiGLUExperts, run_experts
from pkm_lightning.ffn.base import NO_CONTEXT, FFNContext, FFNCost, FFNOutput, Slots
from pkm_lightning.ffn.inputs import check_input
from pkm_lightning.ops import ranked_topk

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ExpertChoiceMoE"]


class ExpertChoiceMoE(nn.Module):
    """A mixture with expert choice in training (Zhou et al. 2022, arXiv 2202.09368) and token choice at evaluation (as
    the baseline of Berges et al. 2024, arXiv 2412.09764).

        S    = softmax over experts of x W_g, in fp32                          (eq. 2)
        k    = floor(n c / E), n the real tokens of one rank's micro-batch     (eq. 1)
        I    = top-k over tokens of S^T, ties by lower position                (eq. 2)
        y[t] = sum over experts e with t in I[e] of S[t, e] E_e(x[t])          (eq. 4)

    and at evaluation `y[t] = sum over the eval_top_k best experts of S[t, e] E_e(x[t])`, without dropping a token.

    **Not causal in training**: whether an expert selects a token depends on every other token of the micro-batch, later
    ones included. The training loss is therefore too low; compare evaluations only, which are causal. Two metrics
    measure the difference between the two routings: `expert_choice_mismatch` (share of real tokens that their best
    expert has not selected) and `expert_choice_unrouted` (share that no expert has selected).

    With padding in the batch, every expert computes floor(positions c / E) rows, so that no shape depends on the data;
    rows beyond its k best real tokens get weight zero. With fewer real tokens than E / c, k is zero and the layer adds
    nothing for that micro-batch; `expert_choice_unrouted` is then 1.

    | paper | here |
    |---|---|
    | e, c, k | `n_experts`, `capacity_factor`, C |
    | W_g | `router.weight` |
    | S, G, I | `probs_TE`, `weights_EC`, `tokens_EC` |

    Args:
        dim: model dimension D.
        n_layers: layers of the model, for the residual scale of the output's initialisation.
        n_experts: experts E.
        capacity_factor: average number of experts per token c, above 0, at most n_experts.
        eval_top_k: experts per token at evaluation K, 1 to n_experts.
        dense_hidden_dim: hidden dimension of the dense FFN.
        hidden_dim: hidden dimension of one expert; None takes `dense_hidden_dim`.

    Raises:
        ConfigError: a size out of range; in training also a micro-batch so small that an expert gets no token.

    Example:
        >>> import torch
        >>> from pkm_lightning import ExpertChoiceMoE
        >>> ExpertChoiceMoE(dim=8, dense_hidden_dim=16, n_experts=4)(torch.randn(2, 8, 8)).y_BTD.shape
        torch.Size([2, 8, 8])
    """

    position_wise = True

    #: Experts rank the tokens of the whole micro-batch.
    causal_in_training = False

    def __init__(
        self,
        *,
        dim: int,
        dense_hidden_dim: int,
        n_layers: int = 1,
        n_experts: int = 16,
        capacity_factor: float = 1.0,
        eval_top_k: int = 1,
        hidden_dim: int | None = None,
    ) -> None:
        super().__init__()
        check_integer("ffn.n_experts", n_experts, low=1)
        check_range("ffn.capacity_factor", capacity_factor, 0, n_experts)
        if capacity_factor == 0:
            raise ConfigError("ffn.capacity_factor=0 gives no expert any token; use a number above 0, as in 1.0.")
        check_integer("ffn.eval_top_k", eval_top_k, low=1, high=n_experts)
        hidden_dim = dense_hidden_dim if hidden_dim is None else hidden_dim
        check_integer("ffn.hidden_dim", hidden_dim, low=1)
        self.capacity_factor, self.eval_top_k = capacity_factor, eval_top_k
        self.router = Router(dim=dim, n_experts=n_experts)
        self.experts = SwiGLUExperts(n_experts=n_experts, dim=dim, hidden_dim=hidden_dim, n_layers=n_layers)

    def reset_parameters(self) -> None:
        """Draws router and experts."""
        self.router.reset_parameters()
        self.experts.reset_parameters()

    def zero_output(self) -> None:
        """Sets the output matrices of all experts to zero."""
        self.experts.zero_output()

    def match_stream(self, *, input_rms: float, stream_length: float) -> None:
        """Matches all experts; the router is divided by the input's RMS."""
        self.experts.match_stream(input_rms=input_rms, stream_length=stream_length)
        self.router.match_input(input_rms)

    def forward(self, x_BTD: Tensor, context: FFNContext = NO_CONTEXT) -> FFNOutput:
        """Routes by expert choice in training mode, else by token choice.

        The trace holds `expert_chosen` (bool) and `expert_weights`, both (B, T, E), in training; at evaluation
        `expert_ids` and `expert_weights`, both (B, T, K).
        """
        check_input(self, x_BTD, self.router.weight.shape[-1], context)
        x_TD = x_BTD.flatten(0, -2)
        probs_TE = self.router(x_TD).softmax(dim=-1)
        choose = self._experts_choose if self.training else self._tokens_choose
        y_TD, trace, metrics = choose(x_TD, probs_TE, context)
        shaped = {name: value.unflatten(0, x_BTD.shape[:-1]) for name, value in trace.items()}
        return FFNOutput(y_TD.view_as(x_BTD), trace=shaped if context.observe else {}, metrics=metrics)

    def slots(self) -> list[Slots]:
        """Returns the experts."""
        return [Slots(name="expert", count=self.experts.n_experts)]

    def cost(self) -> FFNCost:
        """Counts the router, and per token `eval_top_k` experts at evaluation or `capacity_factor` in training.

        The figure for training is exact for micro-batches that give each expert a whole number of tokens, else an upper
        bound.
        """
        params = sum(p.numel() for p in self.parameters())
        router, expert = self.router.weight.numel(), self.experts.params_per_expert()
        active = router + self.eval_top_k * expert
        return FFNCost(
            params=params,
            active_params=active,
            flops=2 * active,
            train_flops=2 * router + round(2 * self.capacity_factor * expert),
        )

    def _experts_choose(
        self, x_TD: Tensor, probs_TE: Tensor, context: FFNContext
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        valid_T = None if context.valid_BT is None else context.valid_BT.flatten()
        tokens_EC, mask_EC = self._chosen_tokens(probs_TE.detach(), valid_T)
        # Expert by expert, as `SwiGLUExperts` takes its rows; every expert has C of them.
        tokens_M = tokens_EC.flatten()
        weights_EC = probs_TE.T.gather(1, tokens_EC).masked_fill(~mask_EC, 0)
        counts_E = tokens_EC.new_full((len(tokens_EC),), tokens_EC.shape[1])
        y_MD = self.experts(x_TD.index_select(0, tokens_M), counts_E)
        weighted_MD = y_MD * weights_EC.flatten().unsqueeze(-1)
        # A token that several experts select gets the sum of their outputs.
        y_TD = weighted_MD.new_zeros(x_TD.shape).index_add(0, tokens_M, weighted_MD).to(y_MD.dtype)
        chosen_TE = torch.zeros_like(probs_TE.T, dtype=torch.bool).scatter(1, tokens_EC, mask_EC).T
        trace = {"expert_chosen": chosen_TE, "expert_weights": probs_TE.detach().masked_fill(~chosen_TE, 0)}
        return y_TD, trace, _train_test_gap(chosen_TE, probs_TE.detach(), valid_T)

    def _tokens_choose(
        self, x_TD: Tensor, probs_TE: Tensor, context: FFNContext
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        ids_TK = ranked_topk(probs_TE.detach(), self.eval_top_k)
        weights_TK = probs_TE.gather(-1, ids_TK)
        y_TD = run_experts(self.experts, x_TD, ids_TK, weights_TK)
        return y_TD, {"expert_ids": ids_TK.int(), "expert_weights": weights_TK.detach()}, {}

    def _chosen_tokens(self, probs_TE: Tensor, valid_T: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns each expert's tokens, best first, and a mask of those it keeps, its k best real ones, both (E, C)."""
        positions, n_experts = probs_TE.shape
        # 100 * 0.29 is 28.999...: rounding must not cost a whole number of tokens one of them.
        capacity = int(positions * self.capacity_factor / n_experts + 1e-9)
        if capacity < 1:
            raise ConfigError(
                f"ffn.capacity_factor={self.capacity_factor} gives each of ffn.n_experts={n_experts} experts only "
                f"{positions * self.capacity_factor / n_experts:.3g} of the micro-batch's {positions} tokens; raise "
                "ffn.capacity_factor or the micro-batch."
            )
        if valid_T is None:
            tokens_EC = ranked_topk(probs_TE.T, capacity)
            return tokens_EC, torch.ones_like(tokens_EC, dtype=torch.bool)
        # Probabilities are at least 0, so that -1 ranks padding behind every real token.
        tokens_EC = ranked_topk(probs_TE.T.masked_fill(~valid_T, -1), capacity)
        # The same arithmetic as above in the same precision, so that both round alike (but MPS has no float64).
        count_dtype = torch.float32 if valid_T.device.type == "mps" else torch.float64
        real = (valid_T.sum().to(count_dtype) * self.capacity_factor / n_experts + 1e-9).floor()
        return tokens_EC, (torch.arange(capacity, device=real.device) < real).expand_as(tokens_EC)


def _train_test_gap(chosen_TE: Tensor, probs_TE: Tensor, valid_T: Tensor | None) -> dict[str, Tensor]:
    best_T1 = ranked_topk(probs_TE, 1)
    missed_T = ~chosen_TE.gather(1, best_T1).squeeze(1)
    unrouted_T = ~chosen_TE.any(dim=1)
    real_T = torch.ones_like(missed_T) if valid_T is None else valid_T
    count = real_T.sum().clamp(min=1)
    return {
        "expert_choice_mismatch": (missed_T & real_T).sum() / count,
        "expert_choice_unrouted": (unrouted_T & real_T).sum() / count,
    }
