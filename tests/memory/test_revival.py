"""Dead rows become busy ones, alike for every way of splitting a table; dead sub-keys go where nobody serves queries.

Letters: N rows, V values per row, T queries, S sub-keys, P values of a half key.
"""

from __future__ import annotations

import pytest
import revival_jobs as jobs
import torch
from rank_group import Groups
from torch import Tensor
from torch.nn import functional

from pkm_lightning.memory import ValueTable
from pkm_lightning.memory.revival import copy_rows, forget_rows, keys_for_worst_served, write_keys


@pytest.mark.parametrize("slices", [1, 3])
def test_rows_become_their_sources_and_no_other_row_changes(slices: int) -> None:
    table = ValueTable(rows=7, dim=12, slices=slices)
    before_NV = table.weight.detach().clone().view(7, 12)
    copy_rows(table, torch.tensor([5, 2]), torch.tensor([0, 6]), noise=0.0, seed=1)
    expected_NV = before_NV.clone()
    expected_NV[[5, 2]] = before_NV[[0, 6]]
    assert torch.equal(table.weight.detach().view(7, 12), expected_NV)


def test_noise_has_the_configured_size() -> None:
    table = ValueTable(rows=4, dim=4000, std=3.0)
    before_NV = table.weight.detach().clone()
    copy_rows(table, torch.tensor([3]), torch.tensor([1]), noise=0.1, seed=1)
    noise_V = table.weight.detach()[3] - before_NV[1]
    assert float(noise_V.std() / before_NV[1].square().mean().sqrt()) == pytest.approx(0.1, rel=0.05)


def test_bf16_tables_are_rewritten_in_their_dtype() -> None:
    table = ValueTable(rows=4, dim=8).to(torch.bfloat16)
    copy_rows(table, torch.tensor([3]), torch.tensor([1]), noise=0.0, seed=1)
    assert torch.equal(table.weight[3], table.weight[1])


@pytest.mark.parametrize("shard", ["dim", "row", "none"])
def test_two_ranks_write_the_rows_that_one_process_writes(ranks: Groups, shard: str) -> None:
    expected_NV = jobs.revived_table(shard)
    for part in ranks(2).run(jobs.revived_table, shard):
        assert torch.equal(torch.tensor(part), torch.tensor(expected_NV))


def test_the_optimizer_forgets_these_rows_and_no_others() -> None:
    table = ValueTable(rows=4, dim=6, slices=2)
    state = {"step": torch.tensor(3.0), "exp_avg": torch.ones(8, 3), "last_step": torch.ones(8).int(), "n": 5}
    forget_rows(state, table, torch.tensor([1, 3]))
    kept_L = [1, 1, 0, 0, 1, 1, 0, 0]
    assert state["exp_avg"][:, 0].tolist() == kept_L  # type: ignore[index]
    assert state["last_step"].tolist() == kept_L  # type: ignore[attr-defined]
    assert float(state["step"]) == 3
    # As many columns as lines: only the name distinguishes them.
    state = {"updates": torch.ones(6).byte(), "column_share": torch.ones(6)}
    forget_rows(state, ValueTable(rows=6, dim=6), torch.tensor([2]))
    assert state["updates"].tolist() == [1, 1, 0, 1, 1, 1]  # type: ignore[attr-defined]
    assert state["column_share"].tolist() == [1] * 6  # type: ignore[attr-defined]


def naive(q_TP: Tensor, keys_SP: Tensor, dead: list[int], normalised: bool) -> Tensor:
    """Computes one new sub-key after another, by loops."""
    length = float(torch.stack([key.norm() for key in keys_SP]).mean())
    alive = [key / key.norm() if normalised else key for s, key in enumerate(keys_SP) if s not in dead]
    made = []
    for _ in dead:
        served = [max(float(q @ key / q.norm()) for key in alive) for q in q_TP]
        worst_P = functional.normalize(q_TP[served.index(min(served))], dim=0)
        alive.append(worst_P if normalised else worst_P * length)
        made.append(worst_P * length)
    return torch.stack(made)


@pytest.mark.parametrize("normalised", [False, True])
def test_new_sub_keys_point_to_the_queries_of_lowest_score_one_after_another(normalised: bool) -> None:
    q_TP, keys_SP, dead = torch.randn(30, 4, dtype=torch.float64), torch.randn(8, 4, dtype=torch.float64), [1, 4, 6]
    made_MP = keys_for_worst_served(q_TP, keys_SP, torch.tensor(dead), normalised=normalised, noise=0.0, seed=1)
    torch.testing.assert_close(made_MP, naive(q_TP, keys_SP, dead, normalised))


def test_where_all_are_dead_the_new_ones_still_differ() -> None:
    q_TP = torch.eye(3).repeat(5, 1)
    made_MP = keys_for_worst_served(q_TP, torch.ones(3, 3), torch.arange(3), normalised=False, noise=0.0, seed=1)
    assert len({int(key.argmax()) for key in made_MP}) == 3


def test_only_the_named_sub_keys_are_written() -> None:
    keys = torch.zeros(2, 2, 5, 3)
    write_keys(keys, 1, 0, torch.tensor([4, 2]), torch.ones(2, 3))
    assert keys.sum() == 6
    assert keys[1, 0, [2, 4]].sum() == 6


@pytest.mark.parametrize("normalised", [False, True])
def test_the_noise_of_a_sub_key_is_relative_to_the_values_of_the_others(normalised: bool) -> None:
    q_TP, keys_SP = torch.randn(5, 4000), 3 * torch.randn(4, 4000)
    plain_MP, noisy_MP = (
        keys_for_worst_served(q_TP, keys_SP, torch.tensor([2]), normalised=normalised, noise=noise, seed=1)
        for noise in (0.0, 0.1)
    )
    assert float((noisy_MP - plain_MP).std()) == pytest.approx(0.1 * 3, rel=0.05)
