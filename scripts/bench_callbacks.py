"""The share of a training step that observing callbacks take: the default ones together, and each alone.

The same run with and without them, in one process, round by round; validation and recall are off. Prints one line per
way; `--out FILE.csv` appends the rounds with versions and date.

    python scripts/bench_callbacks.py --steps 200 --rounds 7
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from bench_trainer_overhead import append, configuration, through_trainer

from pkm_lightning.build.run import resolve

# Callbacks that every run needs; all others only observe.
_NEEDED = ("metrics_csv", "step_checkpoint", "progress_bar")


def ways(config: dict[str, Any], each: bool) -> dict[str, list[str]]:
    """Returns the names of the observing callbacks of each way.

    Args:
        config: the composed configuration.
        each: whether to add one way per callback.
    """
    observers = [name for name in config["callbacks"] if name not in _NEEDED]
    together = {"none": [], "all": observers}
    return together | {name: [name] for name in observers} if each else together


def with_callbacks(config: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """Returns `config` with these and the needed callbacks, in its own order."""
    callbacks = {name: value for name, value in config["callbacks"].items() if name in (*names, *_NEEDED)}
    # Limits are on figures that `diagnostics` logs: alone, `instability` would refuse them.
    if "instability" in callbacks and "diagnostics" not in callbacks:
        callbacks["instability"] = {**callbacks["instability"], "limits": None}
    return {**config, "callbacks": callbacks}


def main() -> None:
    """Runs the rounds, prints and, with `--out`, appends them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--each", action="store_true", help="also every callback alone")
    parser.add_argument("--out", type=Path)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    seconds: dict[str, list[float]] = {}
    for number in range(arguments.rounds + 1):
        with tempfile.TemporaryDirectory() as run_dir:
            run = resolve(configuration(arguments.overrides, arguments.steps, run_dir))
            run.data.prepare_data()
            # Every other round runs in reverse, so that no way always comes first.
            order = list(ways(run.config, arguments.each).items())
            for name, callbacks in order if number % 2 else reversed(order):
                run.data.setup("fit")
                watched = resolve(with_callbacks(run.config, callbacks), training=True)
                seconds_per_step = through_trainer(watched, run.data)
                if number:  # the first round warms up
                    seconds.setdefault(name, []).append(seconds_per_step)
    base = statistics.median(seconds["none"])
    for name, values in seconds.items():
        ratios = sorted(value / none for value, none in zip(values, seconds["none"], strict=True))
        middle = statistics.median(values)
        print(
            f"{name:12} {middle * 1e3:8.2f} ms per step, {middle / base:.3f} of none (medians; by rounds "
            f"{ratios[0]:.3f} to {ratios[-1]:.3f}, median {statistics.median(ratios):.3f})"
        )
    if arguments.out:
        rows = [[name, n, f"{v:.6f}"] for name, values in seconds.items() for n, v in enumerate(values, start=1)]
        append(arguments.out, ["callbacks", "round", "seconds_a_step"], rows, arguments.steps)


if __name__ == "__main__":
    main()
