"""Stands for `fit` in tests of what a comparison does with its runs: each run ends at once, in this process.

The file fates.json of the working directory decides the end of runs, by a part of their directories' paths: a test
loss, "killed", "failed" or "diverged". Without it the loss is best at a learning rate of 6e-3.
"""

from __future__ import annotations

import json
import math
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from run_folders import FakeRun

from pkm_lightning.compare.processes import Processes, RunEnd
from pkm_lightning.compare.schedule import ScheduledRun

FFNS = {"dense": "Dense", "moe": "MoE", "memory_plus": "MemoryPlus"}
_FIELDS: dict[Any, dict[str, Any]] = {
    "killed": {"status": "running"},
    "failed": {"status": "failed", "reason": "no luck", "throughput": None},
    "diverged": {"metrics": {"test/loss": None}, "objective": {"value": None}},
}


def run_fakes(
    self: Processes, runs: Sequence[ScheduledRun], tick: Callable[[list[ScheduledRun]], None]
) -> Iterator[RunEnd]:
    """Replaces `Processes.run`."""
    for run in runs:
        tick([run])
        yield _end(run)


def _end(run: ScheduledRun) -> RunEnd:
    """Writes the run's directory and returns its end."""
    values = dict(override.split("=", 1) for override in run.overrides if "=" in override)
    fates = json.loads(Path("fates.json").read_text()) if Path("fates.json").exists() else {}
    fate = next((fate for part, fate in fates.items() if part in str(run.folder)), None)
    rate, steps = float(values.get("optim.lr", 0.006)), int(values.get("trainer.max_steps", 100))
    loss = fate if isinstance(fate, float) else 1 + abs(math.log(rate / 0.006))
    record = {"metrics": {"test/loss": loss}, "throughput": {"steps_per_sec": 50.0}, **_FIELDS.get(fate, {})}
    objective = {"name": values.get("objective"), "mode": "min", "value": loss, "step": steps}
    record["objective"] = {**objective, **record.get("objective", {})}
    shutil.rmtree(run.folder, ignore_errors=True)
    config = {"optim": {"lr": rate}, "trainer": {"max_steps": steps}}
    fake = FakeRun("", run.seed, ffn=FFNS[values["ffn"]], config=config, record=record, n_facts=10)
    fake.write(run.folder.parent, run.folder.name)
    if fate == "killed":
        return RunEnd(run, -signal.SIGKILL, "")
    return RunEnd(run, int(fate == "failed"), "error: failed" if fate == "failed" else "done")
