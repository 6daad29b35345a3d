"""Short runs before those that are reported: to compile kernels, and to see how fast each arm trains.

`budget.seconds` has to become a number of steps: the schedule of the learning rate spans a run, so its length must be
known before it starts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from pkm_lightning.compare.overrides import last_of_each
from pkm_lightning.compare.plan import Arm, PlannedRun, with_steps
from pkm_lightning.compare.processes import Processes
from pkm_lightning.compare.run_state import read_record

#: Steps of a short run, and of the part at its end that counts: caches and kernels warm up before.
STEPS, MEASURED = 150, 50
#: Short runs of each arm; the middle one counts.
REPEATS = 3


def measured_speeds(
    arms: Sequence[Arm], configs: Mapping[str, dict[str, Any]], base: Sequence[str], out: Path, processes: Processes
) -> tuple[dict[str, float], dict[str, str]]:
    """Optimizer steps a second of each arm, the middle of `REPEATS` runs in turn with the others; why some failed.

    An arm's first run warms up what the others find compiled.
    """
    speeds: dict[str, list[float]] = {arm.name: [] for arm in arms}
    failed: dict[str, str] = {}
    for repeat in range(REPEATS):
        left = [arm for arm in arms if arm.name not in failed]
        planned = [_short(arm, configs[arm.name], base, out, f"try-{repeat + 1}", STEPS) for arm in left]
        said = {end.run.arm: end.words for end in processes.run(processes.to_start(planned), lambda _: None)}
        for run in planned:
            record = read_record(run.folder)
            rate = (record.get("throughput") or {}).get("steps_per_sec")
            if rate:
                speeds[run.arm].append(float(rate))
            else:
                words = record.get("reason") or said.get(run.arm, "")
                failed[run.arm] = f"its speed is not known, callbacks.throughput may be off: {words}"
    return {name: median(rates) for name, rates in speeds.items() if name not in failed}, failed


def warm_up(
    arms: Sequence[Arm], configs: Mapping[str, dict[str, Any]], base: Sequence[str], out: Path, processes: Processes
) -> None:
    """Two steps of each arm that has not been run, which compile its kernels; what fails here fails again."""
    new = [arm for arm in arms if not (out / "runs" / arm.name).exists()]
    planned = [_short(arm, configs[arm.name], base, out, "warm-up", 2) for arm in new]
    for _ in processes.run(processes.to_start(planned), lambda _: None):
        pass


def _short(arm: Arm, config: Mapping[str, Any], base: Sequence[str], out: Path, name: str, steps: int) -> PlannedRun:
    """A run of `steps` steps that asks no questions: the test of an untrained model takes minutes."""
    short = with_steps(arm, steps, 1, config["trainer"]["accumulate_grad_batches"])
    own = [f"trainer.log_every_n_steps={min(MEASURED, steps)}", "seed=0"]
    own += [f"++trainer.limit_{part}_batches=1" for part in ("val", "test")]
    own += ["~callbacks.recall"] * ("recall" in (config["callbacks"] or {}))
    return PlannedRun(arm.name, 0, None, last_of_each((*base, *short.overrides, *own)), out / "speed" / arm.name / name)
