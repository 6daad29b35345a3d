"""The history of revivals through rollbacks and resumes."""

from __future__ import annotations

import torch

from pkm_lightning.usage.revival_history import RevivalHistory


def mask(*which: int) -> torch.Tensor:
    return torch.zeros(4, dtype=torch.bool).index_fill(0, torch.tensor(which), True)


def test_a_rollback_takes_its_share_back_also_after_a_resume() -> None:
    last_N = torch.tensor([0, 5, 0, 2], dtype=torch.int32)
    history = RevivalHistory()
    assert torch.equal(history.last_change("table0", last_N), last_N)
    history.add("table0", mask(0, 1), step=4, clock=4)
    history.add("table0", mask(2), step=8, clock=8)
    history.add("layer0.slot", mask(3), step=8, clock=8)
    resumed = RevivalHistory()
    resumed.load_state_dict(history.state_dict())
    for one in (history, resumed):
        assert one.last_change("table0", last_N).tolist() == [4, 5, 8, 2]
        assert one.counts == {"table0": 3, "layer0.slot": 1}
        one.go_back(8)
        assert one.counts == {"table0": 3, "layer0.slot": 1}
        one.go_back(5)
        assert one.counts == {"table0": 2}
        assert one.last_change("table0", last_N).tolist() == [4, 5, 0, 2]
        assert torch.equal(one.last_change("layer0.slot", last_N), last_N)
        one.add("table0", mask(2), step=8, clock=11)
        one.go_back(3)
        assert not one.counts
        assert torch.equal(one.last_change("table0", last_N), last_N)


def test_what_a_checkpoint_holds_does_not_change_any_more() -> None:
    history = RevivalHistory()
    history.add("table0", mask(2), step=8, clock=8)
    state = history.state_dict()
    history.go_back(0)
    assert state["clocks"]["table0"].tolist() == [0, 0, 8, 0]
    assert len(state["events"]) == 1
