"""Short runs before those that are reported: to compile kernels, and to see how fast each arm trains.

`budget.seconds` has to become a number of steps: the schedule of the learning rate spans a run, so its length must be
known before it starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median

from pkm_lightning.compare.plan import Arm, PlannedRun, last_of_each
from pkm_lightning.compare.processes import Processes
from pkm_lightning.compare.run_state import read_record

#: Steps of a short run, and of the part at its end that counts: caches and kernels warm up before.
STEPS, MEASURED = 150, 50
#: Short runs of each arm; the middle one counts.
REPEATS = 3


def measured_speeds(
    arms: Sequence[Arm], base: Sequence[str], out: Path, processes: Processes
) -> tuple[dict[str, float], dict[str, str]]:
    """Optimizer steps a second of each arm, the middle of `REPEATS` runs in turn with the others; why some failed.

    An arm's first run warms up what the others find compiled.
    """
    speeds: dict[str, list[float]] = {arm.name: [] for arm in arms}
    failed: dict[str, str] = {}
    for repeat in range(REPEATS):
        planned = [_short(arm, base, out, f"try-{repeat + 1}", STEPS) for arm in arms if arm.name not in failed]
        for end in processes.run(planned, lambda _: None):
            rate = ((read_record(end.run.folder).get("throughput")) or {}).get("steps_per_sec")
            if rate:
                speeds[end.run.arm].append(float(rate))
            else:
                failed[end.run.arm] = f"its speed is not known, callbacks.throughput may be off: {end.words}"
    return {name: median(rates) for name, rates in speeds.items() if name not in failed}, failed


def warm_up(arms: Sequence[Arm], base: Sequence[str], out: Path, processes: Processes) -> None:
    """Two steps of each arm that has not been run, which compile its kernels; what fails here fails again."""
    new = [arm for arm in arms if not (out / "runs" / arm.name).exists() and not (out / "speed" / arm.name).exists()]
    for _ in processes.run([_short(arm, base, out, "warm-up", 2) for arm in new], lambda _: None):
        pass


def _short(arm: Arm, base: Sequence[str], out: Path, name: str, steps: int) -> PlannedRun:
    own = (
        f"trainer.max_steps={steps}",
        f"trainer.val_check_interval={steps}",
        f"trainer.log_every_n_steps={min(MEASURED, steps)}",
        "seed=0",
    )
    return PlannedRun(arm.name, 0, None, last_of_each((*base, *arm.overrides, *own)), out / "speed" / arm.name / name)
