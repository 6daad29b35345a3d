"""Slot usage and revival where training goes back to an earlier step and repeats some."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import revival_jobs as revivals
import torch
import usage_jobs as jobs

from pkm_lightning.training.restoring import HostSnapshot

GIVEN = ["strategy=single", "ffn=memory_plus", "placement=middle", "optim.warmup_share=0", "optim.final_factor=1.0"]


class GoBack(L.Callback):
    """Goes back once, from the end of step `at` to that of step `to`."""

    def __init__(self, at: int, to: int) -> None:
        self.at, self.to = at, to
        self.state: HostSnapshot | None = None

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step == self.to and self.state is None:
            self.state = HostSnapshot(trainer, pl_module)
        elif trainer.global_step == self.at and self.state is not None:
            self.state.restore(trainer, pl_module)
            self.at = -1


@pytest.mark.parametrize(("at", "to"), [(5, 1), (5, 4)])
def test_windows_and_last_reads_go_on(at: int, to: int, tmp_path: Path) -> None:
    """Counts every step that was made: the window is that of a run of 9 steps without a rollback."""
    raw, watching = jobs.Raw(), jobs.usage(tmp_path, dead_after=3)
    steps = 9 - (at - to)
    jobs.fit([*GIVEN, f"trainer.max_steps={steps}"], 9, [watching, GoBack(at, to), raw])
    counters = watching.counters
    assert counters is not None
    assert counters.clock == len(raw.seen) == 9
    raw.seen = [(clock, *seen[1:]) for clock, seen in enumerate(raw.seen, start=1)]
    read = {clock: {slot for slot, _ in raw.reads(1, "slot", [clock])} for clock in range(1, 10)}
    last = [max([clock for clock, slots in read.items() if slot in slots], default=0) for slot in range(256)]
    assert counters.last_read("layer1.slot").tolist() == last
    late = raw.reads(1, "slot", range(7, 10))  # of periods of 2: the whole 4th, and what is done of the 5th
    assert counters.total("layer1.slot", "window").counts_N.tolist() == jobs.histogram(late, 256)[0]
    content = json.loads((tmp_path / "usage.json").read_text())
    assert (content["step"], content["clock"], content["window_steps"]) == (steps, 9, 3)
    assert content["layers"]["layer1.slot"]["dead"] == sum(9 - at >= 3 for at in last)


def test_a_revival_is_undone(tmp_path: Path) -> None:
    """Restores rows and history: the same rows are revived at the same step again."""
    overrides = [*GIVEN, "model.memory.n_keys=32"]
    found = []
    for back in (False, True):
        usage, reviving = jobs.usage(tmp_path), revivals.revival(every_n_steps=4, dead_after=2)
        going = [GoBack(5, 3)] if back else []
        jobs.fit([*overrides, "trainer.max_steps=5"], 8, [usage, reviving, *going])
        assert usage.counters is not None
        found.append(reviving.revived["table0"])
        since_N = reviving.history.last_change("table0", torch.zeros(1024, dtype=torch.int32))
        assert int((since_N > 0).sum()) == found[-1]
        assert set(since_N.tolist()) == {0, 6 if back else 4}
        content = json.loads((tmp_path / "usage.json").read_text())["tables"]["table0"]
        never = 1024 - int((usage.counters.total("table0", "ever").counts_N > 0).sum())
        assert content["dead"] >= never > 0  # what was revived is dead until it is read
    assert found[0] == found[1] > 0
