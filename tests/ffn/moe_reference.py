"""Independent references of the mixtures of experts: one token, one expert, one sum at a time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pkm_lightning.experts import SwiGLUExperts
from pkm_lightning.ffn import ExpertChoiceMoE, MoE

Settings = dict[str, Any]
Losses = dict[str, Tensor]


def swiglu(x_D: Tensor, gate_DF: Tensor, up_DF: Tensor, out_FD: Tensor) -> Tensor:
    gate_F = x_D @ gate_DF
    return (gate_F * torch.sigmoid(gate_F) * (x_D @ up_DF)) @ out_FD


def expert(experts: SwiGLUExperts, e: int, x_D: Tensor) -> Tensor:
    return swiglu(x_D, experts.gate[e], experts.up[e], experts.out[e])


def best(scores_E: list[float], k: int) -> list[int]:
    """Selects the `k` best, ties by lower index."""
    return sorted(range(len(scores_E)), key=lambda e: (-scores_E[e], e))[:k]


def scores(settings: Settings, logits_E: Tensor) -> Tensor:
    if settings["score"] == "sigmoid":
        return 1 / (1 + torch.exp(-logits_E))
    return torch.exp(logits_E) / torch.exp(logits_E).sum()


def weights(settings: Settings, logits_E: Tensor, chosen: list[int]) -> list[Tensor]:
    if settings["select"] == "after":
        total = torch.stack([torch.exp(logits_E[e]) for e in chosen]).sum()
        raw = [torch.exp(logits_E[e]) / total for e in chosen]
    else:
        raw = [scores(settings, logits_E)[e] for e in chosen]
    if settings["renormalise"]:
        raw = [weight / torch.stack(raw).sum() for weight in raw]
    return [settings["routed_scale"] * weight for weight in raw]


def token_choice(
    layer: MoE, settings: Settings, x_BTD: Tensor, valid_BT: Tensor | None = None
) -> tuple[Tensor, Losses, Tensor]:
    """Computes output, weighted losses and loads (of real tokens) of `layer`, whose settings are `settings`."""
    n_experts, k = settings["n_experts"], settings["top_k"]
    bias = [0.0] * n_experts
    if settings["balancing"] == "bias":
        bias = [settings["bias_rate"] * steps for steps in layer.bias_steps.tolist()]
    y_BTD = []
    probs: list[list[Tensor]] = []  # of the real tokens of each sequence
    z: list[Tensor] = []
    loads = torch.zeros(len(x_BTD), n_experts, dtype=torch.int64)
    unbiased = torch.zeros_like(loads)
    for b, x_TD in enumerate(x_BTD):
        probs.append([])
        for t, x_D in enumerate(x_TD):
            logits_E = torch.stack([x_D @ weight_D for weight_D in layer.router.weight])
            s_E = scores(settings, logits_E)
            chosen = best([s + extra for s, extra in zip(s_E.tolist(), bias, strict=True)], k)
            gates = weights(settings, logits_E, chosen)
            parts = [g * expert(layer.experts, e, x_D) for g, e in zip(gates, chosen, strict=True)]
            if layer.shared is not None:
                parts.append(
                    swiglu(x_D, layer.shared.gate.weight.T, layer.shared.up.weight.T, layer.shared.out.weight.T)
                )
            y_BTD.append(torch.stack(parts).sum(0))
            if valid_BT is None or valid_BT[b, t]:
                probs[-1].append(s_E / s_E.sum())
                z.append(torch.log(torch.exp(logits_E).sum()) ** 2)
                for e in chosen:
                    loads[b, e] += 1
                for e in best(s_E.tolist(), k):
                    unbiased[b, e] += 1
    losses = _losses(settings, probs, z, loads, unbiased)
    return torch.stack(y_BTD).view_as(x_BTD), losses, loads.sum(0)


def _losses(settings: Settings, probs: list[list[Tensor]], z: list[Tensor], loads: Tensor, unbiased: Tensor) -> Losses:
    """Switch eq. 4 with shares over all choices; ST-MoE eq. 5; DeepSeek-V3 eq. 17-20, weighted by real tokens."""
    n_experts, k = settings["n_experts"], settings["top_k"]
    every = [p_E for of_sequence in probs for p_E in of_sequence]
    losses: Losses = {}
    if settings["balancing"] == "loss" and settings["balance_loss"]:
        f = [int(loads[:, i].sum()) / (len(every) * k) for i in range(n_experts)]
        p = [sum(p_E[i] for p_E in every) / len(every) for i in range(n_experts)]
        losses["balance"] = settings["balance_loss"] * n_experts * sum(a * b for a, b in zip(f, p, strict=True))
    if settings["z_loss"]:
        losses["router_z"] = settings["z_loss"] * torch.stack(z).sum() / len(z)
    if settings["sequence_balance_loss"]:
        total = torch.zeros((), dtype=torch.float64)
        for b, of_sequence in enumerate(probs):
            length = len(of_sequence)
            for i in range(n_experts if length else 0):
                f_i = n_experts / (k * length) * int(unbiased[b, i])
                total = total + length / len(every) * f_i * torch.stack([p_E[i] for p_E in of_sequence]).sum() / length
        losses["sequence_balance"] = settings["sequence_balance_loss"] * total
    return losses


def probabilities(layer: ExpertChoiceMoE, x_TD: Tensor) -> Tensor:
    logits_TE = torch.stack([torch.stack([x_D @ weight_D for weight_D in layer.router.weight]) for x_D in x_TD])
    return torch.exp(logits_TE) / torch.exp(logits_TE).sum(-1, keepdim=True)


def expert_choice(
    layer: ExpertChoiceMoE, capacity_factor: float, x_TD: Tensor, valid_T: Tensor
) -> tuple[Tensor, list[list[int]]]:
    """Computes the output and the tokens of each expert: the floor(n c / E) best of the n real tokens."""
    s_TE = probabilities(layer, x_TD)
    n_experts = s_TE.shape[1]
    real = [t for t, is_real in enumerate(valid_T.tolist()) if is_real]
    k = int(len(real) * capacity_factor / n_experts)
    y_TD = [torch.zeros_like(x_D) for x_D in x_TD]
    chosen = []
    for e in range(n_experts):
        chosen.append(sorted(real, key=lambda t: (-s_TE[t, e].item(), t))[:k])
        for t in chosen[-1]:
            y_TD[t] = y_TD[t] + s_TE[t, e] * expert(layer.experts, e, x_TD[t])
    return torch.stack(y_TD), chosen


def token_choice_of_expert_choice(layer: ExpertChoiceMoE, k: int, x_TD: Tensor) -> Tensor:
    """Computes the output at evaluation: the `k` best experts of each token, weighted by their probabilities."""
    s_TE = probabilities(layer, x_TD)
    return torch.stack(
        [
            torch.stack([s_E[e] * expert(layer.experts, e, x_D) for e in best(s_E.tolist(), k)]).sum(0)
            for x_D, s_E in zip(x_TD, s_TE, strict=True)
        ]
    )
