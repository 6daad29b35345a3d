"""Cures for unread slots: losses on the halves, straight-through gradients, noise; each against a definition.

Letters: T tokens, D model dimension, H heads, S sub-keys per half, N slots, K slots read, J candidates a half.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from ffn import brute_force
from tolerances import assert_close, assert_same_gradients
from torch import Tensor

from pkm_lightning.memory import Addressing, Cures, ValueTable
from pkm_lightning.memory.cures import balance_loss, entropy_loss, gumbel, mean_probabilities

H, S, K, D = 2, 5, 3, 6


def addressing(activation: str = "softmax", norm: str = "rms", *, knn: int = K, **cures: Any) -> Addressing:
    return Addressing(
        dim=D,
        heads=H,
        n_keys=S,
        knn=knn,
        key_dim=8,
        query_norm=norm,
        key_norm=norm == "rms",
        activation=activation,
        temperature=False,
        cures=Cures(**cures),
    ).double()


def halves(layer: Addressing, x_TD: Tensor) -> list[Tensor]:
    """Scores of both halves by definition, (T, H, S) each."""
    p = brute_force.parameters(layer)
    q_TH2P = brute_force.queries(p, x_TD, H, "rms").unflatten(-1, (2, -1))
    keys_H2SP = brute_force.rms_normalised(p["keys.keys"], p["keys.norm.weight"]) / 2
    return [torch.einsum("the,hse->ths", q_TH2P[:, :, half], keys_H2SP[:, half]) for half in (0, 1)]


@pytest.mark.parametrize("valid_T", [None, torch.tensor([True, False, True, True, False, True, True])])
@pytest.mark.parametrize("name", ["balance", "entropy"])
def test_losses_on_the_halves_equal_their_definitions(name: str, valid_T: Tensor | None) -> None:
    layer = addressing(**{f"{name}_loss": 0.3})
    x_TD = torch.randn(7, D, dtype=torch.float64, requires_grad=True)
    read = layer(x_TD, valid_T)
    real = [t for t in range(7) if valid_T is None or valid_T[t]]
    expected = torch.zeros((), dtype=torch.float64)
    for half, scores_THS in enumerate(halves(layer, x_TD)):
        keys_THK = read.ids_THK // S if half == 0 else read.ids_THK % S
        for head in range(H):
            p_S = torch.stack([scores_THS[t, head].softmax(-1) for t in real]).mean(0)
            f_S = [sum(int((keys_THK[t, head] == n).sum()) for t in real) / (len(real) * K) for n in range(S)]
            balance = S * sum(f * p for f, p in zip(f_S, p_S, strict=True))
            entropy = math.log(S) + (p_S * p_S.log()).sum()
            expected = expected + 0.3 * (balance if name == "balance" else entropy) / (2 * H)
    assert read.aux_losses.keys() == {name}
    assert_close(read.aux_losses[name], expected)
    assert_same_gradients(read.aux_losses[name], expected, {"x": x_TD, **dict(layer.named_parameters())})
    assert layer.eval()(x_TD, valid_T).aux_losses == {}


def test_losses_reach_every_sub_key_where_the_read_reaches_few() -> None:
    x_TD = torch.randn(1, D, dtype=torch.float64)
    layer = addressing(entropy_loss=1.0)
    read = layer(x_TD)
    (by_read,) = torch.autograd.grad(read.weights_TC.square().sum(), layer.keys.keys, retain_graph=True)
    (by_loss,) = torch.autograd.grad(read.aux_losses["entropy"], layer.keys.keys)
    assert int(by_read.any(-1).sum()) <= H * 2 * K < H * 2 * S
    assert bool(by_loss.any(-1).all())


def test_losses_are_least_where_use_is_uniform() -> None:
    uniform_HS, skewed_HS = torch.full((1, 4), 0.25), torch.tensor([[0.7, 0.1, 0.1, 0.1]])
    even, first = torch.arange(4).view(1, 4, 1), torch.zeros(1, 4, 1, dtype=torch.int64)
    assert entropy_loss(uniform_HS) == pytest.approx(0, abs=1e-6)
    assert entropy_loss(skewed_HS) > 0.4
    assert balance_loss(uniform_HS, even, None) == pytest.approx(1)
    assert balance_loss(skewed_HS, first, None) == pytest.approx(2.8)
    certain_HTS = torch.tensor([[[1e4, 0.0]]], requires_grad=True)
    entropy_loss(mean_probabilities(certain_HTS, None)).backward()
    assert certain_HTS.grad is not None
    assert bool(certain_HTS.grad.isfinite().all())


# 9 slots are more than the 5 sub-keys of a half, so that all 25 are candidates.
@pytest.mark.parametrize(("activation", "knn"), [("softmax", K), ("relu", 9), ("sigmoid", K)])
def test_straight_through_reads_the_same_and_learns_from_all_candidates(activation: str, knn: int) -> None:
    plain, through = addressing(activation, knn=knn), addressing(activation, knn=knn, straight_through=True)
    through.load_state_dict(plain.state_dict())
    table = ValueTable(rows=S * S, dim=4).double()
    x_TD = torch.randn(7, D, dtype=torch.float64, requires_grad=True)
    expected, read = plain(x_TD), through(x_TD)
    assert read.ids_TC.shape == (7, H * min(knn, S) ** 2)
    assert torch.equal(read.ids_THK, expected.ids_THK)
    assert_close(read.weights_THK, expected.weights_THK.detach())
    y_TV = table(read.ids_TC, read.weights_TC)
    assert_close(y_TV, table(expected.ids_TC, expected.weights_TC))
    # The gradient is that of a read of all candidates.
    scores1_THS, scores2_THS = halves(through, x_TD)
    key1_THK, key2_THK = (s.detach().topk(min(knn, S), dim=-1).indices for s in (scores1_THS, scores2_THS))
    sums_THKK = scores1_THS.gather(-1, key1_THK).unsqueeze(-1) + scores2_THS.gather(-1, key2_THK).unsqueeze(-2)
    sums_THC = sums_THKK.flatten(-2)
    weights = {"softmax": sums_THC.softmax(-1), "relu": sums_THC.relu(), "sigmoid": sums_THC.sigmoid()}[activation]
    ids_THC = (key1_THK.unsqueeze(-1) * S + key2_THK.unsqueeze(-2)).flatten(-2)
    soft_TV = (weights.unsqueeze(-1) * table.weight[ids_THC]).sum((1, 2))
    (table_grad_NV,) = torch.autograd.grad(y_TV.sum(), table.weight, retain_graph=True)
    read_N = torch.zeros(S * S, dtype=torch.float64).index_add(
        0, expected.ids_THK.flatten().long(), expected.weights_THK.detach().flatten()
    )
    assert_close(table_grad_NV, read_N.unsqueeze(-1).expand(-1, 4), kind="grad")
    assert_same_gradients(y_TV, soft_TV, {"x": x_TD, **dict(through.named_parameters())})
    assert through.eval()(x_TD).ids_TC.shape == (7, H * knn)


def test_gumbel_draws_have_the_moments_of_the_distribution() -> None:
    draws = gumbel(torch.empty(10**6))
    assert draws.mean().item() == pytest.approx(0.5772, abs=0.01)
    assert draws.var().item() == pytest.approx(math.pi**2 / 6, rel=0.01)


@pytest.mark.parametrize("straight_through", [False, True])
def test_noise_chooses_slots_and_leaves_their_weights_alone(straight_through: bool) -> None:
    layer = addressing(gumbel_noise=2.0, straight_through=straight_through)
    x_TD = torch.randn(40, D, dtype=torch.float64)
    read = layer(x_TD)
    p = brute_force.parameters(layer)
    exact = brute_force.read(p, x_TD, heads=H, knn=K, norm="rms")
    assert not torch.equal(read.ids_THK, exact.ids_THK.int())
    assert_close(read.weights_THK, exact.scores_THN.gather(-1, read.ids_THK.long()).softmax(-1))
    assert all(len(set(ids)) == K for ids in read.ids_THK.flatten(0, 1).tolist())
    at_evaluation = layer.eval()(x_TD)
    assert torch.equal(at_evaluation.ids_THK, exact.ids_THK.int())


def test_costs() -> None:
    layer = addressing()
    assert layer.reads == layer.training_reads == H * K
    assert addressing(straight_through=True).training_reads == H * K * K
    assert addressing(straight_through=True, knn=9).training_reads == H * S * S
    assert layer.flops() == 2 * (D * H * 8 + 2 * H * S * 4)
