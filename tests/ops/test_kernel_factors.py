"""What a rule's kernels take per row comes from the same states as its update.

Letters: V values per row, U rows that were read.
"""

from __future__ import annotations

import pytest
import torch

from pkm_lightning.ops.row_update import RowRule, UpdateStep, find_rule, new_state, rule_names

RULES = [
    *(find_rule(name)(betas=(0.0, 0.9)) for name in rule_names()),
    find_rule("lazy_adam")(bias_correction="row"),  # type: ignore[call-arg]
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.name}_{'updates' in rule.state}")
def test_they_move_the_states_per_row_as_the_update_does(rule: RowRule) -> None:
    state, step, index_U = new_state(rule, torch.zeros(6, 5)), UpdateStep(lr=0.1, number=3), torch.tensor([4, 1])
    for value in state.values():
        value.copy_(torch.rand(value.shape) if value.is_floating_point() else torch.randint(2, value.shape))
    before = {name: value.clone() for name, value in state.items()}
    grad_UV, mean_squares_U = torch.randn(2, 5), torch.rand(2) if rule.needs_mean_squares else None
    # Padded segments repeat the first.
    padded = [0, 1, 0]
    padded_squares_U = None if mean_squares_U is None else mean_squares_U[padded]
    factors = rule.kernel_factors(state, index_U[padded], step, padded_squares_U)
    assert all(torch.equal(value, before[name]) for name, value in state.items())
    rule.update(torch.randn(2, 5), grad_UV, state, index_U, step, mean_squares_U)
    per_row = {name for name, part in rule.state.items() if part.per == "row"}
    assert per_row == (set() if factors is None else set(factors.states))
    for name in per_row:
        assert factors is not None
        assert torch.equal(factors.states[name].to(state[name].dtype), state[name][index_U[padded]])
