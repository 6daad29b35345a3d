"""How much of a training step the callbacks that watch take: the default ones together, and each by itself.

The same run with and without them, in one process, a round after the other; validation and recall are off. Prints a
line a way; `--out FILE.csv` appends the rounds with versions and date.

    python scripts/bench_callbacks.py --steps 200 --rounds 7
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from bench_trainer_overhead import append, configuration, through_trainer

from pkm_lightning.cli.assembly import complete

#: What a run needs to be a run; all others only watch.
_NEEDED = ("metrics_csv", "step_checkpoint", "progress_bar")


def ways(config: dict[str, Any], each: bool) -> dict[str, list[str]]:
    """The callbacks of each way."""
    watching = [name for name in config["callbacks"] if name not in _NEEDED]
    found = {"none": [], "all": watching}
    return found | {name: [name] for name in watching} if each else found


def with_callbacks(config: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """`config` with these and the needed callbacks, in its own order."""
    kept = {name: value for name, value in config["callbacks"].items() if name in (*names, *_NEEDED)}
    if "instability" in kept and "diagnostics" not in kept:
        kept["instability"] = {**kept["instability"], "limits": None}
    return {**config, "callbacks": kept}


def main() -> None:
    """Runs the rounds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--each", action="store_true", help="also every callback by itself")
    parser.add_argument("--out", type=Path)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    seconds: dict[str, list[float]] = {}
    for number in range(arguments.rounds + 1):
        with tempfile.TemporaryDirectory() as run_dir:
            config, data = complete(configuration(arguments.overrides, arguments.steps, run_dir))
            data.prepare_data()
            order = list(ways(config, arguments.each).items())
            for name, callbacks in order if number % 2 else reversed(order):
                data.setup("fit")
                taken = through_trainer(with_callbacks(config, callbacks), data)
                if number:  # the first round warms up
                    seconds.setdefault(name, []).append(taken)
    usual = statistics.median(seconds["none"])
    for name, values in seconds.items():
        ratios = sorted(value / none for value, none in zip(values, seconds["none"], strict=True))
        middle = statistics.median(values)
        print(
            f"{name:12} {middle * 1e3:8.2f} ms a step, {middle / usual:.3f} of none (medians; by rounds "
            f"{ratios[0]:.3f} to {ratios[-1]:.3f}, median {statistics.median(ratios):.3f})"
        )
    if arguments.out:
        found = [[name, n, f"{v:.6f}"] for name, values in seconds.items() for n, v in enumerate(values, start=1)]
        append(arguments.out, ["callbacks", "round", "seconds_a_step"], found, arguments.steps)


if __name__ == "__main__":
    main()
