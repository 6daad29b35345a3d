"""The distribution from which tokens are drawn, against formulas written out for one sequence at a time."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pkm_lightning.errors import ConfigError
from pkm_lightning.inference.sampling import NO_TOKEN, Sampling

W = 7
NOTHING_SEEN = torch.full((1, 1), -1)


def probabilities(logits: list[float], seen: list[int], sampling: Sampling) -> list[float]:
    """Returns the probability of each token, by the definitions."""
    penalty = sampling.repetition_penalty
    scores = [(z / penalty if z > 0 else z * penalty) if i in seen else z for i, z in enumerate(logits)]
    shares = [math.exp(z / sampling.temperature) for z in scores]
    order = sorted(range(W), key=lambda i: (-shares[i], i))
    if sampling.top_k is not None:
        order = [i for i in order if shares[i] >= shares[order[min(sampling.top_k, W) - 1]]]
    if sampling.top_p is not None:
        total, kept, reached = sum(shares[i] for i in order), [], 0.0
        for i in order:
            if kept and reached >= sampling.top_p:
                break
            kept.append(i)
            reached += shares[i] / total
        order = kept
    if sampling.min_p is not None:
        order = [i for i in order if shares[i] >= sampling.min_p * shares[order[0]]]
    total = sum(shares[i] for i in order)
    return [shares[i] / total if i in order else 0.0 for i in range(W)]


def drawn(logits_W: Tensor, seen: list[int], sampling: Sampling, draws: int = 4000) -> list[float]:
    """Returns how often each token is chosen over an even grid of random numbers."""
    uniform_B = (torch.arange(draws, dtype=torch.float64) + 0.5) / draws
    seen_BP = torch.tensor([seen or [-1]]).expand(draws, -1)
    tokens_B = sampling.choose(logits_W.expand(draws, -1), seen_BP, uniform_B)
    return (torch.bincount(tokens_B, minlength=W) / draws).tolist()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.3},
        {"temperature": 2.5},
        {"top_k": 1},
        {"top_k": 3},
        {"top_k": 100},
        {"top_p": 0.0},
        {"top_p": 0.55},
        {"top_p": 1.0},
        {"min_p": 0.0},
        {"min_p": 0.25},
        {"min_p": 1.0},
        {"repetition_penalty": 1.7},
        {"repetition_penalty": 0.6},
        {"top_k": 5, "top_p": 0.8, "min_p": 0.1, "temperature": 1.4, "repetition_penalty": 1.2},
    ],
    ids=str,
)
@pytest.mark.parametrize("tied", [False, True])
def test_tokens_are_drawn_by_their_probabilities(options: dict[str, Any], tied: bool) -> None:
    logits_W = torch.tensor([0.4, -1.0, 2.0, 2.0 if tied else 1.1, -0.3, 0.4 if tied else 0.9, -5.0])
    sampling = Sampling(**{"temperature": 1.0, **options})
    expected = probabilities(logits_W.tolist(), [2, 4], sampling)
    assert drawn(logits_W, [2, 4, 2], sampling) == pytest.approx(expected, abs=3e-4)


def test_greedy_takes_the_best_after_the_penalty() -> None:
    logits_BW = torch.tensor([[0.0, 3.0, 2.9], [-1.0, -1.1, -4.0]])
    zeros_B = torch.zeros(2, dtype=torch.float64)
    assert Sampling().choose(logits_BW, NOTHING_SEEN.expand(2, -1), zeros_B).tolist() == [1, 0]
    penalised = Sampling(repetition_penalty=1.2).choose(logits_BW, torch.tensor([[1, -1], [0, 0]]), zeros_B)
    assert penalised.tolist() == [2, 1]


def test_the_ends_of_the_unit_interval_draw_possible_tokens() -> None:
    sampling = Sampling(temperature=1.0, top_k=2)
    uniform_B = torch.tensor([0.0, math.nextafter(1.0, 0.0)], dtype=torch.float64)
    logits_BW = torch.tensor([-9.0, 1.0, 1.5, -9.0]).expand(2, -1)
    assert sampling.choose(logits_BW, NOTHING_SEEN.expand(2, -1), uniform_B).tolist() == [1, 2]


@pytest.mark.parametrize(
    ("logits", "temperature", "expected"),
    [
        ([2.0, 1.0], 1e-40, 0),
        ([2.0, 1.0], 1e-320, 0),
        ([1.0, -math.inf], 1.0, 0),
        *(([bad, 1.0], t, NO_TOKEN) for bad in (math.nan, math.inf) for t in (0.0, 1.0)),
        ([-math.inf, -math.inf], 1.0, NO_TOKEN),
    ],
)
def test_a_token_of_the_vocabulary_is_chosen_where_the_logits_are_numbers(
    logits: list[float], temperature: float, expected: int
) -> None:
    uniform_B = torch.tensor([0.7], dtype=torch.float64)
    chosen_B = Sampling(temperature=temperature).choose(torch.tensor([logits]), NOTHING_SEEN, uniform_B)
    assert chosen_B.tolist() == [expected]


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0},
        {"max_new_tokens": 2.5},
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"top_k": 0},
        {"top_p": 1.5},
        {"min_p": -1},
        {"repetition_penalty": 0},
        {"repetition_penalty": 1e39},
        {"samples": 10**12},
        {"stop": ("",)},
        {"stop": "ab"},
        {"samples": 0},
        {"seed": -1},
    ],
    ids=str,
)
def test_values_that_mean_nothing_are_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Sampling(**wrong)
