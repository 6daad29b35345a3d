"""Balancing losses against sums written out by hand; their values in and out of balance.

Letters: K choices per token.
"""

from __future__ import annotations

import math

import pytest
import torch
from tolerances import assert_close

from pkm_lightning.experts.balancing import (
    bias_direction,
    count_choices,
    load_balance_loss,
    relative_maximum,
    router_z_loss,
    sequence_wise_loss,
)

VALID = torch.tensor([[True, True, False], [True, False, False]])


@pytest.mark.parametrize("choices", [1, 2, 5])
def test_perfect_balance_is_one_for_any_number_of_choices(choices: int) -> None:
    ids_BTK = torch.stack([(torch.arange(10) + k) % 5 for k in range(choices)], dim=-1).view(2, 5, choices)
    counts_BE = count_choices(ids_BTK, 5, None)
    assert torch.equal(counts_BE, torch.full((2, 5), choices))
    probs_BTE = torch.rand(2, 5, 5).softmax(-1)
    assert_close(load_balance_loss(counts_BE.sum(0), probs_BTE.flatten(0, 1), None), torch.tensor(1.0))
    assert_close(sequence_wise_loss(counts_BE, probs_BTE, None), torch.tensor(1.0))
    assert relative_maximum(counts_BE.sum(0)) == 1
    assert not bias_direction(counts_BE.sum(0)).any()


def test_one_expert_for_everything_costs_as_much_as_there_are_experts() -> None:
    counts_E, probs_TE = torch.tensor([0, 12, 0]), torch.tensor([[0.0, 1.0, 0.0]]).expand(12, 3)
    assert load_balance_loss(counts_E, probs_TE, None) == 3
    assert relative_maximum(counts_E) == 3


def test_switch_by_hand() -> None:
    probs_TE = torch.tensor([[0.7, 0.2, 0.1], [0.4, 0.5, 0.1]])
    f, p = [3 / 4, 1 / 4, 0], [0.55, 0.35, 0.1]
    expected = 3 * sum(a * b for a, b in zip(f, p, strict=True))
    assert load_balance_loss(torch.tensor([3, 1, 0]), probs_TE, None).item() == pytest.approx(expected)


def test_counts_are_by_sequence_and_without_padding() -> None:
    ids_BTK = torch.tensor([[[0, 2], [2, 1], [0, 1]], [[1, 2], [0, 1], [0, 1]]])
    assert count_choices(ids_BTK, 4, VALID).tolist() == [[1, 1, 2, 0], [0, 1, 1, 0]]
    assert count_choices(ids_BTK, 4, None).tolist() == [[2, 2, 2, 0], [2, 3, 1, 0]]


def test_padding_enters_nothing_whatever_it_holds() -> None:
    probs_BTE = torch.rand(2, 3, 4).softmax(-1)
    logits_BTE = torch.randn(2, 3, 4)
    counts_BE = torch.tensor([[1, 1, 2, 0], [0, 1, 1, 0]])
    valid_T = VALID.flatten()

    def losses(probs: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        balance = load_balance_loss(counts_BE.sum(0), probs.flatten(0, 1), valid_T)
        return torch.stack(
            [balance, router_z_loss(logits.flatten(0, 1), valid_T), sequence_wise_loss(counts_BE, probs, VALID)]
        )

    actual = losses(probs_BTE, logits_BTE)
    balance = load_balance_loss(counts_BE.sum(0), probs_BTE[VALID], None)
    z = sum(math.log(sum(math.exp(v) for v in row)) ** 2 for row in logits_BTE[VALID].tolist()) / 3
    sequence = (
        sum(4 * (probs_BTE[b, t] * counts_BE[b] / counts_BE[b].sum()).sum() for b, t in ((0, 0), (0, 1), (1, 0))) / 3
    )
    assert_close(actual, torch.stack([balance, torch.tensor(z), torch.as_tensor(sequence)]))
    poison = torch.where(VALID.unsqueeze(-1), 0.0, torch.nan)
    assert torch.equal(losses(probs_BTE + poison, logits_BTE + poison), actual)


def test_no_real_token_gives_zero() -> None:
    none_T, counts_E, probs_TE = torch.zeros(6, dtype=torch.bool), torch.zeros(4, dtype=torch.int64), torch.rand(6, 4)
    assert load_balance_loss(counts_E, probs_TE, none_T) == 0
    assert router_z_loss(probs_TE, none_T) == 0
    assert sequence_wise_loss(counts_E.expand(2, 4), probs_TE.view(2, 3, 4), none_T.view(2, 3)) == 0
    assert relative_maximum(counts_E) == 0
    assert not bias_direction(counts_E).any()


def test_shares_of_the_whole_batch_make_the_ranks_losses_average_to_its_loss() -> None:
    probs_TE, loads_E = torch.rand(12, 5, dtype=torch.float64).softmax(-1), torch.tensor([9, 0, 7, 3, 5])
    ranks = [load_balance_loss(loads_E, part_TE, None) for part_TE in probs_TE.split(4)]
    assert_close(torch.stack(ranks).mean(), load_balance_loss(loads_E, probs_TE, None))


def test_bias_moves_towards_the_mean() -> None:
    # The mean is 10/3: 3 is below it and 4 above it, which a mean rounded to a whole number would miss.
    assert bias_direction(torch.tensor([3, 4, 3])).tolist() == [1, -1, 1]
    assert bias_direction(torch.tensor([0, 8, 4])).tolist() == [1, -1, 0]
