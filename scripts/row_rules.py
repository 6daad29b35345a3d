"""What a row optimizer costs in quality: facts learned with Memory+ under each, at the rate that suits it best.

    python scripts/row_rules.py [--folder runs/row-rules] [--ways lazy_adam factored_adam] [--seeds 1 2 3] [--out]

Each way first seeks its `optim.table_lr_factor` on other facts, by the validation loss: from its start in steps of two,
as long as that helps. Then it learns the facts of `data.seed=0` at that rate with each seed. A run that is finished in
FOLDER is used again, so that the script can be stopped and continued. One thread per run, about two minutes each.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

#: Overrides of each way, and the factor with which its search begins.
WAYS: dict[str, tuple[list[str], float]] = {
    "lazy_adam": (["table/optimizer=lazy_adam"], 4),
    "factored_adam": (["table/optimizer=factored_adam"], 4),
    "lazy_adam_by_row": (["table/optimizer=lazy_adam", "table.optimizer.bias_correction=row"], 16),
    "row_adagrad": (["table/optimizer=row_adagrad"], 16),
}
#: About 1,400 facts, each shown 36 times, in a table of 16,384 rows of 64 values.
SETTING = [
    "ffn=memory_plus", "model.memory={n_keys: 128, heads: 2, knn: 8, key_dim: 32}", "data.global_batch_size=48",
    "data.people=400", "data.countries=30", "data.cities=120",
    "data.control_subjects=50", "trainer.max_steps=240", "trainer.val_check_interval=240",
    "logger=none", "~callbacks.progress_bar", "~callbacks.samples",
]  # fmt: skip
TUNING = ["seed=11", "data.seed=11"]
METRICS = ("recall_seen", "recall_paraphrase", "recall_question", "bits_paraphrase", "perplexity")
_MOST_STEPS = 4


def run(folder: Path, name: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Trains, unless the run is finished, and returns its `run.json`."""
    path = folder / name
    record = path / "run.json"
    if not record.exists() or json.loads(record.read_text())["status"] != "finished":
        line = [sys.executable, "-m", "pkm_lightning", "fit", f"run_dir={path}", *SETTING, *overrides]
        done = subprocess.run(line, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(line)}\n{done.stdout}{done.stderr}")
    content: dict[str, Any] = json.loads(record.read_text())
    return content


def figures(way: str, purpose: str, seed: int, factor: float, record: dict[str, Any]) -> dict[str, Any]:
    """Returns a line of the CSV file."""
    metrics = {name: f"{record['metrics'][f'test/{name}']:.4f}" for name in METRICS}
    return {
        "date": datetime.date.today().isoformat(), "way": way, "purpose": purpose, "seed": seed,
        "factor": f"{factor:g}", "loss": f"{record['best_validation']['loss']:.5f}", **metrics,
        "facts": record["facts"], "tokens": record["tokens"], "tokens_per_second": f"{record['tokens_per_second']:.0f}",
        "device": record["device"], "commit": record["commit"][:10],
    }  # fmt: skip


def tuned(folder: Path, way: str) -> Iterator[tuple[float, dict[str, Any]]]:
    """Yields factors and the records of their runs, the best last."""
    overrides, start = WAYS[way]

    def tried(factor: float) -> tuple[float, dict[str, Any]]:
        named = [*overrides, f"optim.table_lr_factor={factor:g}", *TUNING]
        return factor, run(folder, f"{way}-tuning-{factor:g}", named)

    def loss(trial: tuple[float, dict[str, Any]]) -> float:
        return float(trial[1]["best_validation"]["loss"])

    best = tried(start)
    for step in (2.0, 0.5):
        for _ in range(_MOST_STEPS):
            trial = tried(best[0] * step)
            if loss(trial) >= loss(best):
                yield trial
                break
            yield best
            best = trial
        if best[0] > start:  # it helped to go up, so down is known to be worse
            break
    yield best


def lines(folder: Path, way: str, seeds: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Yields the lines of one way: those of its search, then one per seed."""
    overrides, factor = WAYS[way]
    # The last one is the best.
    for factor, record in tuned(folder, way):
        yield figures(way, "tuning", 11, factor, record)
    for seed in seeds:
        named = [*overrides, f"optim.table_lr_factor={factor:g}", f"seed={seed}"]
        yield figures(way, "result", seed, factor, run(folder, f"{way}-{seed}", named))


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains, prints each line and, with `--out`, writes scripts/results/DATE-row-rules.csv after each run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("runs/row-rules"), help="for runs")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--out", type=Path, nargs="?", const=Path("scripts/results"), help="folder of the CSV file")
    parsed = parser.parse_args(arguments)
    written: list[dict[str, Any]] = []
    for way in parsed.ways:
        for line in lines(parsed.folder, way, parsed.seeds):
            written.append(line)
            print(line, flush=True)
            if parsed.out:
                path = parsed.out / f"{datetime.date.today().isoformat()}-row-rules.csv"
                with path.open("w", newline="") as file:
                    writer = csv.DictWriter(file, written[0])
                    writer.writeheader()
                    writer.writerows(written)
        losses = [float(line["loss"]) for line in written if line["way"] == way and line["purpose"] == "result"]
        if losses:
            print(f"{way}: loss {statistics.mean(losses):.5f} ({min(losses):.5f} to {max(losses):.5f})", flush=True)


if __name__ == "__main__":
    main()
