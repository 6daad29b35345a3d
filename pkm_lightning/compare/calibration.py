"""How fast each arm trains, from a short run of its own: `budget.seconds` has to become a number of steps.

The schedule of the learning rate spans a run, so its length must be known before it starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median

from pkm_lightning.compare.plan import Arm, PlannedRun, last_of_each
from pkm_lightning.compare.processes import Processes
from pkm_lightning.compare.run_state import read_record
from pkm_lightning.errors import RunDirectoryError

#: Steps of a short run, and of the part at its end that counts: caches and kernels warm up before.
STEPS, MEASURED = 150, 50
#: Short runs of each arm; the middle one counts.
REPEATS = 3


def measured_speeds(arms: Sequence[Arm], base: Sequence[str], out: Path, processes: Processes) -> dict[str, float]:
    """Optimizer steps a second of each arm: the middle of `REPEATS` runs, those of all arms in turn.

    Raises:
        RunDirectoryError: a run failed.
    """
    speeds: dict[str, list[float]] = {arm.name: [] for arm in arms}
    planned = [_planned(arm, base, out, repeat) for repeat in range(REPEATS) for arm in arms]
    for end in processes.run(planned, lambda _: None):
        rate = ((read_record(end.run.folder).get("throughput")) or {}).get("steps_per_sec")
        if not rate:
            raise RunDirectoryError(
                f"the speed of {end.run.arm} could not be measured (exit code {end.exit_code}: {end.last_line}); "
                "callbacks.throughput must be on for budget.seconds."
            )
        speeds[end.run.arm].append(float(rate))
    return {name: median(rates) for name, rates in speeds.items()}


def _planned(arm: Arm, base: Sequence[str], out: Path, repeat: int) -> PlannedRun:
    short = (
        f"trainer.max_steps={STEPS}",
        f"trainer.val_check_interval={STEPS}",
        f"trainer.log_every_n_steps={MEASURED}",
        "seed=0",
    )
    folder = out / "speed" / arm.name / f"try-{repeat + 1}"
    return PlannedRun(arm.name, 0, None, last_of_each((*base, *arm.overrides, *short)), folder)
