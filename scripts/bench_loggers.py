"""The share of a training step that each logger takes, offline, with the default callbacks.

The same run with each of them, in one process, round by round; validations, and so panels, are off. Prints per logger
the seconds of the clock and of this process's CPU per step (Weights & Biases has a process of its own besides);
`--out FILE.csv` appends the rounds with versions and date.

    python scripts/bench_loggers.py --steps 200 --rounds 7
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from bench_trainer_overhead import append, configuration, through_trainer

from pkm_lightning.build.run import resolve

_WAYS = {
    "none": ["logger=none"],
    "tensorboard": ["logger=tensorboard"],
    "wandb": ["logger=wandb", "logger.wandb.offline=true"],
    "mlflow": ["logger=mlflow"],
}


class Cost(NamedTuple):
    """Seconds per step."""

    clock: float
    cpu: float


def measure(overrides: list[str], steps: int) -> Cost:
    """Trains once; the CPU time includes that of building the model and of starting and ending the logger."""
    with tempfile.TemporaryDirectory() as run_dir:
        run = resolve(configuration(overrides, steps, run_dir), training=True)
        run.data.prepare_data()
        run.data.setup("fit")
        began = time.process_time()
        clock = through_trainer(run, run.data)
        return Cost(clock, (time.process_time() - began) / steps)


def main() -> None:
    """Runs the rounds, prints and, with `--out`, appends them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    costs: dict[str, list[Cost]] = {name: [] for name in _WAYS}
    for number in range(arguments.rounds + 1):
        # Every other round runs in reverse, so that no way always comes first.
        for name, way in list(_WAYS.items()) if number % 2 else reversed(_WAYS.items()):
            cost = measure([*arguments.overrides, *way], arguments.steps)
            if number:  # the first round warms up
                costs[name].append(cost)
    for name, measured in costs.items():
        ratios = [statistics.median(a[i] / b[i] for a, b in zip(measured, costs["none"], strict=True)) for i in (0, 1)]
        clock, cpu = (statistics.median(cost[i] for cost in measured) * 1e3 for i in (0, 1))
        print(
            f"{name:12} {clock:8.2f} ms per step by the clock, {cpu:8.2f} ms of CPU; of none {ratios[0]:.3f}, "
            f"{ratios[1]:.3f} (medians of the rounds' ratios)"
        )
    if arguments.out:
        rows = [[name, n, f"{c.clock:.6f}", f"{c.cpu:.6f}"] for name in costs for n, c in enumerate(costs[name], 1)]
        append(arguments.out, ["logger", "round", "seconds_per_step", "cpu_seconds_per_step"], rows, arguments.steps)


if __name__ == "__main__":
    main()
