"""Short runs before those that are reported."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from pkm_lightning.compare.budget import warm_up
from pkm_lightning.compare.processes import Processes, RunEnd
from pkm_lightning.compare.schedule import ScheduledRun, Variant


class Seen(Processes):
    """Runs nothing and knows what it should have run."""

    def __init__(self) -> None:
        super().__init__(flags=[], logs=Path("logs"), jobs=1, ranks=1, resume="auto")
        self.runs: list[ScheduledRun] = []

    def run(self, planned: Sequence[ScheduledRun], tick: Callable[[list[ScheduledRun]], None]) -> Iterator[RunEnd]:  # type: ignore[override]
        self.runs += planned
        yield from ()


@pytest.mark.parametrize("callbacks", [{"recall": {"val_items": 64}}, {"diagnostics": {}}, None])
def test_an_arm_is_warmed_up_without_a_long_test(tmp_path: Path, callbacks: dict[str, Any] | None) -> None:
    seen, config = Seen(), {"trainer": {"accumulate_grad_batches": 1}, "callbacks": callbacks}
    warm_up([Variant("a", ("ffn=dense", "trainer.max_steps=900"))], {"a": config}, ["data.people=60"], tmp_path, seen)
    (run,) = seen.runs
    assert {"data.people=60", "ffn=dense", "trainer.max_steps=2", "++trainer.limit_test_batches=1"} <= set(
        run.overrides
    )
    assert "trainer.max_steps=900" not in run.overrides
    assert ("~callbacks.recall" in run.overrides) is (callbacks is not None and "recall" in callbacks)
