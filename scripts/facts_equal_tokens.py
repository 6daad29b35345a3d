"""Dense and Memory+ on the same facts in the same tokens: runs what is missing and writes the table.

    python scripts/facts_equal_tokens.py --out scripts/results/DATE-facts-equal-tokens --seeds 1 2 3

Each run is `python -m pkm_lightning fit ffn=... seed=...` with the given overrides; finished runs are kept, so the
script may be stopped and started. `runs.csv` has every run, `report.md` mean, spread and the commands.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

FIGURES = {
    "recall, held-out paraphrases": lambda r: r["metrics"]["recall"]["paraphrase"]["recall"],
    "recall, statements seen": lambda r: r["metrics"]["recall"]["seen"]["recall"],
    "recall, questions": lambda r: r["metrics"]["recall"]["question"]["recall"],
    "recall, never trained": lambda r: r["metrics"]["recall"]["control"]["recall"],
    "bits a fact": lambda r: r["metrics"]["recall"]["paraphrase"]["bits"],
    "perplexity": lambda r: r["metrics"]["test/perplexity"],
    "tokens": lambda r: r["tokens"],
    "training seconds": lambda r: r["seconds"]["train"],
    "trunk FLOPs a token": lambda r: r["flops_per_token"]["trunk"]["decode"],
    "model FLOPs a token": lambda r: r["flops_per_token"]["decode"],
    "parameters": lambda r: r["params"]["total"],
    "active parameters": lambda r: r["params"]["active"],
}


def main() -> None:
    """Runs and reports."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="folder of runs.csv and report.md")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/facts-equal-tokens"), help="folder of the run directories"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--arm", action="append", nargs="+", help="name and overrides of an arm; repeatable")
    arguments = parser.parse_args()
    arms = {arm[0]: arm[1:] for arm in arguments.arm or [["dense", "ffn=dense"], ["memory_plus", "ffn=memory_plus"]]}
    records: dict[str, list[dict[str, Any]]] = {name: [] for name in arms}
    for seed in arguments.seeds:
        for name, overrides in arms.items():
            records[name].append(run(arguments.runs / f"{name}-{seed}", [*overrides, f"seed={seed}"]))
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_csv(arguments.out / "runs.csv", records)
    (arguments.out / "report.md").write_text(report(records, arms, arguments.seeds))
    print(report(records, arms, arguments.seeds))


def run(run_dir: Path, overrides: list[str]) -> dict[str, Any]:
    """The record of a run, started or continued if it has not finished."""
    file = run_dir / "run.json"
    if not file.exists() or json.loads(file.read_text())["status"] != "finished":
        command = [sys.executable, "-m", "pkm_lightning", "fit", *overrides, f"run_dir={run_dir}"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    content: dict[str, Any] = json.loads(file.read_text())
    return content


def write_csv(path: Path, records: dict[str, list[dict[str, Any]]]) -> None:
    """A row a run."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["arm", "seed", *FIGURES, "device", "threads", "torch", "commit", "started"])
        for name, of_arm in records.items():
            for r in of_arm:
                about = [r["device"], r["threads"], r["versions"]["torch"], r["commit"], r["started"]]
                writer.writerow([name, r["seed"], *(figure(r) for figure in FIGURES.values()), *about])


def report(records: dict[str, list[dict[str, Any]]], arms: dict[str, list[str]], seeds: list[int]) -> str:
    """Markdown: mean over seeds with the least and the greatest value."""
    lines = ["| figure | " + " | ".join(records) + " |", "|---|" + "---|" * len(records)]
    for label, figure in FIGURES.items():
        cells = [spread([figure(r) for r in of_arm]) for of_arm in records.values()]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    lines += ["", f"Seeds {', '.join(map(str, seeds))}: mean (least to greatest).", "", "Commands:", ""]
    lines += [f"    python -m pkm_lightning fit {' '.join(overrides)} seed=SEED" for overrides in arms.values()]
    return "\n".join(lines) + "\n"


def spread(values: list[float]) -> str:
    """`mean (least to greatest)`, or the one value that all share."""
    if len(set(values)) == 1:
        return f"{values[0]:,}" if isinstance(values[0], int) else f"{values[0]:.3f}"
    digits = 0 if max(values) > 1000 else 1 if max(values) > 20 else 3
    return f"{statistics.mean(values):,.{digits}f} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


if __name__ == "__main__":
    main()
