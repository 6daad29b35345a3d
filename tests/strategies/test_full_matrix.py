"""Every strategy, number of ranks, shard, way of learning and FFN against one process: 170 runs of 30 steps.

`RANKS_MATRIX=FILE.csv pytest -m slow tests/strategies/test_full_matrix.py` writes one line per case; started again, it
skips the cases in the file.
"""

from __future__ import annotations

import csv
import functools
import itertools
import os
from pathlib import Path

import distributed_jobs as jobs
import pytest
from rank_group import Groups
from tolerances import RANKS

STRATEGIES = ("ddp", "fsdp", "deepspeed_1", "deepspeed_2", "deepspeed_3")
SPLIT = [
    f"ffn={ffn} table.shard={shard} table.learning={learning}"
    for ffn, learning, shard in itertools.product(
        ("memory_plus", "peer", "ultramem", "engram ffn.end_id=0 ffn.gate=no_root"), ("rows", "dense"), ("dim", "row")
    )
]
BY_TOKEN = [f"ffn={ffn} table.shard={shard}" for ffn, shard in itertools.product(("ple", "stem"), ("dim", "row"))]
CASES = list(itertools.product((2, 4), [*SPLIT, *BY_TOKEN, "ffn=moe"], STRATEGIES))


@functools.cache
def alone(overrides: str) -> list[dict[str, float]]:
    kept = [o for o in overrides.split() if not o.startswith("table.shard")]
    return jobs.train(["strategy=single", *kept])


def done(file: Path) -> set[tuple[str, ...]]:
    if not file.exists():
        return set()
    with file.open(newline="") as lines:
        return {(row["ranks"], row["overrides"], row["strategy"]) for row in csv.DictReader(lines)}


def write(file: Path, row: dict[str, object]) -> None:
    new = not file.exists()
    with file.open("a", newline="") as lines:
        writer = csv.DictWriter(lines, row, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(row)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "overrides", "strategy"), CASES)
def test_losses_are_those_of_one_process(ranks: Groups, size: int, overrides: str, strategy: str) -> None:
    file = Path(os.environ["RANKS_MATRIX"]) if "RANKS_MATRIX" in os.environ else None
    if file is not None and (str(size), overrides, strategy) in done(file):
        pytest.skip("the case is in the file")
    expected = [step["train/loss"] for step in alone(overrides)]
    found = ranks(size).run(jobs.train, [f"strategy={strategy}", *overrides.split()])
    losses = [[step["train/loss"] for step in of_rank] for of_rank in found]
    worst = max(abs(a - b) / b for of_rank in losses for a, b in zip(of_rank, expected, strict=True))
    if file is not None:
        row = {"ranks": size, "overrides": overrides, "strategy": strategy, "steps": len(expected)}
        write(
            file,
            {**row, "first_loss": expected[0], "last_loss": expected[-1], "largest_relative_error": f"{worst:.2e}"},
        )
    assert worst < RANKS["loss"]
