"""What the first command of the README takes and leaves: one row of CSV per seed of `fit` with its defaults.

The row has the seconds of the whole process by the clock and by the processors, those of training, peak memory, the
figures of the test, and the slots that were read. The machine must be idle. `--cold` gives each run an empty cache of
numba, as on a machine where the package has never run.

    python scripts/measure_first_run.py --seeds 1 2 3 --out first-run.csv [--cold] [-- ffn=dense]
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

#: Of `usage.json`, over the whole training.
USAGE = ("used_percent", "kl_count", "kl_weight", "top90")


def measure(seed: int, overrides: list[str], folder: Path, cold: bool) -> dict[str, object]:
    """Runs `fit` in a process of its own and returns its row."""
    run = folder / f"seed-{seed}"
    environment = dict(os.environ)
    if cold:
        environment["NUMBA_CACHE_DIR"] = str(folder / f"numba-{seed}")
    begin = time.monotonic()
    command = [sys.executable, "-m", "pkm_lightning", "fit", f"run_dir={run}", f"seed={seed}", *overrides]
    process = subprocess.Popen(command, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - begin
    if status:
        raise SystemExit(f"{' '.join(command)} ended with {os.waitstatus_to_exitcode(status)}")
    record = json.loads((run / "run.json").read_text())
    return {
        "date": datetime.date.today().isoformat(),
        "commit": record["commit"],
        "device": record["device"],
        "torch": record["versions"]["torch"],
        "threads": record["threads"],
        "overrides": " ".join(overrides),
        "kernels": "compiled" if cold else "kept",
        "ffn": record["ffn"],
        "seed": seed,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "train_seconds": record["seconds"]["train"],
        "peak_memory_bytes": record["peak_memory_bytes"],
        "tokens": record["tokens"],
        "parameters": record["params"]["total"],
        "active_parameters": record["params"]["active"],
        "trunk_flops": record["flops_per_token"]["trunk"]["decode"],
        **{name: value for name, value in record["metrics"].items() if name.startswith("test/")},
        **dict(slot_figures(run / "usage.json")),
    }


def slot_figures(file: Path) -> Iterator[tuple[str, object]]:
    """Yields the usage of each layer's slots and of each table; nothing without a table."""
    usage: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    for name, read in {**usage.get("layers", {}), **usage.get("tables", {})}.items():
        yield f"{name} slots", read["slots"]
        yield f"{name} dead", read["dead"]
        yield from ((f"{name} {figure}", round(read["since_start"][figure], 3)) for figure in USAGE)


def main() -> None:
    """Measures as the command line asks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--out", type=Path, required=True, help="CSV file, rewritten after each run")
    parser.add_argument("--cold", action="store_true", help="compile the kernels in each run")
    parser.add_argument("overrides", nargs="*", help="of fit")
    arguments = parser.parse_args()
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in arguments.seeds:
            rows.append(measure(seed, arguments.overrides, Path(folder), arguments.cold))
            with arguments.out.open("w", newline="") as file:
                writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)


if __name__ == "__main__":
    main()
