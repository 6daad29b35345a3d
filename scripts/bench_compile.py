"""The processor seconds that numba takes to compile the kernels of a run on a machine that has none of them compiled.

Runs `fit` for two steps in a process of its own with an empty cache, per configuration (one quoted list of overrides)
and checkout in turn, and sums user and system time within numba's compilations: a clock would count what else the
machine does. The time of a kernel is without that of the kernels that it calls. `--out FILE.csv` writes the medians.

    python scripts/bench_compile.py "" "ffn=engram" --checkout ../before . --rounds 3
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from bench_comparison import commit
from benchmarks.report import conditions

COMMON = ["trainer.max_steps=2", "data.eval_facts=10"]
#: Kernels that take less are only part of the sum.
_LEAST = 0.1  # seconds


def measure(out: str, overrides: list[str]) -> None:
    """Runs `fit` in this process and writes the seconds of each kernel, by module and name, to the file `out`."""
    from numba.core import event

    seconds: Counter[str] = Counter()
    # Name, beginning and the seconds of what is compiled within it.
    running: list[tuple[str, float, list[float]]] = []

    class Compilations(event.Listener):  # type: ignore[misc]
        def on_start(self, event: Any) -> None:
            function = event.data["dispatcher"].py_func
            module = function.__module__ if function.__module__.startswith("pkm_lightning.") else "numba"
            name = f"{module.removeprefix('pkm_lightning.ops.')}.{function.__name__}" if module != "numba" else module
            running.append((name, time.process_time(), []))

        def on_end(self, event: Any) -> None:
            name, began, inner = running.pop()
            passed = time.process_time() - began
            seconds[name] += passed - sum(inner)
            if running:
                running[-1][2].append(passed)

    event.register("numba:compile", Compilations())
    from pkm_lightning.cli.main import main as command

    try:
        command(["fit", *COMMON, *overrides])
    except SystemExit as end:
        if end.code:
            raise
    Path(out).write_text(json.dumps(seconds), encoding="utf-8")


def compile_seconds(checkout: Path, overrides: str) -> dict[str, float]:
    """Returns the seconds by kernel of the package in a checkout."""
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/seconds.json"
        command = [sys.executable, __file__, "--measure", out, *overrides.split(), f"run_dir={folder}/run"]
        scripts = str(Path(__file__).parent)
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(checkout.resolve()), scripts]),
            "NUMBA_CACHE_DIR": f"{folder}/cache",
        }
        subprocess.run(command, cwd=checkout, env=environment, stdout=subprocess.DEVNULL, check=True)
        seconds: dict[str, float] = json.loads(Path(out).read_text(encoding="utf-8"))
        return seconds


def main() -> None:
    """Runs all rounds, prints and, with `--out`, writes their medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("overrides", nargs="*", default=[""])
    parser.add_argument("--checkout", nargs="+", type=Path, default=[Path(__file__).parents[1]])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rounds: dict[tuple[str, str], list[dict[str, float]]] = {}
    for _ in range(arguments.rounds):
        for overrides in arguments.overrides:
            for checkout in arguments.checkout:
                seconds = compile_seconds(checkout, overrides)
                rounds.setdefault((overrides, commit(checkout)), []).append(seconds)
                print(f"{commit(checkout)} {overrides or 'defaults'}: {sum(seconds.values()):.1f} s", flush=True)
    lines = []
    for (overrides, checkout), results in rounds.items():
        all_kernels = statistics.median(sum(result.values()) for result in results)
        lines.append([overrides or "defaults", checkout, "all", f"{all_kernels:.1f}"])
        medians = {name: statistics.median(result.get(name, 0.0) for result in results) for name in results[0]}
        for name, median in sorted(medians.items(), key=lambda item: -item[1]):
            if median >= _LEAST:
                lines.append([overrides or "defaults", checkout, name, f"{median:.2f}"])
    print(*(f"{line[3]:>6} s  {line[1]}  {line[0]}  {line[2]}" for line in lines if line[2] == "all"), sep="\n")
    if arguments.out:
        facts = {name: value for name, value in conditions(torch.device("cpu")).items() if name != "commit"}
        with arguments.out.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["overrides", "checkout", "kernel", "cpu_seconds", "rounds", *facts])
            writer.writerows([*line, arguments.rounds, *facts.values()] for line in lines)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(sys.argv[2], sys.argv[3:])
    else:
        main()
