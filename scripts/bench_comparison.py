"""The processor seconds that a comparison takes beside the training steps of its runs.

Runs `compare` on ten steps with some numbers of seeds, and counts user and system time of all its processes: a clock
would count what else the machine does. The time of the steps is that of `callbacks.processor_time`. What further seeds
add, over the number of runs that they add, is the cost of a run; the rest is that of the comparison. `--checkout DIR`
measures the package there; `--out FILE.csv` appends a row per comparison, with commit, date and versions.

    python scripts/bench_comparison.py --seeds 1 3 -- ffn=dense,memory_plus
"""

from __future__ import annotations

import argparse
import csv
import datetime
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from pkm_lightning.training.machine import cpu_name, versions

STEPS = 10
#: One validation, at the end; the training seconds of the processors as a figure of it.
COMMON = [f"trainer.max_steps={STEPS}", f"trainer.val_check_interval={STEPS}", "callbacks=[default,processor_time]"]


def compare(overrides: list[str], seeds: int, out: Path, checkout: Path) -> tuple[float, float, int]:
    """Runs a comparison; returns the processor seconds of all its processes, those of its steps, and its runs."""
    command = [sys.executable, "-m", "pkm_lightning", "compare", *overrides, *COMMON, f"seeds={seeds}", f"out={out}"]
    # `python -m` prefers the working directory to PYTHONPATH.
    process = subprocess.Popen(command, cwd=checkout, env={**os.environ, "PYTHONPATH": str(checkout)})
    # Every process waits for those that it has started, so that the usage of the last one contains all.
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} ended with {os.waitstatus_to_exitcode(status)}")
    folders = [file.parent for file in out.glob("*/*/*/run.json")]
    return usage.ru_utime + usage.ru_stime, sum(map(step_seconds, folders)), len(list(out.glob("runs/*/*/run.json")))


def step_seconds(run: Path) -> float:
    """Returns the processor seconds of a run's training."""
    with (run / "metrics.csv").open(newline="") as file:
        readings = [float(row["val/cpu_seconds"]) for row in csv.DictReader(file) if row.get("val/cpu_seconds")]
    return readings[-1] if readings else 0.0


def commit(checkout: Path) -> str:
    """Returns the short commit of a checkout, with `+` if files differ."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=checkout, capture_output=True, text=True, check=True).stdout

    return git("rev-parse", "--short", "HEAD").strip() + "+" * bool(git("status", "--porcelain", "-uno").strip())


def append(file: Path, row: Mapping[str, object]) -> None:
    """Appends a row to a CSV file."""
    is_new = not file.exists()
    with file.open("a", newline="") as opened:
        writer = csv.DictWriter(opened, list(row))
        if is_new:
            writer.writeheader()
        writer.writerow(row)


def main() -> None:
    """Runs the comparisons, prints what they took and, with `--out`, appends it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--checkout", type=Path, default=Path(__file__).parents[1])
    parser.add_argument("--out", type=Path)
    parser.add_argument("overrides", nargs="*", default=["ffn=dense,memory_plus"])
    arguments = parser.parse_args()
    measured: list[tuple[float, int]] = []
    for seeds in arguments.seeds:
        with tempfile.TemporaryDirectory() as folder:
            total, steps, runs = compare(arguments.overrides, seeds, Path(folder) / "out", arguments.checkout)
        measured.append((total - steps, runs))
        print(f"seeds={seeds}: {runs} runs, {total:.1f} s of CPU, {steps:.1f} of them training steps", flush=True)
        version = versions()
        row = {
            "date": datetime.date.today().isoformat(), "commit": commit(arguments.checkout),
            "command": " ".join(["compare", *arguments.overrides, *COMMON, f"seeds={seeds}"]), "runs": runs,
            "cpu_seconds": f"{total:.1f}", "of_steps": f"{steps:.1f}", "cpu": cpu_name(), "cores": os.cpu_count(),
            "threads": os.environ.get("OMP_NUM_THREADS", "all"), "torch": version["torch"],
        }  # fmt: skip
        if arguments.out:
            append(arguments.out, row)
    if len(measured) > 1:
        (least, fewest), (most, many) = measured[0], measured[-1]
        print(f"{(most - least) / (many - fewest):.1f} s of CPU per further run beside its steps")


if __name__ == "__main__":
    main()
